"""The messages of a stream of changes, prepared ahead of the commits."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Generic, TypeVar

from orbithash.search.gateway.calls import Calls
from orbithash.search.gateway.malformed import num_bytes, readable
from orbithash.search.protocol.errors import DeadlineExceeded

__all__ = ["prepared"]

Request = TypeVar("Request")
Piece = TypeVar("Piece")

# Messages of one stream that are prepared while an earlier one is committed.
_MAX_AHEAD = 2


async def prepared(
    requests: AsyncIterator[Request], prepare: Callable[[Request], Awaitable[Piece]], calls: Calls
) -> AsyncIterator[Piece]:
    """Yield `prepare(message)` of each message of a stream, in order.

    While the caller works on one message, the next messages are read and prepared, as far as the limit on the bytes of
    requests allows. A failure is raised when its message is due.

    Raises `DeadlineExceeded` if the next message takes more than `max_idle_s` and no earlier message is in progress,
    and `Overloaded` if there is no room for one message.
    """
    waiting: deque[_Waiting[Request, Piece]] = deque()
    reading: asyncio.Future[Request | None] | None = None
    has_ended = False
    try:
        while True:
            has_room = not waiting or (
                len(waiting) < _MAX_AHEAD and calls.request_bytes.has_room(calls.limits.max_receive_bytes)
            )
            if reading is None and not has_ended and has_room:
                reading = asyncio.ensure_future(anext(requests, None))
            if reading is None and not waiting:
                return
            awaited: list[asyncio.Future[object]] = [reading] if reading else []  # type: ignore[list-item]
            awaited += [waiting[0].piece] if waiting else []  # type: ignore[list-item]
            idle_s = None if waiting else calls.limits.max_idle_s
            done, _ = await asyncio.wait(awaited, timeout=idle_s, return_when=asyncio.FIRST_COMPLETED)
            if not done:
                raise DeadlineExceeded(f"the stream sent no message for {calls.limits.max_idle_s:g} s; open it again")
            if reading in done:
                request = reading.result()
                reading = None
                if request is None:
                    has_ended = True
                else:
                    waiting.append(_Waiting(request, prepare, calls))
                continue
            first = waiting.popleft()
            with first.held:
                yield await first.piece
    finally:
        if reading is not None:
            reading.cancel()
        for each in waiting:
            each.cancel()


class _Waiting(Generic[Request, Piece]):
    """A message that is being prepared. Its bytes count as in progress until `held` is closed."""

    def __init__(self, request: Request, prepare: Callable[[Request], Awaitable[Piece]], calls: Calls) -> None:
        self.held = ExitStack()

        async def run() -> Piece:
            self.held.enter_context(calls.request_bytes.hold(num_bytes(request)))
            return await prepare(readable(request))

        self.piece = asyncio.ensure_future(run())

    def cancel(self) -> None:
        """Stop the preparation."""
        self.piece.cancel()
        # Retrieves the exception of a message that failed after an earlier one.
        self.piece.add_done_callback(lambda piece: piece.cancelled() or piece.exception())
        self.piece.add_done_callback(lambda _: self.held.close())
