"""Merge the answers of shards.

Why the tie count is exact: let D be the distance of a query's last merged hit, and let the last hit of one shard lie at
distance d, with t rows of that shard at d. A shard that returns fewer hits than requested has returned all its matching
rows. For a shard that returns as many as requested, d >= D, because its own hits already fill the answer within d.

- d > D: the shard has returned all its rows nearer than d, so all its rows at D: count them.
- d = D: the shard reports t rows at D, of which it may have returned only some: add t.
- d < D: the shard has returned all its rows, and none lies at D: the count is 0.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from orbithash.search.index.answers import NO_HIT, Distances, Ids, ShardAnswer

__all__ = ["Merged", "MergedLists", "join", "merge", "merge_lists"]


class Merged(NamedTuple):
    """Hits of one query: distances int32 [m], ids uint64 [m], and number of rows at the distance of the last hit."""

    distances: Distances
    ids: Ids
    ties: int


class MergedLists(NamedTuple):
    """Hits of one query as lists [m]: distances, ids, and serialised rows (None: the answers carry none); and ties."""

    distances: list[int]
    ids: list[int]
    rows: list[bytes] | None
    ties: int


def merge(answers: Sequence[ShardAnswer], ks: Sequence[int]) -> list[Merged]:
    """Return the first `ks[q]` rows by (distance, id) over all shards for each query q.

    Each shard must have been asked for at least `max(ks)` rows.
    """
    # A loop, because arrays as short as these cost less to process separately than together.
    return [_merge_one(answers, query, k) for query, k in enumerate(ks)]


def _merge_one(answers: Sequence[ShardAnswer], query: int, k: int) -> Merged:
    parts = [(answer.distances[query], answer.ids[query]) for answer in answers]
    distances = np.concatenate([of_shard for of_shard, _ in parts])
    ids = np.concatenate([of_shard for _, of_shard in parts])
    order = np.lexsort((ids, distances))[:k]
    distances, ids = distances[order], ids[order]
    num_hits = int(distances.searchsorted(NO_HIT))
    if not num_hits:
        return Merged(distances[:0], ids[:0], 0)
    cutoff = distances[num_hits - 1]
    ties = 0
    for answer, (of_shard, _) in zip(answers, parts, strict=True):
        first = int(of_shard.searchsorted(cutoff))
        end = int(of_shard.searchsorted(cutoff, side="right"))
        ends_at_cutoff = first < end and (end == len(of_shard) or of_shard[end] == NO_HIT)
        ties += int(answer.ties[query]) if ends_at_cutoff else end - first
    return Merged(distances[:num_hits], ids[:num_hits], ties)


def merge_lists(answers: Sequence[ShardAnswer], ks: Sequence[int], with_rows: bool) -> list[MergedLists]:
    """Merge as `merge`, optionally with the rows that the answers carry.

    For small `ks`, lists cost less than arrays.
    """
    merged = []
    starts = [0] * len(answers)
    for query, k in enumerate(ks):
        hits: list[tuple[Any, ...]] = []
        parts = []
        for number, answer in enumerate(answers):
            distances = answer.distances[query].tolist()
            if distances and distances[-1] == NO_HIT:
                del distances[distances.index(NO_HIT) :]
            ids = answer.ids[query].tolist()[: len(distances)]
            if with_rows:
                start = starts[number]
                starts[number] = end = start + len(distances)
                hits += zip(distances, ids, answer.rows[start:end], strict=True)
            else:
                hits += zip(distances, ids, strict=True)
            parts.append(distances)
        hits.sort()
        del hits[k:]
        if not hits:
            merged.append(MergedLists([], [], [] if with_rows else None, 0))
            continue
        cutoff = hits[-1][0]
        ties = 0
        for answer, distances in zip(answers, parts, strict=True):
            ends_at_cutoff = distances and distances[-1] == cutoff
            ties += int(answer.ties[query]) if ends_at_cutoff else distances.count(cutoff)
        columns = [list(column) for column in zip(*hits, strict=True)]
        merged.append(MergedLists(columns[0], columns[1], columns[2] if with_rows else None, ties))
    return merged


def join(answers: Sequence[ShardAnswer], k: int) -> ShardAnswer:
    """Return the answer of several disjoint parts as that of one, without rows.

    Each part must have been asked for at least `k` rows, or for all rows within a radius that holds `k` rows of the
    parts.
    """
    distances = np.concatenate([answer.distances for answer in answers], axis=1)
    ids = np.concatenate([answer.ids for answer in answers], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    distances, ids = np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
    # -1, which is no distance, for queries without hits.
    cutoffs = np.where(distances != NO_HIT, distances, -1).max(axis=1, initial=-1)
    ties = np.zeros(len(distances), np.int64)
    for answer in answers:
        last = np.where(answer.distances != NO_HIT, answer.distances, -1).max(axis=1, initial=-1)
        num_found = (answer.distances == cutoffs[:, None]).sum(axis=1)
        ties += np.where((last == cutoffs) & (last >= 0), answer.ties, num_found)
    return ShardAnswer(distances, ids, ties)
