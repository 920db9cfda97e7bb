"""Run trials on Ray Tune: those without a stored end, resumed from their checkpoints."""

import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from orbithash.cluster.output import say, track
from orbithash.cluster.tuning.options import Tuning
from orbithash.cluster.tuning.trials import Record, Trial, name_of, read_records
from orbithash.cluster.tuning.worker import NUMBER, work

__all__ = ["remaining", "run_trials"]

# Number of times that a trial whose process died is resumed from its last epoch.
MAX_FAILURES = 2


def run_trials(
    what: str,
    base: Path,
    folder: Path,
    tuning: Tuning,
    num_trials: int,
    propose: Callable[[int, Sequence[Record]], dict[str, Any]],
    epochs: int | None = None,
) -> list[Trial]:
    """Run the trials that have not ended; return all of them by number. Ray is joined already.

    Args:
        what: name of the trials on the terminal.
        base: run folder with the settings and the split that the trials share.
        folder: folder of the files of the trials.
        tuning: metric and resources.
        num_trials: number of trials, including those that ended before.
        propose: returns the settings of a trial from its number and the records of the trials that were started.
        epochs: epochs of a trial that is not stopped early; None: no trial is stopped early.

    Raises:
        KeyboardInterrupt: the user interrupted; the same call resumes.
    """
    import ray

    if remaining(num_trials, read_records(folder)):
        present = ray.cluster_resources()
        needs = {"CPU": tuning.cpus, "GPU": tuning.gpus}
        room = min(int(present.get(name, 0) / amount) for name, amount in needs.items() if amount)
        say(f"{num_trials} {what}, {min(room, num_trials, tuning.max_concurrent or room)} at a time")
        with track(what, num_trials, "trials") as show:
            _tuner(base, folder, tuning, num_trials, propose, epochs, show).fit()
    ended = [record for record in read_records(folder) if record.is_ended]
    if len(ended) < num_trials:
        # Ray Tune handles the interrupt itself: it ends the trials and returns.
        say(f"interrupted; {len(ended)} {what} are complete, and the same command resumes")
        raise KeyboardInterrupt
    return [record.trial() for record in ended]


def remaining(num_trials: int, records: Sequence[Record]) -> list[int]:
    """Return the numbers of the trials that have not ended."""
    ended = {record.number for record in records if record.is_ended}
    return [number for number in range(num_trials) if number not in ended]


def _tuner(
    base: Path,
    folder: Path,
    tuning: Tuning,
    num_trials: int,
    propose: Callable[[int, Sequence[Record]], dict[str, Any]],
    epochs: int | None,
    show: Callable[[int, str], None],
) -> Any:
    """Return the Ray Tune run of the trials that have not ended."""
    # Otherwise Ray Tune prints tables on stdout, which carries the JSON of the command.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune

    from orbithash.cluster.tuning.scheduling import Halving, Listener, Proposer

    records = read_records(folder)
    numbers = remaining(num_trials, records)
    trainable = ray_tune.with_resources(
        partial(work, folder=str(folder), base=str(base), metric=tuning.metric, num_gpus=tuning.gpus),
        {"CPU": tuning.cpus, "GPU": tuning.gpus},
    )
    return ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            search_alg=Proposer(folder, numbers, propose),
            num_samples=len(numbers),
            scheduler=Halving(epochs, tuning.grace, records) if epochs is not None else None,
            max_concurrent_trials=tuning.max_concurrent or None,
            trial_dirname_creator=lambda trial: name_of(trial.config[NUMBER]),
        ),
        # Without a name: each start has a folder of its own.
        run_config=ray_tune.RunConfig(
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[Listener(folder, records, show)],
            failure_config=ray_tune.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
