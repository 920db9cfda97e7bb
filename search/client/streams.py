"""Streams of changes: requests are sent while earlier ones are processed, and each response has a time limit."""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Awaitable, Coroutine, Iterator
from typing import Any

import grpc

from orbithash.search.client.connection import Connection
from orbithash.search.protocol.errors import GatewayError

__all__ = ["exchange", "exchange_async"]

# Requests that are sent before the first of them is acknowledged.
_MAX_IN_FLIGHT = 4


def exchange(connection: Connection, method: Any, requests: Iterator[Any], timeout_s: float) -> Iterator[Any]:
    """Yield the responses to a stream of requests; no call is made without a request.

    Raises the errors of `Connection.error`; `DeadlineExceeded` if a response takes more than `timeout_s` seconds.
    """
    stream = None
    in_flight = 0
    try:
        for request in requests:
            stream = stream or _Stream(connection, method, timeout_s)
            stream.send(request)
            in_flight += 1
            if in_flight > _MAX_IN_FLIGHT:
                response = stream.receive()
                if response is None:
                    raise _ended_early(connection)
                in_flight -= 1
                yield response
        if stream is not None:
            stream.end()
            while (response := stream.receive()) is not None:
                yield response
    finally:
        if stream is not None:
            stream.close()


async def exchange_async(
    connection: Connection, method: Any, requests: Iterator[Any], timeout_s: float
) -> AsyncIterator[Any]:
    """Do the same as `exchange` with a method of an asyncio stub."""
    stream = None
    in_flight = 0
    try:
        for request in requests:
            stream = stream or _AsyncStream(connection, method, timeout_s)
            await stream.send(request)
            in_flight += 1
            if in_flight > _MAX_IN_FLIGHT:
                response = await stream.receive()
                if response is None:
                    raise _ended_early(connection)
                in_flight -= 1
                yield response
        if stream is not None:
            await stream.end()
            while (response := await stream.receive()) is not None:
                yield response
    finally:
        if stream is not None:
            stream.close()


def _ended_early(connection: Connection) -> GatewayError:
    return GatewayError(f"the gateway at {connection.address} ended the stream early")


class _Stream:
    def __init__(self, connection: Connection, method: Any, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        # gRPC reads requests in a thread of its own; the caller's iterators stay in the caller's thread.
        self._requests: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._call = method(iter(self._requests.get, None), metadata=connection.metadata())

    def send(self, request: Any) -> None:
        """Send a request, without waiting."""
        self._requests.put(request)

    def end(self) -> None:
        """Say that there are no more requests."""
        self._requests.put(None)

    def receive(self) -> Any:
        """Return the next response; None at the end of the stream."""
        is_late = threading.Event()

        def give_up() -> None:
            is_late.set()
            self._call.cancel()

        timer = threading.Timer(self._timeout_s, give_up)
        timer.daemon = True
        timer.start()
        try:
            return next(self._call, None)
        except grpc.RpcError as error:
            if is_late.is_set() and error.code() == grpc.StatusCode.CANCELLED:
                raise self._connection.late(self._timeout_s) from error
            raise self._connection.error(error, self._timeout_s) from error
        finally:
            timer.cancel()

    def close(self) -> None:
        """End the stream, whatever its state."""
        self.end()
        self._call.cancel()


class _AsyncStream:
    def __init__(self, connection: Connection, method: Any, timeout_s: float) -> None:
        self._connection = connection
        self._timeout_s = timeout_s
        self._call = method(metadata=connection.metadata())
        self._call.add_done_callback(self._remember)
        self._error: grpc.aio.AioRpcError | None = None

    async def send(self, request: Any) -> None:
        """Send a request; waits while the gateway reads no more."""
        await self._within(self._call.write(request))

    async def end(self) -> None:
        """Say that there are no more requests."""
        await self._within(self._call.done_writing())

    async def receive(self) -> Any:
        """Return the next response; None at the end of the stream."""
        response = await self._within(self._call.read())
        return None if response is grpc.aio.EOF else response

    def close(self) -> None:
        """End the stream, whatever its state."""
        self._call.cancel()

    async def _within(self, step: Awaitable[Any]) -> Any:
        try:
            async with asyncio.timeout(self._timeout_s):
                return await step
        except TimeoutError:
            raise self._connection.late(self._timeout_s) from None
        except (asyncio.InvalidStateError, grpc.RpcError) as error:
            if self._error is None and isinstance(error, asyncio.InvalidStateError):
                raise _ended_early(self._connection) from error
            raise self._connection.error(self._error or error, self._timeout_s) from error

    def _remember(self, call: Any) -> None:
        # A message that is being written when the gateway ends the stream fails, and grpc.aio then replaces the
        # gateway's status by one without details. This callback runs before that.
        code = _result(call.code())
        if code != grpc.StatusCode.OK:
            trailing = _result(call.trailing_metadata())
            self._error = grpc.aio.AioRpcError(code, grpc.aio.Metadata(), trailing, _result(call.details()))


def _result(coroutine: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of a coroutine that has nothing to wait for."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("the status of a call that is done is known")
