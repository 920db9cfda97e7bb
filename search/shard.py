"""One part of an archive's codes, searched.

A shard gives each distinct code to FAISS once and keeps, beside it, the sorted ids of the rows that have it. FAISS so
decides nothing about ties: it says how far each distinct code is, and the order (distance, id) is made here. With an
exact index the answer is exact: all distinct codes up to the last hit's distance are known before rows are counted.

Shards never change. Rows that come, go or are left out by a filter make another shard, at the cost of a copy.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.indexes import build_index

__all__ = ["NO_HIT", "Counts", "Distances", "Ids", "Shard", "ShardAnswer", "part_of"]

Ids = npt.NDArray[np.uint64]
Distances = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

# The distance where a query has fewer hits than others: beyond every distance.
NO_HIT = np.iinfo(np.int32).max

# Bounds the scratch memory of one pass, whatever the number of queries.
_QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class ShardAnswer:
    """The nearest rows of one shard for Q queries, at most m of each.

    Attributes:
        distances: int32 [Q, m], ascending along a row; `NO_HIT` after a query's last hit.
        ids: uint64 [Q, m], ascending among equal distances; 0 after the last hit.
        ties: int64 [Q], how many rows of the shard lie at the distance of the last hit, the hits included and those of
            earlier pages not; 0 without hits.
    """

    distances: Distances
    ids: Ids
    ties: Counts

    @property
    def cutoffs(self) -> Distances:
        """int32 [Q]: the distance of each query's last hit, -1 without hits."""
        cutoffs: Distances = np.where(self.distances == NO_HIT, -1, self.distances).max(axis=1, initial=-1)
        return cutoffs


@dataclass(frozen=True)
class _Found:
    """Distinct codes found, flat: the query each was found for, its distance and its number."""

    query: Counts
    distance: Distances
    code: Counts

    def nearest_first(self) -> "_Found":
        order = np.lexsort((self.distance, self.query))
        return _Found(self.query[order], self.distance[order], self.code[order])


class _Rows(NamedTuple):
    """Rows by ascending (code, id): `counts[c]` of them have the distinct code c."""

    ids: Ids
    counts: Counts
    distinct: Codes

    @property
    def starts(self) -> Counts:
        """Rows with code c are ids[starts[c] : starts[c] + counts[c]]."""
        return np.cumsum(self.counts) - self.counts

    def kept(self, is_kept: npt.NDArray[np.bool_]) -> "_Rows":
        """Some of the rows."""
        counts = np.add.reduceat(is_kept, self.starts, dtype=np.int64) if len(self.ids) else self.counts
        return _Rows(self.ids[is_kept], counts[counts > 0], self.distinct[counts > 0])

    def joined(self, ids: Ids, codes: Codes) -> "_Rows":
        """These rows and others of new ids."""
        keys, new_keys = _sortable(self.distinct), _sortable(codes)
        unseen, first = np.unique(new_keys, return_index=True)
        is_new = ~_are_in(unseen, keys)
        places = np.searchsorted(keys, unseen[is_new])
        distinct = np.insert(self.distinct, places, codes[first[is_new]], axis=0)
        # A code moves up by the new ones before it.
        old = np.arange(len(keys))
        moved = old + np.searchsorted(places, old, side="right")
        numbers = np.concatenate([np.repeat(moved, self.counts), np.searchsorted(_sortable(distinct), new_keys)])
        all_ids = np.concatenate([self.ids, ids])
        order = np.lexsort((all_ids, numbers))
        return _Rows(all_ids[order], np.bincount(numbers, minlength=len(distinct)), distinct)


