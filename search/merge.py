"""The answers of shards made one.

Why the tie count is exact. Let D be the distance of the last merged hit, and let a shard's own last hit lie at d with
t rows of the shard there. A shard that gives fewer than k hits has given all its rows. Of one that gives k hits, d is
at least D, since those k rows alone already fill the answer within d.

- d > D: the shard has given all its rows nearer than d, so all those at D: count them.
- d = D: its rows at D are t, by its own statement; the given ones may be only some of them.
- d < D: it has given all its rows, and none of them lies at D: counting gives 0.

A smaller k cut from a merged answer is exact for the same reasons, with the merged answer in the place of the shard.
"""

from collections.abc import Sequence

import numpy as np

from orbithash.search.shard import Counts, Distances, ShardAnswer

__all__ = ["cut", "merge"]


def merge(answers: Sequence[ShardAnswer], k: int) -> ShardAnswer:
    """The first `k` rows by (distance, id) over all `answers` to the same queries, asked for at least `k` rows each.

    `ties` of the result counts the rows of all these shards at the distance of the last hit.
    """
    distances = np.concatenate([answer.distances for answer in answers], axis=1)
    ids = np.concatenate([answer.ids for answer in answers], axis=1)
    order = np.lexsort((ids, distances), axis=1)[:, :k]
    distances, ids = np.take_along_axis(distances, order, axis=1), np.take_along_axis(ids, order, axis=1)
    ties = np.zeros(len(distances), np.int64)
    if distances.shape[1]:
        for answer in answers:
            ties += _rows_at(answer, distances[:, -1])
    return ShardAnswer(distances, ids, ties)


def cut(answer: ShardAnswer, k: int) -> ShardAnswer:
    """What `answer` would be had only `k` rows been asked for."""
    if answer.distances.shape[1] <= k:
        return answer
    distances, ids = answer.distances[:, :k], answer.ids[:, :k]
    return ShardAnswer(distances, ids, _rows_at(answer, distances[:, -1]))


def _rows_at(answer: ShardAnswer, cutoffs: Distances) -> Counts:
    """Rows int64 [Q] of what `answer` was drawn from at each query's cut-off (see the module's text)."""
    if not answer.distances.shape[1]:
        return np.zeros(len(cutoffs), np.int64)
    given = (answer.distances == cutoffs[:, None]).sum(axis=1, dtype=np.int64)
    return np.where(answer.distances[:, -1] == cutoffs, answer.ties, given)
