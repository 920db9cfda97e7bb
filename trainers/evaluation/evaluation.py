"""Evaluation of codes: the metrics of queries against a database, and examples for the report.

Input are codes, from any encoder: images or sentences, a split of a dataset or an archive.
"""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.trainers.metrics.average_precision import Histograms, average_precision
from orbithash.trainers.metrics.code_statistics import code_statistics
from orbithash.trainers.metrics.metrics import evaluate_codes, nearest_class_shares, pair_recall, rank_histograms
from orbithash.trainers.metrics.rescored import OVERSAMPLING, Scores, rescored_metrics
from orbithash.trainers.metrics.retrieval import (
    Labels,
    Retrieval,
    check_labels,
    labelled,
    num_labels,
    shared_labels,
    with_label,
)

__all__ = [
    "HEADLINE",
    "CodeSample",
    "EncodedPart",
    "Evaluation",
    "GalleryHit",
    "GalleryQuery",
    "evaluate",
    "metrics_of",
    "own_positions",
    "with_baselines",
    "without_baselines",
]

HEADLINE_K = 20
HEADLINE = f"ap_min@{HEADLINE_K}"

# The gallery: classes with a typical query, number of worst queries, items per query.
NUM_TYPICAL, NUM_WORST, NUM_HITS = 8, 4, 8

# Maximum number of database items in the map of codes. t-SNE takes seconds for 2000, and more points overlap.
MAX_SAMPLE = 2000


@dataclass(frozen=True)
class EncodedPart:
    """Items and their codes.

    Attributes:
        ids: unique; the same id in queries and database means the same item.
        codes: uint8 [N, ceil(K/8)].
        labels: integers [N], index of the class, -1 if unknown; or bool [N, C], the classes of each item.
        paths: image file of each item.
        sentences: sentence of each item if the part is text; `paths` are not opened then.
        outputs: int8 [N, K], outputs of the head, as `Encoded`; None: not known, so that they do not rescore.
        vectors: int8 [N, d], stored vectors; None: not known.
    """

    ids: Sequence[str]
    codes: npt.NDArray[np.uint8]
    labels: Labels
    paths: Sequence[str]
    sentences: Sequence[str] | None = None
    outputs: npt.NDArray[np.int8] | None = None
    vectors: npt.NDArray[np.int8] | None = None

    def __post_init__(self) -> None:
        lengths = {"ids": len(self.ids), "codes": len(self.codes), "labels": len(self.labels), "paths": len(self.paths)}
        optional = {"sentences": self.sentences, "outputs": self.outputs, "vectors": self.vectors}
        lengths |= {name: len(values) for name, values in optional.items() if values is not None}
        if len(set(lengths.values())) > 1:
            raise InputError(f"ids, codes, labels and paths of a part must have one entry per item, got {lengths}")
        check_labels(self.labels, len(self.ids), "labels")
        if len(set(self.ids)) < len(self.ids):
            (id, count), *_ = Counter(self.ids).most_common(1)
            raise InputError(f"the id {id!r} occurs {count} times in one part; ids must be unique")

    def select(self, positions: npt.NDArray[np.integer]) -> "EncodedPart":
        """Return the items at these positions."""
        indices = positions.tolist()
        return EncodedPart(
            ids=[self.ids[i] for i in indices],
            codes=self.codes[positions],
            labels=self.labels[positions],
            paths=[self.paths[i] for i in indices],
            sentences=None if self.sentences is None else [self.sentences[i] for i in indices],
            outputs=None if self.outputs is None else self.outputs[positions],
            vectors=None if self.vectors is None else self.vectors[positions],
        )


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
    """A query of the gallery: the reason ("typical" or "worst"), its expected `ap_min@20`, its nearest items."""

    reason: str
    id: str
    path: str
    sentence: str | None
    label: str
    average_precision: float
    hits: tuple[GalleryHit, ...]


