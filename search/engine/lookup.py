"""Rows of a snapshot by key or by filter, without a search."""

import asyncio
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_LARGE_ROWS, Column, check_filter, check_include, has_large
from orbithash.search.protocol.rows import MAX_ROWS, Row, check_keys

if TYPE_CHECKING:
    from orbithash.search.index.shard import Ids

__all__ = ["RowPage", "count_rows", "get_rows", "keys_of", "scroll_rows"]

_COLUMNS = ("key", "label", "lon", "lat", "datetime")
# Every row has a key.
_ALL = "NOT key IS NULL"
# Ids of one read of keys.
_MAX_READ = 100_000


class RowPage(NamedTuple):
    """Rows of one version of the archive; `next` is the id after which the next page begins, None on the last page."""

    rows: list[Row]
    next: int | None
    archive_version: int


async def get_rows(snapshot: Snapshot, keys: Sequence[str], include: Sequence[Column]) -> RowPage:
    """Return the rows with these keys, in their order; keys without a row are skipped.

    Raises `InvalidQuery` for invalid keys or columns, and for more than `MAX_ROWS` keys.
    """
    _check_limit("keys", len(keys), include)
    check_keys(keys)
    check_include(include)

    def read() -> list[Row]:
        ids = snapshot.archive.find(keys)
        return _read(snapshot, [ids[key] for key in keys if key in ids], include)

    return RowPage(await asyncio.to_thread(read), None, snapshot.archive.version)


async def count_rows(snapshot: Snapshot, filter_text: str) -> tuple[int, int]:
    """Return the number of rows that pass a filter and the archive version; "" passes all rows.

    Raises `InvalidQuery`.
    """
    count = len(await _ids(snapshot, filter_text)) if filter_text else snapshot.num_rows
    return count, snapshot.archive.version


async def scroll_rows(
    snapshot: Snapshot, filter_text: str, after: int | None, limit: int, include: Sequence[Column]
) -> RowPage:
    """Return at most `limit` rows that pass a filter and have an id larger than `after`, ordered by id.

    Raises `InvalidQuery`.
    """
    _check_limit("limit", limit, include)
    check_include(include)
    ids = await _ids(snapshot, filter_text)
    begin = 0 if after is None else int(ids.searchsorted(np.uint64(after), side="right"))
    page = ids[begin : begin + limit].tolist()
    rows = await asyncio.to_thread(_read, snapshot, page, include)
    following = page[-1] if begin + limit < len(ids) else None
    return RowPage(rows, following, snapshot.archive.version)


async def keys_of(snapshot: Snapshot, filter_text: str) -> list[str]:
    """Return the keys of all rows that pass a filter, ordered by id. Raises `InvalidQuery`."""
    ids = await _ids(snapshot, filter_text)
    keys: list[str] = []
    for start in range(0, len(ids), _MAX_READ):
        table = await asyncio.to_thread(snapshot.archive.take, ids[start : start + _MAX_READ], ["key"])
        keys += table["key"].to_pylist()
    return keys


async def _ids(snapshot: Snapshot, filter_text: str) -> "Ids":
    """Return the ids uint64 [N] of the rows that pass a filter, ascending."""
    check_filter(filter_text)
    return (await snapshot.selections.get(filter_text or _ALL)).ids


def _read(snapshot: Snapshot, ids: Sequence[int], include: Sequence[Column]) -> list[Row]:
    if not ids:
        return []
    table: Any = snapshot.archive.take(np.array(ids, np.uint64), [*_COLUMNS, *include])
    rows = table.to_pylist()
    for row, id_ in zip(rows, ids, strict=True):
        row["id"] = id_
        if "code" in row:
            row["code"] = bytes(row["code"])
    return [Row(**row) for row in rows]


def _check_limit(field: str, number: int, include: Sequence[Column]) -> None:
    limit = min(MAX_ROWS, MAX_LARGE_ROWS) if has_large(include) else MAX_ROWS
    if not 1 <= number <= limit:
        raise InvalidQuery((field, f"from 1 to {limit:,} rows, got {number:,}"))
