"""Metrics of rescored rankings.

The ranking at cut-off k is what a search for k hits returns, continued: the shortlist (the first ceil(k * oversampling)
items by Hamming distance, and all that tie with the last of them) in the order of its scores, then the other items by
distance. Each cut-off has its own shortlist. Items of equal score tie, as do other items of equal distance.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.vectors import asymmetric_distances, cosine_scores
from orbithash.trainers.metrics.average_precision import (
    Counts,
    Definition,
    Floats,
    Histograms,
    average_precision,
    check_cutoff,
    hits_at,
    ranked_average_precisions,
    success_at,
)
from orbithash.trainers.metrics.metrics import DEFINITIONS, POLICIES, PRECISION_CUTOFFS, SUCCESS_K, Values
from orbithash.trainers.metrics.rankings import Ranking, rankings
from orbithash.trainers.metrics.retrieval import Retrieval

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


@dataclass
class _Rescored:
    """The rankings of all queries at one cut-off, with what is kept of each.

    Attributes:
        k: the cut-off.
        definitions: definitions of average precision that are computed.
        ends: number of items up to the end of each tie group of each query, int64 [G] each.
        relevant: number of relevant items up to there, int64 [G] each.
        precision: average precision of each query by each definition, with ties in the order of the database.
        hits: number of relevant items within the cut-off of each query, with ties in the order of the database.
    """

    k: int
    definitions: Sequence[Definition]
    ends: list[Counts] = field(default_factory=list)
    relevant: list[Counts] = field(default_factory=list)
    precision: list[list[float]] = field(default_factory=list)
    hits: list[int] = field(default_factory=list)

    def add(self, ends: Counts, ranks: Counts) -> None:
        """Add the ranking of a query: the last rank of each tie group, and the ranks of relevant items, ascending."""
        self.ends.append(ends)
        self.relevant.append(ranks.searchsorted(ends, side="right"))
        if self.definitions:
            precision = ranked_average_precisions(ranks, self.k, int(ends[-1]))
            self.precision.append([precision[definition] for definition in self.definitions])
        self.hits.append(int(ranks.searchsorted(self.k, side="right")))


def rescored_metrics(
    retrieval: Retrieval,
    scores: Scores,
    cutoffs: Sequence[int] = (20, 100),
    oversampling: float = OVERSAMPLING,
    counts: Counts | None = None,
) -> Values:
    """Return the metrics of `evaluate_codes` that have a cut-off, for rescored rankings; gains are left out.

    The policies are those of the ties that are left after rescoring; `index`: ties in the order of the database.
    `counts`: as in `rankings`.
    """
    ks = sorted({*map(check_cutoff, cutoffs), *PRECISION_CUTOFFS, SUCCESS_K})
    by_k = [_Rescored(k, DEFINITIONS if k in cutoffs else ()) for k in ks]
    sizes = [math.ceil(round(k * oversampling, 6)) for k in ks]
    for query, ranking in enumerate(rankings(retrieval, counts=counts)):
        for rescored, of_query in zip(by_k, _rescore(ranking, scores, query, sizes), strict=True):
            rescored.add(*of_query)
    values: Values = {}
    for k, rescored in zip(ks, by_k, strict=True):
        groups = Histograms(_steps(rescored.ends), _steps(rescored.relevant))
        for definition, by_order in zip(rescored.definitions, zip(*rescored.precision, strict=True), strict=True):
            by_policy = {str(p): float(average_precision(groups, k, definition, p).mean()) for p in POLICIES}
            values[f"{definition}@{k}"] = {**by_policy, "index": float(np.mean(by_order))}
        num_hits = np.array(rescored.hits)
        divisors = {"precision": np.full(len(num_hits), k), "recall": np.maximum(groups.num_relevant, 1)}
        expected_hits = {p: hits_at(groups, k, p) for p in POLICIES} if k in PRECISION_CUTOFFS else {}
        for name, divisor in divisors.items() if expected_hits else ():
            by_policy = {str(p): float((hits / divisor).mean()) for p, hits in expected_hits.items()}
            values[f"{name}@{k}"] = {**by_policy, "index": float((num_hits / divisor).mean())}
        if k == SUCCESS_K:
            by_policy = {str(p): float(success_at(groups, k, p).mean()) for p in POLICIES}
            values[f"success@{k}"] = {**by_policy, "index": float((num_hits > 0).mean())}
    order = ("expected", "index", "optimistic", "pessimistic")
    return {name: {policy: by_policy[policy] for policy in order} for name, by_policy in values.items()}


def _rescore(ranking: Ranking, scores: Scores, query: int, sizes: Sequence[int]) -> Iterator[tuple[Counts, Counts]]:
    """Yield the ranking after rescoring of `size` items and their ties, for each of the ascending sizes.

    A ranking is the last rank of each tie group, and the ranks of the relevant items, both ascending.
    """
    is_relevant = ranking.gains > 0
    plain_ranks = np.flatnonzero(is_relevant) + 1
    plain_ends = np.cumsum(ranking.counts)
    # Without items, a group of none.
    plain_ends = plain_ends[np.diff(plain_ends, prepend=0) > 0] if len(is_relevant) else plain_ends[:1]
    stops = plain_ends[plain_ends.searchsorted(np.minimum(sizes, len(is_relevant)))].tolist()
    items = ranking.items[: stops[-1]]
    # Every shortlist is the beginning of the longest one, so each item is scored once.
    costs = scores.costs(query, items)
    order = np.lexsort((items, costs))
    ranked = None, (plain_ends, plain_ranks)
    for stop in stops:
        if ranked[0] != stop:
            best = order[order < stop]
            ascending = costs[best]
            # A group ends before the score changes, with the shortlist, and then before the distance changes.
            changes = np.flatnonzero(ascending[1:] != ascending[:-1]) + 1
            ranks = np.flatnonzero(is_relevant[best]) + 1
            ends = np.concatenate([changes, plain_ends[plain_ends.searchsorted(stop) :]])
            ranks = np.concatenate([ranks, plain_ranks[plain_ranks.searchsorted(stop, side="right") :]])
            ranked = stop, (ends, ranks)
        yield ranked[1]


def _steps(rows: Sequence[Counts]) -> Counts:
    """Return the differences of consecutive numbers, and the first number, of each row [G], filled up with zeros."""
    padded = np.empty((len(rows), max(map(len, rows))), np.int64)
    for row, values in zip(padded, rows, strict=True):
        row[: len(values)] = values
        row[len(values) :] = values[-1]
    steps = padded.copy()
    steps[:, 1:] -= padded[:, :-1]
    return steps
