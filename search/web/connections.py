"""Connections of the HTTP server: their number, and the time that a request may take to arrive."""

import asyncio
import sys

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from orbithash.search.web.security.boundary import security_headers
from orbithash.search.web.settings import WebSettings

__all__ = ["limited_protocol"]


class _Limited(H11Protocol):
    settings: WebSettings
    _waiting: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Begin a connection, or close it if there are too many."""
        assert isinstance(transport, asyncio.Transport), "TCP"
        super().connection_made(transport)
        if len(self.connections) > self.settings.limits.max_connections:
            transport.abort()
            return
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """End a connection."""
        self._stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take data: a part of the headers or of a body."""
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self.conn.their_state is h11.IDLE or (
            # A body that nobody reads any more, because the request was refused.
            self.conn.their_state is h11.SEND_BODY and self.conn.our_state is h11.DONE
        ):
            self._wait()
        else:
            self._stop_waiting()

    def send_400_response(self, msg: str) -> None:
        """Answer what is not HTTP, or is larger than the limit of the headers, and close the connection."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()
            return
        error = sys.exc_info()[1]
        is_large = isinstance(error, h11.RemoteProtocolError) and error.error_status_hint == 431
        status, text = (
            (431, b"The address or the headers of the request are too long.\n")
            if is_large
            else (400, b"This is not a valid HTTP request.\n")
        )
        headers = {
            "Content-Type": "text/plain; charset=utf-8",
            "Content-Length": str(len(text)),
            "Connection": "close",
            **security_headers(self.settings),
        }
        for event in (h11.Response(status_code=status, headers=list(headers.items())), h11.Data(text)):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.write(self.conn.send(h11.EndOfMessage()) or b"")
        self.transport.close()

    def _wait(self) -> None:
        """Close the connection unless the rest arrives in time. The time begins with the first byte that is missing."""
        if self._waiting is None:
            limits = self.settings.limits
            limit_s = limits.header_timeout_s if self.conn.their_state is h11.IDLE else limits.body_timeout_s
            self._waiting = self.loop.call_later(limit_s, self._late)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _late(self) -> None:
        if not self.transport.is_closing():
            self.transport.abort()


def limited_protocol(settings: WebSettings) -> type[asyncio.Protocol]:
    """Return the protocol of connections with these limits, for `uvicorn.Config`."""
    return type("LimitedProtocol", (_Limited,), {"settings": settings})
