"""The HTTP server of the web application."""

import asyncio
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import uvicorn

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.address import parse_address
from orbithash.search.protocol.errors import Unauthenticated
from orbithash.search.web.app import create_app
from orbithash.search.web.connections import limited_protocol
from orbithash.search.web.security.clients import open_client
from orbithash.search.web.settings import WebSettings

__all__ = ["is_free", "listening", "run_web", "url_of"]

logger = logging.getLogger(__name__)

# Seconds for requests in progress to end.
_STOP_GRACE_S = 5
# Seconds between two looks at the files of the certificate.
_RENEW_EVERY_S = 30.0


def listening(address: str) -> socket.socket:
    """Return a socket that listens at HOST:PORT; port 0 takes a free one. Raises `InputError`."""
    host, port = parse_address(address)
    try:
        family, kind, protocol, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(512)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise InputError(
            f"cannot listen at {address} ({error.strerror}): the port may be in use; give another port, or 0 for a free"
            " one"
        ) from error
    return listener


def is_free(address: str) -> bool:
    """Return whether `listening` would find the port free."""
    try:
        listening(address).close()
    except InputError:
        return False
    return True


def url_of(settings: WebSettings, listener: socket.socket) -> str:
    """Return the address of the first page."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' if settings.is_https else ''}://{f'[{host}]' if ':' in host else host}:{port}"


async def _check_open(settings: WebSettings) -> None:
    """Raise `InputError` if other machines could reach the archive without both HTTPS and tokens."""
    if settings.is_local or settings.insecure_listen:
        return
    host = parse_address(settings.listen)[0]
    if not settings.is_https:
        raise InputError(
            f"the page has no certificate, so it listens on loopback addresses only (127.0.0.1, ::1, localhost); got "
            f"{host!r}: give --tls-cert and --tls-key, or --insecure-listen"
        )
    async with open_client(settings, None) as client:
        try:
            await client.describe()
        except Unauthenticated:
            return
    raise InputError(
        f"the gateway at {settings.gateway} requires no tokens, so the page listens on loopback addresses only "
        f"(127.0.0.1, ::1, localhost); got {host!r}: start the gateway with --tokens, or give --insecure-listen"
    )


class _Certificate:
    """The certificate of HTTPS connections, which may be replaced while the service runs."""

    def __init__(self, certificate: Path, key: Path) -> None:
        """Raises `InputError` for unreadable or mismatched files."""
        self._files = (certificate, key)
        self._stamps = self._stamp()
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._load(self.context)

    async def renew(self) -> None:
        """Use the files again whenever they have changed. Later connections get the new certificate."""
        while True:
            await asyncio.sleep(_RENEW_EVERY_S)
            if self._stamp() == self._stamps:
                continue
            self._stamps = self._stamp()
            try:
                # First into another context: files that do not match must not take the place of valid ones.
                self._load(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
                self._load(self.context)
            except InputError as error:
                logger.warning("the certificate was not renewed: %s", error)

    def _load(self, context: ssl.SSLContext) -> None:
        try:
            # An empty password: otherwise OpenSSL would ask for one at the terminal.
            context.load_cert_chain(*self._files, password="")
        except (OSError, ValueError) as error:
            certificate, key = self._files
            raise InputError(
                f"{certificate} and {key} are not a certificate and its unencrypted key, both in PEM; give a pair"
            ) from error

    def _stamp(self) -> list[tuple[int, int] | None]:
        return [(path.stat().st_mtime_ns, path.stat().st_ino) if path.exists() else None for path in self._files]


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the caller of `run_web`."""
        yield


async def run_web(
    settings: WebSettings, listener: socket.socket, ready: Callable[[], None], stop: asyncio.Event
) -> None:
    """Serve until `stop` is set, then finish the requests in progress. `ready` is called when requests are answered.

    Raises `InputError` for invalid settings, and if other machines could connect without protection.
    """
    settings.check()
    await _check_open(settings)
    # Uvicorn logs a line for every request that is not HTTP.
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)
    certificate = _Certificate(settings.certificate, settings.key) if settings.certificate and settings.key else None
    config = uvicorn.Config(
        create_app(settings),
        loop="asyncio",
        http=limited_protocol(settings),
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_STOP_GRACE_S,
        h11_max_incomplete_event_size=settings.limits.max_header_bytes,
        ssl_context_factory=None if certificate is None else lambda *_: certificate.context,
    )
    server = _Server(config)
    tasks = [asyncio.create_task(_exit_after(stop, server))]
    if certificate is not None:
        tasks.append(asyncio.create_task(certificate.renew()))
    ready()
    try:
        await server.serve([listener])
    finally:
        for task in tasks:
            task.cancel()


async def _exit_after(stop: asyncio.Event, server: uvicorn.Server) -> None:
    await stop.wait()
    server.should_exit = True
