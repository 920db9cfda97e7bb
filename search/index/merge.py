"""The answers of shards made one.

Why the tie count is exact. Let D be the distance of a query's last merged hit, and let a shard's own last hit lie at d
with t rows of the shard there. A shard that gives fewer hits than it was asked for has given all its rows that count
(near enough, after the cursor). Of one that gives as many, d is at least D, since those rows alone already fill the
answer within d.

- d > D: the shard has given all its rows nearer than d, so all those at D: count them.
- d = D: its rows at D are t, by its own statement; the given ones may be only some of them.
- d < D: it has given all its rows, and none of them lies at D: counting gives 0.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from orbithash.search.index.shard import NO_HIT, Distances, Ids, ShardAnswer

__all__ = ["Merged", "merge"]


class Merged(NamedTuple):
    """The answer to one query: distances int32 and ids uint64 [m] of its hits, rows at the distance of the last one."""

    distances: Distances
    ids: Ids
    ties: int


def merge(answers: Sequence[ShardAnswer], ks: Sequence[int]) -> list[Merged]:
    """The first `ks[q]` rows by (distance, id) over all shards for query q; each was asked for as many or more."""
    # One by one: arrays as short as these cost less than what it takes to treat them together.
    return [_merge_one(answers, query, k) for query, k in enumerate(ks)]


def _merge_one(answers: Sequence[ShardAnswer], query: int, k: int) -> Merged:
    given = [(answer.distances[query], answer.ids[query]) for answer in answers]
    distances = np.concatenate([of_shard for of_shard, _ in given])
    ids = np.concatenate([of_shard for _, of_shard in given])
    order = np.lexsort((ids, distances))[:k]
    distances, ids = distances[order], ids[order]
    num_hits = int(distances.searchsorted(NO_HIT))
    if not num_hits:
        return Merged(distances[:0], ids[:0], 0)
    cutoff = distances[num_hits - 1]
    ties = 0
    for answer, (of_shard, _) in zip(answers, given, strict=True):
        first = int(of_shard.searchsorted(cutoff))
        end = int(of_shard.searchsorted(cutoff, side="right"))
        is_last = first < end and (end == len(of_shard) or of_shard[end] == NO_HIT)
        ties += int(answer.ties[query]) if is_last else end - first
    return Merged(distances[:num_hits], ids[:num_hits], ties)
