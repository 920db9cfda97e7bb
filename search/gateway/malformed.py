"""Messages that are read where a call wants them: not before its caller is known, and with our answer to bytes that
are no message. gRPC itself would read them first, and answer those with an error of Python's and a stack in its log.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["Lenient", "readable"]

Message = TypeVar("Message")


@dataclass(frozen=True)
class _Unread:
    """Stands where a message would."""

    data: bytes
    read: Callable[[bytes], Any]


class Lenient:
    """A server to register servicers with, which get their messages by `readable` only."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """They come again by the next method, with their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See `grpc.aio.Server`."""
        lenient = {
            name: handler._replace(request_deserializer=_later(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)


def _later(read: Callable[[bytes], Any]) -> Callable[[bytes], _Unread]:
    return lambda data: _Unread(data, read)


def readable(request: Message) -> Message:
    """The message; `InvalidQuery` where there is none."""
    if not isinstance(request, _Unread):
        return request
    try:
        message: Message = request.read(request.data)
    except DecodeError as error:
        raise InvalidQuery(("request", "it is not a message of this call; is the client of another version?")) from (
            error
        )
    return message
