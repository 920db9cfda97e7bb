"""`bench features`: Ray Data workers that compute features and keep them, beside bare loops that keep nothing.

The loops are measured before and after the workers, so that a machine that slows down meanwhile does not decide the
ratio. Only the ratio can be compared between machines.
"""

import multiprocessing
import os
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from orbithash.cluster.bench.inputs import write_bench_scenes
from orbithash.cluster.bench.report import environment
from orbithash.cluster.bench.train import environment_variables
from orbithash.cluster.features.fill import fill_for_training
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected, keeping_memory
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.reading import READ_BATCH_SIZE, Normaliser, read_batches
from orbithash.encoders.sources.image_roots import local_folder
from orbithash.trainers.loop.run import Run, make_run

__all__ = ["bench_features"]

# Batches of each loop, at least.
_MIN_BATCHES = 2

# Seconds to wait until all loops can start.
_START_S = 600


def bench_features(count: int, num_workers: int) -> dict[str, Any]:
    """Measure images per second of the workers of `orbithash features` beside as many bare loops at once.

    A loop is a process with a worker's threads. It reads, decodes and prepares its share of the same images and passes
    them through the network; it writes nothing. `kept_loops` have the allocator of training workers, which keeps memory
    from batch to batch. No time includes the start of processes and networks. The images are the training and the
    validation part of `count` generated scenes, the network is a mobilenet_v2.

    Raises:
        InputError: an argument is out of its range.
    """
    num_cores = os.cpu_count() or 1
    if not 1 <= num_workers <= num_cores:
        raise InputError(f"--workers is {num_workers}; 1 to {num_cores}, the cores of this machine, can be compared")
    least = 2 * _MIN_BATCHES * READ_BATCH_SIZE * num_workers
    if count < least:
        raise InputError(f"--count is {count}; at least {least} images are needed to measure {num_workers} workers")
    with (
        TemporaryDirectory() as temporary,
        environment_variables({"ORBITHASH_FEATURES": str(Path(temporary) / "store")}),
        connected(),
    ):
        run = make_run("itq", write_bench_scenes(Path(temporary) / "scenes", count))
        num_threads = num_cores // num_workers

        def loops() -> tuple[float, float]:
            bare = _loops(run, num_workers, num_threads)
            with environment_variables(keeping_memory()):
                return bare, _loops(run, num_workers, num_threads)

        say("bare loops, first time")
        before = loops()
        say(f"{num_workers} workers of Ray Data")
        done = fill_for_training(run, num_workers)
        say("bare loops, second time")
        after = loops()
    bare, kept = (sum(pair) / 2 for pair in zip(before, after, strict=True))
    return {
        **environment("features", "ray", "torch"),
        "images": done.num_computed,
        "network": run.config.backbone,
        "input_px": run.config.image_size,
        "workers": num_workers,
        "threads_per_worker": num_threads,
        "workers_images_per_s": done.images_per_s,
        "workers_start_s": done.start_s,
        "bare_loops_images_per_s": bare,
        "kept_loops_images_per_s": kept,
        "ratio_to_bare_loops": done.images_per_s / bare,
        "ratio_to_kept_loops": done.images_per_s / kept,
    }


def _loops(run: Run, count: int, num_threads: int) -> float:
    """Return images per second of `count` loops together, which start at the same time."""
    context, root = multiprocessing.get_context("spawn"), local_folder(run.root, "the images of this measurement")
    paths = [root / path for split in ("train", "validation") for path in run.images(split).paths]
    with ProcessPoolExecutor(count, context, _set_barrier, (context.Barrier(count, timeout=_START_S),)) as pool:
        shares = [paths[number::count] for number in range(count)]
        seconds = list(pool.map(_loop, [run] * count, shares, [num_threads] * count))
    return len(paths) / max(seconds)


class _Process:
    barrier: Any


def _set_barrier(barrier: Any) -> None:
    _Process.barrier = barrier


def _loop(run: Run, paths: list[Path], num_threads: int) -> float:
    """Return the seconds of computing the features of images in this process; nothing is kept."""
    torch.set_num_threads(num_threads)
    preprocessing = run.preprocessing()
    network = run.build().network.eval().to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    normalise = Normaliser(preprocessing, torch.device("cpu"))
    _Process.barrier.wait()
    began = time.perf_counter()
    with torch.inference_mode():
        for batch in read_batches(paths, preprocessing):
            network.features(normalise(batch))
    return time.perf_counter() - began
