"""Evaluation of codes: the metrics of queries against a database, and examples for the report.

Input are codes, from any encoder: images or sentences, a split of a dataset or an archive.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.trainers.evaluation.comparison import HEADLINE, HEADLINE_K, BaselineResult, main_baseline
from orbithash.trainers.evaluation.gallery import ConfusedPair, GalleryQuery, confused_pairs, make_gallery
from orbithash.trainers.evaluation.parts import EncodedPart, own_positions, present_labels
from orbithash.trainers.metrics.average_precision import Histograms, average_precision
from orbithash.trainers.metrics.code_statistics import CodeStatistics, code_statistics
from orbithash.trainers.metrics.metrics import (
    evaluate_codes,
    nearest_class_counts,
    nearest_class_shares,
    pair_recall,
)
from orbithash.trainers.metrics.rankings import rank_histograms
from orbithash.trainers.metrics.rescored import OVERSAMPLING, Scores, rescored_metrics
from orbithash.trainers.metrics.retrieval import (
    Labels,
    Retrieval,
    labelled,
    num_labels,
    with_label,
)

__all__ = [
    "HEADLINE",
    "CodeSample",
    "Evaluation",
    "class_means",
    "evaluate",
    "metrics_of",
    "with_baselines",
    "without_baselines",
]

# Entries of `metrics.json` that are the same for all directions of a model.
SHARED = ("dataset", "protocol", "method", "model_id", "bits")

# Maximum number of database items in the map of codes. t-SNE of 2000 takes 8 s of one CPU, of 1000 3 s, and more points
# overlap.
MAX_SAMPLE = 1000


@dataclass(frozen=True)
class CodeSample:
    """Labelled database items for the map of codes: `codes` uint8 [n, ceil(K/8)] and `labels` [n]."""

    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """Result of `evaluate`: `metrics` is the content of `metrics.json`, the rest is for plots and galleries.

    `scores` float64 [Q] is the expected `ap_min@20` of each labelled query. `nearest_classes` and `sample` are None for
    multi-label items.
    """

    metrics: dict[str, Any]
    classes: tuple[str, ...]
    histograms: Histograms = field(repr=False)
    scores: npt.NDArray[np.float64] = field(repr=False)
    query_labels: Labels = field(repr=False)
    codes: CodeStatistics = field(repr=False)
    nearest_classes: npt.NDArray[np.float64] | None = field(repr=False)
    sample: CodeSample | None = field(repr=False)
    confused: tuple[ConfusedPair, ...] = field(repr=False)
    gallery: tuple[GalleryQuery, ...] = field(repr=False)
    baselines: Mapping[str, BaselineResult] = field(default_factory=dict, repr=False)

    @property
    def main_baseline(self) -> tuple[str, BaselineResult] | None:
        """Name and result of the best baseline of at most the code's bytes per item, if there is one."""
        return main_baseline(self.baselines, self.metrics["codes"]["bytes_per_code"])

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
    model_id: str = "",
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
        model_id: `model_id` of the model that made the codes; it is only recorded.

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
    codes = code_statistics(database.codes, bits)
    metrics = {
        "dataset": dataset,
        "protocol": protocol,
        "method": method,
        "model_id": model_id,
        "bits": int(bits),
        "queries": len(query.ids),
        "database": len(database.ids),
        "exclude_self": exclude_self,
        "queries_in_database": int(np.count_nonzero(own >= 0)),
        "queries_without_label": num_queries - len(query.ids),
        "queries_without_relevant": int(np.count_nonzero(histograms.num_relevant == 0)),
        "metrics": values,
        "chance": chance,
        "per_class": class_means(scores, query.labels, classes),
        "codes": asdict(codes),
    }
    if rescored := _rescored(retrieval, histograms, query, database, cutoffs):
        metrics["rescored"] = rescored
    if pairs:
        metrics["pair_recall"] = pair_recall(retrieval, histograms, own)
    nearest = nearest_class_counts(retrieval, len(classes), histograms.items)
    confused = confused_pairs(nearest, query.labels)
    return Evaluation(
        metrics=metrics,
        classes=tuple(classes),
        histograms=histograms,
        scores=scores,
        query_labels=query.labels,
        codes=codes,
        nearest_classes=None if retrieval.multi_label else nearest_class_shares(nearest, query.labels),
        sample=None if retrieval.multi_label else _sample(database),
        confused=confused,
        gallery=make_gallery(retrieval, query, database, scores, classes, confused),
    )


