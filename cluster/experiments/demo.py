"""Run the whole chain on one machine: train, evaluate, encode, serve, query; write a summary and a page.

    OUT/scenes/          generated scenes, without --data
    OUT/run/             the run folder, with its evaluation
    OUT/database.parquet list of the images that are encoded: the database part of the split
    OUT/archive/         their codes
    OUT/summary.json     all metrics and durations
    OUT/report/index.html

Running the demo again keeps a complete training and repeats the other stages.
"""

import asyncio
import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from orbithash.cluster.encoding.encode import encode
from orbithash.cluster.experiments.demo_page import show_page
from orbithash.cluster.experiments.demo_report import Queried, write_demo_report
from orbithash.cluster.experiments.evaluate import evaluate_run
from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import connected
from orbithash.cluster.serving.serve import serving
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.cluster.training.train import train_on_ray
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.encoders.sources.image_roots import local_folder
from orbithash.search.client.client import Client
from orbithash.search.protocol.queries import Query
from orbithash.trainers.datasets import PROTOCOLS
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.model_evaluation import draw_caption
from orbithash.trainers.loop.run import Run, make_run
from orbithash.trainers.loop.run_folder import read_history
from orbithash.trainers.scenes import write_scenes

__all__ = ["run_demo"]

NUM_SCENES = 1080
NUM_WORKERS = 2
NUM_SHARDS = 2
NUM_QUERIES = 200
NUM_HITS = 8

Result = TypeVar("Result")


class _Stopwatch:
    """Print the name of each stage when it starts, and record its duration in seconds."""

    def __init__(self, num_stages: int) -> None:
        self.seconds: dict[str, float] = {}
        self._num_stages = num_stages

    def __call__(self, name: str, what: str, work: Callable[[], Result]) -> Result:
        say(f"[{len(self.seconds) + 1}/{self._num_stages}] {what}")
        start = time.perf_counter()
        result = work()
        self.seconds[name] = time.perf_counter() - start
        return result


def run_demo(
    out: Path,
    data: Path | None,
    weights: str | None,
    settings: Sequence[str],
    captions: Path | None = None,
    with_page: bool = False,
) -> dict[str, Any]:
    """Run the demo into the folder `out` and return the content of its `summary.json`.

    DHCL learns from classes. With `captions`, DUCH learns from sentences, and queries are images and sentences. With
    `with_page`, show the archive as a page until Ctrl-C before returning.
    """
    out = out.absolute()
    if captions is not None and (data is None or weights is None):
        raise InputError(
            "--captions are sentences about the images of --data, and DUCH needs --weights; give all three"
        )
    stage = _Stopwatch(6 if data is None else 5)
    if data is None:
        data = out / "scenes"
        stage("scenes", f"drawing {NUM_SCENES} scenes", lambda: _draw(out / "scenes"))
    run = make_run(
        "dhcl" if captions is None else "duch",
        data,
        config=None if weights else "from-scratch",
        settings=settings,
        weights=weights,
        captions=captions,
    )
    root = local_folder(run.root, "the images of the demo")
    with connected(min_cpus=NUM_WORKERS):
        stage("train", f"training on {NUM_WORKERS} Ray Train workers", lambda: _train(run, out / "run"))
        metrics, _ = stage("evaluate", "evaluating on the test part", lambda: evaluate_run(out / "run", root))
        encoded = stage("encode", "encoding the database with Ray Data", lambda: _encode(run, root, out))
        kinds = "image" if captions is None else "image and sentence"
        queried = stage("query", f"querying by {kinds} over gRPC", lambda: asyncio.run(_query(run, root, out)))
    summary = _summary(run, read_history(out / "run"), metrics, encoded, queried, stage.seconds)
    stage("report", "writing the report", lambda: write_demo_report(out, run, summary, queried))
    write_file(out / "summary.json", (json.dumps(summary, indent=1) + "\n"))
    say(
        f"done: {HEADLINE} {summary[HEADLINE]:.4f} (expected over ties), median query {summary['query']['p50_ms']:.0f} "
        f"ms; open {out / 'report' / 'index.html'}"
    )
    if with_page:
        show_page(out / "archive", out / "run" / "model", root)
    return summary


def _draw(directory: Path) -> None:
    processes = len(os.sched_getaffinity(0))
    with track("drawing", NUM_SCENES, "scenes") as advance_to:
        write_scenes(directory, NUM_SCENES, on_progress=lambda done: advance_to(done, ""), processes=processes)


