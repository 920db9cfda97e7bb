"""Retrieval metrics of packed codes: from codes and labels to the figures of `metrics.json`.

A database item is relevant to a query when both have the same label. Database items of unknown label (-1) are relevant
to nothing and stay in the ranking as distractors.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_bits, check_codes, hamming
from orbithash.encoders.errors import InputError
from orbithash.trainers.average_precision import (
    Counts,
    Definition,
    Floats,
    Histograms,
    Policy,
    average_precision,
    check_cutoff,
    hits_at,
    ranked_average_precision,
)

__all__ = [
    "DEFINITIONS",
    "PRECISION_CUTOFFS",
    "RadiusCurve",
    "Retrieval",
    "evaluate_codes",
    "mean_average_precision",
    "nearest_class_shares",
    "order_average_precision",
    "radius_curve",
    "rank_histograms",
]

DEFINITIONS: tuple[Definition, ...] = ("ap_min", "ap_hits", "ap_k", "ap_first_k")
PRECISION_CUTOFFS = (1, 5, 10, 20, 50, 100)
LOOKUP_RADIUS = 2
UNKNOWN = -1

_POLICIES: tuple[Policy, ...] = ("expected", "optimistic", "pessimistic")
# Pairs of query and database item held at once: some 60 MiB with their distances and their order.
_CHUNK_PAIRS = 4_000_000

Figures = dict[str, dict[str, float]]


@dataclass(frozen=True)
class Retrieval:
    """Queries against a database, checked.

    Attributes:
        query_codes: uint8 [Q, ceil(bits/8)], Q >= 1.
        database_codes: uint8 [N, ceil(bits/8)].
        query_labels: integers [Q], none negative.
        database_labels: integers [N], -1 where unknown.
        bits: bits of a code.
        exclude: integers [Q], the position in the database of the query itself, which its ranking leaves out, or -1;
            None where no query leaves anything out.

    Raises:
        InputError: shapes, types or labels that do not fit.
    """

    query_codes: npt.NDArray[np.uint8]
    database_codes: npt.NDArray[np.uint8]
    query_labels: npt.NDArray[np.integer]
    database_labels: npt.NDArray[np.integer]
    bits: int
    exclude: npt.NDArray[np.integer] | None = None

    def __post_init__(self) -> None:
        check_bits(self.bits)
        for side, codes, labels in (
            ("query", self.query_codes, self.query_labels),
            ("database", self.database_codes, self.database_labels),
        ):
            check_codes(codes, self.bits)
            if codes.ndim != 2 or not len(codes):
                raise InputError(f"the {side} codes are {codes.shape}; an evaluation needs one row or more of codes")
            _check_integers(labels, len(codes), f"{side} labels")
        unknown = int(np.count_nonzero(self.query_labels < 0))
        if unknown:
            raise InputError(
                f"{unknown} of {len(self.query_labels)} queries have no label (-1), so nothing is relevant to them; "
                "leave them out"
            )
        if self.exclude is not None:
            _check_integers(self.exclude, len(self.query_codes), "positions to exclude")
            if self.exclude.min() < -1 or self.exclude.max() >= len(self.database_codes):
                raise InputError(f"positions to exclude are -1 or below {len(self.database_codes)}, got others")


def rank_histograms(retrieval: Retrieval, *, chunk_pairs: int = _CHUNK_PAIRS) -> Histograms:
    """Items and relevant items at each distance 0..K from each query."""
    # One column more for what is left out.
    columns = retrieval.bits + 2
    items = np.zeros((len(retrieval.query_codes), columns), np.int64)
    relevant = np.zeros_like(items)
    for start, distances, same in _chunks(retrieval, chunk_pairs):
        rows = len(distances)
        cells = distances + np.arange(rows)[:, None] * columns
        shape, size = (rows, columns), rows * columns
        items[start : start + rows] = np.bincount(cells.ravel(), minlength=size).reshape(shape)
        relevant[start : start + rows] = np.bincount(cells[same], minlength=size).reshape(shape)
    return Histograms(items[:, :-1], relevant[:, :-1])


def mean_average_precision(
    query_codes: npt.NDArray[np.uint8],
    database_codes: npt.NDArray[np.uint8],
    query_labels: npt.NDArray[np.integer],
    database_labels: npt.NDArray[np.integer],
    bits: int,
    k: int | None = 20,
) -> float:
    """The headline in one number: expected `ap_min` within rank k, mean over the queries; None is the whole ranking."""
    retrieval = Retrieval(query_codes, database_codes, query_labels, database_labels, bits)
    return float(average_precision(rank_histograms(retrieval), k).mean())


def order_average_precision(
    retrieval: Retrieval,
    k: int | None,
    definition: Definition = "ap_min",
    *,
    seed: int | None = None,
    chunk_pairs: int = _CHUNK_PAIRS,
) -> Floats:
    """Average precision with ties in one order, float64 [Q]: the database's, or a random one drawn from `seed`."""
    order = None if seed is None else np.random.default_rng(seed).permutation(len(retrieval.database_codes))
    num_items = _num_items(retrieval)
    ranks = _relevant_ranks(retrieval, order, chunk_pairs)
    return np.array([ranked_average_precision(r, k, definition, n) for r, n in zip(ranks, num_items, strict=True)])


