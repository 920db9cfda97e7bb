"""Retrieval metrics of packed codes: all metrics of `metrics.json`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

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
    ranked_average_precision,
    success_at,
)
from orbithash.trainers.metrics.gains import normalised_gains
from orbithash.trainers.metrics.retrieval import CHUNK_PAIRS, Labels, Retrieval, chunks

__all__ = [
    "DEFINITIONS",
    "POLICIES",
    "PRECISION_CUTOFFS",
    "SUCCESS_K",
    "RadiusCurve",
    "Values",
    "add_nearest",
    "evaluate_codes",
    "mean_average_precision",
    "nearest_class_counts",
    "nearest_class_shares",
    "order_average_precision",
    "pair_recall",
    "radius_curve",
    "rank_histograms",
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


def rank_histograms(retrieval: Retrieval, *, chunk_pairs: int = CHUNK_PAIRS) -> Histograms:
    """Return the numbers of items and relevant items at each distance 0..K from each query."""
    # One more column for excluded items.
    columns = retrieval.bits + 2
    items = np.zeros((len(retrieval.query_codes), columns), np.int64)
    relevant = np.zeros_like(items)
    for start, distances, shared in chunks(retrieval, chunk_pairs):
        rows = len(distances)
        cells = distances + np.arange(rows)[:, None] * columns
        shape, size = (rows, columns), rows * columns
        items[start : start + rows] = np.bincount(cells.ravel(), minlength=size).reshape(shape)
        relevant[start : start + rows] = np.bincount(cells[shared > 0], minlength=size).reshape(shape)
    return Histograms(items[:, :-1], relevant[:, :-1])


def mean_average_precision(
    query_codes: npt.NDArray[np.uint8],
    database_codes: npt.NDArray[np.uint8],
    query_labels: Labels,
    database_labels: Labels,
    bits: int,
    k: int | None = 20,
) -> float:
    """Return the mean over the queries of the expected `ap_min` within rank k; None: over the whole ranking."""
    retrieval = Retrieval(query_codes, database_codes, query_labels, database_labels, bits)
    return float(average_precision(rank_histograms(retrieval), k).mean())


def order_average_precision(
    retrieval: Retrieval,
    k: int | None,
    definition: Definition = "ap_min",
    *,
    seed: int | None = None,
    chunk_pairs: int = CHUNK_PAIRS,
) -> Floats:
    """Average precision with ties in one order, float64 [Q]: the database's, or a random one drawn from `seed`."""
    order = None if seed is None else np.random.default_rng(seed).permutation(len(retrieval.database_codes))
    num_items = retrieval.num_items.tolist()
    ranks = _relevant_ranks(retrieval, order, chunk_pairs)
    return np.array([ranked_average_precision(r, k, definition, n) for r, n in zip(ranks, num_items, strict=True)])


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


def nearest_class_shares(retrieval: Retrieval, num_classes: int, *, chunk_pairs: int = CHUNK_PAIRS) -> Floats:
    """Return the classes of the nearest items, float64 [num_classes, num_classes]; a row for the queries of each class.

    Items that tie at the smallest distance share the rank. A row sums to 1 minus the share of unlabelled items; it is 0
    if no query has the class. Labels must be single and below `num_classes`.
    """
    assert not retrieval.multi_label, "a multi-label item has no single column"
    counts = np.bincount(retrieval.query_labels, minlength=num_classes)
    return nearest_class_counts(retrieval, num_classes, chunk_pairs=chunk_pairs) / np.maximum(counts, 1)[:, None]


def nearest_class_counts(retrieval: Retrieval, num_classes: int, *, chunk_pairs: int = CHUNK_PAIRS) -> Floats:
    """Return how many queries of each row's class have a nearest item of each column's class; see `add_nearest`."""
    counts = np.zeros((num_classes, num_classes))
    for start, distances, _ in chunks(retrieval, chunk_pairs):
        labels = retrieval.query_labels[start : start + len(distances)]
        add_nearest(counts, distances, distances <= retrieval.bits, labels, retrieval.database_labels)
    return counts


