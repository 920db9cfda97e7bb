"""Between the wire format and the domain: the only module that sees both."""

from datetime import UTC, datetime
from typing import Any

import grpc
from google.protobuf.timestamp_pb2 import Timestamp
from google.rpc import error_details_pb2, status_pb2

from orbithash.search.protocol.description import Description, ShardStatus
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
from orbithash.search.protocol.queries import INCLUDABLE, MAX_EXAMPLES, Answer, Coverage, Cursor, Example, Hit, Query
from orbithash.search.protocol.rows import Row
from orbithash.v1 import search_pb2

__all__ = [
    "REQUEST_ID",
    "answer_from_pb",
    "answer_to_pb",
    "error_from_pb",
    "error_to_pb",
    "query_from_pb",
    "query_to_pb",
]

# Of the metadata, at both ends of a call.
REQUEST_ID = "orbithash-request-id"

_DOMAIN = "orbithash"
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COLUMNS = {name: search_pb2.Column.Value(f"COLUMN_{name.upper()}") for name in INCLUDABLE}
_NAMES = {number: name for name, number in _COLUMNS.items()}
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
# Errors travel in trailing metadata, of which gRPC carries 8 KiB: twice this text in its longest encoding fits.
_MAX_MESSAGE_CHARS = 300


def example_to_pb(example: Example) -> search_pb2.Example:
    """The message for an example that `Query.check` lets pass."""
    kind, value = _given(example)
    return search_pb2.Example(**{kind: value})


def query_to_pb(query: Query) -> search_pb2.SearchRequest:
    """The request for a query that `Query.check` lets pass."""
    request = search_pb2.SearchRequest(
        k=query.k,
        radius=query.radius,
        filter=query.filter,
        include=[_COLUMNS[name] for name in query.include],
        min_coverage=query.min_coverage,
    )
    if query.after is not None:
        request.after.CopyFrom(search_pb2.Cursor(distance=query.after.distance, id=query.after.id))
    if query.positives:
        request.examples.positives.extend(map(example_to_pb, query.positives))
        request.examples.negatives.extend(map(example_to_pb, query.negatives))
    else:
        request.MergeFrom(search_pb2.SearchRequest(**dict([_given(query)])))
    return request


def query_from_pb(request: search_pb2.SearchRequest) -> Query:
    """The query of a request, unchecked; `InvalidQuery` for columns that are none."""
    kind = request.WhichOneof("query")
    given = {} if kind in (None, "examples") else {kind: getattr(request, kind)}
    # Before anything is made of them: a message has room for millions.
    num_examples = len(request.examples.positives) + len(request.examples.negatives)
    if num_examples > MAX_EXAMPLES:
        raise InvalidQuery(("examples", f"at most {MAX_EXAMPLES} examples are allowed, got {num_examples}"))
    if len(request.include) > len(_NAMES):
        raise InvalidQuery(("include", f"at most {len(_NAMES)} columns, got {len(request.include)}"))
    if unknown := [number for number in request.include if number not in _NAMES]:
        raise InvalidQuery(("include", f"no column has the number {unknown[0]}; there are {dict(_NAMES)}"))
    return Query(
        **given,
        positives=tuple(map(_example_from_pb, request.examples.positives)),
        negatives=tuple(map(_example_from_pb, request.examples.negatives)),
        k=request.k,
        radius=request.radius if request.HasField("radius") else None,
        filter=request.filter,
        after=Cursor(request.after.distance, request.after.id) if request.HasField("after") else None,
        include=tuple(_NAMES[number] for number in request.include),
        min_coverage=request.min_coverage,
    )


def _given(example: Example) -> tuple[str, Any]:
    return next(
        (name, getattr(example, name))
        for name in ("image", "text", "code", "key")
        if getattr(example, name) is not None
    )


def _example_from_pb(message: search_pb2.Example) -> Example:
    kind = message.WhichOneof("example")
    return Example(**({} if kind is None else {kind: getattr(message, kind)}))


