"""Retrieval metrics of packed codes: all metrics of `metrics.json`."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
import numpy.typing as npt

from orbithash.trainers.metrics.average_precision import (
    Counts,
    Definition,
    Floats,
    Histograms,
    Policy,
    average_precision,
    check_cutoff,
    hits_at,
    ranked_average_precisions,
    success_at,
)
from orbithash.trainers.metrics.gains import normalised_gains
from orbithash.trainers.metrics.rankings import rankings
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Labels, Retrieval, query_chunks

__all__ = [
    "DEFINITIONS",
    "POLICIES",
    "PRECISION_CUTOFFS",
    "SUCCESS_K",
    "RadiusCurve",
    "Values",
    "add_nearest",
    "evaluate_codes",
    "nearest_class_counts",
    "nearest_class_shares",
    "pair_recall",
    "radius_curve",
]

DEFINITIONS: tuple[Definition, ...] = ("ap_min", "ap_hits", "ap_k", "ap_first_k")
PRECISION_CUTOFFS = (1, 5, 10, 20, 50, 100)
PAIR_CUTOFFS = (1, 5, 10)
LOOKUP_RADIUS = 2
# k of the success rate, which DHCL's released code calls mean average precision.
SUCCESS_K = 20

POLICIES: tuple[Policy, ...] = ("expected", "optimistic", "pessimistic")

# Number of pairs of a query and a nearest item whose classes are compared at once.
_PAIRS_AT_ONCE = 2**16

# {metric: {tie policy: mean over the queries}}
Values = dict[str, dict[str, float]]


@dataclass(frozen=True)
class RadiusCurve:
    """Lookup of all items within a Hamming radius, inclusive: means over the queries for the radii 0..K.

    A query without items within the radius has precision 0; one without relevant items has recall 0. `empty` is the
    share of queries without items within the radius.
    """

    precision: Floats
    recall: Floats
    empty: Floats


def radius_curve(histograms: Histograms) -> RadiusCurve:
    """Return precision and recall of radius lookup."""
    items, relevant = np.cumsum(histograms.items, 1), np.cumsum(histograms.relevant, 1)
    return RadiusCurve(
        precision=(relevant / np.maximum(items, 1)).mean(0),
        recall=(relevant / np.maximum(relevant[:, -1:], 1)).mean(0),
        empty=(items == 0).mean(0),
    )


def nearest_class_shares(counts: Floats, query_labels: Labels) -> Floats:
    """Return the classes of the nearest items, float64 [C, C]; a row for the queries of each class.

    A row sums to 1 minus the share of unlabelled items; it is 0 if no query has the class.

    Args:
        counts: float64 [C, C] of `nearest_class_counts`.
        query_labels: labels of the queries, one class each.
    """
    assert query_labels.ndim == 1, "a multi-label item has no single column"
    return counts / np.maximum(np.bincount(query_labels, minlength=len(counts)), 1)[:, None]


def nearest_class_counts(
    retrieval: Retrieval, num_classes: int, counts_by_distance: Counts | None = None, *, chunk_pairs: int = CHUNK_PAIRS
) -> Floats:
    """Return how many queries of each row's class have a nearest item of each column's class; see `add_nearest`.

    `counts_by_distance`: as `counts` of `rankings`.
    """
    counts = np.zeros((num_classes, num_classes))
    ranked = rankings(retrieval, counts=counts_by_distance)
    for queries in query_chunks(retrieval, chunk_pairs):
        nearest = []
        for ranking in islice(ranked, queries.stop - queries.start):
            num_tied = ranking.counts[np.flatnonzero(ranking.counts)[:1]].sum()
            nearest.append(ranking.items[:num_tied].copy())
        rows = np.repeat(np.arange(len(nearest)), [len(items) for items in nearest])
        add_nearest(counts, rows, np.concatenate(nearest), retrieval.query_labels[queries], retrieval.database_labels)
    return counts


def add_nearest(counts: Floats, rows: Counts, columns: Counts, query_labels: Labels, database_labels: Labels) -> None:
    """Add to `counts` float64 [C, C] the queries of each row's class with a nearest item of each column's class.

    Items that tie share the rank of the nearest; unlabelled ones are not counted. With several classes per item, only
    nearest items that share no class with the query are counted, in equal parts for all pairs of their classes.

    Args:
        counts: changed in place.
        rows: int64 [P], the query of each pair of a query and one of its nearest items, ascending.
        columns: int64 [P], the item of each pair.
        query_labels: of the queries.
        database_labels: of the items.
    """
    weights = 1 / np.bincount(rows, minlength=len(query_labels))[rows]
    if query_labels.ndim == 1:
        known = database_labels[columns] >= 0
        np.add.at(counts, (query_labels[rows][known], database_labels[columns][known]), weights[known])
        return
    for start in range(0, len(rows), _PAIRS_AT_ONCE):
        part = slice(start, start + _PAIRS_AT_ONCE)
        of_query, of_item = query_labels[rows[part]], database_labels[columns[part]]
        is_wrong = ~(of_query & of_item).any(1) & of_item.any(1)
        shares = [hot[is_wrong] / hot[is_wrong].sum(1, keepdims=True) for hot in (of_query, of_item)]
        size = query_labels.shape[1]
        counts[:size, :size] += (shares[0] * weights[part][is_wrong, None]).T @ shares[1]


def pair_recall(retrieval: Retrieval, histograms: Histograms, own: npt.NDArray[np.integer]) -> dict[str, float]:
    """Return the share of queries that find their own pair within rank k, expected over ties: {"recall@1": …, …}.

    Args:
        retrieval: queries and database.
        histograms: its `rank_histograms`.
        own: integers [Q], the position of the pair in the database; -1 (absent) counts as not found.
    """
    assert retrieval.exclude is None, "a pair is to be found"
    sums = dict.fromkeys((f"recall@{k}" for k in PAIR_CUTOFFS), 0.0)
    before = np.cumsum(histograms.items, 1) - histograms.items
    for queries in query_chunks(retrieval):
        rows = queries.start + np.flatnonzero(own[queries] >= 0)
        differing = retrieval.query_codes[rows] ^ retrieval.database_codes[own[rows]]
        distances = np.bitwise_count(differing).sum(1, dtype=np.int64)
        num_before, tied = before[rows, distances], histograms.items[rows, distances]
        for k in PAIR_CUTOFFS:
            sums[f"recall@{k}"] += float((np.clip(k - num_before, 0, tied) / tied).sum())
    return {name: total / len(own) for name, total in sums.items()}


def evaluate_codes(
    retrieval: Retrieval, histograms: Histograms, cutoffs: Sequence[int] = (20, 100)
) -> tuple[Values, dict[str, float]]:
    """Return the metrics of `metrics.json` and the value of each by chance.

    Args:
        retrieval: queries and database.
        histograms: its `rank_histograms`.
        cutoffs: the k of average precision; the whole ranking ("all") is always added for `ap_min`.

    Returns:
        Means over all queries, as {"ap_min@20": {"expected", "index", "optimistic", "pessimistic"}, …}: every
        definition of average precision, "precision@k" (hits divided by k, even if the database has fewer than k
        items), "recall@k", "success@20" (at least one relevant item), "precision_radius@2", and "ndcg@k" for
        multi-label items. Second, the expectation of each metric under a random ranking.
    """
    values: Values = {}
    chance: dict[str, float] = {}
    random_order = histograms.without_distances()
    measures = [(d, check_cutoff(k)) for k in dict.fromkeys(cutoffs) for d in DEFINITIONS]
    by_order = _order_means(retrieval, histograms, measures)
    for definition, k in [*measures, ("ap_min", None)]:
        name = f"{definition}@{k or 'all'}"
        values[name] = {p: float(average_precision(histograms, k, definition, p).mean()) for p in POLICIES}
        chance[name] = float(average_precision(random_order, k, definition).mean())
    num_relevant = np.maximum(histograms.num_relevant, 1)
    at_k = [(f"precision@{k}", k, np.full_like(num_relevant, k)) for k in PRECISION_CUTOFFS]
    at_k += [(f"recall@{k}", k, num_relevant) for k in PRECISION_CUTOFFS]
    expected_hits = {k: {p: hits_at(histograms, k, p) for p in POLICIES} for k in PRECISION_CUTOFFS}
    chance_hits = {k: hits_at(random_order, k) for k in PRECISION_CUTOFFS}
    for name, k, divisor in at_k:
        values[name] = {p: float((hits / divisor).mean()) for p, hits in expected_hits[k].items()}
        chance[name] = float((chance_hits[k] / divisor).mean())
    success = f"success@{SUCCESS_K}"
    values[success] = {p: float(success_at(histograms, SUCCESS_K, p).mean()) for p in POLICIES}
    chance[success] = float(success_at(random_order, SUCCESS_K).mean())
    for name, value in by_order.items():
        values[name]["index"] = value
    lookup = f"precision_radius@{LOOKUP_RADIUS}"
    within = float(radius_curve(histograms).precision[min(LOOKUP_RADIUS, retrieval.bits)])
    values[lookup] = dict.fromkeys((*POLICIES, "index"), within)
    chance[lookup] = chance["precision@1"]
    if retrieval.multi_label:
        for name, by_policy in normalised_gains(retrieval, cutoffs).items():
            values[name] = {policy: float(gains.mean()) for policy, gains in by_policy.items()}
            chance[name] = values[name]["chance"]
    order = ("expected", "index", "optimistic", "pessimistic")
    return {name: {p: by_policy[p] for p in order} for name, by_policy in values.items()}, chance


def _order_means(
    retrieval: Retrieval, histograms: Histograms, measures: Sequence[tuple[Definition, int]]
) -> dict[str, float]:
    """Return means over the queries with ties in the database's order, in one pass over the rankings."""
    all_measures = [*measures, ("ap_min", None)]
    all_cutoffs = dict.fromkeys(k for _, k in all_measures)
    totals = dict.fromkeys((f"{d}@{k or 'all'}" for d, k in all_measures), 0.0)
    totals[f"success@{SUCCESS_K}"] = 0.0
    totals.update(dict.fromkeys((f"{m}@{k}" for k in PRECISION_CUTOFFS for m in ("precision", "recall")), 0.0))
    num_items = retrieval.num_items.tolist()
    for ranking, items in zip(rankings(retrieval, counts=histograms.items), num_items, strict=True):
        ranks = np.flatnonzero(ranking.gains) + 1
        precisions = {k: ranked_average_precisions(ranks, k, items) for k in all_cutoffs}
        for definition, k in all_measures:
            totals[f"{definition}@{k or 'all'}"] += precisions[k][definition]
        for k, hits in zip(
            PRECISION_CUTOFFS, ranks.searchsorted(PRECISION_CUTOFFS, side="right").tolist(), strict=True
        ):
            totals[f"precision@{k}"] += hits / k
            totals[f"recall@{k}"] += hits / max(len(ranks), 1)
        totals[f"success@{SUCCESS_K}"] += bool(ranks.searchsorted(SUCCESS_K, side="right"))
    return {name: total / len(num_items) for name, total in totals.items()}
