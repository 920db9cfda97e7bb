"""Search one part of an archive's codes.

FAISS indexes each distinct code once; beside it a shard keeps the sorted ids of the rows with each code. FAISS only
reports distances: ties are broken here, by id. With an exact index the answer is exact, because all distinct codes up
to the distance of the last hit are known before rows are counted.

Shards are immutable. A change of rows and a filter each build a new shard, which costs a copy and a new index.
"""

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import NO_HIT, Counts, Distances, Ids, ShardAnswer
from orbithash.search.index.indexes import build_index

__all__ = ["NO_HIT", "Counts", "Distances", "Ids", "Shard", "ShardAnswer", "are_among", "part_of"]

# Queries per pass over the index; bounds its temporary memory.
_QUERIES_AT_ONCE = 64


class _NearCodes(NamedTuple):
    """Distinct codes near a query, nearest first: distances int32 [N] and code numbers int64 [N]."""

    distances: Distances
    codes: Counts


class _Hits(NamedTuple):
    """Hits of a query in their order, and the number of rows at the distance of the last one."""

    distances: Distances
    ids: Ids
    ties: int


class _Buckets(NamedTuple):
    """Row ids sorted by (code, id) and grouped: bucket c has the `counts[c]` rows with the code `distinct[c]`."""

    ids: Ids
    counts: Counts
    distinct: Codes

    @property
    def starts(self) -> Counts:
        """Start of each bucket: bucket c is ids[starts[c] : starts[c] + counts[c]]."""
        return np.cumsum(self.counts) - self.counts

    def kept(self, is_kept: npt.NDArray[np.bool_]) -> "_Buckets":
        """Return the buckets of the rows for which `is_kept` bool [N] is true."""
        counts = np.add.reduceat(is_kept, self.starts, dtype=np.int64) if len(self.ids) else self.counts
        return _Buckets(self.ids[is_kept], counts[counts > 0], self.distinct[counts > 0])

    def joined(self, ids: Ids, codes: Codes) -> "_Buckets":
        """Return the buckets of these rows and of additional rows, whose ids must be new."""
        keys, new_keys = _sortable(self.distinct), _sortable(codes)
        order = np.lexsort((ids, new_keys))
        ids, codes, new_keys = ids[order], codes[order], new_keys[order]
        # The existing code, and the existing row, before which each new row belongs.
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
        return _Buckets(np.insert(self.ids, rows, ids), counts, distinct)


