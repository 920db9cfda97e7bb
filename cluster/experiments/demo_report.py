"""Write the page of the demo."""

import dataclasses
from pathlib import Path
from typing import Any

from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.image_roots import sources_of
from orbithash.search.protocol.queries import Answer
from orbithash.trainers.datasets import Image
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.report import HIT_SIDE_PX, QUERY_SIDE_PX
from orbithash.trainers.loop.export import best_epoch
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import read_history
from orbithash.trainers.methods import get_method
from orbithash.trainers.reports import plots
from orbithash.trainers.reports.page import (
    Fact,
    Facts,
    Figure,
    Figures,
    Gallery,
    GalleryRow,
    Link,
    Section,
    Table,
    Text,
    Tile,
    thumbnail_data_uri,
    write_report,
)
from orbithash.trainers.reports.provenance import Provenance

__all__ = ["Queried", "write_demo_report"]

NUM_ROWS = 12

STAGES = {
    "scenes": "draw the scenes",
    "train": "train",
    "evaluate": "evaluate",
    "encode": "encode",
    "query": "start serving, query",
}


@dataclasses.dataclass(frozen=True)
class Queried:
    """A query of the demo: an image of the test part, or a sentence about it; the answer and its latency in ms."""

    image: Image
    sentence: str | None
    answer: Answer
    took_ms: float


def write_demo_report(out: Path, run: Run, summary: dict[str, Any], queried: list[Queried]) -> None:
    """Write `OUT/report/index.html`."""
    history = read_history(out / "run")
    best = best_epoch(history)
    precision_recall = (out / "run" / "evaluation" / "plots" / "precision_recall.svg").read_text()
    figures = [
        Figure("Training losses", plots.learning_curves(history, "train"), "Mean of each loss over each epoch."),
        Figure(
            "On the validation part",
            plots.learning_curves(history, "validation"),
            f"The model is {_choice(run, best)}. The test part is not used to choose it.",
        ),
        Figure(
            "Precision and recall by radius",
            precision_recall,
            "Each point is one Hamming radius, within which all images are returned. Up and to the right is better.",
        ),
        Figure(
            "Duration of each stage",
            plots.bars(
                {STAGES[name]: value for name, value in summary["seconds"].items() if name in STAGES}, "seconds"
            ),
            "Wall-clock time, including the start of Ray's workers and actors.",
        ),
    ]
    sections: list[Section] = [
        _facts(summary),
        *_galleries(run, HashModel.load(out / "run" / "model"), queried),
        Figures("Training and evaluation", figures),
        Table("Further pages", ["page"], [[Link("Report of the evaluation", "../run/evaluation/report.html")]]),
        _timings(summary),
        Text(
            "What the demo did",
            [
                f"A {summary['method']} network learned {summary['bits']}-bit codes from "
                f"{'images and sentences about them' if 'directions' in summary else 'labelled images'} on "
                f"{summary['train']['workers']} Ray Train workers. The model folder holds "
                f"{_choice(run, best)}. Ray Data decoded and encoded the database into an archive; its "
                "codes were loaded into "
                f"{summary['query']['shards']} FAISS shards in Ray actors, and a gRPC gateway answered queries by "
                "images that were neither trained on nor in the archive.",
                "The report of the evaluation has all metrics with their definitions and the failures: the worst "
                "queries, the most confused classes, wasted bits.",
            ],
        ),
    ]
    (out / "report").mkdir(exist_ok=True)
    write_report(
        out / "report" / "index.html",
        f"orbithash on {summary['dataset']}",
        f"Similar images, found by {summary['bits']}-bit codes: trained, encoded, served and evaluated on this "
        "machine.",
        sections,
        Provenance(
            "Demo", f"{summary['dataset']} in {run.root}", {"Model": f"{summary['method']}, {summary['bits']} bits"}
        ),
    )


def _choice(run: Run, best: dict[str, Any]) -> str:
    """Return which epoch became the model, and why."""
    metric = get_method(run.method).selection_metric
    if f"validation/{metric}" in best:
        return f"epoch {best['epoch']}, the best by {metric} on the validation part"
    reason = "this method uses no labels to choose" if metric is None else "there is no validation part"
    return f"the last epoch, {best['epoch']}: {reason}"