@dataclass(frozen=True)
class RadiusCurve:
    """Lookup of everything within a Hamming radius, inclusive: means over the queries for the radii 0..K.

    `precision` counts a query with an empty ball as 0, `recall` one with nothing relevant; `empty` is the share of
    queries whose ball is empty.
    """

    precision: Floats
    recall: Floats
    empty: Floats


def radius_curve(histograms: Histograms) -> RadiusCurve:
    """Precision and recall of radius lookup."""
    items, relevant = np.cumsum(histograms.items, 1), np.cumsum(histograms.relevant, 1)
    return RadiusCurve(
        precision=(relevant / np.maximum(items, 1)).mean(0),
        recall=(relevant / np.maximum(relevant[:, -1:], 1)).mean(0),
        empty=(items == 0).mean(0),
    )


def nearest_class_shares(retrieval: Retrieval, num_classes: int, *, chunk_pairs: int = _CHUNK_PAIRS) -> Floats:
    """Which class stands at rank 1: float64 [num_classes, num_classes], a row for the queries of one class.

    Items that tie at the smallest distance share the rank. A row sums to 1, less what goes to unknown labels, or is 0
    where no query has the class. Labels are below `num_classes`.
    """
    shares = np.zeros((num_classes, num_classes))
    for start, distances, _ in _chunks(retrieval, chunk_pairs):
        nearest = distances.min(1, keepdims=True)
        rows, columns = np.nonzero((distances == nearest) & (nearest <= retrieval.bits))
        weights = 1 / np.bincount(rows, minlength=len(distances))[rows]
        known = retrieval.database_labels[columns] >= 0
        pairs = (retrieval.query_labels[start + rows], retrieval.database_labels[columns])
        np.add.at(shares, (pairs[0][known], pairs[1][known]), weights[known])
    counts = np.bincount(retrieval.query_labels, minlength=num_classes)
    return shares / np.maximum(counts, 1)[:, None]


def evaluate_codes(
    retrieval: Retrieval, histograms: Histograms, cutoffs: Sequence[int] = (20, 100)
) -> tuple[Figures, dict[str, float]]:
    """The figures of `metrics.json` and what each would be by chance.

    Args:
        retrieval: queries and database.
        histograms: its `rank_histograms`.
        cutoffs: the k of average precision; the whole ranking ("all") is always added for `ap_min`.

    Returns:
        Means over all queries, as {"ap_min@20": {"expected", "index", "optimistic", "pessimistic"}, …}: every
        definition of average precision, "precision@k" (hits over k, also where the database has fewer than k items),
        "recall@k" and "precision_radius@2"; and the expectation of each under a random ranking.
    """
    figures: Figures = {}
    chance: dict[str, float] = {}
    lone = histograms.without_distances()
    measures = [(d, check_cutoff(k)) for k in dict.fromkeys(cutoffs) for d in DEFINITIONS]
    by_order = _order_means(retrieval, measures)
    for definition, k in [*measures, ("ap_min", None)]:
        name = f"{definition}@{k or 'all'}"
        figures[name] = {p: float(average_precision(histograms, k, definition, p).mean()) for p in _POLICIES}
        chance[name] = float(average_precision(lone, k, definition).mean())
    num_relevant = np.maximum(histograms.num_relevant, 1)
    at_k = [(f"precision@{k}", k, np.full_like(num_relevant, k)) for k in PRECISION_CUTOFFS]
    at_k += [(f"recall@{k}", k, num_relevant) for k in PRECISION_CUTOFFS]
    for name, k, divisor in at_k:
        figures[name] = {p: float((hits_at(histograms, k, p) / divisor).mean()) for p in _POLICIES}
        chance[name] = float((hits_at(lone, k) / divisor).mean())
    for name, value in by_order.items():
        figures[name]["index"] = value
    lookup = f"precision_radius@{LOOKUP_RADIUS}"
    within = float(radius_curve(histograms).precision[min(LOOKUP_RADIUS, retrieval.bits)])
    figures[lookup] = dict.fromkeys((*_POLICIES, "index"), within)
    chance[lookup] = chance["precision@1"]
    order = ("expected", "index", "optimistic", "pessimistic")
    return {name: {p: values[p] for p in order} for name, values in figures.items()}, chance


