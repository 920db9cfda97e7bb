"""The HTTP server of the web application."""

import asyncio
import signal
import socket
import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.address import parse_address
from orbithash.search.web.app import create_app
from orbithash.search.web.settings import WebSettings

__all__ = ["listening", "run_web", "url_of"]

# Seconds for requests in progress to end.
_STOP_GRACE_S = 5


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


def url_of(settings: WebSettings, listener: socket.socket) -> str:
    """Return the address of the first page."""
    host, port = listener.getsockname()[:2]
    return f"http{'s' if settings.is_https else ''}://{f'[{host}]' if ':' in host else host}:{port}"


class _Server(uvicorn.Server):
    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to `run_web`."""
        yield


async def run_web(settings: WebSettings, listener: socket.socket, ready: Callable[[], None]) -> None:
    """Serve until SIGTERM or SIGINT, then finish the requests in progress. `ready` is called when it listens."""
    config = uvicorn.Config(
        create_app(settings),
        loop="asyncio",
        http="h11",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_graceful_shutdown=_STOP_GRACE_S,
        h11_max_incomplete_event_size=settings.limits.max_header_bytes,
        ssl_certfile=settings.certificate,
        ssl_keyfile=settings.key,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise InputError(
            f"{settings.certificate} and {settings.key} are not a certificate and its unencrypted key, both in PEM"
        ) from error
    server = _Server(config)

    def stop() -> None:
        server.should_exit = True

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    ready()
    await server.serve([listener])
