"""The report of an evaluation: `metrics.json`, `failures.json`, the plots as SVG files, and `report.html`."""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.evaluation.comparison import HEADLINE
from orbithash.trainers.evaluation.evaluation import CodeSample, Evaluation, class_means, metrics_of
from orbithash.trainers.evaluation.failures import failures_of
from orbithash.trainers.evaluation.gallery import GalleryHit, GalleryQuery
from orbithash.trainers.evaluation.report_failures import answers, failure_sections
from orbithash.trainers.evaluation.report_text import (
    BASELINE_NAMES,
    Evaluations,
    arrow,
    baseline_table,
    explanations,
    headline_facts,
    metrics_table,
    report_provenance,
    report_title,
    rescored_table,
)
from orbithash.trainers.metrics.average_precision import hits_at
from orbithash.trainers.metrics.metrics import radius_curve
from orbithash.trainers.reports import plots
from orbithash.trainers.reports.page import (
    Figure,
    Figures,
    Gallery,
    Part,
    Section,
    Text,
    Tile,
    thumbnail_data_uri,
    write_report,
)

__all__ = ["HIT_SIDE_PX", "QUERY_SIDE_PX", "ReadImage", "write_evaluation"]

MAX_CURVE_K = 1000
NUM_CURVE_POINTS = 25
# Minimum number of codes, and of distinct codes, for a map.
MIN_MAPPED, MIN_MAPPED_DISTINCT = 10, 3
# Twice the width at which the page shows them, for high-resolution screens.
QUERY_SIDE_PX, HIT_SIDE_PX = 272, 180

_TYPICAL_CAPTION = (
    "The query with the median average precision (AP) of some classes, from the easiest class to the hardest, and its "
    "nearest items in order."
)

# Reads the image at a path as uint8 [H, W, 3].
ReadImage = Callable[[str], npt.NDArray[np.uint8]]


def write_evaluation(
    folder: Path,
    evaluations: Evaluation | Mapping[str, Evaluation],
    *,
    read_image: ReadImage | None = None,
    history: Sequence[Mapping[str, Any]] = (),
    source: str = "",
) -> Path:
    """Write `metrics.json`, `failures.json`, the plots and `report.html`, each atomically; return the path of the page.

    Args:
        folder: created if absent.
        evaluations: one evaluation, or one per direction ("image->text").
        read_image: reads the gallery's images. An item for which it raises `InputError` is shown without an image.
            None: the gallery has no images.
        history: one record per epoch, for the learning curves; see `plots.learning_curves`.
        source: folder or table of the items, for the head of the page.
    """
    if isinstance(evaluations, Evaluation):
        by_name, metrics = {"": evaluations}, evaluations.metrics
    else:
        by_name, metrics = dict(evaluations), metrics_of(evaluations)
    for file_name, content in (("metrics.json", metrics), ("failures.json", failures_of(by_name))):
        write_file(folder / file_name, json.dumps(content, indent=2, allow_nan=False) + "\n")
    figures = _draw(by_name, history)
    for name, figure in (pair for of_direction in figures.values() for pair in of_direction.items()):
        assert isinstance(figure.plot, str), "plots are SVG"
        write_file(folder / "plots" / f"{name}.svg", figure.plot)
    path = folder / "report.html"
    sections = _sections(by_name, figures, read_image)
    write_report(path, *report_title(by_name), sections, report_provenance(by_name, source))
    return path


def _draw(evaluations: Evaluations, history: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Figure]]:
    """Return all plots by direction and file name; "" holds those of the whole model."""
    shared = {}
    if history:
        shared["losses"] = Figure(
            "Training losses", plots.learning_curves(history, "train"), "Mean of each loss over each epoch."
        )
    if any(name.startswith("validation/") for record in history for name in record):
        shared["validation"] = Figure(
            "Validation",
            plots.learning_curves(history, "validation"),
            "On images held back from training. The choice of the epoch never uses the test part.",
        )
    shared["precision_at_k"] = _precision_at_k(evaluations)
    shared["precision_recall"] = Figure(
        "Precision and recall by radius",
        plots.precision_recall({arrow(name): radius_curve(e.histograms) for name, e in evaluations.items()}),
        "Each point is one Hamming radius: all items within it are returned. Up and to the right is better. A query "
        "that finds nothing counts as precision 0, so a curve may start low.",
    )
    figures = {"": shared}
    for name, evaluation in evaluations.items():
        figures.setdefault(name, {}).update(_direction_plots(name, evaluation))
    return figures


def _sections(
    evaluations: Evaluations, figures: Mapping[str, Mapping[str, Figure]], read_image: ReadImage | None
) -> list[Section]:
    """Return the sections of the page; `figures` are those of `_draw`."""

    def make_tile(item: GalleryQuery | GalleryHit, note: str, relevant: bool | None) -> Tile:
        return _tile(item, read_image, note, relevant)

    sections: list[Section] = [headline_facts(evaluations), Figures("Plots", list(figures[""].values()))]
    for name, evaluation in evaluations.items():
        if name:
            sections += [Part(arrow(name)), Figures("Plots", list(figures[name].values()))]
        sections += failure_sections(evaluation, make_tile)
        typical = answers(evaluation, "typical", make_tile)
        sections += [Gallery("Typical answers", typical, _TYPICAL_CAPTION), metrics_table(evaluation)]
        if "rescored" in evaluation.metrics:
            sections.append(rescored_table(evaluation))
        if baselines := evaluation.metrics.get("baselines"):
            sections.append(baseline_table(evaluation, baselines))
    if len(evaluations) > 1:
        sections.append(Part("All directions"))
    sections.append(Text("How to read these metrics", explanations(evaluations)))
    return sections