def class_means(scores: npt.NDArray[np.float64], labels: Labels, classes: Sequence[str]) -> dict[str, float]:
    """Return the mean score float64 [Q] of the queries of each class, by its name."""
    return {str(classes[label]): float(scores[with_label(labels, label)].mean()) for label in present_labels(labels)}


def _rescored(
    retrieval: Retrieval, histograms: Histograms, query: EncodedPart, database: EncodedPart, cutoffs: Sequence[int]
) -> dict[str, Any]:
    """Return the metrics of rescored rankings by way of rescoring, and the oversampling; empty if there is no way."""
    scores = {}
    if query.vectors is not None and database.vectors is not None:
        scores["vector"] = Scores(query.vectors, database.vectors)
    if query.outputs is not None:
        scores["asymmetric"] = Scores(query.outputs, database.codes)
    found = {
        way: rescored_metrics(retrieval, of_way, (HEADLINE_K, *cutoffs), counts=histograms.items)
        for way, of_way in scores.items()
    }
    return {"oversampling": OVERSAMPLING, **found} if found else {}


def with_baselines(evaluation: Evaluation, results: Mapping[str, BaselineResult | str]) -> Evaluation:
    """Return the evaluation with the results of `evaluate_baselines` and the names of the better baselines.

    Better: with a higher headline. "beaten_by" names those of at most the code's bytes per item, "beaten_by_larger"
    those of more.
    """
    size = evaluation.metrics["codes"]["bytes_per_code"]
    possible = {name: result for name, result in results.items() if not isinstance(result, str)}
    better = [name for name, result in possible.items() if result.metrics[HEADLINE] > evaluation.headline]
    metrics = {
        **evaluation.metrics,
        "baselines": {
            name: {"left_out": result}
            if isinstance(result, str)
            else {"bytes": result.bytes, "metrics": dict(result.metrics)}
            for name, result in results.items()
        },
        "beaten_by": [name for name in better if possible[name].bytes <= size],
        "beaten_by_larger": [name for name in better if possible[name].bytes > size],
    }
    return replace(evaluation, metrics=metrics, baselines=possible)


def without_baselines(evaluation: Evaluation, reason: str) -> Evaluation:
    """Return the evaluation with the reason why there are no baselines."""
    return replace(evaluation, metrics={**evaluation.metrics, "baselines": {}, "baselines_left_out": reason})


def metrics_of(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """Return the content of `metrics.json` for several directions of one model, such as "image->text".

    The entries of `SHARED` are written once; every other entry is an object with a key for each direction.
    "mean_recall" is the mean of all recalls of the own pair.
    """
    contents = {name: evaluation.metrics for name, evaluation in evaluations.items()}
    metrics: dict[str, Any] = {}
    for key in dict.fromkeys(key for content in contents.values() for key in content):
        of_direction = {name: content[key] for name, content in contents.items() if key in content}
        metrics[key] = next(iter(of_direction.values())) if key in SHARED else of_direction
    if "pair_recall" in metrics:
        recalls = [recall for of_pair in metrics["pair_recall"].values() for recall in of_pair.values()]
        metrics["mean_recall"] = sum(recalls) / len(recalls)
    return metrics


def _sample(database: EncodedPart) -> CodeSample:
    """Return at most `MAX_SAMPLE` labelled items of the database, always the same ones."""
    known = np.flatnonzero(labelled(database.labels))
    if len(known) > MAX_SAMPLE:
        known = np.sort(np.random.default_rng(0).choice(known, MAX_SAMPLE, replace=False))
    labels = database.labels[known]
    return CodeSample(database.codes[known], labels)
