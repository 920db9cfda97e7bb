"""What is trained on what, and all that is checked of it before anything starts."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.datasets import Manifest
from orbithash.trainers.loop.tables import check_sources
from orbithash.trainers.methods import METHODS, Method, get_method
from orbithash.trainers.metrics.retrieval import Labels, label_arrays

__all__ = ["Run", "check_batch", "check_labels", "check_run"]


@dataclass(frozen=True)
class Run:
    """What is trained on what. `root` is the data folder that the manifest's paths are relative to."""

    method: str
    config: TrainConfig
    manifest: Manifest
    root: Path

    def preprocessing(self) -> Preprocessing:
        """What an image goes through before the network, in validation and ever after."""
        return self.config.preprocessing()

    def build(self) -> Method:
        """The method with its initial weights, the same on every rank."""
        torch.manual_seed(self.config.seed)
        return get_method(self.method)(self.config, len(self.manifest.classes), len(self.manifest.part("train")))

    def labels(self) -> dict[str, Labels]:
        """The labels of the training and the validation part, in one form."""
        splits = ("train", "validation")
        of_images = ([image.labels for image in self.manifest.part(split)] for split in splits)
        return dict(zip(splits, label_arrays(len(self.manifest.classes), *of_images), strict=True))


def check_run(run: Run, num_workers: int | tuple[int, int]) -> None:
    """`InputError` with all that keeps `run` from training on so many workers, but for what is inside its images.

    `num_workers` is one number, or the least and the most of one that changes while the run goes on.
    """
    images = run.manifest.part("train", "validation")
    problems: list[str] = []

    def check_order() -> None:
        method = run.build()
        if not problems:
            # Batches are drawn by labels, and only from what passed the checks before.
            method.order(run.labels()["train"], 0)

    checks: list[Callable[[], None]] = [
        lambda: check_batch(run, num_workers),
        lambda: check_labels(run),
        lambda: check_sources(images, get_method(run.method), run.config),
        check_order,
    ]
    for check in checks:
        try:
            check()
        except InputError as err:
            problems.append(str(err))
    if problems:
        raise listed(problems, f"{run.method} cannot train on {run.root}")


def check_batch(run: Run, num_workers: int | tuple[int, int]) -> None:
    """`InputError` where the batch cannot be shared among the workers or is more than there is; see `check_run`."""
    batch_size, num_images = run.config.batch_size, len(run.manifest.part("train"))
    factor = get_method(run.method).group_size * run.config.accumulate
    least, most = (num_workers, num_workers) if isinstance(num_workers, int) else num_workers
    # As many workers as come up share every batch alike: it is a multiple of each number that may.
    divisor = math.lcm(*range(least, most + 1)) * factor
    if batch_size % divisor or batch_size < 2 * most * run.config.accumulate:
        times = "" if factor == 1 else f"{factor} times "
        if least == most:
            workers, rule = f"{most} workers", f"a multiple of {times}the number of workers"
        else:
            numbers = f"of {times}each number between them"
            workers, rule = f"{least} to {most} workers", f"a multiple {numbers}, which is one of {divisor},"
        pieces = "" if run.config.accumulate == 1 else f" in {run.config.accumulate} pieces"
        each = "each" if not pieces else "each of a piece"
        raise InputError(
            f"batch_size {batch_size} over {workers}{pieces}; it must be {rule} and leave {each} at least 2 images"
        )
    if num_images < batch_size:
        raise InputError(f"batch_size {batch_size} is more than the {num_images} training images; make it smaller")


def check_labels(run: Run) -> None:
    """`InputError` where a method that learns from classes finds an image with none or several."""
    if not get_method(run.method).needs_labels:
        return
    images = run.manifest.part("train", "validation")
    faults = {
        "no class": [image.path for image in images if not image.labels],
        "several classes": [image.path for image in images if len(image.labels) > 1],
    }
    told = [
        f"{len(paths)} of {len(images)} training images have {fault} (first: {paths[0]})"
        for fault, paths in faults.items()
        if paths
    ]
    if told:
        others = " and ".join(name for name, kind in METHODS.items() if not kind.needs_labels)
        raise InputError(f"{' and '.join(told)}; {run.method} learns from one class of each, {others} need none")
