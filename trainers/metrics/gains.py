"""Normalised discounted cumulative gain of Hamming rankings of items with several classes, exact for tied distances.

The gain of an item is the number of classes it shares with the query, the discount at rank r is 1 / log2(r + 1):

    DCG@k = sum of gain_r / log2(r + 1) over r <= k;    NDCG@k = DCG@k / (DCG@k of the best possible ranking)

A query that shares nothing with any item counts as 0. The tie policies are those of `average_precision`. By expectation
every place of a group of equal distance has the group's mean gain, so the expected DCG needs no more than that.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from orbithash.trainers.metrics.average_precision import Floats, check_cutoff
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Retrieval, chunks

__all__ = ["normalised_gains"]


def normalised_gains(
    retrieval: Retrieval, cutoffs: Sequence[int], *, chunk_pairs: int = CHUNK_PAIRS
) -> dict[str, dict[str, Floats]]:
    """NDCG of each query as {"ndcg@k": {policy: float64 [Q]}}; the policies include "index" and "chance"."""
    num_items, columns = len(retrieval.database_codes), retrieval.bits + 2
    # The sum of the first r discounts, for every r.
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, num_items + 2)))])
    found: dict[str, dict[str, list[Floats]]] = {}
    # No more cells of (query, distance, gain) at once than pairs.
    cells_of_query = columns * (retrieval.query_labels[0].size + 1)
    for _, distances, shared in chunks(retrieval, chunk_pairs * num_items // max(num_items, cells_of_query)):
        counts = _joint_counts(distances, shared.astype(np.int64), columns)
        for k in map(check_cutoff, dict.fromkeys(cutoffs)):
            values = _of_chunk(counts, discounts, k)
            nearest = np.argsort(distances, axis=1, kind="stable")[:, :k]
            listed = np.take_along_axis(shared, nearest, 1)
            values["index"] = (listed * np.diff(discounts)[: listed.shape[1]]).sum(1)
            best = values.pop("best")
            of_k = found.setdefault(f"ndcg@{k}", {})
            for policy, gains in values.items():
                ndcg = np.divide(gains, best, out=np.zeros_like(best), where=best > 0)
                of_k.setdefault(policy, []).append(ndcg)
    return {name: {policy: np.concatenate(v) for policy, v in of_k.items()} for name, of_k in found.items()}


def _joint_counts(
    distances: npt.NDArray[np.uint16], gains: npt.NDArray[np.int64], columns: int
) -> npt.NDArray[np.int64]:
    """Items of each query at each distance with each gain, int64 [q, K+1, G]; what is left out is dropped."""
    rows, levels = len(distances), int(gains.max()) + 1
    cells = (np.arange(rows)[:, None] * columns + distances) * levels + gains
    counts: npt.NDArray[np.int64] = np.bincount(cells.ravel(), minlength=rows * columns * levels)
    return counts.reshape(rows, columns, levels)[:, :-1]


def _of_chunk(counts: npt.NDArray[np.int64], discounts: Floats, k: int) -> dict[str, Floats]:
    """DCG@k of each query by policy, and of the best ranking, from counts int64 [q, K+1, G]."""
    rows, num_distances, num_levels = counts.shape
    levels = np.arange(num_levels, dtype=np.float64)
    rising, falling = np.tile(levels, num_distances), np.tile(levels[::-1], num_distances)
    items = counts.sum(2)
    all_items = items.sum(1, keepdims=True)
    return {
        "expected": _dcg(items, counts @ levels / np.maximum(items, 1), discounts, k),
        "optimistic": _dcg(counts[:, :, ::-1].reshape(rows, -1), falling, discounts, k),
        "pessimistic": _dcg(counts.reshape(rows, -1), rising, discounts, k),
        "chance": _dcg(all_items, (counts.sum(1) @ levels)[:, None] / np.maximum(all_items, 1), discounts, k),
        "best": _dcg(counts.sum(1)[:, ::-1], levels[::-1], discounts, k),
    }


def _dcg(counts: npt.NDArray[np.int64], gains: Floats, discounts: Floats, k: int) -> Floats:
    """DCG@k float64 [q] of runs in ranking order: `counts` int64 [q, R] items in each, each of them of its `gains`."""
    ends = np.cumsum(counts, 1)
    weights = discounts[np.minimum(ends, k)] - discounts[np.minimum(ends - counts, k)]
    total: Floats = (gains * weights).sum(1)
    return total
