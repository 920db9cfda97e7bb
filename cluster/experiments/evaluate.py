"""Evaluation of the model of a run folder, with a progress bar, and workers that compute features for it."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orbithash.cluster.features.fill import device_here, fill
from orbithash.cluster.output import say, track_when_known
from orbithash.cluster.runtime import connected
from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.image_roots import ImageRoot, image_root
from orbithash.trainers import library

__all__ = ["evaluate_run"]


def evaluate_run(
    folder: Path,
    data: Path | str | ImageRoot,
    protocol: str | None = None,
    baselines: bool = True,
    cutoffs: Sequence[int] = (20, 100),
    bits: int | None = None,
    workers: int | None = None,
    gpus_per_worker: float = 0,
) -> tuple[dict[str, Any], Path]:
    """Return the metrics and the path of the report; see `library.evaluate_run`.

    `workers` of Ray Data, with a number of GPUs each, first compute the features of images that are not kept; None:
    this process does. The codes are the same.
    """
    device = None
    if workers is not None:
        device = device_here(gpus_per_worker)
        if gpus_per_worker and device == "cpu":
            # Passes of one image by GPUs are kept apart from those of CPUs.
            raise InputError(
                f"--gpus-per-worker is {gpus_per_worker:g} and this process has no GPU to look up what the workers "
                "compute; start the command on a node with a GPU, or omit --gpus-per-worker"
            )
        _compute_features(folder.absolute(), image_root(data), protocol, baselines, bits, workers, gpus_per_worker)
    with track_when_known("evaluating", "images") as on_progress:
        metrics, page, reason = library.evaluate_run(
            folder, data, protocol, baselines, cutoffs, bits, device, on_progress=on_progress
        )
    if reason is not None:
        say(f"no baselines: {reason}")
    return metrics, page


def _compute_features(
    folder: Path,
    data: ImageRoot,
    protocol: str | None,
    baselines: bool,
    bits: int | None,
    workers: int,
    gpus_per_worker: float,
) -> None:
    """Let workers compute the features that the evaluation asks for, in its order."""
    if workers < 1:
        raise InputError(f"--workers is {workers}; at least 1 is needed")
    library.check_evaluation(folder, data, protocol, bits)
    with connected():
        fill(partial(library.evaluation_features, folder, data, protocol, baselines, bits), workers, gpus_per_worker)
        # Which images need a pass of their own follows from the features of all.
        rows = library.unsure_rows(folder, data, protocol, bits, device_here(gpus_per_worker))
        if len(rows):
            fill(partial(library.unsure_features, folder, data, protocol, bits, rows), workers, gpus_per_worker)
