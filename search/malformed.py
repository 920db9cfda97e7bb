"""Bytes that are no message: gRPC itself would answer with an error of Python's, and write its stack into the log."""

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from orbithash.search.errors import InvalidQuery

__all__ = ["Lenient", "readable"]

Message = TypeVar("Message")


class _Malformed:
    """Stands where a message would."""


class Lenient:
    """A server to register servicers with, whose calls are made also with bytes that are no message: see `readable`."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        """They come again by the next method, with their names."""

    def add_registered_method_handlers(self, service: str, handlers: Mapping[str, Any]) -> None:
        """See `grpc.aio.Server`."""
        lenient = {
            name: handler._replace(request_deserializer=_or_marked(handler.request_deserializer))
            for name, handler in handlers.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service, lenient),))
        self._server.add_registered_method_handlers(service, lenient)


def _or_marked(read: Callable[[bytes], Any]) -> Callable[[bytes], Any]:
    def read_or_mark(data: bytes) -> Any:
        try:
            return read(data)
        except DecodeError:
            return _Malformed()

    return read_or_mark


def readable(request: Message) -> Message:
    """The message; `InvalidQuery` where there is none."""
    if isinstance(request, _Malformed):
        raise InvalidQuery(("request", "it is not a message of this call; is the client of another version?"))
    return request
