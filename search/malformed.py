"""Bytes that are no message: gRPC itself would answer with an error of Python's, and write its stack into the log."""

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import grpc
from google.protobuf.message import DecodeError

from orbithash.search.errors import InvalidQuery

__all__ = ["LenientReading", "readable"]

Message = TypeVar("Message")

_OURS = "/orbithash."


class _Malformed:
    """Stands where a message would."""


class LenientReading(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Lets our own calls be made also with bytes that are no message; `readable` refuses those."""

    async def intercept_service(self, continuation: Callable[[Any], Awaitable[Any]], details: Any) -> Any:
        """See gRPC."""
        handler = await continuation(details)
        if handler is None or not details.method.startswith(_OURS):
            return handler
        read = handler.request_deserializer

        def read_or_mark(data: bytes) -> Any:
            try:
                return read(data)
            except DecodeError:
                return _Malformed()

        return handler._replace(request_deserializer=read_or_mark)


def readable(request: Message) -> Message:
    """The message; `InvalidQuery` where there is none."""
    if isinstance(request, _Malformed):
        raise InvalidQuery(("request", "it is not a message of this call; is the client of another version?"))
    return request
