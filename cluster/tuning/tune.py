"""Search for settings of a method on Ray Tune: concurrent trials, unpromising ones are stopped early (ASHA).

TUNE/base/         the settings that all trials share and the split, as in a run folder
TUNE/search.yaml   the search space and the options of the search
TUNE/ray/          Ray Tune's storage
TUNE/trials.json, report.html   settings and score of each trial, best first
TUNE/best.yaml     the settings of the best trial, for `train --config`

A trial is one process, so that trials never wait for workers of each other. The first trial uses the settings as given
and is trained to its end, as the reference for the others. Every second one of the others stays near these settings.
The test part is never used.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_gpu_share, check_resources, connected
from orbithash.cluster.tuning.sampling import domain, read_settings, sample_points
from orbithash.cluster.tuning.worker import EPOCH, OBJECTIVE, PROBLEM, WORST, configured, work
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import check_training, claim_folder
from orbithash.trainers.methods import get_method
from orbithash.trainers.search_space import (
    Choice,
    Dimension,
    Space,
    declared_space,
    is_whole,
    parse_space,
    plain_space,
)

__all__ = ["Trial", "Tuning", "asked_space", "best_config", "tune"]

# Number of times that a trial whose process died is resumed from its last epoch.
MAX_FAILURES = 2

# ASHA keeps one out of this number of trials at each of its rungs.
REDUCTION = 3


@dataclass(frozen=True)
class Tuning:
    """The options of a search.

    Attributes:
        space: settings to vary; all others are those of the run.
        num_trials: number of trials, including the one with the settings of the run.
        metric: metric on the validation part, higher is better.
        cpus, gpus: resources of each trial; parts of a GPU are allowed.
        max_concurrent: maximum number of concurrent trials; 0: limited by resources only.
        grace: epochs before a trial may be stopped early.
        seed: seed of the sampled settings.
    """

    space: Space
    num_trials: int
    metric: str
    cpus: float = 1
    gpus: float = 0
    max_concurrent: int = 0
    grace: int = 1
    seed: int = 0

    @classmethod
    def of(
        cls, run: Run, space: Space, num_trials: int, metric: str | None, grace: int | None, **options: Any
    ) -> "Tuning":
        """Return the options; defaults are the method's metric, and a quarter of the epochs as grace."""
        metric = metric or get_method(run.method).tuning_metric
        grace = max(1, run.config.epochs // 4) if grace is None else grace
        return cls(space, num_trials, metric, grace=grace, **options)

    def to_plain(self) -> dict[str, Any]:
        """Return the options that decide which trials run, for search.yaml; resources do not."""
        fields = ("num_trials", "metric", "grace", "seed")
        return {**{name: getattr(self, name) for name in fields}, "space": plain_space(self.space)}


@dataclass(frozen=True)
class Trial:
    """One trial and its best result.

    Attributes:
        number: 0 for the trial with the settings as given, then counting up.
        settings: values of the settings of the space.
        score: best value of the metric; None if no epoch was scored.
        epoch: in which that was.
        epochs: how many it had before its end, or before it was stopped.
        problem: what went wrong, or "".
    """

    number: int
    settings: dict[str, Any]
    score: float | None
    epoch: int
    epochs: int
    problem: str


def asked_space(config: TrainConfig, texts: Sequence[str] | None) -> dict[str, Dimension]:
    """Return the search space: that of `--search`, else all declared ranges of settings that are not given."""
    if texts:
        return parse_space(type(config), texts)
    declared = declared_space(type(config))
    return {name: dimension for name, dimension in declared.items() if name not in config.model_fields_set}


def tune(run: Run, tuning: Tuning, folder: Path) -> list[Trial]:
    """Run the trials and write trials.json; return the trials, the best one first.

    An interrupted search of the same options resumes.

    Raises:
        InputError: wrong options, before anything starts; no trial has a score.
    """
    folder = folder.absolute()
    _check(run, tuning, folder)
    if (folder / "trials.json").exists():
        say(f"{folder} is complete already; nothing to search")
        return [Trial(**fields) for fields in json.loads((folder / "trials.json").read_text())]
    with connected():
        import ray

        check_resources("a trial", [{"CPU": tuning.cpus, "GPU": tuning.gpus}])
        claim_folder(run, folder / "base")
        write_file(folder / "search.yaml", yaml.safe_dump(tuning.to_plain(), sort_keys=False))
        room = int(ray.cluster_resources()["CPU"] // tuning.cpus) if tuning.cpus else tuning.num_trials
        at_a_time = min(room, tuning.num_trials, tuning.max_concurrent or room)
        say(f"{tuning.num_trials} trials of {run.method}, {at_a_time} at a time, compared by {tuning.metric}")
        with _showing(tuning.num_trials):
            results = list(_tuner(run, tuning, folder).fit())
    is_done = [bool(result.error) or bool((result.metrics or {}).get("done")) for result in results]
    if len(results) < tuning.num_trials or not all(is_done):
        say(f"interrupted; {sum(is_done)} trials are complete, and the same command resumes")
        raise KeyboardInterrupt
    trials = [_trial_of(result) for result in sorted(results, key=lambda result: str(result.path))]
    trials.sort(key=lambda trial: WORST if trial.score is None else trial.score, reverse=True)
    if trials[0].score is None:
        raise InputError(f"no trial has a {tuning.metric}: {trials[0].problem or f'see the logs in {folder}/ray'}")
    text = json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1)
    write_file(folder / "trials.json", text)
    return trials


def _check(run: Run, tuning: Tuning, folder: Path) -> None:
    if tuning.num_trials < 2:
        raise InputError(
            f"--trials is {tuning.num_trials}; at least 2 are needed, because the first uses the settings as given"
        )
    if not tuning.space:
        raise InputError("nothing to search: every setting with a range has a given value; give --search KEY=LOW:HIGH")
    if not run.manifest.part("validation"):
        raise InputError("no validation part to score the trials on; set --validation above 0")
    if not 1 <= tuning.grace <= run.config.epochs:
        raise InputError(f"--grace is {tuning.grace}; from 1 to epochs={run.config.epochs} are allowed")
    check_gpu_share("--gpus-per-trial", tuning.gpus, is_whole=False)
    if not (math.isfinite(tuning.cpus) and tuning.cpus >= 0 and tuning.cpus + tuning.gpus > 0):
        raise InputError(f"{tuning.cpus:g} CPUs and {tuning.gpus:g} GPUs per trial; one of them must be above 0")
    if tuning.max_concurrent < 0:
        raise InputError(f"--concurrent is {tuning.max_concurrent}; a number of trials, or 0 for no limit, is needed")
    for settings in (_corner(run, tuning.space, high) for high in (False, True)):
        # Invalid values are reported once here, not by every trial.
        configured(run, settings)
    search = folder / "search.yaml"
    if search.exists():
        there = yaml.safe_load(search.read_text())
        mine = json.loads(json.dumps(tuning.to_plain()))
        if other := [f"{key} was {there.get(key)!r}, is {mine[key]!r}" for key in mine if mine[key] != there.get(key)]:
            raise InputError(f"{folder} holds another search ({'; '.join(other)}); give another --out")
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / "base").is_dir():
        raise InputError(f"{folder} is not empty and not the folder of a search; give another --out")
    check_training(run, folder / "base")


