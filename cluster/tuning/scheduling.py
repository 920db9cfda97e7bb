"""What Ray Tune calls during a search: the scheduler and the callback. Importing this module imports Ray Tune."""

from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from ray.tune import Callback
from ray.tune.schedulers import ASHAScheduler, TrialScheduler

from orbithash.cluster.tuning.trials import Outcome, name_of, write_outcome
from orbithash.cluster.tuning.worker import EPOCH, NUMBER, OBJECTIVE, PROBLEM, SCORES

__all__ = ["Halving", "Listener"]

# ASHA keeps one out of this number of trials at each of its rungs.
REDUCTION = 3


class Halving(ASHAScheduler):  # type: ignore[misc]
    """ASHA with one exception: the trial with the settings as given is never stopped.

    `outcomes` are those of the trials that ended before the search was resumed: the others are compared with them too.
    """

    def __init__(self, epochs: int, grace: int, outcomes: Sequence[Outcome]) -> None:
        super().__init__(
            time_attr=EPOCH, metric=OBJECTIVE, mode="max", max_t=epochs, grace_period=grace, reduction_factor=REDUCTION
        )
        for outcome in outcomes:
            trial = SimpleNamespace(trial_id=name_of(outcome.number), config={NUMBER: outcome.number})
            self.on_trial_add(None, trial)
            for epoch, score in outcome.scores:
                self.on_trial_result(None, trial, {EPOCH: epoch, OBJECTIVE: score})

    def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
        """Return whether the trial continues."""
        decision = super().on_trial_result(tune_controller, trial, result)
        return str(TrialScheduler.CONTINUE if trial.config[NUMBER] == 0 else decision)


class Listener(Callback):  # type: ignore[misc]
    """Writes the outcome of each trial that ends, and shows progress.

    Ray Tune calls neither `on_trial_complete` nor `on_trial_error` for trials that an interrupt ends.
    """

    def __init__(
        self,
        folder: Path,
        points: Sequence[dict[str, Any]],
        outcomes: Sequence[Outcome],
        show: Callable[[int, str], None],
    ) -> None:
        self._folder, self._points, self._show = folder, points, show
        self._num_ended = len(outcomes)
        # Of the trials that have not ended, by number.
        self._scores: dict[int, list[tuple[int, float]]] = {}
        self._problems: dict[int, str] = {}
        self._best = max((score for outcome in outcomes for _, score in outcome.scores), default=0.0)

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
        """Write the outcome of a trial that was stopped early or is complete."""
        self._end(trial.config[NUMBER], "")

    def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
        """Write the outcome of a trial whose process failed too often."""
        number = trial.config[NUMBER]
        self._problems[number] = Path(trial.error_file).read_text().strip().splitlines()[-1]
        self._end(number, f"trial {number} failed")

    def _end(self, number: int, note: str) -> None:
        scores, problem = self._scores.pop(number, []), self._problems.pop(number, "")
        write_outcome(self._folder, Outcome(number, self._points[number], scores, problem))
        self._num_ended += 1
        self._show(self._num_ended, note)
