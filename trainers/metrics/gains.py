"""Normalised discounted cumulative gain (NDCG) of Hamming rankings of multi-label items, exact for tied distances.

The gain of an item is the number of classes it shares with the query, the discount at rank r is 1 / log2(r + 1):

    DCG@k = sum of gain_r / log2(r + 1) over r <= k;    NDCG@k = DCG@k / (DCG@k of the best possible ranking)

A query that shares no class with any item counts as 0. The tie policies are those of `average_precision`. Under
`expected`, every rank of a group of equal distances has the group's mean gain.
"""

from collections.abc import Sequence
from itertools import islice

import numpy as np

from orbithash.trainers.metrics.average_precision import Counts, Floats, check_cutoff
from orbithash.trainers.metrics.rankings import count_gains, rankings
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Retrieval, query_chunks

__all__ = ["normalised_gains"]


def normalised_gains(
    retrieval: Retrieval, cutoffs: Sequence[int], *, chunk_pairs: int = CHUNK_PAIRS
) -> dict[str, dict[str, Floats]]:
    """Return the NDCG of each query as {"ndcg@k": {policy: float64 [Q]}}; policies include "index" and "chance"."""
    num_items, columns = len(retrieval.database_codes), retrieval.bits + 2
    # Entry r is the sum of the first r discounts.
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(2, num_items + 2)))])
    results: dict[str, dict[str, list[Floats]]] = {}
    # The number of cells (query, distance, gain) of a chunk is limited like the number of pairs.
    cells_of_query = columns * (retrieval.query_labels[0].size + 1)
    ks = [check_cutoff(k) for k in dict.fromkeys(cutoffs)]
    ranked = rankings(retrieval, max(ks))
    for queries in query_chunks(retrieval, chunk_pairs * num_items // max(num_items, cells_of_query)):
        counts = _joint_counts(retrieval, queries)
        listed = np.zeros((len(counts), min(max(ks), num_items)))
        for row, ranking in zip(listed, islice(ranked, len(counts)), strict=True):
            row[: len(ranking.gains)] = ranking.gains
        for k in ks:
            values = _chunk_dcg(counts, discounts, k)
            first = listed[:, :k]
            values["index"] = (first * np.diff(discounts)[: first.shape[1]]).sum(1)
            best = values.pop("best")
            by_policy = results.setdefault(f"ndcg@{k}", {})
            for policy, gains in values.items():
                ndcg = np.divide(gains, best, out=np.zeros_like(best), where=best > 0)
                by_policy.setdefault(policy, []).append(ndcg)
    return {name: {policy: np.concatenate(v) for policy, v in results[name].items()} for name in results}


def _joint_counts(retrieval: Retrieval, queries: slice) -> Counts:
    """Return the number of items of each query at each distance with each gain, int64 [q, K+1, G]."""
    labels = retrieval.query_labels[queries]
    counts = count_gains(retrieval, queries, int(labels.sum(1).max()) + 1 if labels.ndim == 2 else 2)
    num_levels = int(np.flatnonzero(counts.any((0, 1))).max(initial=0)) + 1
    return np.ascontiguousarray(counts[:, :, :num_levels])


def _chunk_dcg(counts: Counts, discounts: Floats, k: int) -> dict[str, Floats]:
    """Return the DCG@k of each query by policy, and of the best ranking, from counts int64 [q, K+1, G]."""
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


def _dcg(counts: Counts, gains: Floats, discounts: Floats, k: int) -> Floats:
    """Return the DCG@k float64 [q] of a ranking in R runs of items with equal gain.

    `counts` int64 [q, R] are the numbers of items of each run, `gains` the gain of each of its items.
    """
    ends = np.cumsum(counts, 1)
    weights = discounts[np.minimum(ends, k)] - discounts[np.minimum(ends - counts, k)]
    total: Floats = (gains * weights).sum(1)
    return total
