"""The answers of shards made one.

Why the tie count is exact. Let D be the distance of a query's last merged hit, and let a shard's own last hit lie at d
with t rows of the shard there. A shard that gives fewer than k hits has given all its rows that count (near enough,
after the cursor). Of one that gives k hits, d is at least D, since those k rows alone already fill the answer within d.

- d > D: the shard has given all its rows nearer than d, so all those at D: count them.
- d = D: its rows at D are t, by its own statement; the given ones may be only some of them.
- d < D: it has given all its rows, and none of them lies at D: counting gives 0.

A smaller k cut from a merged answer is exact for the same reasons, with the merged answer in the place of the shard.
"""

from collections.abc import Sequence

import numpy as np

from orbithash.search.shard import NO_HIT, Counts, Distances, ShardAnswer

__all__ = ["cut", "merge"]


def merge(answers: Sequence[ShardAnswer], k: int) -> ShardAnswer:
    """The first `k` rows by (distance, id) over all `answers` to the same queries, asked for at least `k` rows each.

    `ties` of the result counts the rows of all these shards at the distance of the last hit.
    """
    distances = np.concatenate([answer.distances for answer in answers], axis=1)
    ids = np.concatenate([answer.ids for answer in answers], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    distances, ids = np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
    merged = ShardAnswer(distances, ids, np.zeros(len(distances), np.int64))
    cutoffs = merged.cutoffs
    ties = np.zeros(len(distances), np.int64)
    for answer in answers:
        ties += _rows_at(answer, cutoffs)
    return ShardAnswer(distances, ids, ties)


def cut(answer: ShardAnswer, k: int) -> ShardAnswer:
    """What `answer` would be had only `k` rows been asked for."""
    if answer.distances.shape[1] <= k:
        return answer
    short = ShardAnswer(answer.distances[:, :k], answer.ids[:, :k], answer.ties)
    return ShardAnswer(short.distances, short.ids, _rows_at(answer, short.cutoffs))


def _rows_at(answer: ShardAnswer, cutoffs: Distances) -> Counts:
    """Rows int64 [Q] of what `answer` was drawn from at each query's cut-off (see the module's text)."""
    given = ((answer.distances == cutoffs[:, None]) & (answer.distances != NO_HIT)).sum(axis=1, dtype=np.int64)
    return np.where(answer.cutoffs == cutoffs, answer.ties, given)
