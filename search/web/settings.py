"""Settings of the web service."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from orbithash.encoders.errors import InputError
from orbithash.search.client.connection import Tls
from orbithash.search.protocol.address import is_loopback, parse_address

__all__ = ["DEFAULT_LISTEN", "Rate", "WebLimits", "WebSettings"]

DEFAULT_LISTEN = "127.0.0.1:8080"


@dataclass(frozen=True)
class Rate:
    """Requests that a client may make: `burst` at once, and `per_s` a second after that."""

    per_s: float
    burst: int


@dataclass(frozen=True)
class WebLimits:
    """What clients can use of the web service.

    Attributes:
        max_upload_bytes: size of an uploaded image.
        max_call_bytes: size of a request of the JSON door, where base64 makes an image a third larger.
        max_bytes: size of all bodies in progress; more are refused.
        max_header_bytes: size of the request line and the headers.
        max_requests: requests in progress; more are refused.
        max_connections: open connections; more are closed.
        max_clients: tokens with an open connection to the gateway.
        header_timeout_s: time for the headers of a request to arrive, in seconds.
        body_timeout_s: time for the body of a request to arrive, in seconds.
        idle_client_s: time after which the connection of a token that is not used is closed, in seconds.
        rates: requests of each kind that one client may make.
    """

    max_upload_bytes: int = 10 * 2**20
    max_call_bytes: int = 15 * 2**20
    max_bytes: int = 128 * 2**20
    max_header_bytes: int = 64 * 2**10
    max_requests: int = 128
    max_connections: int = 512
    max_clients: int = 256
    header_timeout_s: float = 10.0
    body_timeout_s: float = 30.0
    idle_client_s: float = 600.0
    rates: Mapping[str, Rate] = field(
        default_factory=lambda: {
            "searches": Rate(50.0, 200),
            "uploads": Rate(2.0, 20),
            "exports": Rate(0.5, 10),
            "logins": Rate(0.5, 20),
        }
    )


@dataclass(frozen=True)
class WebSettings:
    """Where the web service listens and which gateway it asks.

    Attributes:
        gateway: HOST:PORT of the gateway.
        listen: HOST:PORT to listen on; port 0 takes a free one.
        gateway_tls: files of the encrypted connection to the gateway; None: it is not encrypted.
        gateway_name: name in the certificate of the gateway; None: that of its address.
        certificate, key: files in PEM for HTTPS; None: HTTP.
        hosts: names under which browsers reach the service, besides localhost and IP addresses.
        insecure_listen: let other machines connect without HTTPS and tokens.
        base_map: template of the addresses of map tiles with {z}, {x} and {y}; None: the built-in map only.
        limits: what clients can use.
    """

    gateway: str
    listen: str = DEFAULT_LISTEN
    gateway_tls: Tls | None = None
    gateway_name: str | None = None
    certificate: Path | None = None
    key: Path | None = None
    hosts: tuple[str, ...] = ()
    insecure_listen: bool = False
    base_map: str | None = None
    limits: WebLimits = field(default_factory=WebLimits)

    def check(self) -> None:
        """Raise `InputError` for values that are not allowed."""
        parse_address(self.gateway)
        parse_address(self.listen)
        if (self.certificate is None) != (self.key is None):
            raise InputError("a certificate needs its key: give --tls-cert and --tls-key, or neither")
        for name in self.hosts:
            if not _is_host_name(name):
                raise InputError(f"--web-host is a name without port and path, such as maps.example.org; got {name!r}")
        # Raises an error for an invalid template.
        _ = self.base_map_origin

    @property
    def is_https(self) -> bool:
        """Whether connections are encrypted."""
        return self.certificate is not None

    @property
    def is_local(self) -> bool:
        """Whether only this machine can connect."""
        return is_loopback(parse_address(self.listen)[0])

    @property
    def base_map_origin(self) -> str | None:
        """The origin of the base map's tiles, such as https://tiles.example.org; None without a base map.

        Raises `InputError` for a template that is not a URL with {z}, {x} and {y}.
        """
        if self.base_map is None:
            return None
        try:
            parts = urlsplit(self.base_map)
            host, port = parts.hostname, parts.port
        except ValueError:
            host, port = None, None
        if (
            host is None
            or not _is_host_name(host)
            or parts.scheme not in ("http", "https")
            or parts.username is not None
            or not all(name in self.base_map for name in ("{z}", "{x}", "{y}"))
        ):
            raise InputError(
                "a base map is an http or https URL with {z}, {x} and {y}, such as "
                f"https://tiles.example.org/{{z}}/{{x}}/{{y}}.png; got {self.base_map!r}"
            )
        return f"{parts.scheme}://{host}" + (f":{port}" if port else "")


def _is_host_name(name: str) -> bool:
    return bool(name) and name.isascii() and all(each.isalnum() or each in "-._" for each in name)
