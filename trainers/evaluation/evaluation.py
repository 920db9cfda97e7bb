"""Evaluation of a model's codes: `metrics.json`, the plots and the report.

Queries are encoded, the database is encoded, and nothing here knows how: the same evaluation serves one modality or
two, a split of one dataset or an archive.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.metrics.average_precision import Histograms, average_precision
from orbithash.trainers.metrics.code_statistics import code_statistics
from orbithash.trainers.metrics.metrics import evaluate_codes, nearest_class_shares, pair_recall, rank_histograms
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
    "Hit",
    "Shown",
    "evaluate",
    "metrics_of",
    "own_positions",
    "with_baselines",
    "without_baselines",
    "write_evaluation",
]

HEADLINE_K = 20
HEADLINE = f"ap_min@{HEADLINE_K}"

# What the gallery shows: one typical query of each of some classes, and the worst queries of all.
NUM_TYPICAL, NUM_WORST, NUM_HITS = 8, 4, 8

# Database items whose codes are drawn as a map: t-SNE takes seconds for so many, and more hide each other.
MAX_SAMPLE = 2000

ReadImage = Callable[[str], npt.NDArray[np.uint8]]


@dataclass(frozen=True)
class EncodedPart:
    """Items and their codes.

    Attributes:
        ids: unique; the same id in queries and database is the same item.
        codes: uint8 [N, ceil(K/8)].
        labels: integers [N], index of the class, -1 where unknown; or bool [N, C], its classes.
        paths: what to open to see each item.
        sentences: each item's sentence where the part is text; then `paths` are not opened.
    """

    ids: Sequence[str]
    codes: npt.NDArray[np.uint8]
    labels: Labels
    paths: Sequence[str]
    sentences: Sequence[str] | None = None

    def __post_init__(self) -> None:
        lengths = {"ids": len(self.ids), "codes": len(self.codes), "labels": len(self.labels), "paths": len(self.paths)}
        if self.sentences is not None:
            lengths["sentences"] = len(self.sentences)
        if len(set(lengths.values())) > 1:
            raise InputError(f"a part has one of each for every item, got {lengths}")
        check_labels(self.labels, len(self.ids), "labels")
        if len(set(self.ids)) < len(self.ids):
            (id, count), *_ = Counter(self.ids).most_common(1)
            raise InputError(f"the id {id!r} occurs {count} times in one part; ids are unique")

    def rows(self, which: npt.NDArray[np.integer]) -> "EncodedPart":
        """Some of the items, by position."""
        positions = which.tolist()
        return EncodedPart(
            ids=[self.ids[i] for i in positions],
            codes=self.codes[which],
            labels=self.labels[which],
            paths=[self.paths[i] for i in positions],
            sentences=None if self.sentences is None else [self.sentences[i] for i in positions],
        )


@dataclass(frozen=True)
class Hit:
    """One database item in the answer to a query of the gallery."""

    id: str
    path: str
    sentence: str | None
    label: str
    distance: int
    relevant: bool


@dataclass(frozen=True)
class Shown:
    """A query of the gallery: why it is shown ("typical" or "worst"), its expected `ap_min@20`, its nearest items."""

    reason: str
    id: str
    path: str
    sentence: str | None
    label: str
    average_precision: float
    hits: tuple[Hit, ...]


@dataclass(frozen=True)
class CodeSample:
    """Some database items for a map of their codes: `codes` uint8 [n, ceil(K/8)] and `labels` [n], all known."""

    codes: npt.NDArray[np.uint8]
    labels: npt.NDArray[Any]


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate` found: `metrics` is the content of `metrics.json`, the rest is for plots and gallery.

    `nearest_classes` and `sample` are None where items have several classes.
    """

    metrics: dict[str, Any]
    classes: tuple[str, ...]
    histograms: Histograms = field(repr=False)
    nearest_classes: npt.NDArray[np.float64] | None = field(repr=False)
    sample: CodeSample | None = field(repr=False)
    gallery: tuple[Shown, ...] = field(repr=False)

    @property
    def headline(self) -> float:
        """Expected `ap_min@20`."""
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
    """Evaluates the codes of queries against the codes of a database.

    Args:
        query: what is asked; items without a label are left out, and counted.
        database: what is searched.
        dataset: the dataset's name, for the record, as are `protocol` and `method`.
        protocol: the name of the split.
        method: what made the codes.
        bits: bits of a code.
        exclude_self: leaves out of each answer the item with the query's own id, where the database has it.
        classes: the name of each label.
        cutoffs: the k of average precision; 20, the headline's, is always among them.
        pairs: adds how often a query finds the item with its own id, such as the sentence of the image.

    Raises:
        InputError: codes, labels or cut-offs that do not fit each other.
    """
    num_asked = len(query.ids)
    query = query.rows(np.flatnonzero(labelled(query.labels)))
    if not query.ids:
        raise InputError(f"none of the {num_asked} queries has a label, so nothing is relevant to them")
    own = own_positions(query, database)
    retrieval = Retrieval(
        query.codes, database.codes, query.labels, database.labels, bits, own if exclude_self else None
    )
    beyond = max(num_labels(query.labels), num_labels(database.labels)) - 1
    if beyond >= len(classes):
        raise InputError(f"label {beyond} has no name; there are {len(classes)} classes")
    histograms = rank_histograms(retrieval)
    figures, chance = evaluate_codes(retrieval, histograms, (HEADLINE_K, *cutoffs))
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
        "queries_without_label": num_asked - len(query.ids),
        "queries_without_relevant": int(np.count_nonzero(histograms.num_relevant == 0)),
        "metrics": figures,
        "chance": chance,
        "per_class": {
            str(classes[label]): float(scores[with_label(query.labels, label)].mean())
            for label in _present(query.labels)
        },
        "codes": asdict(code_statistics(database.codes, bits)),
    }
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


