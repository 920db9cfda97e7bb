"""What Ray Tune calls during a search: searcher, scheduler and callback. Importing this module imports Ray Tune."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler
from ray.tune.search import Searcher

from orbithash.cluster.tuning.trials import Record, name_of, read_record, read_records, write_record
from orbithash.cluster.tuning.worker import EPOCH, NUMBER, OBJECTIVE, PROBLEM, SCORES

__all__ = ["Halving", "Listener", "Proposer"]

# ASHA keeps one out of this number of trials at each of its rungs.
REDUCTION = 3


class Proposer(Searcher):  # type: ignore[misc]
    """Starts the next trial, with the settings in its file, or else with those that `propose` returns for its number.

    `propose` gets the records of all trials that were started. Ray Tune's OptunaSearch is not used: it resumes only
    from a pickle of its whole state, it reports a trial that was stopped early like a complete one, and it samples the
    settings of an unfinished trial again, which its checkpoint does not fit.
    """

    def __init__(
        self, folder: Path, numbers: Sequence[int], propose: Callable[[int, Sequence[Record]], dict[str, Any]]
    ) -> None:
        super().__init__()
        self._folder, self._numbers, self._propose = folder, list(numbers), propose

    def suggest(self, trial_id: str) -> Any:
        """Return the configuration of the next trial for Ray Tune: its number."""
        if not self._numbers:
            return Searcher.FINISHED
        number = self._numbers.pop(0)
        records = read_records(self._folder)
        if all(record.number != number for record in records):
            write_record(self._folder, Record(number, self._propose(number, records)))
        return {NUMBER: number}

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: `Listener` writes the record of the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the records are all of the state."""


class Halving(ASHAScheduler):  # type: ignore[misc]
    """ASHA with one exception: the trial with the settings as given is never stopped.

    `records` include those of the trials that ended before the search was resumed: the others are compared with these.
    """

    def __init__(self, epochs: int, grace: int, records: Sequence[Record]) -> None:
        super().__init__(
            time_attr=EPOCH, metric=OBJECTIVE, mode="max", max_t=epochs, grace_period=grace, reduction_factor=REDUCTION
        )
        for record in records:
            trial = SimpleNamespace(trial_id=name_of(record.number), config={NUMBER: record.number})
            self.on_trial_add(None, trial)
            for epoch, score in record.scores:
                self.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: score})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if trial.config[NUMBER] == 0 else decision)


class Listener(Callback):  # type: ignore[misc]
    """Writes the record of each trial that ends, and shows progress.

    Ray Tune calls neither `on_trial_complete` nor `on_trial_error` for trials that an interrupt ends.
    """

    def __init__(self, folder: Path, records: Sequence[Record], show: Callable[[int, str], None]) -> None:
        self._folder, self._show = folder, show
        self._num_ended = sum(record.is_ended for record in records)
        # Of the trials that have not ended, by number.
        self._scores: dict[int, list[tuple[int, float]]] = {}
        self._problems: dict[int, str] = {}
        self._best = max((score for record in records for _, score in record.scores), default=0.0)

    def __getstate__(self) -> dict[str, Any]:
        # Ray Tune stores a pickle of the callback. It is never loaded, and a progress bar cannot be pickled.
        return {}

    def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
        """Keep the scores of a trial, or its problem."""
        number = trial.config[NUMBER]
        if result[PROBLEM]:
            self._problems[number] = result[PROBLEM]
            return
        self._scores[number] = result[SCORES]
        self._best = max([self._best, *(score for _, score in result[SCORES])])
        note = f"trial {number} epoch {result[EPOCH]}: {result[OBJECTIVE]:.4f}, best {self._best:.4f}"
        self._show(self._num_ended, note)

    def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Write the record of a trial that was stopped early or is complete."""
        self._end(trial.config[NUMBER], "")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Write the record of a trial whose process failed too often."""
        number = trial.config[NUMBER]
        self._problems[number] = Path(trial.error_file).read_text().strip().splitlines()[-1]
        self._end(number, f"trial {number} failed")

    def _end(self, number: int, note: str) -> None:
        scores, problem = self._scores.pop(number, []), self._problems.pop(number, "")
        started = read_record(self._folder, number)
        write_record(self._folder, dataclasses.replace(started, scores=scores, problem=problem, is_ended=True))
        self._num_ended += 1
        self._show(self._num_ended, note)