def _tile(item: GalleryQuery | GalleryHit, read_image: ReadImage | None, note: str, relevant: bool | None) -> Tile:
    image = None
    if item.sentence is None and read_image is not None:
        try:
            image = thumbnail_data_uri(read_image(item.path), QUERY_SIDE_PX if relevant is None else HIT_SIDE_PX)
        except (InputError, OSError):
            note = f"{note}, cannot be read"
    return Tile(item.label, image, item.sentence, note, relevant)


def _file_name(kind: str, name: str) -> str:
    return f"{kind}_{name.replace('->', '_to_')}" if name else kind


def _precision_at_k(evaluations: Evaluations) -> Figure:
    first = next(iter(evaluations.values()))
    top = int(min(MAX_CURVE_K, max(2, first.histograms.num_items.max())))
    cutoffs = np.unique(np.geomspace(1, top, NUM_CURVE_POINTS).round().astype(int)).tolist()

    def precisions(evaluation: Evaluation, policy: Any) -> Any:
        return np.array([hits_at(evaluation.histograms, k, policy).mean() / k for k in cutoffs])

    lines = {arrow(name) or "expected": precisions(evaluation, "expected") for name, evaluation in evaluations.items()}
    is_single = len(evaluations) == 1
    band = (precisions(first, "pessimistic"), precisions(first, "optimistic")) if is_single else None
    chance = first.metrics["chance"]["precision@1"] if is_single else None
    caption = (
        "Share of the k nearest items that are of the query's class. It must fall once k exceeds the size of the class."
    )
    if is_single:
        caption += " The band spans all orders of items at equal distance."
    return Figure("Precision within the first k", plots.cutoff_curve(cutoffs, lines, band=band, chance=chance), caption)


def _direction_plots(name: str, evaluation: Evaluation) -> dict[str, Figure]:
    """Return the plots of one direction by file name."""
    histograms, metrics = evaluation.histograms, evaluation.metrics
    caption = "Mean over the queries of each class, the hardest class at the bottom."
    baseline = None
    if evaluation.main_baseline is not None:
        baseline_name, result = evaluation.main_baseline
        by_class = class_means(result.scores, evaluation.query_labels, evaluation.classes)
        baseline = BASELINE_NAMES[baseline_name], by_class
        caption += " The marks are those of the best simple method of at most as many bytes."
    figures = {
        _file_name("per_class", name): Figure(
            "Average precision by class",
            plots.bars(
                metrics["per_class"], f"expected {HEADLINE}", mean=evaluation.headline, limit=1, baseline=baseline
            ),
            caption,
        ),
    }
    if (shares := evaluation.nearest_classes) is not None:
        present = [
            i for i, label in enumerate(evaluation.classes) if label in metrics["per_class"] or shares[:, i].any()
        ]
        figures[_file_name("confusion", name)] = Figure(
            "Class of the nearest item",
            plots.class_confusion(shares[np.ix_(present, present)], [evaluation.classes[i] for i in present]),
            "Percentage of the queries of each row's class whose nearest item is of each column's class. A perfect "
            "model has all on the diagonal.",
        )
    figures[_file_name("distances", name)] = Figure(
        "Distances",
        plots.distance_histogram(histograms.items.sum(0), histograms.relevant.sum(0)),
        "Distances from queries to database items of their own class and of other classes. The less the two overlap, "
        "the better a radius separates them.",
    )
    figures[_file_name("bit_balance", name)] = Figure(
        "Balance of the bits",
        plots.bit_balance(metrics["codes"]["bit_balance"]),
        "Share of database codes in which each bit is 1. A bit near one half carries the most information, a bit at 0 "
        "or 1 none. Orange bits are dead or have a rare value.",
    )
    is_cross_modal = "->" in name and len(set(name.split("->"))) > 1
    if (
        evaluation.sample is not None
        and not is_cross_modal
        and (points := _map(evaluation.sample, metrics["bits"])) is not None
    ):
        labels = evaluation.sample.labels
        figures[_file_name("code_map", name)] = Figure(
            "Map of the codes",
            plots.code_map(points, [evaluation.classes[label] for label in labels]),
            f"{len(points):,} database items, arranged by t-SNE. Items close together in the map are close in Hamming "
            "distance; the sizes of groups and the distances between them have no meaning.",
        )
    return figures


def _map(sample: CodeSample, bits: int) -> np.ndarray | None:
    """Return the positions float [n, 2] of the codes in the plane, or None if there are too few distinct codes."""
    if len(sample.codes) < MIN_MAPPED or len(np.unique(sample.codes, axis=0)) < MIN_MAPPED_DISTINCT:
        return None
    from sklearn.manifold import TSNE

    values = np.where(unpack(sample.codes, bits), 1.0, -1.0).astype(np.float32)
    # From principal components, equal codes would start at one point: the approximate gradient then throws some of
    # them far away.
    tsne = TSNE(perplexity=min(30.0, (len(values) - 1) / 3), init="random", random_state=0)
    positions: np.ndarray = tsne.fit_transform(values)
    return positions
