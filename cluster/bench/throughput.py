"""Measurements beside a baseline of the same run. Only the ratios mean something on another machine.

Each baseline is measured before and after what it is compared with, so that a machine that slows down meanwhile does
not decide the ratio.
"""

import dataclasses
import datetime as dt
import json
import multiprocessing
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbithash.cluster.encoding.encode import BATCH_SIZE, encode
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected, keeping_memory
from orbithash.cluster.training.train import prepare_run, train_on_ray
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.records import Record, read_record
from orbithash.encoders.imagery.sources import Item, list_source
from orbithash.encoders.networks.card import HeadSpec, ModelCard, NetworkSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.loop.loop import train
from orbithash.trainers.loop.run import Run
from orbithash.trainers.scenes import write_scenes

__all__ = ["bench_encode", "bench_train", "circumstances", "show", "write_random_model"]

NUM_SCENES_TO_TRAIN_ON = 540


def bench_encode(model: Path | None, data: Path | None, count: int) -> dict[str, Any]:
    """Images per second of `orbithash encode` beside bare loops in one process with as many threads.

    `whole_loop` does the same work: read, decode, encode, write. `encode_loop` gets its batches already decoded, so it
    is what the network alone allows.
    """
    if count < 2 * BATCH_SIZE:
        raise InputError(f"--count is {count}; at least {2 * BATCH_SIZE} images are needed to measure a rate")
    with tempfile.TemporaryDirectory() as temporary, connected():
        root = Path(temporary)
        folder = model or write_random_model(root / "model")
        source = _listed(root, data or _write_scenes(root / "scenes", count), count)
        items = list_source(str(source))
        loaded = HashModel.load(folder)
        num_threads = os.cpu_count() or 1
        with _threads(num_threads):
            say("bare loops, first time")
            before = _whole_loop(loaded, items, root / "bare0", num_threads), _encode_loop(loaded, items)
            say("the Ray Data pipeline")
            summary = encode(str(source), folder, str(root / "archive"))
            say("bare loops, second time")
            after = _whole_loop(loaded, items, root / "bare1", num_threads), _encode_loop(loaded, items)
        whole, bare = (sum(pair) / 2 for pair in zip(before, after, strict=True))
        return {
            **circumstances("encode"),
            "images": len(items),
            "network": loaded.card.network.backbone,
            "input_px": loaded.preprocessing.crop,
            "threads": num_threads,
            "pipeline_images_per_s": summary.rows_per_s,
            "pipeline_start_s": summary.start_s,
            "whole_loop_images_per_s": whole,
            "encode_loop_images_per_s": bare,
            "ratio_to_whole_loop": summary.rows_per_s / whole,
            "ratio_to_encode_loop": summary.rows_per_s / bare,
        }


def bench_train(data: Path | None, weights: str | None, epochs: int, workers: int = 1) -> dict[str, Any]:
    """Images per second of each Ray Train worker beside the bare loop with a worker's threads and its share of a batch.

    Epochs only. `bare_loop` has the machine to itself; of `bare_loops`, as many as workers run at once and know nothing
    of each other. `kept_loops` are the same with the workers' allocator, which is what the machine allows.
    """
    if epochs < 2:
        raise InputError(f"--epochs is {epochs}; at least 2 are needed, for the first one warms up")
    num_cores = os.cpu_count() or 1
    if not 1 <= workers <= num_cores:
        raise InputError(f"--workers is {workers}; 1 to {num_cores}, the cores of this machine, can be compared")
    num_threads = num_cores // workers
    with tempfile.TemporaryDirectory() as temporary, connected():
        root = Path(temporary)
        folder = data or _write_scenes(root / "scenes", NUM_SCENES_TO_TRAIN_ON)
        settings = [f"epochs={epochs}", "warm_up_epochs=0", f"validate_every={epochs}"]
        run = prepare_run("dhcl", folder, settings=settings, weights=weights)
        share = run.config.batch_size // workers
        bare_run = dataclasses.replace(run, config=run.config.model_copy(update={"batch_size": share}))

        def bare_loops(count: int, environment: dict[str, str] | None = None) -> float:
            with (
                _environment(environment or {}),
                ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool,
            ):
                return float(np.mean(list(pool.map(_bare_training, [bare_run] * count, [num_threads] * count))))

        def all_bare_loops() -> tuple[float, float, float]:
            return bare_loops(1), bare_loops(workers), bare_loops(workers, keeping_memory())

        say("bare loops, first time")
        before = all_bare_loops()
        say(f"{workers} Ray Train workers")
        begun = time.perf_counter()
        history = train_on_ray(run, root / "run", workers)
        seconds = time.perf_counter() - begun
        say("bare loops, second time")
        after = all_bare_loops()
        rate = _rate(history) / workers
        alone, together, kept = (sum(pair) / 2 for pair in zip(before, after, strict=True))
        return {
            **circumstances("train"),
            "images": len(run.manifest.part("train")),
            "network": run.config.backbone,
            "input_px": run.config.image_size,
            "workers": workers,
            "threads_per_worker": num_threads,
            "images_per_worker_and_step": share,
            "worker_images_per_s": rate,
            "worker_start_s": seconds - sum(record["seconds"] for record in history),
            "worker_peak_memory_mb": max(record["peak_memory_mb"] for record in history),
            "bare_loop_images_per_s": alone,
            "bare_loops_images_per_s": together,
            "kept_loops_images_per_s": kept,
            "ratio_to_bare_loop": rate / alone,
            "ratio_to_bare_loops": rate / together,
            "ratio_to_kept_loops": rate / kept,
        }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result for a machine or for a person."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<26} {value:.3f}" if isinstance(value, float) else f"{name:<26} {value}")