@dataclass(frozen=True)
class CodeSample:
    """Labelled database items for the map of codes: `codes` uint8 [n, ceil(K/8)] and `labels` [n]."""

    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: `metrics` is the content of `metrics.json`, the rest is for plots and gallery.

    `nearest_classes` and `sample` are None for multi-label items.
    """

    metrics: dict[str, Any]
    classes: tuple[str, ...]
    histograms: Histograms = field(repr=False)
    nearest_classes: npt.NDArray[np.float64] | None = field(repr=False)
    sample: CodeSample | None = field(repr=False)
    gallery: tuple[GalleryQuery, ...] = field(repr=False)

    @property
    def headline(self) -> float:
        """The expected `ap_min@20`."""
        return float(self.metrics["metrics"][HEADLINE]["expected"])


def evaluate(
    query: EncodedPart,
    database: EncodedPart,
    *,
    dataset: str,
    protocol: str,
    method: str,
    bits: int,
    exclude_self: bool,
    classes: Sequence[str],
    cutoffs: Sequence[int] = (20, 100),
    pairs: bool = False,
) -> Evaluation:
    """Evaluate the codes of queries against the codes of a database.

    Args:
        query: the queries; items without a label are excluded and counted.
        database: the items to search.
        dataset: name of the dataset; it is only recorded, as are `protocol` and `method`.
        protocol: name of the split.
        method: name of the method that made the codes.
        bits: length of a code.
        exclude_self: exclude the item with the query's own id from each answer.
        classes: name of each label.
        cutoffs: the k of average precision; the headline's 20 is always added.
        pairs: also measure how often a query finds the item with its own id, such as the sentence of an image.

    Raises:
        InputError: codes, labels or cut-offs are inconsistent, or no query has a label.
    """
    num_queries = len(query.ids)
    query = query.select(np.flatnonzero(labelled(query.labels)))
    if not query.ids:
        raise InputError(f"none of the {num_queries} queries has a label, so no item is relevant to them")
    own = own_positions(query, database)
    retrieval = Retrieval(
        query.codes, database.codes, query.labels, database.labels, bits, own if exclude_self else None
    )
    max_label = max(num_labels(query.labels), num_labels(database.labels)) - 1
    if max_label >= len(classes):
        raise InputError(f"label {max_label} has no name; there are {len(classes)} classes")
    histograms = rank_histograms(retrieval)
    values, chance = evaluate_codes(retrieval, histograms, (HEADLINE_K, *cutoffs))
    scores = average_precision(histograms, HEADLINE_K)
    metrics = {
        "dataset": dataset,
        "protocol": protocol,
        "method": method,
        "bits": int(bits),
        "queries": len(query.ids),
        "database": len(database.ids),
        "exclude_self": exclude_self,
        "queries_in_database": int(np.count_nonzero(own >= 0)),
        "queries_without_label": num_queries - len(query.ids),
        "queries_without_relevant": int(np.count_nonzero(histograms.num_relevant == 0)),
        "metrics": values,
        "chance": chance,
        "per_class": {
            str(classes[label]): float(scores[with_label(query.labels, label)].mean())
            for label in _present(query.labels)
        },
        "codes": asdict(code_statistics(database.codes, bits)),
    }
    if rescored := _rescored(retrieval, query, database, cutoffs):
        metrics["rescored"] = rescored
    if pairs:
        metrics["pair_recall"] = pair_recall(retrieval, own)
    return Evaluation(
        metrics=metrics,
        classes=tuple(classes),
        histograms=histograms,
        nearest_classes=None if retrieval.multi_label else nearest_class_shares(retrieval, len(classes)),
        sample=None if retrieval.multi_label else _sample(database),
        gallery=_gallery(retrieval, query, database, scores, classes),
    )


def _rescored(
    retrieval: Retrieval, query: EncodedPart, database: EncodedPart, cutoffs: Sequence[int]
) -> dict[str, Any]:
    """Return the metrics of rescored rankings by way of rescoring, and the oversampling; empty if there is no way."""
    scores = {}
    if query.vectors is not None and database.vectors is not None:
        scores["vector"] = Scores(query.vectors, database.vectors)
    if query.outputs is not None:
        scores["asymmetric"] = Scores(query.outputs, database.codes)
    found = {way: rescored_metrics(retrieval, of_way, (HEADLINE_K, *cutoffs)) for way, of_way in scores.items()}
    return {"oversampling": OVERSAMPLING, **found} if found else {}


def own_positions(query: EncodedPart, database: EncodedPart) -> npt.NDArray[np.int64]:
    """Return the position in the database of the item with each query's id, int64 [Q]; -1 if it is absent."""
    positions = {id: position for position, id in enumerate(database.ids)}
    return np.array([positions.get(id, -1) for id in query.ids], np.int64)


