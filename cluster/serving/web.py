"""The web service in a process: that of `orbithash web`, or one beside the gateway of `serve --web`."""

import asyncio
import logging
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from orbithash.cluster.output import say
from orbithash.cluster.serving.processes import ends_with_parent
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.search.client.connection import Tls
from orbithash.search.gateway.protection import ServerTls
from orbithash.search.logs import Format, is_json, log_to_stderr
from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.web.settings import WebSettings

__all__ = ["Page", "page_of", "run"]

logger = logging.getLogger(__name__)


def run(settings: WebSettings, log_format: Format) -> None:
    """Serve until SIGTERM or SIGINT. Raises `InputError` for invalid settings and a port that is in use."""
    from orbithash.search.web.server import listening, url_of

    settings.check()
    with listening(settings.listen) as listener:
        _serve(settings, log_format, listener, f"page at {url_of(settings, listener)}; stop with Ctrl-C")


def _serve(settings: WebSettings, log_format: Format, listener: socket.socket, greeting: str = "") -> None:
    """Serve at a socket until SIGTERM or SIGINT, or until the process that has started this one ends."""
    from orbithash.search.web.server import run_web

    def ready() -> None:
        if greeting and is_json():
            logger.info("%s", greeting)
        elif greeting:
            say(greeting)

    async def until_signal() -> None:
        stop = asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        with ends_with_parent(stop.set):
            await run_web(settings, listener, ready, stop)

    with log_to_stderr(log_format):
        asyncio.run(until_signal())


class Page:
    """The page of a gateway: an open port, and what the process does that answers there."""

    def __init__(self, settings: ServeSettings, listener: socket.socket) -> None:
        from orbithash.search.web.server import url_of

        self._settings = settings
        self._listener = listener
        self.url = url_of(_web_settings(settings, "127.0.0.1:0"), listener)

    def work(self, gateway: str) -> Callable[[], None]:
        """Return what a process does that serves the page of the gateway at this address."""
        return partial(_serve, _web_settings(self._settings, gateway), self._settings.log_format, self._listener)


@contextmanager
def page_of(settings: ServeSettings) -> Iterator[Page | None]:
    """Hold the port of the page for the block; yields None without an address.

    Raises `InputError` for invalid settings, a port that is in use, and an address that other machines could reach
    without the required protection.
    """
    if settings.web_address is None:
        yield None
        return
    from orbithash.search.web.server import listening

    _web_settings(settings, "127.0.0.1:0").check()
    host, _ = parse_address(settings.web_address)
    if not is_loopback(host):
        settings.protection.check_open(host)
    with listening(settings.web_address) as listener:
        yield Page(settings, listener)


def _web_settings(settings: ServeSettings, gateway: str) -> WebSettings:
    assert settings.web_address is not None, "the page is asked for"
    tls = settings.protection.tls
    return WebSettings(
        _reachable(gateway),
        settings.web_address,
        gateway_tls=None if tls is None else Tls(tls.certificate),
        gateway_name=None if tls is None else _name_of(tls),
        certificate=None if tls is None else tls.certificate,
        key=None if tls is None else tls.key,
        hosts=settings.web_hosts,
        insecure_listen=settings.protection.insecure_listen,
        base_map=settings.base_map,
    )


def _reachable(address: str) -> str:
    """Return the address at which this machine reaches a gateway that listens at `address`."""
    host, port = parse_address(address)
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def _name_of(tls: ServerTls) -> str | None:
    """Return a name in the gateway's certificate, which may lack the loopback address; None if it has no name."""
    server, client = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    server.load_cert_chain(tls.certificate, tls.key, password="")
    client.check_hostname = False
    # The certificate itself is trusted, and not only its authority.
    client.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    client.load_verify_locations(tls.certificate)
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    ends = [
        client.wrap_bio(to_client, to_server),
        server.wrap_bio(to_server, to_client, server_side=True),
    ]
    # Each end answers the messages of the other one.
    for _ in range(4):
        for end in ends:
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                pass
            except ssl.SSLError as error:
                logger.warning("%s: the page does not trust it: %s", tls.certificate, error.reason)
                return None
    certificate: dict[str, Any] = dict(ends[0].getpeercert() or {})
    names = [str(name) for kind, name in certificate.get("subjectAltName", ()) if kind in ("DNS", "IP Address")]
    return names[0].replace("*", "gateway") if names else None
