"""Between the wire format and the domain: the only module that sees both."""

from datetime import UTC

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from orbithash.search.errors import (
    DeadlineExceeded,
    GatewayError,
    InvalidQuery,
    KeyNotFound,
    Overloaded,
    SearchError,
    Unavailable,
)
from orbithash.search.queries import Answer, Coverage, Hit, Query
from orbithash.v1 import search_pb2

__all__ = ["answer_from_pb", "answer_to_pb", "error_from_pb", "error_to_pb", "query_from_pb", "query_to_pb"]

_DOMAIN = "orbithash"
_CODES: dict[type[SearchError], grpc.StatusCode] = {
    InvalidQuery: grpc.StatusCode.INVALID_ARGUMENT,
    KeyNotFound: grpc.StatusCode.NOT_FOUND,
    Overloaded: grpc.StatusCode.RESOURCE_EXHAUSTED,
    DeadlineExceeded: grpc.StatusCode.DEADLINE_EXCEEDED,
    Unavailable: grpc.StatusCode.UNAVAILABLE,
    GatewayError: grpc.StatusCode.INTERNAL,
}
# Errors travel in trailing metadata, of which gRPC carries 8 KiB: twice this text in its longest encoding fits.
_MAX_MESSAGE_CHARS = 300


def query_to_pb(query: Query) -> search_pb2.SearchRequest:
    """The request for a query that `Query.check` lets pass."""
    if query.image is not None:
        return search_pb2.SearchRequest(image=query.image, k=query.k)
    if query.code is not None:
        return search_pb2.SearchRequest(code=query.code, k=query.k)
    return search_pb2.SearchRequest(key=query.key or "", k=query.k)


def query_from_pb(request: search_pb2.SearchRequest) -> Query:
    """The query of a request, unchecked."""
    kind = request.WhichOneof("query")
    return Query(
        image=request.image if kind == "image" else None,
        code=request.code if kind == "code" else None,
        key=request.key if kind == "key" else None,
        k=request.k,
    )


def answer_to_pb(answer: Answer) -> search_pb2.SearchResponse:
    """The response that carries an answer."""
    return search_pb2.SearchResponse(
        hits=[_hit_to_pb(hit) for hit in answer.hits],
        ties_at_cutoff=answer.ties_at_cutoff,
        coverage=search_pb2.Coverage(
            searched_rows=answer.coverage.searched_rows,
            total_rows=answer.coverage.total_rows,
            fraction=answer.coverage.fraction,
            answered_shards=answer.coverage.answered_shards,
            total_shards=answer.coverage.total_shards,
        ),
        took_ms=answer.took_ms,
        model_id=answer.model_id,
        archive_version=answer.archive_version,
    )


def answer_from_pb(response: search_pb2.SearchResponse) -> Answer:
    """The answer that a response carries."""
    coverage = response.coverage
    return Answer(
        tuple(_hit_from_pb(hit) for hit in response.hits),
        response.ties_at_cutoff,
        Coverage(coverage.searched_rows, coverage.total_rows, coverage.answered_shards, coverage.total_shards),
        response.took_ms,
        response.model_id,
        response.archive_version,
    )


def error_to_pb(error: SearchError) -> status_pb2.Status:
    """The status of an error, with google.rpc details."""
    code: int = _CODES[type(error)].value[0]
    status = status_pb2.Status(code=code, message=_line(str(error)))
    status.details.add().Pack(error_details_pb2.ErrorInfo(reason=error.reason, domain=_DOMAIN))
    if isinstance(error, InvalidQuery):
        request = error_details_pb2.BadRequest()
        for field, problem in error.violations:
            request.field_violations.add(field=field, description=_line(problem))
        status.details.add().Pack(request)
    if isinstance(error, Overloaded):
        retry = error_details_pb2.RetryInfo()
        retry.retry_delay.FromMilliseconds(round(1e3 * error.retry_after_s))
        status.details.add().Pack(retry)
    return status


def error_from_pb(status: status_pb2.Status) -> SearchError | None:
    """The error that `error_to_pb` made this status of; None if it comes from elsewhere."""
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


def _hit_to_pb(hit: Hit) -> search_pb2.Hit:
    datetime = None
    if hit.datetime is not None:
        datetime = Timestamp()
        datetime.FromDatetime(hit.datetime)
    return search_pb2.Hit(
        rank=hit.rank,
        distance=hit.distance,
        id=hit.id,
        key=hit.key,
        label=hit.label,
        lon=hit.lon,
        lat=hit.lat,
        datetime=datetime,
    )


def _hit_from_pb(hit: search_pb2.Hit) -> Hit:
    return Hit(
        hit.rank,
        hit.distance,
        hit.id,
        hit.key,
        hit.label if hit.HasField("label") else None,
        hit.lon if hit.HasField("lon") else None,
        hit.lat if hit.HasField("lat") else None,
        hit.datetime.ToDatetime(UTC) if hit.HasField("datetime") else None,
    )


def _line(message: str) -> str:
    """One line: whatever an error message drags along in further lines stays here."""
    line = message.partition("\n")[0]
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[: _MAX_MESSAGE_CHARS - 1] + "…"
