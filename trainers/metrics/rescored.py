"""Metrics of rescored rankings.

The ranking at cut-off k is what a search for k hits returns, continued: the shortlist (the first ceil(k * oversampling)
items by Hamming distance, and all that tie with the last of them) in the order of its scores, then the other items by
distance. Each cut-off has its own shortlist. Items of equal score tie, as do other items of equal distance.
"""

import math
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.vectors import asymmetric_distances, cosine_scores
from orbithash.trainers.metrics.average_precision import (
    Counts,
    Floats,
    Histograms,
    average_precision,
    check_cutoff,
    hits_at,
    ranked_average_precision,
    success_at,
)
from orbithash.trainers.metrics.metrics import DEFINITIONS, POLICIES, PRECISION_CUTOFFS, SUCCESS_K, Values
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Retrieval, chunks

__all__ = ["OVERSAMPLING", "Scores", "rescored_metrics"]

# As the default of a search.
OVERSAMPLING = 4.0


class Scores(NamedTuple):
    """What rescoring needs: `queries` int8 [Q, d] and `database`.

    By stored vectors: both are int8 stored vectors. By outputs: the outputs of the queries, and codes uint8 [N, B].
    """

    queries: npt.NDArray[np.int8]
    database: npt.NDArray[np.int8] | npt.NDArray[np.uint8]

    def costs(self, query: int, items: Counts) -> Floats:
        """Return numbers by which these items are ordered, float64 [M], ascending."""
        rows = self.database[items]
        if rows.dtype == np.int8:
            return -cosine_scores(self.queries[query], rows.astype(np.int8))
        return asymmetric_distances(self.queries[query], rows.astype(np.uint8)).astype(np.float64)


class _Ranking(NamedTuple):
    """One query's ranking.

    Attributes:
        items: number of items of each tie group, in order, int64 [G].
        relevant: number of relevant items of each tie group.
        ranks: 1-based ranks of the relevant items if ties are in the order of the database.
    """

    items: Counts
    relevant: Counts
    ranks: Counts


def rescored_metrics(
    retrieval: Retrieval,
    scores: Scores,
    cutoffs: Sequence[int] = (20, 100),
    oversampling: float = OVERSAMPLING,
    *,
    chunk_pairs: int = CHUNK_PAIRS,
) -> Values:
    """Return the metrics of `evaluate_codes` that have a cut-off, for rescored rankings; gains are left out.

    The policies are those of the ties that are left after rescoring; `index`: ties in the order of the database.
    """
    values: Values = {}
    num_items = retrieval.num_items.tolist()
    for k in sorted({*cutoffs, *PRECISION_CUTOFFS, SUCCESS_K}):
        size = math.ceil(round(check_cutoff(k) * oversampling, 6))
        rankings = list(_rankings(retrieval, scores, size, chunk_pairs))
        groups = Histograms(_padded([r.items for r in rankings]), _padded([r.relevant for r in rankings]))
        if k in cutoffs:
            for definition in DEFINITIONS:
                by_policy = {str(p): float(average_precision(groups, k, definition, p).mean()) for p in POLICIES}
                by_order = [
                    ranked_average_precision(r.ranks, k, definition, n)
                    for r, n in zip(rankings, num_items, strict=True)
                ]
                values[f"{definition}@{k}"] = {**by_policy, "index": float(np.mean(by_order))}
        num_hits = np.array([np.searchsorted(r.ranks, k, side="right") for r in rankings])
        divisors = {"precision": np.full(len(rankings), k), "recall": np.maximum(groups.num_relevant, 1)}
        for name, divisor in divisors.items() if k in PRECISION_CUTOFFS else ():
            by_policy = {str(p): float((hits_at(groups, k, p) / divisor).mean()) for p in POLICIES}
            values[f"{name}@{k}"] = {**by_policy, "index": float((num_hits / divisor).mean())}
        if k == SUCCESS_K:
            by_policy = {str(p): float(success_at(groups, k, p).mean()) for p in POLICIES}
            values[f"success@{k}"] = {**by_policy, "index": float((num_hits > 0).mean())}
    order = ("expected", "index", "optimistic", "pessimistic")
    return {name: {policy: by_policy[policy] for policy in order} for name, by_policy in values.items()}


def _rankings(retrieval: Retrieval, scores: Scores, size: int, chunk_pairs: int) -> Iterator[_Ranking]:
    """Yield the ranking of each query with a shortlist of `size` items and those that tie with the last."""
    query = 0
    for _, all_distances, shared in chunks(retrieval, chunk_pairs):
        for distances, is_relevant in zip(all_distances, shared > 0, strict=True):
            order = np.argsort(distances, kind="stable")[: np.count_nonzero(distances <= retrieval.bits)]
            ordered = distances[order]
            stop = int(ordered.searchsorted(ordered[min(size, len(order)) - 1], side="right")) if len(order) else 0
            costs = scores.costs(query, order[:stop])
            best = np.lexsort((order[:stop], costs))
            order[:stop], costs = order[:stop][best], costs[best]
            # A group begins where the score changes and, after the shortlist, where the distance changes.
            begins = np.ones(len(order), np.bool_)
            begins[1:stop] = costs[1:] != costs[:-1]
            begins[stop + 1 :] = ordered[stop + 1 :] != ordered[stop:-1]
            starts, relevant = np.flatnonzero(begins), is_relevant[order]
            yield _Ranking(
                np.diff(starts, append=len(order)),
                np.add.reduceat(relevant, starts, dtype=np.int64) if len(order) else starts,
                np.flatnonzero(relevant) + 1,
            )
            query += 1


def _padded(rows: Sequence[Counts]) -> Counts:
    """Return rows of several lengths as int64 [Q, G], filled up with zeros."""
    padded = np.zeros((len(rows), max(map(len, rows))), np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
    return padded
