"""Messages that are parsed by the method that serves them.

gRPC itself would parse a message before the caller is known, and would answer bytes that are no message with an error
of Python's and a traceback in the log.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["Lenient", "num_bytes", "readable"]

Message = TypeVar("Message")


@dataclass(frozen=True)
class _Unread:
    """The bytes of a message, and the function that parses them."""

    data: bytes
    parse: Callable[[bytes], Any]


class Lenient:
    """A server for servicers that parse their messages with `readable`."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """Ignored: `add_registered_method_handlers` gets the same handlers with their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See `grpc.aio.Server`."""
        lenient = {
            name: handler._replace(request_deserializer=_unread(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)


def _unread(parse: Callable[[bytes], Any]) -> Callable[[bytes], _Unread]:
    return lambda data: _Unread(data, parse)


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
