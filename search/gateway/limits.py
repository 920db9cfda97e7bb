"""Limits of what callers can use: calls, streams, and bytes of requests in progress."""

from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import grpc

from orbithash.search.protocol.errors import Overloaded

__all__ = ["GatewayLimits", "LimitedStreams", "RequestBytes", "Streams"]


@dataclass(frozen=True)
class GatewayLimits:
    """What callers can use of a gateway.

    Attributes:
        max_receive_bytes: gRPC refuses a larger request before it is read.
        max_concurrent_rpcs: calls in flight, streams and health checks included; gRPC refuses more.
        max_streams: streams in flight of each method, so that idle streams leave room for searches.
        max_request_bytes: size of all requests in progress; more are refused.
        max_timeout_s: time limit of a call without a deadline or with a later deadline, and of each message of a
            stream, in seconds. Refresh has no limit.
        max_idle_s: time that a stream may take to send its next message while no answer is due, in seconds.
    """

    max_receive_bytes: int = 16 * 2**20
    max_concurrent_rpcs: int = 1024
    max_streams: int = 64
    max_request_bytes: int = 512 * 2**20
    max_timeout_s: float = 30.0
    max_idle_s: float = 60.0


class RequestBytes:
    """Counts the bytes of requests in progress, up to a limit."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._held = 0

    def has_room(self, num_bytes: int) -> bool:
        """Return whether a request of this size is within the limit."""
        return self._held + num_bytes <= self._limit

    def add(self, num_bytes: int) -> None:
        """Count a request of this size. Raises `Overloaded` beyond the limit."""
        if not self.has_room(num_bytes):
            raise Overloaded(f"requests of {self._held:,} bytes are in progress; try again later", retry_after_s=1.0)
        self._held += num_bytes

    def remove(self, num_bytes: int) -> None:
        """Stop counting a request of this size."""
        self._held -= num_bytes

    @contextmanager
    def hold(self, num_bytes: int) -> Iterator[None]:
        """Count a request of this size during the block. Raises `Overloaded` beyond the limit."""
        self.add(num_bytes)
        try:
            yield
        finally:
            self.remove(num_bytes)


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
