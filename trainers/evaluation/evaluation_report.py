"""What the evaluation's report shows: figures, tables, gallery, and the words around them."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.trainers.evaluation.evaluation import HEADLINE, CodeSample, Evaluation, Hit, ReadImage, Shown
from orbithash.trainers.metrics.average_precision import hits_at
from orbithash.trainers.metrics.metrics import LOOKUP_RADIUS, radius_curve
from orbithash.trainers.reports import plots
from orbithash.trainers.reports.page import (
    Fact,
    Facts,
    Figure,
    Figures,
    Gallery,
    GalleryRow,
    Section,
    Table,
    Text,
    Tile,
    thumbnail_data_uri,
)

__all__ = ["draw_figures", "evaluation_sections", "evaluation_title", "gallery_section"]

MAX_CURVE_K = 1000
NUM_CURVE_POINTS = 25
# Fewer codes make no map.
MIN_MAPPED, MIN_MAPPED_DISTINCT = 10, 3
# Twice the width at which the page shows them.
QUERY_SIDE_PX, HIT_SIDE_PX = 272, 180

Evaluations = Mapping[str, Evaluation]


def evaluation_title(evaluations: Evaluations) -> tuple[str, str]:
    """Title and subtitle of the page."""
    first = next(iter(evaluations.values())).metrics
    bits, size = first["bits"], first["codes"]["bytes_per_code"]
    return (
        f"{first['method']} on {first['dataset']}",
        f"How well {bits}-bit codes ({size} bytes an item) find items of the same class. "
        f"Protocol {first['protocol']}, {first['queries']:,} queries in a database of {first['database']:,}.",
    )


def draw_figures(evaluations: Evaluations, history: Sequence[Mapping[str, Any]] = ()) -> dict[str, dict[str, Figure]]:
    """Every figure by the name of its file: first those of the whole model (""), then those of each direction.

    `evaluations` has one entry named "", or one for each direction.
    """
    shared = {}
    if history:
        shared["losses"] = Figure(
            "Training losses", plots.learning_curves(history, "train"), "The mean of each loss over every epoch."
        )
    if any(name.startswith("validation/") for record in history for name in record):
        shared["validation"] = Figure(
            "On the validation part",
            plots.learning_curves(history, "validation"),
            "On images held back from training. The test part had no say in which epoch became the model.",
        )
    shared["precision_at_k"] = _precision_at_k(evaluations)
    shared["precision_recall"] = Figure(
        "Precision and recall by radius",
        plots.precision_recall({_arrow(name): radius_curve(e.histograms) for name, e in evaluations.items()}),
        "Each point is one Hamming radius: everything within it is returned. Up and to the right is better. A query "
        "that finds nothing counts as precision 0, so a curve may start low.",
    )
    figures = {"": shared}
    for name, evaluation in evaluations.items():
        figures.setdefault(name, {}).update(_figures_of(name, evaluation))
    return figures


def evaluation_sections(
    evaluations: Evaluations, figures: Mapping[str, Mapping[str, Figure]], read_image: ReadImage | None
) -> list[Section]:
    """The whole report as sections, `figures` being what `draw_figures` made."""
    sections: list[Section] = [_facts(evaluations), Figures("Plots", list(figures[""].values()))]
    for name, evaluation in evaluations.items():
        if name:
            sections.append(Figures(f"Plots{_of(name)}", list(figures[name].values())))
        sections += [
            gallery_section(evaluation, read_image, reason, f"{title}{_of(name)}", caption)
            for reason, title, caption in _GALLERIES
        ]
        sections.append(_table(name, evaluation))
        if baselines := evaluation.metrics.get("baselines"):
            sections.append(_baseline_table(name, evaluation, baselines))
    sections.append(Text("How to read these figures", _explanations(evaluations)))
    return sections


_GALLERIES = (
    (
        "typical",
        "Typical answers",
        "The median query of some classes, from the easiest class to the hardest, and the nearest items in order. "
        "A tick on a solid frame is the query's class, a cross on a dashed frame another; d is the Hamming distance.",
    ),
    ("worst", "The worst answers", "The queries with the lowest average precision of all."),
)


def gallery_section(
    evaluation: Evaluation, read_image: ReadImage | None, reason: str, title: str, caption: str
) -> Gallery:
    """The queries of the gallery that are shown for `reason` ("typical" or "worst"), with their nearest items."""
    rows = [
        GalleryRow(
            _tile(shown, read_image, QUERY_SIDE_PX, f"AP {shown.average_precision:.2f}", None),
            [_tile(hit, read_image, HIT_SIDE_PX, f"d = {hit.distance}", hit.relevant) for hit in shown.hits],
        )
        for shown in evaluation.gallery
        if shown.reason == reason
    ]
    return Gallery(title, rows, caption)


def _tile(item: Shown | Hit, read_image: ReadImage | None, side_px: int, note: str, right: bool | None) -> Tile:
    image = None
    if item.sentence is None and read_image is not None:
        try:
            image = thumbnail_data_uri(read_image(item.path), side_px)
        except (InputError, OSError):
            note = f"{note}, cannot be read"
    return Tile(item.label, image, item.sentence, note, right)


def _arrow(name: str) -> str:
    return name.replace("->", " → ")


def _of(name: str) -> str:
    return f", {_arrow(name)}" if name else ""


def _file(kind: str, name: str) -> str:
    return f"{kind}_{name.replace('->', '_to_')}" if name else kind


def _precision_at_k(evaluations: Evaluations) -> Figure:
    first = next(iter(evaluations.values()))
    top = int(min(MAX_CURVE_K, max(2, first.histograms.num_items.max())))
    cutoffs = np.unique(np.geomspace(1, top, NUM_CURVE_POINTS).round().astype(int)).tolist()

    def precisions(evaluation: Evaluation, policy: Any) -> Any:
        return np.array([hits_at(evaluation.histograms, k, policy).mean() / k for k in cutoffs])

    lines = {_arrow(name) or "expected": precisions(evaluation, "expected") for name, evaluation in evaluations.items()}
    alone = len(evaluations) == 1
    band = (precisions(first, "pessimistic"), precisions(first, "optimistic")) if alone else None
    chance = first.metrics["chance"]["precision@1"] if alone else None
    caption = "The share of the k nearest items that are of the query's class. It must fall once k exceeds the class."
    if alone:
        caption += " The band is what the order of equally distant items could make of it."
    return Figure("Precision within the first k", plots.cutoff_curve(cutoffs, lines, band=band, chance=chance), caption)


def _figures_of(name: str, evaluation: Evaluation) -> dict[str, Figure]:
    histograms, metrics = evaluation.histograms, evaluation.metrics
    figures = {
        _file("per_class", name): Figure(
            "Average precision by class",
            plots.bars(metrics["per_class"], f"expected {HEADLINE}", mean=evaluation.headline, limit=1),
            "The mean over the queries of each class, the hardest class at the bottom.",
        ),
    }
    if (shares := evaluation.nearest_classes) is not None:
        present = [
            i for i, label in enumerate(evaluation.classes) if label in metrics["per_class"] or shares[:, i].any()
        ]
        figures[_file("confusion", name)] = Figure(
            "What stands first",
            plots.class_confusion(shares[np.ix_(present, present)], [evaluation.classes[i] for i in present]),
            "For the queries of each row, the share (in %) whose nearest item is of each column's class. All on the "
            "diagonal would be perfect.",
        )
    figures[_file("distances", name)] = Figure(
        "Distances",
        plots.distance_histogram(histograms.items.sum(0), histograms.relevant.sum(0)),
        "How far queries lie from database items of their own class and of others. The less the two overlap, the "
        "better a radius tells them apart.",
    )
    figures[_file("bit_balance", name)] = Figure(
        "Balance of the bits",
        plots.bit_balance(metrics["codes"]["bit_balance"]),
        "The share of database codes in which each bit is 1. A bit near one half says most; a bit at 0 or 1 says "
        "nothing.",
    )
    across = "->" in name and len(set(name.split("->"))) > 1
    if (
        evaluation.sample is not None
        and not across
        and (points := _map(evaluation.sample, metrics["bits"])) is not None
    ):
        labels = evaluation.sample.labels
        figures[_file("code_map", name)] = Figure(
            "A map of the codes",
            plots.code_map(points, [evaluation.classes[label] for label in labels]),
            f"{len(points):,} database items, near each other where their codes are (t-SNE). What lies close in the "
            "map is close in Hamming distance; distances between groups, and their sizes, mean nothing.",
        )
    return figures


def _map(sample: CodeSample, bits: int) -> np.ndarray | None:
    """Places float [n, 2] of the codes in the plane, or None where they are too few or too alike for a map."""
    if len(sample.codes) < MIN_MAPPED or len(np.unique(sample.codes, axis=0)) < MIN_MAPPED_DISTINCT:
        return None
    from sklearn.manifold import TSNE

    values = np.where(unpack(sample.codes, bits), 1.0, -1.0).astype(np.float32)
    places: np.ndarray = TSNE(perplexity=min(30.0, (len(values) - 1) / 3), random_state=0).fit_transform(values)
    return places


def _facts(evaluations: Evaluations) -> Facts:
    if len(evaluations) > 1:
        facts = [_headline(f"mAP@20, {_arrow(name)}", e) for name, e in evaluations.items()]
        facts += [_pair_fact(name, e) for name, e in evaluations.items() if "pair_recall" in e.metrics]
        return Facts("At a glance", [*facts, *(fact for e in evaluations.values() for fact in _baseline_facts(e))])
    (evaluation,) = evaluations.values()
    figures, chance, codes = (evaluation.metrics[key] for key in ("metrics", "chance", "codes"))
    empty = radius_curve(evaluation.histograms).empty[LOOKUP_RADIUS]
    wasted = codes["constant_bits"]
    return Facts(
        "At a glance",
        [
            _headline("mAP@20", evaluation),
            Fact(
                "Nearest item is right",
                _percent(figures["precision@1"]["expected"]),
                f"Queries whose nearest item is of their class; items that tie share the place. "
                f"By chance: {_percent(chance['precision@1'])}.",
            ),
            Fact(
                "mAP@all",
                f"{figures['ap_min@all']['expected']:.3f}",
                f"Every relevant item counts, however far down. By chance: {chance['ap_min@all']:.3f}.",
            ),
            Fact(
                f"Lookup within {LOOKUP_RADIUS} bits",
                _percent(figures[f"precision_radius@{LOOKUP_RADIUS}"]["expected"]),
                f"Precision of all items within that distance; {_percent(empty)} of the queries find none there and "
                "count as 0.",
            ),
            Fact(
                "Distinct codes",
                f"{codes['distinct']:,}",
                f"Among {codes['count']:,} database items. {wasted or 'No'} of {evaluation.metrics['bits']} bits "
                f"{'is' if wasted == 1 else 'are'} the same in all of them.",
            ),
            *_baseline_facts(evaluation),
        ],
    )


def _headline(label: str, evaluation: Evaluation) -> Fact:
    values, chance = evaluation.metrics["metrics"][HEADLINE], evaluation.metrics["chance"][HEADLINE]
    return Fact(
        label,
        f"{values['expected']:.3f}",
        f"The expectation over the order of ties: the worst order would give {values['pessimistic']:.3f}, the best "
        f"{values['optimistic']:.3f}. By chance: {chance:.3f}.",
    )


def _pair_fact(name: str, evaluation: Evaluation) -> Fact:
    recall = evaluation.metrics["pair_recall"]
    return Fact(
        f"Own pair in the first 10, {_arrow(name)}",
        _percent(recall["recall@10"]),
        f"Queries that find the other half of their own pair there; {_percent(recall['recall@5'])} among the first 5, "
        f"{_percent(recall['recall@1'])} at rank 1. Each image has one sentence.",
    )


def _baseline_facts(evaluation: Evaluation) -> list[Fact]:
    """The best baseline of at most the code's bytes, where there is one."""
    size, headline = evaluation.metrics["codes"]["bytes_per_code"], evaluation.headline
    fair = {
        name: found["metrics"][HEADLINE]
        for name, found in evaluation.metrics.get("baselines", {}).items()
        if "metrics" in found and found["bytes"] <= size
    }
    if not fair:
        return []
    best = max(fair, key=lambda name: fair[name])
    verdict = "better than this model" if fair[best] > headline else "not better than this model"
    explanation = f"mAP@20 of {_BASELINES[best]} on the pretrained features in {size} bytes an item: {verdict}."
    return [Fact("Best simple method", f"{fair[best]:.3f}", explanation)]


