"""Conversion of queries, answers, rows and descriptions to protobuf messages and back."""

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

from google.protobuf.field_mask_pb2 import FieldMask

from orbithash.search.protocol.description import Description, ShardStatus
from orbithash.search.protocol.errors import GatewayError, InvalidQuery, SearchError
from orbithash.search.protocol.hits import RowHits, delimited, hit_from_pb, hit_to_pb, time_from_pb, time_to_pb
from orbithash.search.protocol.queries import (
    INCLUDABLE,
    MAX_EXAMPLES,
    Answer,
    Column,
    Coverage,
    Cursor,
    Example,
    Query,
    Rescore,
)
from orbithash.search.protocol.rows import UPDATABLE, Columns, Row, RowUpdate
from orbithash.search.protocol.statuses import error_from_pb, error_to_pb
from orbithash.v1 import search_pb2

__all__ = [
    "REQUEST_ID",
    "answer_from_pb",
    "answer_to_bytes",
    "coverage_from_pb",
    "coverage_to_pb",
    "description_from_pb",
    "description_to_pb",
    "include_from_pb",
    "include_to_pb",
    "query_from_pb",
    "query_to_pb",
    "result_from_pb",
    "results_to_bytes",
    "row_from_bytes",
    "row_from_pb",
    "row_to_pb",
    "update_from_pb",
    "update_to_pb",
]

# Tags of the fields SearchManyResponse.results and SearchResult.response.
_RESULTS, _RESPONSE = b"\x0a", b"\x0a"

# The metadata key of a request's id, in both directions.
REQUEST_ID = "orbithash-request-id"

_COLUMNS: dict[str, search_pb2.Column.ValueType] = {
    name: search_pb2.Column.Value(f"COLUMN_{name.upper()}") for name in INCLUDABLE
}
_RESCORES: dict[Rescore, search_pb2.Rescore.ValueType] = {
    "": search_pb2.RESCORE_UNSPECIFIED,
    "vector": search_pb2.RESCORE_VECTOR,
    "asymmetric": search_pb2.RESCORE_ASYMMETRIC,
}
_RESCORE_NAMES: dict[int, Rescore] = {int(number): name for name, number in _RESCORES.items()}
_NAMES: dict[int, Column] = {int(_COLUMNS[name]): name for name in INCLUDABLE}


def example_to_pb(example: Example) -> search_pb2.Example:
    """Return the message of an example that passes `Query.check`."""
    (kind,) = example.given()
    given: dict[str, Any] = {kind: getattr(example, kind)}
    if example.weight != 1:
        given["weight"] = example.weight
    return search_pb2.Example(**given)


def query_to_pb(query: Query) -> search_pb2.SearchRequest:
    """Return the request for a query that passes `Query.check`."""
    request = search_pb2.SearchRequest(
        k=query.k,
        radius=query.radius,
        filter=query.filter,
        include=include_to_pb(query.include),
        min_coverage=query.min_coverage,
    )
    if query.rescore:
        request.rescore, request.oversampling = _RESCORES[query.rescore], query.oversampling
    if query.after is not None:
        distance, row = query.after
        request.after.CopyFrom(search_pb2.Cursor(distance=distance, id=row))
    if query.positives:
        request.examples.positives.extend(map(example_to_pb, query.positives))
        request.examples.negatives.extend(map(example_to_pb, query.negatives))
    else:
        (kind,) = query.given()
        given: dict[str, Any] = {kind: getattr(query, kind)}
        request.MergeFrom(search_pb2.SearchRequest(**given))
    return request


def query_from_pb(request: search_pb2.SearchRequest) -> Query:
    """Return the query of a request, unchecked. Raises `InvalidQuery` for unknown columns and too many examples."""
    kind = request.WhichOneof("query")
    given: dict[str, Any] = {"k": request.k}
    if kind == "examples":
        examples = request.examples
        # Checked before the conversion: a message has room for millions.
        num_examples = len(examples.positives) + len(examples.negatives)
        if num_examples > MAX_EXAMPLES:
            raise InvalidQuery(("examples", f"at most {MAX_EXAMPLES} examples are allowed, got {num_examples}"))
        given["positives"] = tuple(map(_example_from_pb, examples.positives))
        given["negatives"] = tuple(map(_example_from_pb, examples.negatives))
    elif kind is not None:
        given[kind] = getattr(request, kind)
    if request.HasField("radius"):
        given["radius"] = request.radius
    if request.HasField("after"):
        given["after"] = Cursor(request.after.distance, request.after.id)
    if request.HasField("oversampling"):
        given["oversampling"] = request.oversampling
    return Query(
        **given,
        filter=request.filter,
        include=include_from_pb(request.include),
        min_coverage=request.min_coverage,
        rescore=_rescore_from_pb(request.rescore),
    )