def circumstances(name: str, *packages: str) -> dict[str, Any]:
    """What a figure is worth nothing without; the packages are those whose versions matter."""
    return {
        "bench": name,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {version(package)}" for package in packages or ("ray", "torch")),
    }


@contextmanager
def _environment(variables: dict[str, str]) -> Iterator[None]:
    """What processes that are started in the block are given."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _threads(num_threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(num_threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def write_random_model(folder: Path, bits: int = 64) -> Path:
    """A network of usual size with random weights: speed does not ask what was learned."""
    spec = NetworkSpec("mobilenet_v2", "frozen-batch", "avg+max", HeadSpec(bits=bits), num_classes=2)
    card = ModelCard(
        method="dhcl",
        network=spec,
        thresholds=(0.0,) * spec.bits,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), resize=160, crop=160),
        classes=("a", "b"),
        dataset={},
        metrics={},
    )
    torch.manual_seed(0)
    HashModel(card, HashNetwork(spec)).save(folder)
    return folder


def _write_scenes(folder: Path, count: int) -> Path:
    say(f"drawing {count} scenes")
    write_scenes(folder, count, processes=len(os.sched_getaffinity(0)))
    return folder


def _listed(root: Path, data: Path, count: int) -> Path:
    """A list of the first `count` images of a folder."""
    items = list_source(str(data))
    if len(items) < count:
        raise InputError(f"{data} has {len(items)} images, --count asks for {count}")
    path = root / "images.txt"
    path.write_text("".join(f"{item.path}\n" for item in items[:count]))
    return path


def _whole_loop(model: HashModel, items: list[Item], archive: Path, num_threads: int) -> float:
    """Images per second of reading, decoding, encoding and writing, the simplest way that uses all threads."""
    target = Archive.create(archive, model.bits, model.model_id)
    begun = time.perf_counter()
    with ThreadPoolExecutor(num_threads) as pool:
        for batch in _batched(items):
            records: list[Record] = list(pool.map(lambda item: read_record(item, model.preprocessing), batch))
            codes = model.encode_prepared(np.stack([record.pixels for record in records]))
            columns = {
                name: [getattr(record, name) for record in records]
                for name in ("uri", "datetime", "lon", "lat", "footprint", "thumbnail")
            }
            rows = Archive.table(codes, model.bits, key=[item.key for item in batch], **columns)
            target.commit(Archive.write_fragments(target.path, rows))
    return len(items) / (time.perf_counter() - begun)


def _encode_loop(model: HashModel, items: list[Item]) -> float:
    """Images per second of the network over batches that are decoded already."""
    batches = [np.stack([read_record(item, model.preprocessing).pixels for item in batch]) for batch in _batched(items)]
    begun = time.perf_counter()
    for batch in batches:
        model.encode_prepared(batch)
    return len(items) / (time.perf_counter() - begun)


def _batched(items: list[Item]) -> list[list[Item]]:
    return [items[start : start + BATCH_SIZE] for start in range(0, len(items), BATCH_SIZE)]


class _Keeper:
    """An observer that keeps the history and writes nothing."""

    history: list[dict[str, Any]]

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        pass

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        self.history = history


def _bare_training(run: Run, num_threads: int) -> float:
    """Images per second; in a process of its own."""
    torch.set_num_threads(num_threads)
    keeper = _Keeper()
    train(run, keeper)
    return _rate(keeper.history)


def _rate(history: list[dict[str, Any]]) -> float:
    """Median images per second of all epochs but the first."""
    return float(np.median([record["images_per_s"] for record in history[1:]]))
