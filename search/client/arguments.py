"""From the arguments of the clients' methods to queries and messages that a gateway accepts."""

import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

from orbithash.search.protocol import convert
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import (
    MAX_BATCH_HITS,
    MAX_LARGE_ROWS,
    MAX_QUERIES,
    Query,
    check_filter,
    check_include,
    has_large,
)
from orbithash.search.protocol.rankings import content_query
from orbithash.search.protocol.rows import MAX_ROWS, Columns, Row, RowUpdate, check_ids, check_keys
from orbithash.v1 import search_pb2

__all__ = [
    "as_content",
    "as_queries",
    "as_query",
    "batches",
    "check_has_pages",
    "count_request",
    "delete_requests",
    "get_requests",
    "scroll_request",
    "update_requests",
    "upsert_requests",
]

# A gateway accepts messages of up to 16 MiB; a row or a query may have an image of 10 MiB.
_MAX_MESSAGE_BYTES = 6 * 2**20

Item = TypeVar("Item", Row, RowUpdate)


def as_query(query: Query | None, **fields: Any) -> Query:
    """Return `query`, or the query with these fields, checked; fields with None have their defaults.

    Raises `InvalidQuery`, also for a query together with fields.
    """
    given = _given(fields)
    if query is None:
        query = Query(**given)
    elif given:
        raise InvalidQuery(
            (
                "query",
                f"give a Query or fields, not both; got a Query and {', '.join(given)}. Change a query with "
                "dataclasses.replace",
            )
        )
    if not isinstance(query, Query):
        raise InvalidQuery(("query", f"a Query, or fields such as key='a.tif'; got {type(query).__name__}"))
    query.check()
    return query


def as_queries(queries: Iterable[Query] | None, **fields: Any) -> list[Query]:
    """Return `queries`, or one query per image, text, vector, key or code, checked.

    Raises `InvalidQuery`, also for queries together with fields and for more than one kind of examples.
    """
    given = _given(fields)
    plural = {"images": "image", "texts": "text", "vectors": "vector", "keys": "key", "codes": "code"}
    kinds = [name for name in plural if name in given]
    if queries is not None:
        return [as_query(query, **fields) for query in _listed("queries", queries)]
    if len(kinds) != 1:
        *first, last = plural
        got = " and ".join(kinds) or "none"
        raise InvalidQuery(("queries", f"give queries or exactly one of {', '.join(first)} and {last}, got {got}"))
    (kind,) = kinds
    shared = {name: value for name, value in given.items() if name != kind}
    return [as_query(None, **{plural[kind]: item}, **shared) for item in _listed(kind, given[kind])]


def as_content(**content: Any) -> tuple[str, Any]:
    """Return the kind and the value of the one content that is given, checked. Raises `InvalidQuery`."""
    query = content_query(_given(content))
    (kind,) = query.given()
    return kind, getattr(query, kind)


def check_has_pages(query: Query) -> None:
    """Raise `InvalidQuery` if the answer to a query has no further pages."""
    if query.rescore:
        raise InvalidQuery(("rescore", "a rescored answer has no pages; ask for more hits with a larger k"))


def batches(queries: Sequence[Query]) -> Iterator[search_pb2.SearchManyRequest]:
    """Yield requests with all queries, in order, each within the gateway's limits."""
    batch: list[search_pb2.SearchRequest] = []
    hits = large = size = 0
    for query in queries:
        request = convert.query_to_pb(query)
        num_bytes, num_large = request.ByteSize(), query.k if has_large(query.include) else 0
        if batch and (
            len(batch) == MAX_QUERIES
            or hits + query.shortlist_size > MAX_BATCH_HITS
            or large + num_large > MAX_LARGE_ROWS
            or size + num_bytes > _MAX_MESSAGE_BYTES
        ):
            yield search_pb2.SearchManyRequest(requests=batch)
            batch, hits, large, size = [], 0, 0, 0
        batch.append(request)
        hits, large, size = hits + query.shortlist_size, large + num_large, size + num_bytes
    if batch:
        yield search_pb2.SearchManyRequest(requests=batch)


