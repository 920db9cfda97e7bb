"""The code of a trial: train with its settings, report a score per epoch to Ray Tune."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from orbithash.cluster.runtime import device_for
from orbithash.cluster.tuning.trials import checkpoint_of, read_record
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, recover_folder
from orbithash.trainers.config import load_config
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import open_run
from orbithash.trainers.metrics.retrieval import VALIDATION_SIZES

__all__ = ["EPOCH", "NUMBER", "OBJECTIVE", "PROBLEM", "SCORES", "WORST", "configured", "work"]

# Name of the number of a trial in its configuration for Ray Tune.
NUMBER = "number"
# Names of the values that a trial reports per epoch: its score, its number, all scores so far, what went wrong.
OBJECTIVE, EPOCH, SCORES, PROBLEM = "objective", "epoch", "scores", "problem"
# Score of a trial without a result: below every metric.
WORST = -1.0


def configured(run: Run, settings: dict[str, Any]) -> Run:
    """Return `run` with these settings changed; raise `InputError` if they are invalid."""
    config = load_config(type(run.config), **{**run.config.model_dump(), **settings})
    return dataclasses.replace(run, config=config)


def work(trial: dict[str, int], folder: str, base: str, metric: str, num_gpus: float) -> None:
    """Run one trial, from its checkpoint if there is one.

    Args:
        trial: the number of the trial, under `NUMBER`.
        folder: folder of the files of the trials.
        base: run folder with the settings and the split that all trials share.
        metric: metric on the validation part.
        num_gpus: number of GPUs of this process.
    """
    device = device_for(num_gpus)
    from ray import tune as ray_tune

    from orbithash.trainers.loop.checkpoint import load_checkpoint
    from orbithash.trainers.loop.loop import train

    number = trial[NUMBER]
    checkpoint = checkpoint_of(Path(folder), number)
    reporter = _Reporter(metric, checkpoint)
    try:
        run = configured(open_run(Path(base)), read_record(Path(folder), number).settings)
        recover_folder(checkpoint)
        is_resumed = checkpoint.is_dir()
        if is_resumed:
            # A resumed search does not know these epochs, and none may be left to train.
            reporter.report(load_checkpoint(checkpoint)["history"])
        train(run, reporter, resume_from=checkpoint if is_resumed else None, device=device)
    except InputError as error:
        # Incompatible settings, or a loss that is not finite: the other trials continue.
        ray_tune.report({OBJECTIVE: WORST, EPOCH: 1, SCORES: [], PROBLEM: str(error)})


class _Reporter:
    """The observer of the training loop in a trial."""

    def __init__(self, metric: str, checkpoint: Path) -> None:
        self._name = f"validation/{metric}"
        self._checkpoint = checkpoint

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Ignore steps: trials report per epoch."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        record = history[-1]
        if self._name not in record:
            metrics = [name for name in record if name.startswith("validation/") and name not in VALIDATION_SIZES]
            if metrics:
                known = ", ".join(name.partition("/")[2] for name in metrics)
                raise InputError(f"--metric is {self._name.partition('/')[2]!r}; the validation metrics are {known}")
            return
        with new_folder(self._checkpoint) as part:
            write_checkpoint(part)
        self.report(history)

    def report(self, history: Sequence[dict[str, Any]]) -> None:
        """Report the last scored epoch to Ray Tune, with the scores of all epochs."""
        from ray import tune as ray_tune

        scores = [(record["epoch"], record[self._name]) for record in history if self._name in record]
        epoch, score = scores[-1]
        ray_tune.report({OBJECTIVE: score, EPOCH: epoch, SCORES: scores, PROBLEM: ""})