def add_nearest(
    counts: Floats,
    distances: npt.NDArray[Any],
    is_ranked: npt.NDArray[np.bool_],
    query_labels: Labels,
    database_labels: Labels,
) -> None:
    """Add to `counts` float64 [C, C] the queries of each row's class with a nearest item of each column's class.

    Items that tie share the rank of the nearest; unlabelled ones are not counted. With several classes per item, only
    nearest items that share no class with the query are counted, in equal parts for all pairs of their classes.

    Args:
        counts: changed in place.
        distances: [q, N].
        is_ranked: bool [q, N]; excluded items are not ranked.
        query_labels: of the q queries.
        database_labels: of the N items.
    """
    rows, columns = np.nonzero((distances == distances.min(1, keepdims=True)) & is_ranked)
    weights = 1 / np.bincount(rows, minlength=len(distances))[rows]
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


def pair_recall(
    retrieval: Retrieval, own: npt.NDArray[np.integer], *, chunk_pairs: int = CHUNK_PAIRS
) -> dict[str, float]:
    """Return the share of queries that find their own pair within rank k, expected over ties: {"recall@1": …, …}.

    `own` integers [Q] is the position of the pair in the database; -1 (absent) counts as not found.
    """
    sums = dict.fromkeys((f"recall@{k}" for k in PAIR_CUTOFFS), 0.0)
    for start, distances, _ in chunks(retrieval, chunk_pairs):
        positions = own[start : start + len(distances)]
        rows = np.flatnonzero(positions >= 0)
        pair = distances[rows, positions[rows], None]
        before, tied = (distances[rows] < pair).sum(1), (distances[rows] == pair).sum(1)
        for k in PAIR_CUTOFFS:
            sums[f"recall@{k}"] += float((np.clip(k - before, 0, tied) / tied).sum())
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
    by_order = _order_means(retrieval, measures)
    for definition, k in [*measures, ("ap_min", None)]:
        name = f"{definition}@{k or 'all'}"
        values[name] = {p: float(average_precision(histograms, k, definition, p).mean()) for p in POLICIES}
        chance[name] = float(average_precision(random_order, k, definition).mean())
    num_relevant = np.maximum(histograms.num_relevant, 1)
    at_k = [(f"precision@{k}", k, np.full_like(num_relevant, k)) for k in PRECISION_CUTOFFS]
    at_k += [(f"recall@{k}", k, num_relevant) for k in PRECISION_CUTOFFS]
    for name, k, divisor in at_k:
        values[name] = {p: float((hits_at(histograms, k, p) / divisor).mean()) for p in POLICIES}
        chance[name] = float((hits_at(random_order, k) / divisor).mean())
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


def _order_means(retrieval: Retrieval, measures: Sequence[tuple[Definition, int]]) -> dict[str, float]:
    """Return means over the queries with ties in the database's order, in one pass over the rankings."""
    all_measures = [*measures, ("ap_min", None)]
    totals = dict.fromkeys((f"{d}@{k or 'all'}" for d, k in all_measures), 0.0)
    totals[f"success@{SUCCESS_K}"] = 0.0
    totals.update(dict.fromkeys((f"{m}@{k}" for k in PRECISION_CUTOFFS for m in ("precision", "recall")), 0.0))
    num_items = retrieval.num_items.tolist()
    for ranks, items in zip(_relevant_ranks(retrieval, None, CHUNK_PAIRS), num_items, strict=True):
        for definition, k in all_measures:
            totals[f"{definition}@{k or 'all'}"] += ranked_average_precision(ranks, k, definition, items)
        for k in PRECISION_CUTOFFS:
            hits = int(np.searchsorted(ranks, k, side="right"))
            totals[f"precision@{k}"] += hits / k
            totals[f"recall@{k}"] += hits / max(len(ranks), 1)
        totals[f"success@{SUCCESS_K}"] += bool(np.searchsorted(ranks, SUCCESS_K, side="right"))
    return {name: total / len(num_items) for name, total in totals.items()}


def _relevant_ranks(retrieval: Retrieval, order: Counts | None, chunk_pairs: int) -> Iterator[Counts]:
    """Yield the 1-based ranks of the relevant items of each query; ties are in the order of the database or `order`."""
    for _, distances, shared in chunks(retrieval, chunk_pairs):
        same = shared > 0
        if order is not None:
            distances, same = distances[:, order], same[:, order]
        ranking = np.argsort(distances, axis=1, kind="stable")
        for row in np.take_along_axis(same, ranking, 1):
            yield np.flatnonzero(row) + 1
