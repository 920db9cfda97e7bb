"""One part of an archive's codes, searched exactly.

A shard gives each distinct code to FAISS once and keeps, beside it, the sorted ids of the rows that have it. FAISS so
decides nothing about ties: it says how far each distinct code is, and the order (distance, id) is made here.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.encoders.errors import InputError

__all__ = ["Counts", "Distances", "Ids", "Shard", "ShardAnswer", "build_shards", "split_rows"]

Ids = npt.NDArray[np.uint64]
Distances = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

# Bounds the scratch memory of one pass, whatever the number of queries.
_QUERIES_AT_ONCE = 64


@dataclass(frozen=True)
class ShardAnswer:
    """The nearest rows of one shard for Q queries; m = min(k, rows of the shard).

    Attributes:
        distances: int32 [Q, m], ascending along a row.
        ids: uint64 [Q, m], ascending among equal distances.
        ties: int64 [Q], how many rows of the shard lie at the distance of the last hit, the hits included; 0 if m is 0.
    """

    distances: Distances
    ids: Ids
    ties: Counts


@dataclass(frozen=True)
class _Found:
    """Distinct codes found, flat: the query each was found for, its distance and its number."""

    query: Counts
    distance: Distances
    code: Counts


class Shard:
    """An exact Hamming index over ids uint64 [N] and codes uint8 [N, ceil(bits/8)], in any order; N may be 0.

    Safe for concurrent searches. A search uses the calling thread only.
    """

    def __init__(self, ids: Ids, codes: Codes, bits: int) -> None:
        """Raises `InputError` when ids and codes do not belong together or an id occurs twice."""
        self.bits = check_bits(bits)
        check_codes(codes, bits)
        if ids.dtype != np.uint64 or ids.ndim != 1 or codes.ndim != 2 or len(ids) != len(codes):
            raise InputError(
                f"a shard takes ids uint64 [N] and codes [N, B], got {ids.dtype} {ids.shape}, {codes.shape}"
            )
        self.num_rows = len(ids)
        order = _order(ids, codes)
        self._ids = ids[order]
        sorted_codes = codes[order]
        is_first = np.ones(len(ids), np.bool_)
        is_first[1:] = (sorted_codes[1:] != sorted_codes[:-1]).any(axis=1)
        # Rows with distinct code c are self._ids[self._starts[c] : self._starts[c] + self._counts[c]], ascending.
        self._starts: Counts = np.flatnonzero(is_first).astype(np.int64)
        self._counts: Counts = np.diff(self._starts, append=len(ids))
        if len(np.unique(ids)) != len(ids):
            raise InputError("a shard takes each id once")

        import faiss

        self._index = faiss.IndexBinaryFlat(8 * codes.shape[1])
        self._index.add(sorted_codes[is_first])

    def search(self, queries: Codes, k: int) -> ShardAnswer:
        """The `k` nearest rows of each query uint8 [Q, ceil(bits/8)], ordered by (distance, id); all rows if fewer."""
        check_codes(queries, self.bits)
        if queries.ndim != 2 or k < 1:
            raise InputError(f"search takes queries [Q, B] and k from 1, got shape {queries.shape} and k {k}")
        width = min(k, self.num_rows)
        answer = ShardAnswer(
            np.zeros((len(queries), width), np.int32),
            np.zeros((len(queries), width), np.uint64),
            np.zeros(len(queries), np.int64),
        )
        if not width:
            return answer

        import faiss

        # OpenMP keeps this number per thread. One: the cores are shared with other searches, and spinning for each
        # other costs more than a second core gains.
        faiss.omp_set_num_threads(1)
        for start in range(0, len(queries), _QUERIES_AT_ONCE):
            part = slice(start, start + _QUERIES_AT_ONCE)
            found, cutoffs = self._near_codes(queries[part], width)
            answer.distances[part], answer.ids[part], answer.ties[part] = self._rows(found, cutoffs, width)
        return answer

    def _near_codes(self, queries: Codes, width: int) -> tuple[_Found, Distances]:
        """All distinct codes up to each query's cut-off, and that cut-off: the distance of the row in place `width`."""
        num_distinct = len(self._starts)
        # More codes than rows are wanted, because whether those at the cut-off are complete shows only by one beyond
        # it. Where the surplus does not reach that far, the second pass below does.
        asked = min(width + min(max(3 * width, 64), 256), num_distinct)
        distances, codes = self._index.search(queries, asked)
        covered = np.cumsum(self._counts[codes], axis=1)
        last = (covered < width).sum(axis=1)
        cutoffs = np.take_along_axis(distances, last[:, None], axis=1)[:, 0]
        complete = (distances[:, -1] > cutoffs) | (asked == num_distinct)
        query, column = np.nonzero((distances <= cutoffs[:, None]) & complete[:, None])
        parts = [_Found(query, distances[query, column], codes[query, column])]
        parts += self._within(queries, cutoffs, np.flatnonzero(~complete))
        found = _Found(
            np.concatenate([part.query for part in parts]),
            np.concatenate([part.distance for part in parts]),
            np.concatenate([part.code for part in parts]),
        )
        return found, cutoffs

    def _within(self, queries: Codes, radii: Distances, chosen: Counts) -> Iterator[_Found]:
        """All distinct codes within its radius (inclusive) of each chosen query."""
        for radius in np.unique(radii[chosen]):
            members = chosen[radii[chosen] == radius]
            # FAISS leaves out what lies at the radius itself.
            limits, distances, codes = self._index.range_search(queries[members], int(radius) + 1)
            yield _Found(np.repeat(members, np.diff(limits.astype(np.int64))), distances.astype(np.int32), codes)

    def _rows(self, found: _Found, cutoffs: Distances, width: int) -> tuple[Distances, Ids, Counts]:
        """The first `width` rows [Q, width] in the order (distance, id), and [Q] rows at the cut-off."""
        counts = self._counts[found.code]
        at_cutoff = found.distance == cutoffs[found.query]
        ties = np.zeros(len(cutoffs), np.int64)
        np.add.at(ties, found.query[at_cutoff], counts[at_cutoff])
        # A code's later ids cannot be among the hits once it has filled them alone.
        counts = np.minimum(counts, width)
        total = int(counts.sum())
        within_code = np.arange(total) - np.repeat(np.cumsum(counts) - counts, counts)
        ids = self._ids[np.repeat(self._starts[found.code], counts) + within_code]
        query, distance = np.repeat(found.query, counts), np.repeat(found.distance, counts)
        order = np.lexsort((ids, distance, query))
        firsts = np.searchsorted(query[order], np.arange(len(cutoffs)))
        chosen = order[firsts[:, None] + np.arange(width)]
        return distance[chosen], ids[chosen], ties


def _order(ids: Ids, codes: Codes) -> Counts:
    """Positions that sort rows by (code, id)."""
    words = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
    words[:, : codes.shape[1]] = codes
    return np.lexsort((ids, *words.view(np.uint64).T))


def split_rows(num_rows: int, num_shards: int) -> list[slice]:
    """`num_shards` contiguous ranges of rows whose sizes differ by one at most; some are empty if rows are fewer."""
    if num_shards < 1:
        raise InputError(f"an archive has at least 1 shard, got {num_shards}")
    bounds = [num_rows * shard // num_shards for shard in range(num_shards + 1)]
    return [slice(start, stop) for start, stop in itertools.pairwise(bounds)]


def build_shards(ids: Ids, codes: Codes, bits: int, num_shards: int) -> list[Shard]:
    """Shards over contiguous ranges of ascending id. However many, their merged answer is that of one."""
    order = np.argsort(ids)
    ids, codes = ids[order], codes[order]
    return [Shard(ids[rows], codes[rows], bits) for rows in split_rows(len(ids), num_shards)]