def with_baselines(evaluation: Evaluation, baselines: Mapping[str, Mapping[str, Any]]) -> Evaluation:
    """Return the evaluation with the result of `evaluate_baselines` and the names of the better baselines.

    Better: with a higher headline. "beaten_by" names those of at most the code's bytes per item, "beaten_by_larger"
    those of more.
    """
    size = evaluation.metrics["codes"]["bytes_per_code"]
    better = [
        name for name, result in baselines.items() if result.get("metrics", {}).get(HEADLINE, -1) > evaluation.headline
    ]
    metrics = {
        **evaluation.metrics,
        "baselines": dict(baselines),
        "beaten_by": [name for name in better if baselines[name]["bytes"] <= size],
        "beaten_by_larger": [name for name in better if baselines[name]["bytes"] > size],
    }
    return replace(evaluation, metrics=metrics)


def without_baselines(evaluation: Evaluation, reason: str) -> Evaluation:
    """Return the evaluation with the reason why there are no baselines."""
    return replace(evaluation, metrics={**evaluation.metrics, "baselines": {}, "baselines_left_out": reason})


def metrics_of(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the content of `metrics.json` for several directions of one model, such as "image->text".

    Dataset, protocol, method and bits are written once; every other entry is an object with a key for each direction.
    "mean_recall" is the mean of all recalls of the own pair.
    """
    contents = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    shared = ("dataset", "protocol", "method", "bits")
    metrics: dict[str, Any] = {}
    for key in dict.fromkeys(key for content in contents.values() for key in content):
        of_direction = {name: content[key] for name, content in contents.items() if key in content}
        metrics[key] = next(iter(of_direction.values())) if key in shared else of_direction
    if "pair_recall" in metrics:
        recalls = [recall for of_pair in metrics["pair_recall"].values() for recall in of_pair.values()]
        metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


def _gallery(
    retrieval: Retrieval,
    query: EncodedPart,
    database: EncodedPart,
    scores: npt.NDArray[np.float64],
    classes: Sequence[str],
) -> tuple[GalleryQuery, ...]:
    """Return the median query of some classes, then the worst queries. The choice is deterministic."""
    gallery = []
    for reason, row in _choose(scores, query.labels):
        distances = hamming(retrieval.query_codes[row : row + 1], retrieval.database_codes)[0]
        num_shared = shared_labels(query.labels[row : row + 1], database.labels)[0]
        order = np.argsort(distances, kind="stable")
        if retrieval.exclude is not None:
            order = order[order != retrieval.exclude[row]]
        hits = tuple(
            GalleryHit(
                id=database.ids[i],
                path=database.paths[i],
                sentence=database.sentences[i] if database.sentences is not None else None,
                label=_class_names(classes, database.labels[i]),
                distance=int(distances[i]),
                relevant=bool(num_shared[i]),
            )
            for i in order[:NUM_HITS].tolist()
        )
        sentence = query.sentences[row] if query.sentences is not None else None
        label = _class_names(classes, query.labels[row])
        score = float(scores[row])
        gallery.append(GalleryQuery(reason, query.ids[row], query.paths[row], sentence, label, score, hits))
    return tuple(gallery)


def _choose(scores: npt.NDArray[np.float64], labels: Labels) -> Iterator[tuple[str, int]]:
    """Yield reason and position of the gallery's queries; the classes are evenly spaced from easiest to hardest."""
    present = sorted(_present(labels), key=lambda label: (-scores[with_label(labels, label)].mean(), label))
    picks = np.linspace(0, len(present) - 1, min(NUM_TYPICAL, len(present))).round().astype(int)
    chosen = set()
    for pick in picks.tolist():
        rows = np.flatnonzero(with_label(labels, present[pick]))
        row = int(rows[np.argsort(scores[rows], kind="stable")[len(rows) // 2]])
        # A multi-label query may be the median of several classes.
        if row not in chosen:
            chosen.add(row)
            yield "typical", row
    for row in np.argsort(scores, kind="stable")[:NUM_WORST].tolist():
        yield "worst", row


def _present(labels: Labels) -> list[int]:
    """Return the classes that occur, ascending."""
    present: list[int] = (np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(0))).tolist()
    return [label for label in present if label >= 0]


def _sample(database: EncodedPart) -> CodeSample:
    """Return at most `MAX_SAMPLE` labelled items of the database, always the same ones."""
    known = np.flatnonzero(labelled(database.labels))
    if len(known) > MAX_SAMPLE:
        known = np.sort(np.random.default_rng(0).choice(known, MAX_SAMPLE, replace=False))
    labels = database.labels[known]
    return CodeSample(database.codes[known], labels)


def _class_names(classes: Sequence[str], label: npt.NDArray[Any]) -> str:
    """Return the name of an item's class, or the names of all its classes."""
    return ", ".join(classes[i] for i in _present(label[None])) or "unknown"
