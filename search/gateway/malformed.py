"""Messages that are missing or malformed.

Methods read and parse their messages themselves. gRPC would do it before the caller is known, and would answer bytes
that are no message with an error of Python's and a traceback in the log. gRPC would also wait without end for a message
that is never sent. Of a message that is not read, a client can send only what fits into the window of HTTP/2.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["Lenient", "Pending", "num_bytes", "readable"]

Message = TypeVar("Message")


@dataclass(frozen=True)
class Pending:
    """The message of a call that was not read yet."""

    context: Any

    async def read(self) -> Any:
        """Return the message, for `readable`. Raises `InvalidQuery` for a call without one."""
        # The iterator of requests costs a fourth of an empty call more.
        request = await self.context.read()
        if request is grpc.aio.EOF:
            raise InvalidQuery(("request", "the call has no message"))
        return request


@dataclass(frozen=True)
class _Unread:
    """The bytes of a message, and the function that parses them."""

    data: bytes
    parse: Callable[[bytes], Any]


class Lenient:
    """A server to which servicers are added.

    With `is_raw`, the servicers get a `Pending` message, parse it with `readable`, and may return serialised ones.
    Otherwise a call whose message does not arrive within `max_idle_s` seconds ends with DEADLINE_EXCEEDED.
    """

    def __init__(self, server: Any, max_idle_s: float, is_raw: bool) -> None:
        self._server = server
        self._max_idle_s = max_idle_s
        self._is_raw = is_raw

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Ignored: `add_registered_method_handlers` gets the same handlers with their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See `grpc.aio.Server`."""
        lenient = {name: self._lenient(handler) for name, handler in handlers.items()}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)

    def _lenient(self, handler: Any) -> Any:
        parse, serialise = handler.request_deserializer, handler.response_serializer
        if self._is_raw:
            parse, serialise = _unread(parse), _serialised(serialise)
        if handler.request_streaming:
            return handler._replace(request_deserializer=parse, response_serializer=serialise)
        # A stream of one message is the same on the wire, and only of a stream can the wait be limited.
        if handler.response_streaming:
            serve, make = handler.unary_stream, grpc.stream_stream_rpc_method_handler
        else:
            serve, make = handler.unary_unary, grpc.stream_unary_rpc_method_handler
        return make(_unread_first(serve) if self._is_raw else _first(serve, self._max_idle_s), parse, serialise)


def _unread_first(serve: Callable[[Any, Any], Awaitable[Any]]) -> Callable[[Any, Any], Awaitable[Any]]:
    """Return a method that serves the first message of a stream, which it has to read."""

    async def serve_first(_: AsyncIterator[Any], context: Any) -> Any:
        return await serve(Pending(context), context)

    return serve_first


def _first(serve: Callable[[Any, Any], Awaitable[Any]], max_idle_s: float) -> Callable[[Any, Any], Awaitable[Any]]:
    """Return a method that serves the first message of a stream."""

    async def serve_first(_: AsyncIterator[Any], context: Any) -> Any:
        try:
            async with asyncio.timeout(max_idle_s):
                request = await context.read()
        except TimeoutError:
            await context.abort(grpc.StatusCode.DEADLINE_EXCEEDED, f"no message within {max_idle_s:g} s")
        if request is grpc.aio.EOF:
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
        return await serve(request, context)

    return serve_first


def _unread(parse: Callable[[bytes], Any]) -> Callable[[bytes], _Unread]:
    return lambda data: _Unread(data, parse)


def _serialised(serialise: Callable[[Any], bytes]) -> Callable[[Any], bytes]:
    """Return a function that serialises messages, and leaves serialised ones as they are."""
    return lambda message: message if isinstance(message, bytes) else serialise(message)


def num_bytes(request: Any) -> int:
    """Return the size of a request, in bytes."""
    return len(request.data) if isinstance(request, _Unread) else request.ByteSize()


def readable(request: Message) -> Message:
    """Return the message of a request. Raises `InvalidQuery` for bytes that are no message."""
    if not isinstance(request, _Unread):
        return request
    try:
        message: Message = request.parse(request.data)
    except DecodeError as error:
        raise InvalidQuery(
            ("request", "the bytes are not a message of this method; the client may be of another version")
        ) from error
    return message