def get_requests(
    keys: Iterable[str] | None, ids: Iterable[int] | None, include: Sequence[str]
) -> Iterator[search_pb2.GetRequest]:
    """Yield requests for the rows with these keys, or with these ids. Raises `InvalidQuery`."""
    if (keys is None) == (ids is None):
        raise InvalidQuery(("keys", f"give keys or ids, got {'neither' if keys is None else 'both'}"))
    check_include(include)
    limit = min(MAX_ROWS, MAX_LARGE_ROWS) if has_large(include) else MAX_ROWS
    columns = convert.include_to_pb(include)
    if keys is not None:
        for chunk in _chunks(keys, limit):
            yield search_pb2.GetRequest(keys=chunk, include=columns)
        return
    listed = [] if ids is None else list(ids)
    check_ids(listed)
    for start in range(0, len(listed), limit):
        yield search_pb2.GetRequest(ids=listed[start : start + limit], include=columns)


def count_request(filter_text: str) -> search_pb2.CountRequest:
    """Return the request for the number of rows that pass a filter. Raises `InvalidQuery`."""
    check_filter(filter_text)
    return search_pb2.CountRequest(filter=filter_text)


def scroll_request(
    filter_text: str, after: int | None, page_size: int, include: Sequence[str]
) -> search_pb2.ScrollRequest:
    """Return the request for one page of rows. Raises `InvalidQuery`."""
    check_filter(filter_text)
    check_include(include)
    if not 1 <= page_size <= MAX_ROWS:
        raise InvalidQuery(("page_size", f"from 1 to {MAX_ROWS:,} rows, got {page_size!r}"))
    if after is not None and not 0 <= after < 2**64:
        raise InvalidQuery(("after", f"the id of a row, got {after!r}"))
    return search_pb2.ScrollRequest(
        filter=filter_text, after=after, limit=page_size, include=convert.include_to_pb(include)
    )


def upsert_requests(rows: Iterable[Row]) -> Iterator[search_pb2.UpsertRequest]:
    """Yield requests that write rows, within the gateway's limits. Raises `InvalidQuery`."""
    for piece in _pieces(rows):
        yield search_pb2.UpsertRequest(rows=map(convert.row_to_pb, piece))


def update_requests(updates: Mapping[str, Columns]) -> Iterator[search_pb2.UpdateRequest]:
    """Yield requests that update rows, within the gateway's limits. Raises `InvalidQuery`."""
    for piece in _pieces(RowUpdate(key, columns) for key, columns in updates.items()):
        yield search_pb2.UpdateRequest(updates=map(convert.update_to_pb, piece))


def delete_requests(keys: Iterable[str] | None, filter_text: str | None) -> Iterator[search_pb2.DeleteRequest]:
    """Yield requests that remove rows, either by keys or by filter. Raises `InvalidQuery`."""
    if (keys is None) == (filter_text is None):
        raise InvalidQuery(("keys", f"give keys or a filter, got {'neither' if keys is None else 'both'}"))
    if keys is not None:
        for chunk in _chunks(keys, MAX_ROWS):
            yield search_pb2.DeleteRequest(keys=chunk)
    else:
        check_filter(filter_text or "")
        if not filter_text:
            raise InvalidQuery(("filter", "an empty filter would remove all rows; write NOT key IS NULL to do so"))
        yield search_pb2.DeleteRequest(filter=filter_text)


def _given(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields that are not None, sequences as tuples."""
    given = {name: value for name, value in fields.items() if value is not None}
    for name in given.keys() & {"positives", "negatives", "include"}:
        # A string is refused later.
        given[name] = given[name] if isinstance(given[name], str) else tuple(given[name])
    return given


def _listed(field: str, items: Iterable[Any]) -> Iterable[Any]:
    """Return `items`. Raises `InvalidQuery` for a single string or bytes, which would be split into its parts."""
    if isinstance(items, str | bytes):
        raise InvalidQuery((field, f"a sequence such as ['a.tif'], got one {type(items).__name__}: {items[:80]!r}"))
    return items


def _pieces(items: Iterable[Item]) -> Iterator[list[Item]]:
    piece: list[Item] = []
    size = 0
    for item in items:
        item.check()
        if piece and (len(piece) == MAX_ROWS or size + item.num_bytes > _MAX_MESSAGE_BYTES):
            yield piece
            piece, size = [], 0
        piece.append(item)
        size += item.num_bytes
    if piece:
        yield piece


def _chunks(keys: Iterable[str], limit: int) -> Iterator[list[str]]:
    iterator = iter(_listed("keys", keys))
    while chunk := list(itertools.islice(iterator, limit)):
        check_keys(chunk)
        yield chunk