def _facts(summary: dict[str, Any]) -> Facts:
    train, encode, query = summary["train"], summary["encode"], summary["query"]
    return Facts(
        "In short",
        [
            Fact(
                HEADLINE,
                f"{summary[HEADLINE]:.3f}",
                "Mean average precision within 20 hits, expected over ties; 1 is perfect.",
                f"chance: {summary['chance']:.3f}",
            ),
            Fact(
                "training",
                f"{train['images_per_s']:.0f}/s",
                f"Images per second on {train['workers']} workers, median of the epochs.",
            ),
            Fact(
                "encoding",
                f"{encode['rows_per_s']:.0f}/s",
                f"Images per second from files to committed rows, {encode['num_encoded']:,} images in total.",
                _slowest_stage(encode),
            ),
            Fact(
                "a query by image",
                f"{query['p50_ms']:.0f} ms",
                f"Median of {query['count']} queries over gRPC, including decoding and encoding; 95th percentile: "
                f"{query['p95_ms']:.0f} ms.",
            ),
        ],
    )


def _slowest_stage(encode: dict[str, Any]) -> str:
    """Return the stage of encoding that limits one worker, and its rate; "" if nothing was read."""
    rates = encode["worker_images_per_s"]
    if not rates:
        return ""
    stage = min(rates, key=rates.__getitem__)
    return f"one worker, {stage} alone: {rates[stage]:.0f}/s"


def _galleries(run: Run, model: HashModel, queried: list[Queried]) -> list[Gallery]:
    by_image, by_sentence = (
        [one for one in queried if (one.sentence is None) == is_image] for is_image in (True, False)
    )
    galleries = [
        _gallery(run, model, by_image, "Query by image", "On the left, an image of the test part"),
        _gallery(
            run, model, by_sentence, "Query by sentence", "On the left, a sentence about an image of the test part"
        ),
    ]
    return galleries if by_sentence else galleries[:1]


def _gallery(run: Run, model: HashModel, queried: list[Queried], title: str, what: str) -> Gallery:
    """Show the first answer of each class, for at most `NUM_ROWS` classes."""
    chosen: dict[int, Queried] = {}
    for one in queried:
        chosen.setdefault(one.image.label, one)
    rendering = model.preprocessing.rendering

    def tile(path: str, label: str, note: str, side_px: int, right: bool | None) -> Tile:
        image = thumbnail_data_uri(rendering.picture(read_image(sources_of(run.root, [path])[0], rendering)), side_px)
        return Tile(label, image, note=note, relevant=right)

    rows = []
    for label, one in sorted(chosen.items())[:NUM_ROWS]:
        name = run.manifest.classes[label]
        hits = [
            tile(hit.key, hit.label or "", f"d = {hit.distance}", HIT_SIDE_PX, hit.label == name)
            for hit in one.answer.hits
        ]
        note = f"{one.took_ms:.0f} ms"
        query = tile(one.image.path, name, note, QUERY_SIDE_PX, None)
        if one.sentence is not None:
            query = Tile(name, sentence=one.sentence, note=note)
        rows.append(GalleryRow(query, hits))
    return Gallery(
        title,
        rows,
        f"{what}; to its right, the hits of the gateway, nearest first. The queries are random, one for each class. A "
        "tick and a solid frame mark the query's class, a cross and a dashed frame another class; d is the Hamming "
        "distance.",
    )


def _timings(summary: dict[str, Any]) -> Table:
    train, encode, query = summary["train"], summary["encode"], summary["query"]
    by_sentence = summary.get("query_by_sentence")
    return Table(
        "Measurements",
        ["measurement", "value"],
        [
            ["epochs", str(train["epochs"])],
            ["duration of the epochs", f"{train['seconds']:.0f} s"],
            ["training rate", f"{train['images_per_s']:.0f} images/s"],
            ["images encoded", f"{encode['num_encoded']:,}"],
            ["images refused", f"{encode['num_refused']:,}"],
            ["start-up of the encoding workers", f"{encode['start_s']:.1f} s"],
            ["encoding rate after start-up", f"{encode['rows_per_s']:.0f} images/s"],
            ["distinct codes in the database", f"{summary['distinct_codes']:,}"],
            ["query by image, median", f"{query['p50_ms']:.1f} ms"],
            ["query by image, 95th percentile", f"{query['p95_ms']:.1f} ms"],
            *([["query by sentence, median", f"{by_sentence['p50_ms']:.1f} ms"]] if by_sentence else []),
            *([f"{HEADLINE}, {name}", f"{value:.3f}"] for name, value in summary.get("directions", {}).items()),
        ],
    )