class Shard:
    """An index over ids uint64 [N] and codes uint8 [N, ceil(bits/8)], in any order; N may be 0.

    Safe for concurrent searches. A search uses the calling thread only.
    """

    def __init__(self, ids: Ids, codes: Codes, bits: int, index: str = "flat") -> None:
        """Raises `InputError` when ids and codes do not belong together, an id occurs twice or the index is unknown."""
        check_bits(bits)
        check_codes(codes, bits)
        if ids.dtype != np.uint64 or ids.ndim != 1 or codes.ndim != 2 or len(ids) != len(codes):
            raise InputError(
                f"a shard takes ids uint64 [N] and codes [N, B], got {ids.dtype} {ids.shape}, {codes.shape}"
            )
        if len(np.unique(ids)) != len(ids):
            raise InputError("a shard takes each id once")
        keys = _sortable(codes)
        order = np.lexsort((ids, keys))
        sorted_keys = keys[order]
        is_first = np.ones(len(ids), np.bool_)
        is_first[1:] = sorted_keys[1:] != sorted_keys[:-1]
        starts = np.flatnonzero(is_first)
        self._fill(bits, index, _Rows(ids[order], np.diff(starts, append=len(ids)), codes[order[starts]]))

    def _fill(self, bits: int, index: str, rows: _Rows) -> None:
        self.bits = bits
        self.num_rows = len(rows.ids)
        self._rows, self._starts = rows, rows.starts
        self._kind = index
        self._index = build_index(index, np.ascontiguousarray(rows.distinct))

    def _of(self, rows: _Rows) -> "Shard":
        """Another shard of this kind."""
        shard = Shard.__new__(Shard)
        shard._fill(self.bits, self._kind, rows)
        return shard

    def where(self, ids: Ids) -> "Shard":
        """The shard of those of its rows whose ids are among `ids`, which ascend."""
        return self._of(self._rows.kept(_are_in(self._rows.ids, ids)))

    def changed(self, removed: Ids, ids: Ids, codes: Codes) -> "Shard":
        """The shard without the rows `removed`, and with rows `ids`, in place of any that it had of these ids."""
        check_codes(codes, self.bits)
        gone = np.union1d(removed, ids)
        return self._of(self._rows.kept(~_are_in(self._rows.ids, gone)).joined(ids, codes))

    def search(
        self, queries: Codes, k: int, radius: int | None = None, after: tuple[int, int] | None = None
    ) -> ShardAnswer:
        """The `k` nearest rows of each query uint8 [Q, ceil(bits/8)], ordered by (distance, id); fewer if there are.

        `radius`: only rows at most so far. `after`: only rows that come after this (distance, id) in that order.
        """
        check_codes(queries, self.bits)
        if queries.ndim != 2 or k < 1:
            raise InputError(f"search takes queries [Q, B] and k from 1, got shape {queries.shape} and k {k}")
        width = min(k, self.num_rows)
        answer = ShardAnswer(
            np.full((len(queries), width), NO_HIT, np.int32),
            np.zeros((len(queries), width), np.uint64),
            np.zeros(len(queries), np.int64),
        )
        for start in range(0, len(queries) if width else 0, _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            answer.distances[part], answer.ids[part], answer.ties[part] = self._search(
                queries[part], width, radius, after
            )
        return answer

    def _search(
        self, queries: Codes, width: int, radius: int | None, after: tuple[int, int] | None
    ) -> tuple[Distances, Ids, Counts]:
        skipped, skipped_at_last = np.zeros((2, len(queries)), np.int64)
        if after is not None:
            skipped, skipped_at_last = self._ranks(queries, after)
        wanted = min(int(skipped.max()) + width, self.num_rows)
        if radius is not None and self._index.is_quick_within(radius):
            found = self._within(queries, radius)
        else:
            found = self._near_codes(queries, wanted)
        distances, ids = self._order(found, len(queries), wanted)
        columns = skipped[:, None] + np.arange(width)
        is_hit = columns < wanted
        columns = np.minimum(columns, wanted - 1)
        distances, ids = np.take_along_axis(distances, columns, 1), np.take_along_axis(ids, columns, 1)
        is_hit &= distances <= (NO_HIT - 1 if radius is None else radius)
        distances, ids = np.where(is_hit, distances, NO_HIT), np.where(is_hit, ids, np.uint64(0))
        last = ShardAnswer(distances, ids, skipped).cutoffs
        at_last = found.distance == last[found.query]
        ties = np.bincount(found.query[at_last], self._rows.counts[found.code[at_last]], len(queries)).astype(np.int64)
        if after is not None:
            ties -= np.where(last == after[0], skipped_at_last, 0)
        return distances, ids, ties

    def _ranks(self, queries: Codes, after: tuple[int, int]) -> tuple[Counts, Counts]:
        """How many rows are not after this (distance, id), and how many of them lie at its distance: [Q] each."""
        distance, row = after
        found = self._within(queries, distance)
        nearer, at = found.distance < distance, found.distance == distance
        counts = np.bincount(found.query[nearer], self._rows.counts[found.code[nearer]], len(queries)).astype(np.int64)
        num_at = np.zeros(len(queries), np.int64)
        for query, code in zip(found.query[at].tolist(), found.code[at].tolist(), strict=True):
            start = self._starts[code]
            ids = self._rows.ids[start : start + self._rows.counts[code]]
            num_at[query] += np.searchsorted(ids, np.uint64(row), side="right")
        return counts + num_at, num_at

    def _near_codes(self, queries: Codes, width: int) -> _Found:
        """All distinct codes up to each query's cut-off: the distance of the row in place `width`."""
        num_distinct = len(self._rows.counts)
        # More codes than rows are wanted, because whether those at the cut-off are complete shows only by one beyond
        # it. Where the surplus does not reach that far, the second pass below does.
        asked = min(width + min(max(3 * width, 64), 256), num_distinct)
        distances, codes = self._index.nearest(queries, asked)
        distances = np.where(codes < 0, NO_HIT, distances)
        covered = np.cumsum(np.where(codes < 0, 0, self._rows.counts[codes]), axis=1)
        last = np.minimum((covered < width).sum(axis=1), asked - 1)
        cutoffs = np.minimum(np.take_along_axis(distances, last[:, None], axis=1)[:, 0], NO_HIT - 1)
        complete = (distances[:, -1] > cutoffs) | (asked == num_distinct) | (not self._index.is_exact)
        query, column = np.nonzero((distances <= cutoffs[:, None]) & complete[:, None])
        parts = [_Found(query, distances[query, column], codes[query, column])]
        parts += self._each_within(queries, cutoffs, np.flatnonzero(~complete))
        return _Found(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.distance for part in parts]),
            np.concatenate([part.code for part in parts]),
        )

    def _within(self, queries: Codes, radius: int) -> _Found:
        """All distinct codes within the radius (inclusive) of each query."""
        limits, distances, codes = self._index.within(queries, min(radius, 8 * queries.shape[1]))
        return _Found(np.repeat(np.arange(len(queries)), np.diff(limits)), distances, codes)

    def _each_within(self, queries: Codes, radii: Distances, chosen: Counts) -> Iterator[_Found]:
        """All distinct codes within its own radius of each chosen query."""
        for radius in np.unique(radii[chosen]):
            members = chosen[radii[chosen] == radius]
            found = self._within(queries[members], int(radius))
            yield _Found(members[found.query], found.distance, found.code)

    def _order(self, found: _Found, num_queries: int, width: int) -> tuple[Distances, Ids]:
        """The first `width` rows [Q, width] in the order (distance, id)."""
        found = found.nearest_first()
        # A code's later ids cannot be among the hits once it has filled them alone.
        counts = np.minimum(self._rows.counts[found.code], width)
        # Nor can codes farther than the one with which the hits are full.
        before = np.cumsum(counts) - counts
        before -= before[np.searchsorted(found.query, found.query)]
        is_full = before + counts >= width
        last = np.full(num_queries, NO_HIT, np.int32)
        np.minimum.at(last, found.query[is_full], found.distance[is_full])
        is_near = found.distance <= last[found.query]
        found, counts = _Found(found.query[is_near], found.distance[is_near], found.code[is_near]), counts[is_near]
        total = int(counts.sum())
        within_code = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        ids = self._rows.ids[np.repeat(self._starts[found.code], counts) + within_code]
        query, distance = np.repeat(found.query, counts), np.repeat(found.distance, counts)
        order = np.lexsort((ids, distance, query))
        place = np.arange(total) - np.searchsorted(query[order], query[order])
        chosen = order[place < width]
        at = query[chosen], place[place < width]
        distances, rows = np.full((num_queries, width), NO_HIT, np.int32), np.zeros((num_queries, width), np.uint64)
        distances[at], rows[at] = distance[chosen], ids[chosen]
        return distances, rows


def _sortable(codes: Codes) -> npt.NDArray[Any]:
    """Each code [N, B] as one value; they sort as the codes' bytes do."""
    width = codes.shape[1]
    if width > 8:
        return np.ascontiguousarray(codes).view(f"S{width}").reshape(-1)
    words = np.zeros((len(codes), 8), np.uint8)
    words[:, :width] = codes
    return words.view(">u8").reshape(-1).astype(np.uint64)


def _are_in(values: npt.NDArray[Any], ascending: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Which of `values` are among `ascending`."""
    if not len(ascending):
        return np.zeros(len(values), np.bool_)
    places = np.minimum(np.searchsorted(ascending, values), len(ascending) - 1)
    return np.asarray(ascending[places] == values)


def part_of(ids: Ids, number: int, num_shards: int) -> npt.NDArray[np.bool_]:
    """Which rows belong to shard `number` of `num_shards`: ids are dealt like cards, so that new rows spread evenly."""
    return np.asarray(ids % np.uint64(num_shards) == number)