def _train(run: Run, folder: Path) -> None:
    train_on_ray(run, folder, NUM_WORKERS)


def _encode(run: Run, root: Path, out: Path) -> dict[str, Any]:
    """Encode the database part of the split; the queries are not in the archive."""
    images = run.manifest.part(*PROTOCOLS[run.manifest.protocol].database)
    table = pa.table(
        {
            "key": images.ids,
            "path": [str(root / path) for path in images.paths],
            "label": [run.manifest.classes[image.label] for image in images],
        }
    )
    pq.write_table(table, out / "database.parquet")
    archive = out / "archive"
    if archive.exists():
        # Remove the archive of an earlier demo; opening it refuses a folder that is something else.
        Archive.open(archive)
        shutil.rmtree(archive)
    return encode(str(out / "database.parquet"), out / "run" / "model", str(archive)).to_json()


async def _query(run: Run, root: Path, out: Path) -> list[Queried]:
    """Query the gateway with images of the test part, one after another, like a single user.

    An image with captions is queried twice: by the image and by one of its sentences.
    """
    queries = run.manifest.part("test")
    chosen = np.random.default_rng(0).permutation(len(queries))[:NUM_QUERIES]

    def query_all(address: str) -> list[Queried]:
        queried = []
        with Client(address) as client, track("querying", len(chosen), "queries") as advance_to:
            # The first query connects and is not measured.
            client.search(image=(root / queries[0].path).read_bytes(), k=1)
            has_text = client.describe().has_text
            for number, row in enumerate(chosen.tolist(), 1):
                image = queries[row]
                sentence = draw_caption(image, run.manifest.seed) if has_text and image.captions else None
                requests = [Query(image=(root / image.path).read_bytes(), k=NUM_HITS)]
                requests += [] if sentence is None else [Query(text=sentence, k=NUM_HITS)]
                for query in requests:
                    start = time.perf_counter()
                    answer = client.search(query)
                    queried.append(Queried(image, query.text, answer, 1e3 * (time.perf_counter() - start)))
                advance_to(number, "")
        return queried

    settings = ServeSettings(str(out / "archive"), out / "run" / "model", "127.0.0.1:0", num_shards=NUM_SHARDS)
    async with serving(settings) as running:
        return await asyncio.to_thread(query_all, running.gateway.address)


def _summary(
    run: Run,
    history: list[dict[str, Any]],
    metrics: dict[str, Any],
    encoded: dict[str, Any],
    queried: list[Queried],
    seconds: dict[str, float],
) -> dict[str, Any]:
    if not history or not queried:
        raise InputError("the demo has no result: no epoch was completed or the test part has no image to query with")
    directions: dict[str, float] = {}
    if "image->image" in metrics["metrics"]:
        # With a text side: the headline is image to image; the other directions are listed too.
        directions = {name: of_one[HEADLINE]["expected"] for name, of_one in metrics["metrics"].items()}
        metrics = {
            name: value["image->image"] if isinstance(value, dict) and "image->image" in value else value
            for name, value in metrics.items()
        }
    times = {
        kind: [one.took_ms for one in queried if (one.sentence is None) == (kind == "image")]
        for kind in ("image", "sentence")
    }
    return {
        "dataset": run.manifest.dataset,
        "protocol": run.manifest.protocol,
        "method": run.method,
        "bits": metrics["bits"],
        HEADLINE: metrics["metrics"][HEADLINE]["expected"],
        "chance": metrics["chance"][HEADLINE],
        "metrics": metrics["metrics"],
        "distinct_codes": metrics["codes"]["distinct"],
        "train": {
            "workers": NUM_WORKERS,
            "epochs": len(history),
            "images_per_s": float(np.median([record["images_per_s"] for record in history])),
            # Of the epochs only; seconds.train includes start-up and validation.
            "seconds": sum(record["seconds"] for record in history),
        },
        "encode": encoded,
        "query": {"shards": NUM_SHARDS, **_percentiles(times["image"])},
        **({"query_by_sentence": _percentiles(times["sentence"])} if times["sentence"] else {}),
        **({"directions": directions} if directions else {}),
        "seconds": dict(seconds),
    }


def _percentiles(times_ms: Sequence[float]) -> dict[str, Any]:
    p50, p95 = (float(np.percentile(times_ms, share)) for share in (50, 95))
    return {"count": len(times_ms), "p50_ms": p50, "p95_ms": p95}