def _corner(run: Run, space: Space, high: bool) -> dict[str, Any]:
    """Return the first or the last value of each setting of the space."""

    def end(name: str) -> Any:
        dimension = space[name]
        if isinstance(dimension, Choice):
            return dimension.values[-1 if high else 0]
        value = dimension.high if high else dimension.low
        return int(value) if is_whole(type(run.config), name) else float(value)

    return {name: end(name) for name in space}


def best_config(run: Run, trials: Sequence[Trial]) -> str:
    """Return the settings of the best trial as YAML, for `train --config`; `trials` has the best first."""
    config = configured(run, trials[0].settings).config
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _tuner(run: Run, tuning: Tuning, folder: Path) -> Any:
    """Return the Ray Tune search in the folder, or a new one."""
    # Otherwise Ray Tune prints tables on stdout, which carries the JSON of the command.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune
    from ray.tune.search import BasicVariantGenerator

    trainable = ray_tune.with_resources(
        partial(work, folder=str(folder / "base"), metric=tuning.metric, num_gpus=tuning.gpus),
        {"CPU": tuning.cpus, "GPU": tuning.gpus},
    )
    storage = str(folder / "ray")
    if ray_tune.Tuner.can_restore(storage):
        return ray_tune.Tuner.restore(storage, trainable)
    points = sample_points(run.config, tuning.space, tuning.num_trials, tuning.seed)
    return ray_tune.Tuner(
        trainable,
        param_space={name: domain(type(run.config), name, tuning.space) for name in tuning.space},
        tune_config=ray_tune.TuneConfig(
            metric=OBJECTIVE,
            mode="max",
            num_samples=tuning.num_trials,
            scheduler=_halving(points[0], run.config.epochs, tuning.grace),
            search_alg=BasicVariantGenerator(points_to_evaluate=points, max_concurrent=tuning.max_concurrent),
            trial_dirname_creator=_folder_of,
        ),
        run_config=ray_tune.RunConfig(
            name="ray",
            storage_path=str(folder),
            verbose=0,
            callbacks=[_listener()],
            failure_config=ray_tune.FailureConfig(max_failures=MAX_FAILURES),
            checkpoint_config=ray_tune.CheckpointConfig(num_to_keep=1),
        ),
    )