_BASELINES = {
    "cosine": "float cosine",
    "sign": "signs of all features",
    "sign_truncated": "signs of the first features",
    "lsh": "random projections (LSH)",
    "pca_sign": "PCA and sign",
    "itq": "ITQ",
    "pq": "product quantisation",
}
_BASELINE_FIGURES = (HEADLINE, "ap_hits@20", "ap_first_k@20", "ap_min@100", "ap_min@all", "precision@1")


def _baseline_table(name: str, evaluation: Evaluation, baselines: Mapping[str, Mapping[str, Any]]) -> Table:
    """The model beside the baselines, and in words who is better."""
    metrics = evaluation.metrics
    own = {
        figure: metrics["metrics"][figure]["expected"] for figure in _BASELINE_FIGURES if figure in metrics["metrics"]
    }
    measured = {
        "this model": {"bytes": metrics["codes"]["bytes_per_code"], "metrics": own},
        **{_BASELINES[key]: found for key, found in baselines.items() if "metrics" in found},
    }
    rows = [
        [label, f"{found['bytes']:,}", *(f"{found['metrics'][figure]:.4f}" for figure in own)]
        for label, found in measured.items()
    ]
    left_out = [f"{_BASELINES[key]} ({found['left_out']})" for key, found in baselines.items() if "left_out" in found]
    return Table(
        f"Beside simple methods{_of(name)}",
        ["method", "bytes an item", *own],
        rows,
        f"{_verdict(metrics)} All simple methods use the features of the backbone as it was before this training, and "
        "were fitted on the training part alone. Expected figures, means over all queries."
        + (f" Left out: {'; '.join(left_out)}." if left_out else ""),
    )