def own_positions(query: EncodedPart, database: EncodedPart) -> npt.NDArray[np.int64]:
    """Where the database has the item with each query's id, int64 [Q], -1 where it has none."""
    positions = {id: position for position, id in enumerate(database.ids)}
    return np.array([positions.get(id, -1) for id in query.ids], np.int64)


def with_baselines(evaluation: Evaluation, baselines: Mapping[str, Mapping[str, Any]]) -> Evaluation:
    """The evaluation with the figures of `evaluate_baselines`, and the names of those with a better headline.

    "beaten_by" names those of at most as many bytes an item, "beaten_by_larger" those of more.
    """
    size = evaluation.metrics["codes"]["bytes_per_code"]
    better = [
        name for name, found in baselines.items() if found.get("metrics", {}).get(HEADLINE, -1) > evaluation.headline
    ]
    metrics = {
        **evaluation.metrics,
        "baselines": dict(baselines),
        "beaten_by": [name for name in better if baselines[name]["bytes"] <= size],
        "beaten_by_larger": [name for name in better if baselines[name]["bytes"] > size],
    }
    return replace(evaluation, metrics=metrics)


def without_baselines(evaluation: Evaluation, reason: str) -> Evaluation:
    """The evaluation with a note of why there are no baselines."""
    return replace(evaluation, metrics={**evaluation.metrics, "baselines": {}, "baselines_left_out": reason})