def row_to_pb(row: Row) -> search_pb2.Row:
    """The message for a row that `Row.check` lets pass."""
    names = ("image", "code", "label", "caption", "lon", "lat", "footprint", "thumbnail")
    known: dict[str, Any] = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
    return search_pb2.Row(key=row.key, uri=row.uri, datetime=_time_to_pb(row.datetime), **known)


def row_from_pb(message: search_pb2.Row) -> Row:
    """The row of a message, unchecked; `InvalidQuery` for a time out of range."""
    kind = message.WhichOneof("content")
    optional = {
        name: getattr(message, name)
        for name in ("label", "caption", "lon", "lat", "footprint", "thumbnail")
        if message.HasField(name)
    }
    try:
        time = _time_from_pb(message, "datetime")
    except (ValueError, OverflowError) as error:
        raise InvalidQuery(("datetime", f"out of range (row {message.key[:80]!r})")) from error
    return Row(
        key=message.key,
        uri=message.uri,
        datetime=time,
        **({} if kind is None else {kind: getattr(message, kind)}),
        **optional,
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
        next=None if answer.next is None else search_pb2.Cursor(distance=answer.next.distance, id=answer.next.id),
        matching_rows=answer.matching_rows,
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
        Cursor(response.next.distance, response.next.id) if response.HasField("next") else None,
        response.matching_rows if response.HasField("matching_rows") else None,
    )


def result_to_pb(outcome: Answer | SearchError) -> search_pb2.SearchResult:
    """What became of one query of a batch."""
    if isinstance(outcome, Answer):
        return search_pb2.SearchResult(response=answer_to_pb(outcome))
    return search_pb2.SearchResult(error=error_to_pb(outcome))


def result_from_pb(result: search_pb2.SearchResult) -> Answer | SearchError:
    """The inverse of `result_to_pb`."""
    if result.HasField("response"):
        return answer_from_pb(result.response)
    return error_from_pb(result.error) or GatewayError(result.error.message)


def description_to_pb(description: Description) -> search_pb2.DescribeResponse:
    """The response that carries a description."""
    return search_pb2.DescribeResponse(
        rows=description.rows,
        bits=description.bits,
        model_id=description.model_id,
        archive_version=description.archive_version,
        index=description.index,
        has_text=description.has_text,
        shards=[
            search_pb2.ShardStatus(rows=shard.rows, replicas=shard.replicas, healthy_replicas=shard.healthy_replicas)
            for shard in description.shards
        ],
        orbithash_version=description.orbithash_version,
    )


def description_from_pb(response: search_pb2.DescribeResponse) -> Description:
    """The description that a response carries."""
    return Description(
        response.rows,
        response.bits,
        response.model_id,
        response.archive_version,
        response.index,
        response.has_text,
        tuple(ShardStatus(shard.rows, shard.replicas, shard.healthy_replicas) for shard in response.shards),
        response.orbithash_version,
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
    extra: dict[str, Any] = hit.extra
    return search_pb2.Hit(
        rank=hit.rank,
        distance=hit.distance,
        id=hit.id,
        key=hit.key,
        label=hit.label,
        lon=hit.lon,
        lat=hit.lat,
        datetime=_time_to_pb(hit.datetime),
        **extra,
    )


def _hit_from_pb(message: search_pb2.Hit) -> Hit:
    hit: Any = message
    return Hit(
        hit.rank,
        hit.distance,
        hit.id,
        hit.key,
        hit.label if hit.HasField("label") else None,
        hit.lon if hit.HasField("lon") else None,
        hit.lat if hit.HasField("lat") else None,
        _time_from_pb(hit, "datetime"),
        {name: getattr(hit, name) for name in INCLUDABLE if hit.HasField(name)},
    )


def _time_to_pb(time: datetime | None) -> Timestamp | None:
    if time is None:
        return None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def _time_from_pb(message: Any, field: str) -> datetime | None:
    if not message.HasField(field):
        return None
    time: datetime = getattr(message, field).ToDatetime(UTC)
    return time


def _line(message: str) -> str:
    """One line: whatever an error message drags along in further lines stays here."""
    line = message.partition("\n")[0]
    return line if len(line) <= _MAX_MESSAGE_CHARS else line[: _MAX_MESSAGE_CHARS - 1] + "…"
