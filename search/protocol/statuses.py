"""Conversion of errors to google.rpc.Status and back."""

from typing import TYPE_CHECKING

import grpc
from google.rpc import error_details_pb2, status_pb2

from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayError,
    InvalidQuery,
    KeyNotFound,
    Overloaded,
    PermissionDenied,
    SearchError,
    Unauthenticated,
    Unavailable,
)

if TYPE_CHECKING:
    from collections.abc import Iterable

__all__ = ["error_from_pb", "error_to_pb"]

_DOMAIN = "orbithash"
_CODES: dict[type[SearchError], grpc.StatusCode] = {
    InvalidQuery: grpc.StatusCode.INVALID_ARGUMENT,
    KeyNotFound: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    Unauthenticated: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDenied: grpc.StatusCode.PERMISSION_DENIED,
    GatewayError: grpc.StatusCode.INTERNAL,
}
# A status travels in trailing metadata, of which a gRPC client accepts 8 KiB. The message is sent twice: in the header
# grpc-message with up to 12 bytes per character, and in the status, which base64 makes a third larger.
_MAX_MESSAGE_CHARS = 300
_MAX_STATUS_BYTES = 2800


def error_to_pb(error: SearchError) -> status_pb2.Status:
    """Return the status of an error, with google.rpc details; small enough for a call's trailing metadata."""
    code: int = next(_CODES[kind].value[0] for kind in type(error).__mro__ if kind in _CODES)
    status = status_pb2.Status(code=code, message=_first_line(str(error)))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN))
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1e3 * error.retry_after_s))
        status.details.add().Pack(retry)
    if isinstance(error, InvalidQuery):
        status.details.add().Pack(_bad_request(error.violations, _MAX_STATUS_BYTES - status.ByteSize()))
    return status


def _bad_request(violations: "Iterable[tuple[str, str]]", max_bytes: int) -> error_details_pb2.BadRequest:
    """Return as many of the violations, in their order, as fit into `max_bytes`; at least the first."""
    request = error_details_pb2.BadRequest()
    for field, problem in violations:
        request.field_violations.add(field=_first_line(field)[:80], description=_first_line(problem))
        if request.ByteSize() > max_bytes and len(request.field_violations) > 1:
            del request.field_violations[-1]
            break
    return request


def error_from_pb(status: status_pb2.Status) -> SearchError | None:
    """Return the error of a status made by `error_to_pb`; None for a status of another origin."""
    info, request, retry = (
        error_details_pb2.ErrorInfo(),
        error_details_pb2.BadRequest(),
        error_details_pb2.RetryInfo(),
    )
    for detail in status.details:
        for message in (info, request, retry):
            detail.Unpack(message)
    kinds = {kind.reason: kind for kind in _CODES} if info.domain == _DOMAIN else {}
    kind = kinds.get(info.reason)
    if kind is InvalidQuery:
        return InvalidQuery(*((violation.field, violation.description) for violation in request.field_violations))
    if kind is Overloaded:
        return Overloaded(status.message, retry.retry_delay.ToMilliseconds() / 1e3)
    return kind(status.message) if kind else None


def _first_line(message: str) -> str:
    line = message.partition("\n")[0]
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[: _MAX_MESSAGE_CHARS - 1] + "…"