def metrics_of(evaluations: Mapping[str, Evaluation]) -> dict[str, Any]:
    """The content of `metrics.json` for several directions of one model, such as "image->text".

    What all directions share stands once; everything else is an object with a key for each direction that has it.
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


def write_evaluation(
    folder: Path,
    evaluations: Evaluation | Mapping[str, Evaluation],
    *,
    read_image: ReadImage | None = None,
    history: Sequence[Mapping[str, Any]] = (),
) -> Path:
    """Writes `metrics.json`, the plots and `report.html` into `folder`, each atomically, and returns the page's path.

    Args:
        folder: made where it is absent.
        evaluations: one evaluation, or one for each direction ("image->text").
        read_image: opens a path of the gallery as uint8 [H, W, 3]; an item it refuses with `InputError` is shown
            without its picture. None shows no pictures.
        history: one record for each epoch, for the learning curves; see `plots.learning_curves`.
    """
    # matplotlib, jinja2 and pillow: not before a report is written.
    from orbithash.trainers.evaluation.evaluation_report import draw_figures, evaluation_sections, evaluation_title
    from orbithash.trainers.reports.page import write_report

    if isinstance(evaluations, Evaluation):
        by_name, metrics = {"": evaluations}, evaluations.metrics
    else:
        by_name, metrics = dict(evaluations), metrics_of(evaluations)
    text = json.dumps(metrics, indent=2, allow_nan=False) + "\n"
    write_file(folder / "metrics.json", text)
    figures = draw_figures(by_name, history)
    for name, figure in (pair for of_direction in figures.values() for pair in of_direction.items()):
        assert isinstance(figure.plot, str), "plots are SVG"
        write_file(folder / "plots" / f"{name}.svg", figure.plot)
    path = folder / "report.html"
    write_report(path, *evaluation_title(by_name), evaluation_sections(by_name, figures, read_image))
    return path


def _gallery(
    retrieval: Retrieval,
    query: EncodedPart,
    database: EncodedPart,
    scores: npt.NDArray[np.float64],
    classes: Sequence[str],
) -> tuple[Shown, ...]:
    """The same queries for the same codes, chosen by rule: the median of some classes, then the worst of all."""
    shown = []
    for reason, row in _choose(scores, query.labels):
        distances = hamming(retrieval.query_codes[row : row + 1], retrieval.database_codes)[0]
        related = shared_labels(query.labels[row : row + 1], database.labels)[0]
        order = np.argsort(distances, kind="stable")
        if retrieval.exclude is not None:
            order = order[order != retrieval.exclude[row]]
        hits = tuple(
            Hit(
                id=database.ids[i],
                path=database.paths[i],
                sentence=database.sentences[i] if database.sentences is not None else None,
                label=_class_names(classes, database.labels[i]),
                distance=int(distances[i]),
                relevant=bool(related[i]),
            )
            for i in order[:NUM_HITS].tolist()
        )
        sentence = query.sentences[row] if query.sentences is not None else None
        label = _class_names(classes, query.labels[row])
        shown.append(Shown(reason, query.ids[row], query.paths[row], sentence, label, float(scores[row]), hits))
    return tuple(shown)


def _choose(scores: npt.NDArray[np.float64], labels: Labels) -> Iterator[tuple[str, int]]:
    """Reason and row of the queries to show; the classes run evenly from the easiest to the hardest."""
    present = sorted(_present(labels), key=lambda label: (-scores[with_label(labels, label)].mean(), label))
    picks = np.linspace(0, len(present) - 1, min(NUM_TYPICAL, len(present))).round().astype(int)
    chosen = set()
    for pick in picks.tolist():
        rows = np.flatnonzero(with_label(labels, present[pick]))
        row = int(rows[np.argsort(scores[rows], kind="stable")[len(rows) // 2]])
        # A query of several classes may be the median of more than one.
        if row not in chosen:
            chosen.add(row)
            yield "typical", row
    for row in np.argsort(scores, kind="stable")[:NUM_WORST].tolist():
        yield "worst", row


def _present(labels: Labels) -> list[int]:
    """The classes that occur, ascending."""
    present: list[int] = (np.unique(labels) if labels.ndim == 1 else np.flatnonzero(labels.any(0))).tolist()
    return [label for label in present if label >= 0]


def _sample(database: EncodedPart) -> CodeSample:
    """The same items for the same database."""
    known = np.flatnonzero(labelled(database.labels))
    if len(known) > MAX_SAMPLE:
        known = np.sort(np.random.default_rng(0).choice(known, MAX_SAMPLE, replace=False))
    labels = database.labels[known]
    return CodeSample(database.codes[known], labels)


def _class_names(classes: Sequence[str], label: npt.NDArray[Any]) -> str:
    """The name of one item's class, or of all its classes."""
    return ", ".join(classes[i] for i in _present(label[None])) or "unknown"
