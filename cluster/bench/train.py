"""`bench train`: Ray Train workers beside the plain training loop.

The loops are measured before and after the workers, so that a machine that slows down meanwhile does not decide the
ratio. Only the ratios can be compared between machines.

What several workers cost is shown in steps: loops that know nothing of each other, loops that wait for each other's
outputs in every step, ranks that also average gradients, and the workers, which differ from these ranks by Ray only.
"""

import dataclasses
import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import torch

from orbithash.cluster.bench.inputs import write_bench_scenes
from orbithash.cluster.bench.report import environment
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected, keeping_memory
from orbithash.cluster.training.train import train_on_ray
from orbithash.encoders.errors import InputError
from orbithash.trainers.loop import loop
from orbithash.trainers.loop.run import Run, make_run

__all__ = ["bench_train", "environment_variables"]

_NUM_SCENES = 540


def bench_train(data: str | None, weights: str | None, epochs: int, workers: int = 1) -> dict[str, Any]:
    """Measure images per second of each Ray Train worker beside plain loops with a worker's threads and batch.

    Only epochs are timed. `bare_loop` runs alone. `bare_loops` are as many independent loops at once as workers.
    `kept_loops` are the same with the workers' memory allocator, which is the limit that the machine sets.
    `gathering_loops` also gather the outputs of the whole batch in each step, and `ranks` also average gradients by
    DDP: they are `workers` without Ray. Both are left out with one worker.
    """
    if epochs < 2:
        raise InputError(f"--epochs is {epochs}; at least 2 are needed, because the first one warms up")
    num_cores = os.cpu_count() or 1
    if not 1 <= workers <= num_cores:
        raise InputError(f"--workers is {workers}; 1 to {num_cores}, the cores of this machine, can be compared")
    num_threads = num_cores // workers
    with tempfile.TemporaryDirectory() as temporary, connected():
        root = Path(temporary)
        folder = data or write_bench_scenes(root / "scenes", _NUM_SCENES)
        settings = [f"epochs={epochs}", "warm_up_epochs=0", f"validate_every={epochs}"]
        run = make_run("dhcl", folder, settings=settings, weights=weights)
        share = run.config.batch_size // workers
        plain_run = dataclasses.replace(run, config=run.config.model_copy(update={"batch_size": share}))

        def plain_loops(count: int, variables: dict[str, str] | None = None) -> float:
            with (
                environment_variables(variables or {}),
                ProcessPoolExecutor(count, multiprocessing.get_context("spawn")) as pool,
            ):
                return float(np.mean(list(pool.map(_train_plainly, [plain_run] * count, [num_threads] * count))))

        def ranks(*, with_gradients: bool) -> float:
            with tempfile.TemporaryDirectory() as meeting, environment_variables(keeping_memory()):
                context = multiprocessing.get_context("spawn")
                places = [(number, workers, f"{meeting}/store") for number in range(workers)]
                with ProcessPoolExecutor(workers, context) as pool:
                    rates = pool.map(_train_as_rank, repeat(run), repeat(num_threads), places, repeat(with_gradients))
                    return float(np.mean(list(rates))) / workers

        def all_plain_loops() -> dict[str, float]:
            rates = {
                "bare_loop": plain_loops(1),
                "bare_loops": plain_loops(workers),
                "kept_loops": plain_loops(workers, keeping_memory()),
            }
            if workers > 1:
                rates |= {
                    "gathering_loops": ranks(with_gradients=False),
                    "ranks": ranks(with_gradients=True),
                }
            return rates

        say("plain loops, first time")
        before = all_plain_loops()
        say(f"{workers} Ray Train workers")
        begun = time.perf_counter()
        history = train_on_ray(run, root / "run", workers)
        seconds = time.perf_counter() - begun
        say("plain loops, second time")
        after = all_plain_loops()
        rate = _rate(history) / workers
        plain = {name: (before[name] + after[name]) / 2 for name in before}
        return {
            **environment("train", "ray", "torch"),
            "images": len(run.manifest.part("train")),
            "network": run.config.backbone,
            "input_px": run.config.image_size,
            "workers": workers,
            "threads_per_worker": num_threads,
            "images_per_worker_and_step": share,
            "worker_images_per_s": rate,
            "worker_start_s": seconds - sum(record["seconds"] for record in history),
            "worker_peak_memory_mb": max(record["peak_memory_mb"] for record in history),
            **{f"{name}_images_per_s": value for name, value in plain.items()},
            **{f"ratio_to_{name}": rate / value for name, value in plain.items()},
        }


@contextmanager
def environment_variables(variables: dict[str, str]) -> Iterator[None]:
    """Set environment variables, which processes started in the block inherit."""
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


class _HistoryObserver:
    """An observer that keeps the history and writes nothing."""

    history: list[dict[str, Any]]

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        pass

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        self.history = history


def _train_plainly(run: Run, num_threads: int) -> float:
    """Train without Ray, in a process of its own, and return images per second."""
    torch.set_num_threads(num_threads)
    observer = _HistoryObserver()
    loop.train(run, observer)
    return _rate(observer.history)


def _train_as_rank(run: Run, num_threads: int, place: tuple[int, int, str], with_gradients: bool) -> float:
    """Train as one of several ranks without Ray, and return images per second of all of them.

    `place` is the rank, the number of ranks, and the file by which they meet.
    """
    number, count, store = place
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=number, world_size=count)
    try:
        if not with_gradients:
            # What `wrap` returns with one rank.
            loop.wrap = lambda method: method  # type: ignore[assignment, attr-defined]
        return _train_plainly(run, num_threads)
    finally:
        torch.distributed.destroy_process_group()


def _rate(history: list[dict[str, Any]]) -> float:
    """Return the median images per second of all epochs but the first."""
    return float(np.median([record["images_per_s"] for record in history[1:]]))