def _verdict(metrics: Mapping[str, Any]) -> str:
    fair, larger = ([_BASELINES[key] for key in metrics[which]] for which in ("beaten_by", "beaten_by_larger"))
    if fair:
        verdict = f"By {HEADLINE} this model is worse than {_and(fair)}, of no more bytes an item."
    else:
        verdict = f"By {HEADLINE} no simple method of as few bytes an item is better than this model."
    return verdict + (f" With more bytes an item, {_and(larger)} {_is(larger)} better." if larger else "")


def _and(names: Sequence[str]) -> str:
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _is(names: Sequence[str]) -> str:
    return "is" if len(names) == 1 else "are"


def _table(name: str, evaluation: Evaluation) -> Table:
    figures, chance = evaluation.metrics["metrics"], evaluation.metrics["chance"]
    policies = ("expected", "index", "pessimistic", "optimistic")
    return Table(
        f"All figures{_of(name)}",
        ["metric", "expected", "database order", "relevant last", "relevant first", "by chance"],
        [
            [metric, *(f"{values[policy]:.4f}" for policy in policies), f"{chance[metric]:.4f}"]
            for metric, values in figures.items()
        ],
        "Means over all queries. The columns differ only in how items at the same distance are ordered.",
    )


def _explanations(evaluations: Evaluations) -> list[str]:
    evaluation = next(iter(evaluations.values()))
    first = evaluation.metrics
    own = (
        "The query itself is left out of its answer."
        if first["exclude_self"]
        else f"{first['queries_in_database']:,} of the queries are in the database too and may find themselves."
    )
    several = any(name.startswith("ndcg@") for name in first["metrics"])
    relevant = "shares a class with the query" if several else "has the query's class"
    paragraphs = [
        f"An item is relevant when it {relevant}. The average precision of a query is the mean precision at "
        "the ranks of the relevant items; the four definitions differ in what they divide by. ap_min divides by the "
        "smaller of k and the number of relevant items: it is the headline. ap_hits divides by the relevant items "
        "among the first k and flatters most; ap_k divides by k; ap_first_k looks for the first k relevant items "
        "however deep they lie. A query with nothing relevant counts as 0.",
        "Codes have few bits, so many items lie at exactly the same distance and their order is arbitrary. “Expected” "
        "is the mean over all such orders, computed exactly; “database order” is what a stable sort would give, "
        "and depends on how the database happens to be stored.",
        f"{own} {first['queries_without_relevant']:,} queries have nothing relevant in the database. “By chance” is "
        "what a random ranking would score.",
    ]
    if several:
        paragraphs.append(
            "ndcg sums the number of classes that each item shares with the query, divided by log2(rank + 1), and "
            "divides the sum by that of the best possible order."
        )
    if first["queries_without_label"]:
        paragraphs.append(f"{first['queries_without_label']:,} queries without a label were left out.")
    if len(evaluations) > 1:
        paragraphs.append(
            "Every image has one of its sentences, drawn once by the seed of the split. From image to text and back, "
            "an image's own sentence is one of the items to be found."
        )
    if "baselines_left_out" in first:
        paragraphs.append(f"There are no simple methods to compare with: {first['baselines_left_out']}.")
    return paragraphs


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
