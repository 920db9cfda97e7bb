"""Examples for the report: typical answers, the worst queries, and the pairs of classes that are confused.

Every choice follows from the codes and the labels alone, so the same evaluation always shows the same examples.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import hamming
from orbithash.trainers.evaluation.parts import EncodedPart, class_names, present_labels
from orbithash.trainers.metrics.retrieval import Labels, Retrieval, num_labels, shared_labels, with_label

__all__ = ["ConfusedPair", "GalleryHit", "GalleryQuery", "Reason", "confused_pairs", "make_gallery"]

# Number of classes with a typical query, of worst queries, of confused pairs, of pairs with an example, of hits shown.
NUM_TYPICAL, NUM_WORST, NUM_CONFUSED, NUM_CONFUSED_EXAMPLES, NUM_HITS = 8, 8, 10, 5, 8

Reason = Literal["typical", "worst", "confused"]


@dataclass(frozen=True)
class GalleryHit:
    """One database item in the answer to a query of the gallery."""

    id: str
    path: str
    sentence: str | None
    label: str
    distance: int
    relevant: bool


@dataclass(frozen=True)
class GalleryQuery:
    """A query of the gallery with its nearest items.

    Attributes:
        reason: why it is shown.
        position: its position among the labelled queries.
        average_precision: its expected `ap_min@20`.
        hits: its nearest items, nearest first.
    """

    reason: Reason
    position: int
    id: str
    path: str
    sentence: str | None
    label: str
    average_precision: float
    hits: tuple[GalleryHit, ...]


@dataclass(frozen=True)
class ConfusedPair:
    """Two different classes and how often the nearest item of a query of the first one is of the second one.

    Attributes:
        label, nearest: class of the query, class of its nearest item; indices. The item shares no class with the query.
        queries: number of these queries; a query whose nearest items tie counts in parts.
        of: number of all queries of the class.
    """

    label: int
    nearest: int
    queries: float
    of: int


def confused_pairs(nearest: npt.NDArray[np.float64], query_labels: Labels) -> tuple[ConfusedPair, ...]:
    """Return the most frequent pairs, most frequent first, from the counts float64 [C, C] of `nearest_class_counts`."""
    of_class = np.array(
        [np.count_nonzero(with_label(query_labels, label)) for label in range(num_labels(query_labels))]
    )
    of_class = np.pad(of_class, (0, len(nearest) - len(of_class)))
    queries = nearest.copy()
    np.fill_diagonal(queries, 0)
    shares = queries / np.maximum(of_class, 1)[:, None]
    # Of equal numbers, the larger share of its class is first. Rounding must not decide.
    order = np.lexsort((-shares.ravel().round(9), -queries.ravel().round(9)))[:NUM_CONFUSED]
    pairs = (divmod(cell, len(queries)) for cell in order.tolist() if queries.flat[cell] > 0)
    return tuple(ConfusedPair(a, b, float(queries[a, b]), int(of_class[a])) for a, b in pairs)


def make_gallery(
    retrieval: Retrieval,
    query: EncodedPart,
    database: EncodedPart,
    scores: npt.NDArray[np.float64],
    classes: Sequence[str],
    confused: Sequence[ConfusedPair],
) -> tuple[GalleryQuery, ...]:
    """Return the median query of some classes, the worst queries, and an example of some confused pairs.

    `scores` float64 [Q] is the expected `ap_min@20` of each query.
    """

    def answer(reason: Reason, row: int) -> GalleryQuery:
        distances, order = _ranked(retrieval, row)
        num_shared = shared_labels(query.labels[row : row + 1], database.labels)[0]
        hits = tuple(
            GalleryHit(
                id=database.ids[i],
                path=database.paths[i],
                sentence=database.sentences[i] if database.sentences is not None else None,
                label=class_names(classes, database.labels[i]),
                distance=int(distances[i]),
                relevant=bool(num_shared[i]),
            )
            for i in order[:NUM_HITS].tolist()
        )
        sentence = query.sentences[row] if query.sentences is not None else None
        label = class_names(classes, query.labels[row])
        return GalleryQuery(reason, row, query.ids[row], query.paths[row], sentence, label, float(scores[row]), hits)

    gallery = [answer("typical", row) for row in _typical(scores, query.labels)]
    gallery += [answer("worst", row) for row in np.argsort(scores, kind="stable")[:NUM_WORST].tolist()]
    for pair in confused[:NUM_CONFUSED_EXAMPLES]:
        gallery.append(answer("confused", _example(retrieval, scores, pair)))
    return tuple(gallery)


def _ranked(retrieval: Retrieval, row: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.intp]]:
    """Return the distances of all items from a query, and their positions, nearest first, without an excluded item."""
    distances = hamming(retrieval.query_codes[row : row + 1], retrieval.database_codes)[0]
    order = np.argsort(distances, kind="stable")
    if retrieval.exclude is not None:
        order = order[order != retrieval.exclude[row]]
    return distances, order


def _typical(scores: npt.NDArray[np.float64], labels: Labels) -> Iterator[int]:
    """Yield the position of the median query of some classes, which are evenly spaced from easiest to hardest."""
    present = sorted(present_labels(labels), key=lambda label: (-scores[with_label(labels, label)].mean(), label))
    picks = np.linspace(0, len(present) - 1, min(NUM_TYPICAL, len(present))).round().astype(int)
    chosen = set()
    for pick in picks.tolist():
        rows = np.flatnonzero(with_label(labels, present[pick]))
        row = int(rows[np.argsort(scores[rows], kind="stable")[len(rows) // 2]])
        # A multi-label query may be the median of several classes.
        if row not in chosen:
            chosen.add(row)
            yield row


def _example(retrieval: Retrieval, scores: npt.NDArray[np.float64], pair: ConfusedPair) -> int:
    """Return the position of the query of the pair with the lowest score whose first item is of the second class.

    If there is none, the second class is only among the items that tie with the first one; then the query with the
    lowest score for which that is so.
    """
    rows = np.flatnonzero(with_label(retrieval.query_labels, pair.label))
    tied = []
    for row in rows[np.argsort(scores[rows], kind="stable")].tolist():
        distances, order = _ranked(retrieval, row)
        if not len(order):
            continue
        near = order[distances[order] == distances[order[0]]]
        num_shared = shared_labels(retrieval.query_labels[row : row + 1], retrieval.database_labels[near])[0]
        is_confused = with_label(retrieval.database_labels[near], pair.nearest) & (num_shared == 0)
        if is_confused[0]:
            return int(row)
        if is_confused.any():
            tied.append(int(row))
    return tied[0]
