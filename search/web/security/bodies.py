"""Sizes of requests: headers, bodies and the time that a body may take to arrive, and all bodies together."""

import asyncio

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from orbithash.search.web.errors import WebError
from orbithash.search.web.security.origins import is_door
from orbithash.search.web.settings import WebLimits, WebSettings

__all__ = ["Bodies"]

# A form, or the JSON of a detector.
_MAX_FORM_BYTES = 2**20


def _max_bytes(path: str, limits: WebLimits) -> int:
    if is_door(path):
        return limits.max_call_bytes
    return limits.max_upload_bytes if path == "/image" else _MAX_FORM_BYTES


def _header_bytes(scope: Scope) -> int:
    headers = sum(len(name) + len(value) + 4 for name, value in scope["headers"])
    return len(scope["raw_path"]) + len(scope["query_string"]) + headers


class Bodies:
    """Refuses headers that are too large, and bodies that are too large or too slow, while they arrive."""

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._limits = settings.limits
        self._num_bytes = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        # The server has a limit, too, but only for headers that arrive in several pieces.
        if _header_bytes(scope) > self._limits.max_header_bytes:
            raise WebError(431, "The address or the headers of the request are too long.")
        body = _Body(self, _max_bytes(scope["path"], self._limits), receive)
        length = Headers(scope=scope).get("content-length", "")
        if length.isascii() and length.isdigit():
            body.check(int(length))
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._num_bytes -= body.num_bytes

    def add(self, num_bytes: int) -> None:
        """Count bytes that have arrived. Raises `WebError` if too many are in progress."""
        if self._num_bytes + num_bytes > self._limits.max_bytes:
            raise WebError(503, "Too many uploads are in progress. Try again in a few seconds.", {"Retry-After": "5"})
        self._num_bytes += num_bytes

    @property
    def timeout_s(self) -> float:
        """Time for a body to arrive, in seconds."""
        return self._limits.body_timeout_s


class _Body:
    """The body of one request."""

    def __init__(self, bodies: Bodies, max_bytes: int, receive: Receive) -> None:
        self._bodies = bodies
        self._max_bytes = max_bytes
        self._receive = receive
        self._deadline: float | None = None
        self._is_complete = False
        self.num_bytes = 0

    def check(self, num_bytes: int) -> None:
        """Raise `WebError` if a body of this size is too large."""
        if num_bytes > self._max_bytes:
            raise WebError(
                413, f"The upload is larger than {self._max_bytes / 2**20:.0f} MiB, which is the maximum here."
            )

    async def receive(self) -> Message:
        """Return the next part of the body. Raises `WebError` for a body that is too large or too slow."""
        if self._is_complete:
            return await self._receive()
        now = asyncio.get_running_loop().time()
        self._deadline = self._deadline or now + self._bodies.timeout_s
        try:
            async with asyncio.timeout_at(self._deadline):
                message = await self._receive()
        except TimeoutError:
            raise WebError(
                408, f"The request did not arrive within {self._bodies.timeout_s:.0f} s.", {"Connection": "close"}
            ) from None
        if message["type"] == "http.request":
            num_bytes = len(message.get("body", b""))
            self.check(self.num_bytes + num_bytes)
            self._bodies.add(num_bytes)
            self.num_bytes += num_bytes
            self._is_complete = not message.get("more_body", False)
        else:
            self._is_complete = True
        return message