def _rescore_from_pb(number: int) -> Rescore:
    name = _RESCORE_NAMES.get(number)
    if name is None:
        raise InvalidQuery(("rescore", f"unknown way of rescoring {number}; see Rescore"))
    return name


def _example_from_pb(message: search_pb2.Example) -> Example:
    kind = message.WhichOneof("example")
    given: dict[str, Any] = {} if kind is None else {kind: getattr(message, kind)}
    if message.HasField("weight"):
        given["weight"] = message.weight
    return Example(**given)


def include_to_pb(include: Sequence[str]) -> list[search_pb2.Column.ValueType]:
    """Return the numbers of columns that pass `check_include`."""
    return [_COLUMNS[name] for name in include]


def include_from_pb(numbers: Sequence[int]) -> tuple[Column, ...]:
    """Return the names of columns. Raises `InvalidQuery` for unknown columns and for too many of them."""
    if len(numbers) > len(_NAMES):
        raise InvalidQuery(("include", f"at most {len(_NAMES)} columns, got {len(numbers)}"))
    if unknown := [number for number in numbers if number not in _NAMES]:
        raise InvalidQuery(("include", f"no column has the number {unknown[0]}; allowed: {dict(_NAMES)}"))
    return tuple(_NAMES[number] for number in numbers)


def row_to_pb(row: Row) -> search_pb2.Row:
    """Return the message of a row."""
    names = (
        "image",
        "code",
        "vector",
        "label",
        "caption",
        "lon",
        "lat",
        "footprint",
        "thumbnail",
        "id",
        "stored_vector",
    )
    known: dict[str, Any] = {name: getattr(row, name) for name in names if getattr(row, name) is not None}
    return search_pb2.Row(key=row.key, uri=row.uri, datetime=time_to_pb(row.datetime), **known)


def row_from_pb(message: search_pb2.Row) -> Row:
    """Return the row of a message, unchecked. Raises `InvalidQuery` for a time out of range."""
    kind = message.WhichOneof("content")
    return Row(
        key=message.key,
        uri=message.uri,
        id=message.id if message.HasField("id") else None,
        stored_vector=message.stored_vector if message.HasField("stored_vector") else None,
        **({} if kind is None else {kind: getattr(message, kind)}),
        **_columns_from_pb(message, [name for name in UPDATABLE if name != "uri"]),
    )


def row_from_bytes(data: bytes) -> Row:
    """Return the row of a serialised `Hit`, as the shards return rows."""
    message = search_pb2.Hit.FromString(data)
    hit = hit_from_pb(message)
    # What a row calls `vector` is the input of the model.
    extra: dict[str, Any] = {"stored_vector" if name == "vector" else name: value for name, value in hit.extra.items()}
    columns = {"label": hit.label, "lon": hit.lon, "lat": hit.lat, "datetime": hit.datetime}
    return Row(key=hit.key, id=hit.id, **columns, **extra)  # type: ignore[arg-type]


def update_to_pb(update: RowUpdate) -> search_pb2.RowUpdate:
    """Return the message of an update that passes `RowUpdate.check`."""
    known: dict[str, Any] = {name: value for name, value in update.columns.items() if value is not None}
    if "datetime" in known:
        known["datetime"] = time_to_pb(known["datetime"])
    return search_pb2.RowUpdate(row=search_pb2.Row(key=update.key, **known), columns=FieldMask(paths=update.columns))


def update_from_pb(message: search_pb2.RowUpdate) -> RowUpdate:
    """Return the update of a message, unchecked except for the names of its columns. Raises `InvalidQuery`."""
    row = message.row
    names = list(message.columns.paths)
    where = f"(row {row.key[:80]!r})"
    if unknown := [name for name in names if name not in UPDATABLE]:
        allowed = ", ".join(UPDATABLE)
        raise InvalidQuery(("columns", f"unknown column {unknown[0][:80]!r}; columns to update: {allowed} {where}"))
    if row.WhichOneof("content") is not None or row.HasField("id"):
        raise InvalidQuery(("row", f"an update changes neither image nor code nor vector nor id {where}"))
    given: dict[str, Any] = {**dict.fromkeys(names), **_columns_from_pb(row, names)}
    if "uri" in names:
        given["uri"] = row.uri or None
    columns: Columns = given  # type: ignore[assignment]
    return RowUpdate(row.key, columns)


def _columns_from_pb(message: search_pb2.Row, names: Iterable[str]) -> dict[str, Any]:
    """Return the columns of a message that are set, uri left out."""
    row: Any = message
    columns = {name: getattr(row, name) for name in names if name not in ("uri", "datetime") and row.HasField(name)}
    if "datetime" in names:
        try:
            columns["datetime"] = time_from_pb(row, "datetime")
        except (ValueError, OverflowError) as error:
            raise InvalidQuery(("datetime", f"out of range (row {row.key[:80]!r})")) from error
    return columns