def _order_means(retrieval: Retrieval, measures: Sequence[tuple[Definition, int]]) -> dict[str, float]:
    """Means over the queries with ties in the database's order, in one pass over the rankings."""
    everything = [*measures, ("ap_min", None)]
    totals = dict.fromkeys((f"{d}@{k or 'all'}" for d, k in everything), 0.0)
    totals.update(dict.fromkeys((f"{m}@{k}" for k in PRECISION_CUTOFFS for m in ("precision", "recall")), 0.0))
    num_items = _num_items(retrieval)
    for ranks, items in zip(_relevant_ranks(retrieval, None, _CHUNK_PAIRS), num_items, strict=True):
        for definition, k in everything:
            totals[f"{definition}@{k or 'all'}"] += ranked_average_precision(ranks, k, definition, items)
        for k in PRECISION_CUTOFFS:
            hits = int(np.searchsorted(ranks, k, side="right"))
            totals[f"precision@{k}"] += hits / k
            totals[f"recall@{k}"] += hits / max(len(ranks), 1)
    return {name: total / len(num_items) for name, total in totals.items()}


def _num_items(retrieval: Retrieval) -> list[int]:
    left_out = 0 if retrieval.exclude is None else (retrieval.exclude >= 0).astype(np.int64)
    num_items: list[int] = (np.full(len(retrieval.query_codes), len(retrieval.database_codes)) - left_out).tolist()
    return num_items


def _relevant_ranks(retrieval: Retrieval, order: Counts | None, chunk_pairs: int) -> Iterator[Counts]:
    """The 1-based ranks of the relevant items of each query, ties in the order of the database or of `order`."""
    for _, distances, same in _chunks(retrieval, chunk_pairs):
        if order is not None:
            distances, same = distances[:, order], same[:, order]
        ranking = np.argsort(distances, axis=1, kind="stable")
        for row in np.take_along_axis(same, ranking, 1):
            yield np.flatnonzero(row) + 1


def _chunks(
    retrieval: Retrieval, chunk_pairs: int
) -> Iterator[tuple[int, npt.NDArray[np.uint16], npt.NDArray[np.bool_]]]:
    """The first query, distances uint16 [q, N] and relevance bool [q, N] of some queries at a time.

    What a query leaves out is not relevant and stands at distance K + 1, behind everything.
    """
    rows = max(1, chunk_pairs // len(retrieval.database_codes))
    for start in range(0, len(retrieval.query_codes), rows):
        queries = slice(start, start + rows)
        # 16 bits: numpy sorts them by radix.
        distances = hamming(retrieval.query_codes[queries], retrieval.database_codes).astype(np.uint16)
        same = retrieval.query_labels[queries, None] == retrieval.database_labels[None, :]
        if retrieval.exclude is not None:
            left_out = retrieval.exclude[queries]
            found = np.flatnonzero(left_out >= 0)
            distances[found, left_out[found]] = retrieval.bits + 1
            same[found, left_out[found]] = False
        yield start, distances, same


def _check_integers(values: npt.NDArray[np.integer], count: int, what: str) -> None:
    if not np.issubdtype(values.dtype, np.integer) or values.shape != (count,):
        raise InputError(f"{what} are {count} integers, got {values.dtype} {values.shape}")