class Shard:
    """Index over ids uint64 [N] and codes uint8 [N, ceil(bits/8)], in any order; N may be 0.

    Safe for concurrent searches. A search uses only the calling thread.
    """

    def __init__(self, ids: Ids, codes: Codes, bits: int, index: str = "flat") -> None:
        """Raise `InputError` if ids and codes have the wrong shape, an id occurs twice, or the index is unknown."""
        check_bits(bits)
        check_codes(codes, bits)
        if ids.dtype != np.uint64 or ids.ndim != 1 or codes.ndim != 2 or len(ids) != len(codes):
            raise InputError(
                f"a shard requires ids uint64 [N] and codes uint8 [N, B], got ids {ids.dtype} {list(ids.shape)} and "
                f"codes {list(codes.shape)}"
            )
        if len(np.unique(ids)) != len(ids):
            raise InputError(
                f"a shard requires unique ids; {len(ids) - len(np.unique(ids)):,} of {len(ids):,} ids are repeated"
            )
        keys = _sortable(codes)
        order = np.lexsort((ids, keys))
        sorted_keys = keys[order]
        is_first = np.ones(len(ids), np.bool_)
        is_first[1:] = sorted_keys[1:] != sorted_keys[:-1]
        starts = np.flatnonzero(is_first)
        self._fill(bits, index, _Buckets(ids[order], np.diff(starts, append=len(ids)), codes[order[starts]]))

    def _fill(self, bits: int, index: str, buckets: _Buckets) -> None:
        self.bits = bits
        self.num_rows = len(buckets.ids)
        self._buckets, self._starts, self._counts = buckets, buckets.starts, buckets.counts
        self._kind = index
        self._index = build_index(index, np.ascontiguousarray(buckets.distinct))

    def _with(self, buckets: _Buckets) -> "Shard":
        """Return a shard of the same kind over other rows."""
        shard = Shard.__new__(Shard)
        shard._fill(self.bits, self._kind, buckets)
        return shard

    def where(self, ids: Ids) -> "Shard":
        """Return the shard of the rows whose ids are among `ids`, which must be ascending."""
        return self._with(self._buckets.kept(are_among(self._buckets.ids, ids)))

    def changed(self, removed: Ids, ids: Ids, codes: Codes) -> "Shard":
        """Return the shard without the rows `removed` and with the rows `ids`, which replace rows of the same id."""
        check_codes(codes, self.bits)
        is_replaced = are_among(self._buckets.ids, np.union1d(removed, ids))
        return self._with(self._buckets.kept(~is_replaced).joined(ids, codes))

    def search(
        self, queries: Codes, k: int, radius: int | None = None, after: tuple[int, int] | None = None
    ) -> ShardAnswer:
        """Return the k nearest rows of each query, ordered by (distance, id); all rows if there are fewer than k.

        Args:
            queries: uint8 [Q, ceil(bits/8)].
            k: maximum number of hits per query.
            radius: maximum distance in bits, inclusive; None: no limit.
            after: return only rows after this (distance, id) in the order; None: from the first.
        """
        check_codes(queries, self.bits)
        if queries.ndim != 2 or k < 1:
            raise InputError(
                f"a search requires queries uint8 [Q, B] and k >= 1, got shape {list(queries.shape)} and k {k}"
            )
        width = min(k, self.num_rows)
        answer = ShardAnswer(
            np.full((len(queries), width), NO_HIT, np.int32),
            np.zeros((len(queries), width), np.uint64),
            np.zeros(len(queries), np.int64),
        )
        for start in range(0, len(queries) if width else 0, _QUERIES_AT_ONCE):
            part = queries[start : start + _QUERIES_AT_ONCE]
            # A loop, because arrays as short as these cost less to process separately than together.
            for row, near in enumerate(self._near_codes(part, width, radius, after), start):
                hits = self._first(near, width, radius, after)
                count = len(hits.distances)
                answer.distances[row, :count], answer.ids[row, :count], answer.ties[row] = hits
        return answer

    def _near_codes(
        self, queries: Codes, width: int, radius: int | None, after: tuple[int, int] | None
    ) -> Iterator[_NearCodes]:
        """Yield for each query all distinct codes up to its first `width` matching rows, and possibly some more."""
        if radius is not None and self._index.is_quick_within(radius):
            yield from self._within(queries, radius)
            return
        skipped = [0] * len(queries)
        if after is not None:
            skipped = [self._rank(near, after) for near in self._within(queries, after[0])]
        num_needed = min(max(skipped) + width, self.num_rows)
        num_distinct = len(self._counts)
        # The codes at the cut-off are known to be complete only if a farther code was found. Hence more codes than rows
        # are requested; where that does not reach beyond the cut-off, a range search follows.
        num_requested = min(num_needed + min(max(3 * num_needed, 64), 256), num_distinct)
        near = self._index.nearest(queries, num_requested)
        for row in range(len(queries)):
            distances, codes = near.distances[row], near.numbers[row]
            if codes[-1] < 0:
                distances, codes = distances[codes >= 0], codes[codes >= 0]
            covered = self._counts[codes].cumsum()
            last = covered.searchsorted(min(skipped[row] + width, self.num_rows))
            if last == len(codes):
                # Only an approximate index returns fewer codes than exist.
                yield _NearCodes(distances, codes)
                continue
            cutoff = distances[last]
            if distances[-1] > cutoff or num_requested == num_distinct or not self._index.is_exact:
                stop = distances.searchsorted(cutoff, side="right")
                yield _NearCodes(distances[:stop], codes[:stop])
            else:
                yield from self._within(queries[row : row + 1], int(cutoff))

    def _within(self, queries: Codes, radius: int) -> Iterator[_NearCodes]:
        """Yield for each query all distinct codes within the radius (inclusive), nearest first."""
        limits, distances, codes = self._index.within(queries, min(radius, 8 * queries.shape[1]))
        for start, stop in itertools.pairwise(limits.tolist()):
            order = np.argsort(distances[start:stop], kind="stable")
            yield _NearCodes(distances[start:stop][order], codes[start:stop][order])

    def _rank(self, near: _NearCodes, after: tuple[int, int]) -> int:
        """Return the number of rows up to this (distance, id); `near` must hold all codes up to the distance."""
        distance, id_ = after
        num_nearer = int(self._counts[near.codes[near.distances < distance]].sum())
        return num_nearer + int((self._ids_of(near.codes[near.distances == distance]) <= np.uint64(id_)).sum())

    def _ids_of(self, codes: Counts, max_per_code: int | None = None) -> Ids:
        """Return the ids of the rows with these codes, code by code; at most `max_per_code` per code."""
        counts = self._counts[codes] if max_per_code is None else np.minimum(self._counts[codes], max_per_code)
        if len(codes) == counts.sum():
            one_per_code: Ids = self._buckets.ids[self._starts[codes]]
            return one_per_code
        within_code = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ids: Ids = self._buckets.ids[np.repeat(self._starts[codes], counts) + within_code]
        return ids

    def _first(self, near: _NearCodes, width: int, radius: int | None, after: tuple[int, int] | None) -> _Hits:
        """Return the first `width` matching rows; `near` must hold all codes up to them."""
        distances, codes = near
        if radius is not None:
            stop = distances.searchsorted(radius, side="right")
            distances, codes = distances[:stop], codes[:stop]
        max_per_code = None
        if after is not None:
            start = distances.searchsorted(after[0])
            distances, codes = distances[start:], codes[start:]
        else:
            # The first `width` rows of a code fill the answer alone.
            max_per_code = width
        counts = self._counts[codes]
        # Codes beyond the distance at which the answer is full cannot contribute. The cursor may exclude rows at its
        # own distance, so that many more are needed.
        num_excluded = 0 if after is None else int(counts[: distances.searchsorted(after[0], side="right")].sum())
        last = counts.cumsum().searchsorted(width + num_excluded)
        if last < len(codes):
            stop = distances.searchsorted(distances[last], side="right")
            distances, codes, counts = distances[:stop], codes[:stop], counts[:stop]
        ids = self._ids_of(codes, max_per_code)
        if len(ids) > len(codes):
            distances = np.repeat(distances, counts if max_per_code is None else np.minimum(counts, max_per_code))
        if after is not None:
            is_after = (distances > after[0]) | (ids > np.uint64(after[1]))
            distances, ids = distances[is_after], ids[is_after]
        order = np.lexsort((ids, distances))[:width]
        if not len(order):
            return _Hits(distances, ids, 0)
        cutoff = distances[order[-1]]
        if after is not None:
            return _Hits(distances[order], ids[order], int((distances == cutoff).sum()))
        at_cutoff = slice(*(near.distances.searchsorted(cutoff, side=side) for side in ("left", "right")))
        return _Hits(distances[order], ids[order], int(self._counts[near.codes[at_cutoff]].sum()))


def _sortable(codes: Codes) -> npt.NDArray[Any]:
    """Return each code uint8 [N, B] as one value [N]; the values sort as the bytes of the codes."""
    width = codes.shape[1]
    if width > 8:
        return np.ascontiguousarray(codes).view(f"S{width}").reshape(-1)
    words = np.zeros((len(codes), 8), np.uint8)
    words[:, :width] = codes
    return words.view(">u8").reshape(-1).astype(np.uint64)


def are_among(ids: Ids, others: Ids) -> npt.NDArray[np.bool_]:
    """Return which of the unique `ids` are among `others`, which must be ascending: bool [N]."""
    if not 0 < len(others) < len(ids) // 100:
        return np.isin(ids, others, assume_unique=True)
    # Binary search in a few ids, which fit into the cache, is faster than sorting all.
    places = np.minimum(np.searchsorted(others, ids), len(others) - 1)
    return np.asarray(others[places] == ids)


def part_of(ids: Ids, number: int, num_shards: int) -> npt.NDArray[np.bool_]:
    """Return which rows belong to shard `number` of `num_shards`, bool [N]: round-robin, so that shards grow evenly."""
    return np.asarray(ids % np.uint64(num_shards) == number)
