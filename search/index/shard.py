"""One part of an archive's codes, searched.

A shard gives each distinct code to FAISS once and keeps, beside it, the sorted ids of the rows that have it. FAISS so
decides nothing about ties: it says how far each distinct code is, and the order (distance, id) is made here. With an
exact index the answer is exact: all distinct codes up to the last hit's distance are known before rows are counted.

Shards never change. Rows that come, go or are left out by a filter make another shard, at the cost of a copy.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.index.indexes import build_index

__all__ = ["NO_HIT", "Counts", "Distances", "Ids", "Shard", "ShardAnswer", "are_among", "part_of"]

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


class _Found(NamedTuple):
    """Distinct codes found for a query, nearest first: distances int32 [N], numbers int64 [N]."""

    distances: Distances
    codes: Counts


class _Hits(NamedTuple):
    """Rows found for a query in their order, and how many rows lie at the distance of the last one."""

    distances: Distances
    ids: Ids
    ties: int


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
        order = np.lexsort((ids, new_keys))
        ids, codes, new_keys = ids[order], codes[order], new_keys[order]
        # Before which code of these, and before which row.
        places = np.searchsorted(keys, new_keys)
        bounds = np.append(self.starts, len(self.ids))
        is_known = np.append(keys, keys[:1])[places] == new_keys if len(keys) else np.zeros(len(ids), np.bool_)
        rows = bounds[places]
        for new in np.flatnonzero(is_known).tolist():
            start, stop = bounds[places[new]], bounds[places[new] + 1]
            rows[new] = start + np.searchsorted(self.ids[start:stop], ids[new])
        is_first = ~is_known
        is_first[1:] &= new_keys[1:] != new_keys[:-1]
        counts = np.insert(self.counts, places[is_first], 0)
        distinct = np.insert(self.distinct, places[is_first], codes[is_first], axis=0)
        np.add.at(counts, np.searchsorted(_sortable(distinct), new_keys), 1)
        return _Rows(np.insert(self.ids, rows, ids), counts, distinct)


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
        self._rows, self._starts, self._counts = rows, rows.starts, rows.counts
        self._kind = index
        self._index = build_index(index, np.ascontiguousarray(rows.distinct))

    def _of(self, rows: _Rows) -> "Shard":
        """Another shard of this kind."""
        shard = Shard.__new__(Shard)
        shard._fill(self.bits, self._kind, rows)
        return shard

    def where(self, ids: Ids) -> "Shard":
        """The shard of those of its rows whose ids are among `ids`, which ascend."""
        return self._of(self._rows.kept(are_among(self._rows.ids, ids)))

    def changed(self, removed: Ids, ids: Ids, codes: Codes) -> "Shard":
        """The shard without the rows `removed`, and with rows `ids`, in place of any that it had of these ids."""
        check_codes(codes, self.bits)
        is_gone = are_among(self._rows.ids, np.union1d(removed, ids))
        return self._of(self._rows.kept(~is_gone).joined(ids, codes))

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
            part = queries[start : start + _QUERIES_AT_ONCE]
            # One by one: arrays as short as these cost less than what it takes to treat them together.
            for row, found in enumerate(self._found(part, width, radius, after), start):
                hits = self._first(found, width, radius, after)
                count = len(hits.distances)
                answer.distances[row, :count], answer.ids[row, :count], answer.ties[row] = hits
        return answer

    def _found(self, queries: Codes, width: int, radius: int | None, after: tuple[int, int] | None) -> Iterator[_Found]:
        """For each query all distinct codes up to its first `width` rows that count, and maybe some more."""
        if radius is not None and self._index.is_quick_within(radius):
            yield from self._within(queries, radius)
            return
        skipped = [0] * len(queries)
        if after is not None:
            skipped = [self._rank(found, after) for found in self._within(queries, after[0])]
        wanted = min(max(skipped) + width, self.num_rows)
        num_distinct = len(self._counts)
        # More codes than rows are wanted, because whether those at the cut-off are complete shows only by one beyond
        # it. Where the surplus does not reach that far, the second pass does.
        asked = min(wanted + min(max(3 * wanted, 64), 256), num_distinct)
        near = self._index.nearest(queries, asked)
        for row in range(len(queries)):
            distances, codes = near.distances[row], near.numbers[row]
            if codes[-1] < 0:
                distances, codes = distances[codes >= 0], codes[codes >= 0]
            covered = self._counts[codes].cumsum()
            last = covered.searchsorted(min(skipped[row] + width, self.num_rows))
            if last == len(codes):
                # Of an index that is not exact.
                yield _Found(distances, codes)
                continue
            cutoff = distances[last]
            if distances[-1] > cutoff or asked == num_distinct or not self._index.is_exact:
                stop = distances.searchsorted(cutoff, side="right")
                yield _Found(distances[:stop], codes[:stop])
            else:
                yield from self._within(queries[row : row + 1], int(cutoff))

    def _within(self, queries: Codes, radius: int) -> Iterator[_Found]:
        """For each query all distinct codes within the radius (inclusive), nearest first."""
        limits, distances, codes = self._index.within(queries, min(radius, 8 * queries.shape[1]))
        for start, stop in itertools.pairwise(limits.tolist()):
            order = np.argsort(distances[start:stop], kind="stable")
            yield _Found(distances[start:stop][order], codes[start:stop][order])

    def _rank(self, found: _Found, after: tuple[int, int]) -> int:
        """How many rows are not after this (distance, id), where all codes up to that distance are found."""
        distance, row = after
        num_nearer = int(self._counts[found.codes[found.distances < distance]].sum())
        return num_nearer + int((self._ids_of(found.codes[found.distances == distance]) <= np.uint64(row)).sum())

    def _ids_of(self, codes: Counts, most: int | None = None) -> Ids:
        """The ids of the rows with these codes, code by code; at most `most` of each."""
        counts = self._counts[codes] if most is None else np.minimum(self._counts[codes], most)
        if len(codes) == counts.sum():
            alone: Ids = self._rows.ids[self._starts[codes]]
            return alone
        within_code = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ids: Ids = self._rows.ids[np.repeat(self._starts[codes], counts) + within_code]
        return ids

    def _first(self, found: _Found, width: int, radius: int | None, after: tuple[int, int] | None) -> _Hits:
        """The first rows that count, of codes that are complete up to them."""
        distances, codes = found
        if radius is not None:
            stop = distances.searchsorted(radius, side="right")
            distances, codes = distances[:stop], codes[:stop]
        most = None
        if after is not None:
            start = distances.searchsorted(after[0])
            distances, codes = distances[start:], codes[start:]
        else:
            # A code's later ids cannot be among the hits once it has filled them alone.
            most = width
        counts = self._counts[codes]
        # Nor can codes farther than the one with which the hits are full, those that the cursor may leave out apart.
        num_left_out = 0 if after is None else int(counts[: distances.searchsorted(after[0], side="right")].sum())
        last = counts.cumsum().searchsorted(width + num_left_out)
        if last < len(codes):
            stop = distances.searchsorted(distances[last], side="right")
            distances, codes, counts = distances[:stop], codes[:stop], counts[:stop]
        ids = self._ids_of(codes, most)
        if len(ids) > len(codes):
            distances = np.repeat(distances, counts if most is None else np.minimum(counts, most))
        if after is not None:
            counts_here = (distances > after[0]) | (ids > np.uint64(after[1]))
            distances, ids = distances[counts_here], ids[counts_here]
        order = np.lexsort((ids, distances))[:width]
        if not len(order):
            return _Hits(distances, ids, 0)
        cutoff = distances[order[-1]]
        if after is not None:
            return _Hits(distances[order], ids[order], int((distances == cutoff).sum()))
        at_cutoff = slice(*(found.distances.searchsorted(cutoff, side=side) for side in ("left", "right")))
        return _Hits(distances[order], ids[order], int(self._counts[found.codes[at_cutoff]].sum()))


def _sortable(codes: Codes) -> npt.NDArray[Any]:
    """Each code [N, B] as one value; they sort as the codes' bytes do."""
    width = codes.shape[1]
    if width > 8:
        return np.ascontiguousarray(codes).view(f"S{width}").reshape(-1)
    words = np.zeros((len(codes), 8), np.uint8)
    words[:, :width] = codes
    return words.view(">u8").reshape(-1).astype(np.uint64)


def are_among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Which ids, each of them once, are among others, which ascend."""
    if not 0 < len(others) < len(ids) // 100:
        return np.isin(ids, others, assume_unique=True)
    # A few fit into the cache, where looking each one up is quicker than sorting all.
    places = np.minimum(np.searchsorted(others, ids), len(others) - 1)
    return np.asarray(others[places] == ids)


def part_of(ids: Ids, number: int, num_shards: int) -> npt.NDArray[np.bool_]:
    """Which rows belong to shard `number` of `num_shards`: ids are dealt like cards, so that new rows spread evenly."""
    return np.asarray(ids % np.uint64(num_shards) == number)
