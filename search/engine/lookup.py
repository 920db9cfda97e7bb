"""Rows of a snapshot by key or by filter, without a search."""

import asyncio
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orbithash.search.engine.owners import ask_shards, read_hits
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Ids
from orbithash.search.protocol.convert import row_from_bytes
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_LARGE_ROWS, Column, check_filter, check_include, has_large
from orbithash.search.protocol.rows import MAX_ROWS, Row, check_ids, check_keys
from orbithash.search.shards.interface import ShardClient

__all__ = ["RowPage", "count_rows", "get_rows", "ids_of", "rows_of_ids", "scroll_rows"]

# Seconds until a call of a shard has failed; callers with less time cancel it. A new filter is evaluated on all rows.
_TIMEOUT_S = 30.0
# Ids of one page of `ids_of`, from each shard.
_MAX_READ = 100_000


class RowPage(NamedTuple):
    """Rows of one version of the archive; `next` is the id after which the next page begins, None on the last page."""

    rows: list[Row]
    next: int | None
    archive_version: int


async def get_rows(snapshot: Snapshot, keys: Sequence[str], include: Sequence[Column]) -> RowPage:
    """Return the rows with these keys, in their order; keys without a row are skipped.

    Raises `InvalidQuery` for invalid keys or columns, and for more than `MAX_ROWS` keys; `Unavailable`.
    """
    _check_limit("keys", len(keys), include)
    check_keys(keys)
    check_include(include)
    found = await asyncio.to_thread(snapshot.archive.find, keys)
    ids = np.array([found[key] for key in keys if key in found], np.uint64)
    return RowPage(await _rows(snapshot, ids, include), None, snapshot.archive.version)


async def rows_of_ids(snapshot: Snapshot, ids: Sequence[int], include: Sequence[Column]) -> RowPage:
    """Return the rows with these ids, in their order; ids without a row are skipped. Raises as `get_rows`."""
    _check_limit("ids", len(ids), include)
    check_ids(ids)
    check_include(include)
    asked = np.array(ids, np.uint64)
    here = await asyncio.to_thread(snapshot.archive.exist, asked)
    return RowPage(await _rows(snapshot, asked[here], include), None, snapshot.archive.version)


async def count_rows(snapshot: Snapshot, filter_text: str) -> tuple[int, int]:
    """Return the number of rows that pass a filter and the archive version; "" passes all rows.

    Raises `InvalidQuery` and `Unavailable`.
    """
    check_filter(filter_text)
    if not filter_text:
        return snapshot.num_rows, snapshot.archive.version
    counts = await ask_shards([shard.count(filter_text, _TIMEOUT_S) for shard in snapshot.shards], _TIMEOUT_S)
    return sum(counts), snapshot.archive.version


async def scroll_rows(
    snapshot: Snapshot, filter_text: str, after: int | None, limit: int, include: Sequence[Column]
) -> RowPage:
    """Return at most `limit` rows that pass a filter and have an id larger than `after`, ordered by id.

    Raises `InvalidQuery` and `Unavailable`.
    """
    _check_limit("limit", limit, include)
    check_include(include)
    check_filter(filter_text)
    # One more, to know whether another page follows.
    calls = [shard.scroll(filter_text, after, limit + 1, _TIMEOUT_S) for shard in snapshot.shards]
    ids = np.sort(np.concatenate(await ask_shards(calls, _TIMEOUT_S)))
    page = ids[:limit]
    rows = await _rows(snapshot, page, include)
    return RowPage(rows, int(page[-1]) if len(ids) > limit else None, snapshot.archive.version)


async def ids_of(snapshot: Snapshot, filter_text: str) -> Ids:
    """Return the ids of all rows that pass a filter, ascending. Raises `InvalidQuery` and `Unavailable`."""
    check_filter(filter_text)
    return np.sort(np.concatenate([await _passing(shard, filter_text) for shard in snapshot.shards]))


async def _passing(shard: ShardClient, filter_text: str) -> Ids:
    """Return the ids of all rows of a shard that pass a filter, ascending."""
    pages = [np.empty(0, np.uint64)]
    while True:
        after = int(pages[-1][-1]) if len(pages[-1]) else None
        (page,) = await ask_shards([shard.scroll(filter_text, after, _MAX_READ, _TIMEOUT_S)], _TIMEOUT_S)
        pages.append(page)
        if len(page) < _MAX_READ:
            return np.concatenate(pages)


async def _rows(snapshot: Snapshot, ids: Ids, include: Sequence[Column]) -> list[Row]:
    return [row_from_bytes(row) for row in await read_hits(snapshot, ids, include, _TIMEOUT_S)]


def _check_limit(field: str, number: int, include: Sequence[Column]) -> None:
    limit = min(MAX_ROWS, MAX_LARGE_ROWS) if has_large(include) else MAX_ROWS
    if not 1 <= number <= limit:
        raise InvalidQuery((field, f"from 1 to {limit:,} rows, got {number:,}"))
