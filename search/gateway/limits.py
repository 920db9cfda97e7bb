"""Limits of what callers can use: calls, streams, and bytes of requests in progress."""

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc

from orbithash.search.protocol.errors import DeadlineExceeded, Overloaded

__all__ = ["BytesInProgress", "GatewayLimits", "LimitedStreams", "SlowMessages", "Streams"]

# Seconds after which a message that has not arrived counts as slow.
_SLOW_S = 0.1

Message = TypeVar("Message")


@dataclass(frozen=True)
class GatewayLimits:
    """What callers can use of a gateway.

    Attributes:
        max_receive_bytes: gRPC refuses a larger request before it is read.
        max_concurrent_rpcs: calls in flight, streams and health checks included; gRPC refuses more.
        max_streams: streams in flight of each method, so that idle streams leave room for searches.
        max_request_bytes: size of all requests in progress; more are refused.
        max_response_bytes: size of all responses that are being sent; more are refused.
        max_slow_messages: messages that arrive slowly at the same time, each of which may take `max_receive_bytes`;
            the messages of streams do not count.
        max_timeout_s: time limit of a call without a deadline or with a later deadline, and of each message of a
            stream, in seconds. Refresh has no limit.
        max_idle_connection_s: time after which a connection without calls is closed, in seconds. Clients open another
            one when they need it.
        max_idle_s: time that a stream may take to send its next message while no answer is due, in seconds.
    """

    max_receive_bytes: int = 16 * 2**20
    max_concurrent_rpcs: int = 1024
    max_streams: int = 64
    max_request_bytes: int = 512 * 2**20
    max_response_bytes: int = 512 * 2**20
    max_slow_messages: int = 32
    max_timeout_s: float = 30.0
    max_idle_s: float = 60.0
    max_idle_connection_s: float = 600.0


class BytesInProgress:
    """Counts the bytes of messages in progress, up to a limit."""

    def __init__(self, what: str, limit: int) -> None:
        """`what`: name of the messages, in the plural."""
        self._what = what
        self._limit = limit
        self._held = 0

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a message of this size is within the limit."""
        return self._held + num_bytes <= self._limit

    def add(self, num_bytes: int) -> None:
        """Count a message of this size. Raises `Overloaded` beyond the limit."""
        if not self.has_room(num_bytes):
            raise Overloaded(f"{self._what} of {self._held:,} bytes are in progress; try again later", 1.0)
        self._held += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Stop counting a message of this size."""
        self._held -= num_bytes

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Count a message of this size during the block. Raises `Overloaded` beyond the limit."""
        self.add(num_bytes)
        try:
            yield
        finally:
            self.remove(num_bytes)


class _Arriving:
    """A message that is arriving: the task that waits for it, its deadline, and why the wait was ended, if it was."""

    __slots__ = ("begun", "deadline", "error", "is_slow", "task")

    def __init__(self, task: "asyncio.Task[Any]", begun: float, deadline: float) -> None:
        self.task = task
        self.begun = begun
        self.deadline = deadline
        self.is_slow = False
        self.error: Overloaded | DeadlineExceeded | None = None


class SlowMessages:
    """Counts the messages that have been arriving for a while, up to a limit.

    The size of a message is not known before it has arrived. Of messages that arrive at once only few are on the way.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._number = 0
        self._arriving: set[_Arriving] = set()
        # One timer for all messages: one for each would cost a tenth of an empty call.
        self._timer: asyncio.TimerHandle | None = None

    async def receive(self, message: Awaitable[Message], timeout_s: float) -> Message:
        """Return a message. Raises `Overloaded` beyond the limit, and `DeadlineExceeded` after `timeout_s`."""
        task = asyncio.current_task()
        assert task is not None, "called in a task"
        loop = asyncio.get_running_loop()
        now = loop.time()
        arriving = _Arriving(task, now, now + timeout_s)
        self._arriving.add(arriving)
        self._look_at(min(now + _SLOW_S, arriving.deadline))
        try:
            return await message
        except asyncio.CancelledError:
            # Cancelled by `_look`, and not by the caller too.
            if arriving.error is None or task.uncancel():
                raise
            raise arriving.error from None
        finally:
            self._arriving.remove(arriving)
            self._number -= arriving.is_slow

    def _look_at(self, time: float) -> None:
        """Look for slow messages at a time of the loop's clock, unless that happens earlier."""
        if self._timer is not None:
            if self._timer.when() <= time:
                return
            self._timer.cancel()
        self._timer = asyncio.get_running_loop().call_at(time, self._look)

    def _look(self) -> None:
        self._timer = None
        now = asyncio.get_running_loop().time()
        due = []
        for arriving in sorted(self._arriving, key=lambda each: each.begun):
            if arriving.error is not None:
                continue
            if not arriving.is_slow and now >= arriving.begun + _SLOW_S:
                if self._number < self._limit:
                    arriving.is_slow = True
                    self._number += 1
                else:
                    arriving.error = Overloaded(f"{self._limit} messages arrive slowly; try again later", 1.0)
            if arriving.error is None and now >= arriving.deadline:
                arriving.error = DeadlineExceeded(f"no message within {arriving.deadline - arriving.begun:.3g} s")
            if arriving.error is not None:
                arriving.task.cancel()
            else:
                due.append(arriving.deadline if arriving.is_slow else min(arriving.begun + _SLOW_S, arriving.deadline))
        if due:
            self._look_at(min(due))


class Streams:
    """Counts the streams in flight of each method, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_open: Counter[str] = Counter()

    @contextmanager
    def hold(self, method: str) -> Iterator[None]:
        """Count a stream during the block. Raises `Overloaded` beyond the limit."""
        if self._num_open[method] >= self._limit:
            raise Overloaded(f"{self._limit} streams of {method} are open; close one or try again later", 1.0)
        self._num_open[method] += 1
        try:
            yield
        finally:
            self._num_open[method] -= 1


class LimitedStreams(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Limits the streams of services that gRPC brings: health checks and reflection."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call, with a limit if it is a stream of another package."""
        handler = await continuation(details)
        if handler is None or not handler.response_streaming or details.method.startswith("/orbithash."):
            return handler
        # `Lenient` makes a stream of every request.
        return handler._replace(stream_stream=self._limited(handler.stream_stream, details.method))

    def _limited(self, serve: Callable[[Any, Any], Any], method: str) -> Callable[[Any, Any], Awaitable[None]]:
        async def limited(request: Any, context: Any) -> None:
            try:
                with self._streams.hold(method):
                    responses = serve(request, context)
                    if hasattr(responses, "__aiter__"):
                        async for response in responses:
                            await context.write(response)
                    else:
                        await responses
                    return
            except Overloaded as error:
                message = str(error)
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, message)

        return limited