def coverage_to_pb(coverage: Coverage) -> search_pb2.Coverage:
    """Return the message of a coverage."""
    return search_pb2.Coverage(
        searched_rows=coverage.searched_rows,
        total_rows=coverage.total_rows,
        fraction=coverage.fraction,
        answered_shards=coverage.answered_shards,
        total_shards=coverage.total_shards,
    )


def coverage_from_pb(message: search_pb2.Coverage) -> Coverage:
    """Return the coverage of a message."""
    return Coverage(message.searched_rows, message.total_rows, message.answered_shards, message.total_shards)


def answer_to_bytes(answer: Answer) -> bytes:
    """Return the serialised `SearchResponse` that carries an answer."""
    head = search_pb2.SearchResponse(
        ties_at_cutoff=answer.ties_at_cutoff,
        took_ms=answer.took_ms,
        matching_rows=answer.matching_rows,
        shortlist_radius=answer.shortlist_radius,
        is_shortlist_bounded=answer.is_shortlist_bounded,
    )
    if answer.next is not None:
        head.next.distance, head.next.id = answer.next
    if isinstance(answer.hits, RowHits):
        # Without an object for each hit.
        hits = answer.hits.serialised()
    else:
        head.hits.extend(map(hit_to_pb, answer.hits))
        hits = b""
    same = _same_fields(answer.coverage, answer.model_id, answer.archive_version, answer.is_exact)
    return b"".join((hits, head.SerializeToString(), same))


@lru_cache(64)
def _same_fields(coverage: Coverage, model_id: str, archive_version: int, is_exact: bool) -> bytes:
    """Return the fields of a `SearchResponse` that are the same in most answers."""
    return search_pb2.SearchResponse(
        coverage=coverage_to_pb(coverage),
        model_id=model_id,
        archive_version=archive_version,
        is_exact=is_exact,
    ).SerializeToString()


def answer_from_pb(response: search_pb2.SearchResponse) -> Answer:
    """Return the answer of a response."""
    return Answer(
        tuple(hit_from_pb(hit) for hit in response.hits),
        response.ties_at_cutoff,
        coverage_from_pb(response.coverage),
        response.took_ms,
        response.model_id,
        response.archive_version,
        Cursor(response.next.distance, response.next.id) if response.HasField("next") else None,
        response.matching_rows if response.HasField("matching_rows") else None,
        response.is_exact,
        response.shortlist_radius if response.HasField("shortlist_radius") else None,
        response.is_shortlist_bounded,
    )


def results_to_bytes(outcomes: Iterable[Answer | SearchError]) -> bytes:
    """Return the serialised `SearchManyResponse` that carries the outcomes of the queries of a batch."""
    return b"".join(delimited(_RESULTS, _result_to_bytes(outcome)) for outcome in outcomes)


def _result_to_bytes(outcome: Answer | SearchError) -> bytes:
    if isinstance(outcome, Answer):
        return delimited(_RESPONSE, answer_to_bytes(outcome))
    return search_pb2.SearchResult(error=error_to_pb(outcome)).SerializeToString()


def result_from_pb(result: search_pb2.SearchResult) -> Answer | SearchError:
    """Return the outcome of one query of a batch."""
    if result.HasField("response"):
        return answer_from_pb(result.response)
    return error_from_pb(result.error) or GatewayError(result.error.message)


def description_to_pb(description: Description) -> search_pb2.DescribeResponse:
    """Return the response that carries a description."""
    return search_pb2.DescribeResponse(
        rows=description.rows,
        bits=description.bits,
        model_id=description.model_id,
        archive_version=description.archive_version,
        index=description.index,
        has_text=description.has_text,
        shards=[
            search_pb2.ShardStatus(
                rows=shard.rows,
                replicas=shard.replicas,
                healthy_replicas=shard.healthy_replicas,
                segments=shard.segments,
                memory_bytes=shard.memory_bytes,
            )
            for shard in description.shards
        ],
        orbithash_version=description.orbithash_version,
        num_features=description.num_features,
        embedding=description.embedding,
        is_exact=description.is_exact,
        gateways=description.gateways,
        vector_dims=description.vector_dims,
        vector_scale=description.vector_scale,
        has_views=description.has_views,
    )


def description_from_pb(response: search_pb2.DescribeResponse) -> Description:
    """Return the description of a response."""
    return Description(
        response.rows,
        response.bits,
        response.model_id,
        response.archive_version,
        response.index,
        response.has_text,
        tuple(
            ShardStatus(shard.rows, shard.replicas, shard.healthy_replicas, shard.segments, shard.memory_bytes)
            for shard in response.shards
        ),
        response.orbithash_version,
        response.num_features,
        response.embedding if response.HasField("embedding") else None,
        response.is_exact,
        response.gateways,
        response.vector_dims,
        response.vector_scale,
        response.has_views,
    )
