"""The messages of a stream of changes, prepared ahead of the commits."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import ExitStack
from typing import Generic, TypeVar

from orbithash.search.gateway.calls import Calls
from orbithash.search.gateway.malformed import num_bytes, readable
from orbithash.search.protocol.errors import DeadlineExceeded

__all__ = ["prepared"]

Request = TypeVar("Request")
Piece = TypeVar("Piece")


async def prepared(
    requests: AsyncIterator[Request], prepare: Callable[[Request], Awaitable[Piece]], calls: Calls
) -> AsyncIterator[Piece]:
    """Yield `prepare(message)` of each message of a stream, in order.

    While the caller works on one message, up to two more are read and prepared, as far as the limit on the bytes of
    requests allows. A failure is raised when its message is due.

    Raises `DeadlineExceeded` if the next message takes more than `max_idle_s` and no earlier message is in progress,
    and `Overloaded` if there is no room for one message.
    """
    # One message waits here, and one outside until there is room.
    waiting: asyncio.Queue[_Waiting[Request, Piece] | Exception | None] = asyncio.Queue(maxsize=1)
    in_progress: set[_Waiting[Request, Piece]] = set()

    async def read() -> None:
        try:
            while True:
                if not calls.request_bytes.has_room(calls.limits.max_receive_bytes):
                    await waiting.join()
                request = await anext(requests, None)
                if request is None:
                    break
                message = _Waiting(request, prepare, calls)
                in_progress.add(message)
                await waiting.put(message)
        except Exception as error:
            await waiting.put(error)
        else:
            await waiting.put(None)

    reader = asyncio.create_task(read())
    try:
        while True:
            try:
                async with asyncio.timeout(calls.limits.max_idle_s):
                    message = await waiting.get()
            except TimeoutError:
                idle_s = calls.limits.max_idle_s
                raise DeadlineExceeded(f"the stream sent no message for {idle_s:g} s; open it again") from None
            if message is None:
                return
            if isinstance(message, Exception):
                raise message
            with message.held:
                yield await message.piece
            in_progress.discard(message)
            waiting.task_done()
    finally:
        reader.cancel()
        for each in in_progress:
            each.cancel()


class _Waiting(Generic[Request, Piece]):
    """A message that is being prepared. Its bytes count as in progress until `held` is closed."""

    def __init__(self, request: Request, prepare: Callable[[Request], Awaitable[Piece]], calls: Calls) -> None:
        self.held = ExitStack()

        async def run() -> Piece:
            self.held.enter_context(calls.request_bytes.hold(num_bytes(request)))
            return await prepare(readable(request))

        self.piece = asyncio.create_task(run())

    def cancel(self) -> None:
        """Stop the preparation and release the bytes."""

        def end(piece: asyncio.Task[Piece]) -> None:
            self.held.close()
            if not piece.cancelled():
                # Retrieves the exception of a message that failed after an earlier one.
                piece.exception()

        self.piece.cancel()
        self.piece.add_done_callback(end)
