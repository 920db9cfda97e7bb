"""The code of a trial: train with its settings, report a score per epoch to Ray Tune."""

import dataclasses
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from orbithash.cluster.runtime import device_for
from orbithash.cluster.tuning.sampling import read_settings
from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import open_run

__all__ = ["EPOCH", "OBJECTIVE", "PROBLEM", "WORST", "configured", "work"]

# Names of the values that a trial reports per epoch.
OBJECTIVE, EPOCH, PROBLEM = "objective", "epoch", "problem"
# Score of a trial without a result: below every metric.
WORST = -1.0


def configured(run: Run, settings: dict[str, Any]) -> Run:
    """Return `run` with these settings changed; raise `InputError` if they are invalid."""
    config = load_config(type(run.config), **{**run.config.model_dump(), **settings})
    return dataclasses.replace(run, config=config)


def work(settings: dict[str, Any], folder: str, metric: str, num_gpus: float) -> None:
    """Run one trial; its process has this number of GPUs."""
    device = device_for(num_gpus)
    from ray import tune as ray_tune

    from orbithash.trainers.loop.loop import train

    checkpoint = ray_tune.get_checkpoint()
    try:
        run = configured(open_run(Path(folder)), read_settings(settings))
        with checkpoint.as_directory() if checkpoint else nullcontext() as resume_from:
            train(
                run,
                _Reporter(metric),
                resume_from=Path(resume_from) if resume_from else None,
                device=device,
            )
    except InputError as error:
        # Incompatible settings, or a loss that is not finite: the other trials continue.
        ray_tune.report({OBJECTIVE: WORST, EPOCH: 1, PROBLEM: str(error)})


class _Reporter:
    """The observer of the training loop in a trial."""

    def __init__(self, metric: str) -> None:
        self._name = f"validation/{metric}"

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Ignore steps: trials report per epoch."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        from ray import tune as ray_tune

        record = history[-1]
        if self._name not in record:
            if any(name.startswith("validation/") for name in record):
                known = ", ".join(name.partition("/")[2] for name in record if name.startswith("validation/"))
                raise InputError(f"--metric is {self._name.partition('/')[2]!r}; the validation metrics are {known}")
            return
        with TemporaryDirectory() as temporary:
            write_checkpoint(Path(temporary))
            metrics = {OBJECTIVE: record[self._name], EPOCH: record["epoch"], PROBLEM: ""}
            ray_tune.report(metrics, checkpoint=ray_tune.Checkpoint.from_directory(temporary))
