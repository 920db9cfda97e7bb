"""The demo's page."""

import dataclasses
from pathlib import Path
from typing import Any

from orbithash.cluster.training.run_folder import read_history
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.search.protocol.queries import Answer
from orbithash.trainers.datasets import Image
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.report import HIT_SIDE_PX, QUERY_SIDE_PX
from orbithash.trainers.loop.run import Run
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
    write_report,
)

__all__ = ["Asked", "write_demo_report"]

NUM_ROWS = 12

STAGES = {
    "scenes": "draw the scenes",
    "train": "train",
    "evaluate": "evaluate",
    "encode": "encode",
    "query": "start serving, query",
}


@dataclasses.dataclass(frozen=True)
class Asked:
    """A query of the demo: an unseen image, or a sentence about it; what the gateway answered after how many ms."""

    image: Image
    sentence: str | None
    answer: Answer
    took_ms: float


def write_demo_report(out: Path, run: Run, summary: dict[str, Any], asked: list[Asked]) -> None:
    """Writes `OUT/report/index.html`."""
    history = read_history(out / "run")
    precision_recall = (out / "run" / "evaluation" / "plots" / "precision_recall.svg").read_text()
    figures = [
        Figure("Training losses", plots.learning_curves(history, "train"), "The mean of each loss over every epoch."),
        Figure(
            "On the validation part",
            plots.learning_curves(history, "validation"),
            "The model is the epoch with the best of these; the test part had no say in it.",
        ),
        Figure(
            "Precision and recall by radius",
            precision_recall,
            "Each point is one Hamming radius: everything within it is returned. Up and to the right is better.",
        ),
        Figure(
            "Where the time went",
            plots.bars(
                {STAGES[name]: value for name, value in summary["seconds"].items() if name in STAGES}, "seconds"
            ),
            "Wall-clock time of each stage, the start of Ray's workers and actors included.",
        ),
    ]
    sections: list[Section] = [
        _facts(summary),
        *_galleries(run, HashModel.load(out / "run" / "model"), asked),
        Figures("How it was learned, and how well", figures),
        _timings(summary),
        Text(
            "What happened here",
            [
                f"A {summary['method']} network learned {summary['bits']}-bit codes from "
                f"{'images and sentences about them' if 'directions' in summary else 'labelled images'} on "
                f"{summary['train']['workers']} Ray Train workers. Its best epoch on held-back images became the model "
                "folder. Ray Data decoded and encoded the database into an archive; its codes were loaded into "
                f"{summary['query']['shards']} FAISS shards in Ray actors, and a gRPC gateway answered queries by "
                "images that were neither trained on nor in the archive.",
                "The page of the evaluation, with every metric and its definition, is run/evaluation/report.html.",
            ],
        ),
    ]
    (out / "report").mkdir(exist_ok=True)
    write_report(
        out / "report" / "index.html",
        f"orbithash on {summary['dataset']}",
        f"Images like this one, found by {summary['bits']}-bit codes: trained, encoded, served and evaluated on this "
        "machine.",
        sections,
    )


def _facts(summary: dict[str, Any]) -> Facts:
    train, encode, query = summary["train"], summary["encode"], summary["query"]
    return Facts(
        "In short",
        [
            Fact(
                HEADLINE,
                f"{summary[HEADLINE]:.3f}",
                f"Mean average precision within 20 hits, the expectation over ties. Chance is {summary['chance']:.3f}, "
                "perfect is 1.",
            ),
            Fact(
                "training",
                f"{train['images_per_s']:.0f}/s",
                f"Images per second on {train['workers']} workers, the median epoch.",
            ),
            Fact(
                "encoding",
                f"{encode['rows_per_s']:.0f}/s",
                f"Images per second from files to committed rows, {encode['num_encoded']:,} in all.",
            ),
            Fact(
                "a query by image",
                f"{query['p50_ms']:.0f} ms",
                f"Median of {query['count']} over gRPC, decoding and encoding included; the 95th percentile is "
                f"{query['p95_ms']:.0f} ms.",
            ),
        ],
    )


def _galleries(run: Run, model: HashModel, asked: list[Asked]) -> list[Gallery]:
    by_image, by_sentence = ([one for one in asked if (one.sentence is None) == is_image] for is_image in (True, False))
    galleries = [
        _gallery(run, model, by_image, "Ask by image", "Left, an image the model has never seen"),
        _gallery(run, model, by_sentence, "Ask by sentence", "Left, a sentence about an image the archive lacks"),
    ]
    return galleries if by_sentence else galleries[:1]


def _gallery(run: Run, model: HashModel, asked: list[Asked], title: str, what: str) -> Gallery:
    """The first answer for as many classes as there are rows."""
    chosen: dict[int, Asked] = {}
    for one in asked:
        chosen.setdefault(one.image.label, one)
    rendering = model.preprocessing.rendering

    def tile(path: str, label: str, note: str, side_px: int, right: bool | None) -> Tile:
        image = thumbnail_data_uri(rendering.picture(read_image(run.root / path, rendering)), side_px)
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
        f"{what}; beside it, what the gateway answered, nearest first. The queries are "
        "drawn at random, one a class. A tick on a solid frame is the query's class, a cross on a dashed frame "
        "another; d is the Hamming distance.",
    )


def _timings(summary: dict[str, Any]) -> Table:
    train, encode, query = summary["train"], summary["encode"], summary["query"]
    by_sentence = summary.get("query_by_sentence")
    return Table(
        "Figures",
        ["what", "value"],
        [
            ["epochs", str(train["epochs"])],
            ["time in epochs", f"{train['seconds']:.0f} s"],
            ["training rate", f"{train['images_per_s']:.0f} images/s"],
            ["images encoded", f"{encode['num_encoded']:,}"],
            ["images refused", f"{encode['num_refused']:,}"],
            ["start of the encoding workers", f"{encode['start_s']:.1f} s"],
            ["encoding rate after it", f"{encode['rows_per_s']:.0f} images/s"],
            ["distinct codes in the database", f"{summary['distinct_codes']:,}"],
            ["query by image, median", f"{query['p50_ms']:.1f} ms"],
            ["query by image, 95th percentile", f"{query['p95_ms']:.1f} ms"],
            *([["query by sentence, median", f"{by_sentence['p50_ms']:.1f} ms"]] if by_sentence else []),
            *([f"{HEADLINE}, {name}", f"{value:.3f}"] for name, value in summary.get("directions", {}).items()),
        ],
    )