def _folder_of(trial: Any) -> str:
    # A trial's id ends in its number.
    return f"trial_{trial.trial_id.rpartition('_')[2]}"


def _halving(defaults: dict[str, Any], epochs: int, grace: int) -> Any:
    """Return ASHA with one exception: the trial with the settings as given is never stopped."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Halving(ASHAScheduler):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            return str(TrialScheduler.CONTINUE if trial.config == defaults else decision)

    return Halving(time_attr=EPOCH, max_t=epochs, grace_period=grace, reduction_factor=REDUCTION)


def _trial_of(result: Any) -> Trial:
    """Return the trial of a result of Ray Tune."""
    number = int(Path(result.path).name.rpartition("_")[2])
    settings = read_settings(result.config or {})
    frame = result.metrics_dataframe
    problem = str(result.error).strip().splitlines()[-1] if result.error else ""
    if frame is None or not len(frame) or OBJECTIVE not in frame:
        return Trial(number, settings, None, 0, 0, problem)
    best = frame.loc[frame[OBJECTIVE].idxmax()]
    if best[OBJECTIVE] == WORST:
        return Trial(number, settings, None, 0, 0, str(best[PROBLEM]))
    return Trial(number, settings, float(best[OBJECTIVE]), int(best[EPOCH]), int(frame[EPOCH].max()), problem)


class _Shown:
    """The progress that the listener updates; not part of the listener, which Ray Tune pickles."""

    advance_to: Callable[[int, str], None] | None = None
    num_done = 0
    best: float | None = None


@contextmanager
def _showing(num_trials: int) -> Iterator[None]:
    _Shown.num_done, _Shown.best = 0, None
    with track("tuning", num_trials, "trials") as advance_to:
        _Shown.advance_to = advance_to
        try:
            yield
        finally:
            _Shown.advance_to = None


def _listener() -> Any:
    from ray import tune as ray_tune

    class Listener(ray_tune.Callback):  # type: ignore[misc]
        def on_trial_result(self, iteration: int, trials: Any, trial: Any, result: dict[str, Any], **_: Any) -> None:
            score = result.get(OBJECTIVE, WORST)
            _Shown.best = score if _Shown.best is None else max(_Shown.best, score)
            self._show(trials, f"{_folder_of(trial)} epoch {result.get(EPOCH)}: {score:.4f}, best {_Shown.best:.4f}")

        def on_trial_complete(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self._show(trials, "")

        def on_trial_error(self, iteration: int, trials: Any, trial: Any, **_: Any) -> None:
            self._show(trials, f"{_folder_of(trial)} failed")

        @staticmethod
        def _show(trials: Any, note: str) -> None:
            if _Shown.advance_to is not None:
                _Shown.advance_to(sum(trial.is_finished() for trial in trials), note)

    return Listener()
