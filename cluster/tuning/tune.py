"""Settings of a method looked for on Ray Tune: trials that train side by side, the hopeless ones stopped early (ASHA).

TUNE/base/         the settings that all trials share and the split, as in a run folder
TUNE/search.yaml   what is looked for
TUNE/ray/          Ray Tune's storage
TUNE/trials.json, report.html   each trial's settings and how it fared, best first
TUNE/best.yaml     the best trial's settings, for `train --config`

A trial is one process, so trials never wait for one another's workers. The first one has the settings as they are, and
is trained to its end: what the others are compared with. Every second one of these stays near it. The test part is
never looked at.
"""

import dataclasses
import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import yaml

from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_gpu_share, check_resources, connected, device_for
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.config import TrainConfig, load_config
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import check_training, claim_folder, open_run
from orbithash.trainers.methods import get_method
from orbithash.trainers.search_space import (
    Choice,
    Dimension,
    Linear,
    Space,
    declared_space,
    is_whole,
    parse_space,
    plain_space,
)

__all__ = ["Trial", "Tuning", "asked_space", "best_config", "tune"]

# A trial whose process dies goes on from its last epoch this often.
MAX_FAILURES = 2

# ASHA keeps one of so many trials at each of its rungs.
REDUCTION = 3

# How far a trial goes that is to stay near the given settings, which are seldom far from good ones.
NEAR = 0.25

# What a trial reports of an epoch.
OBJECTIVE, EPOCH, PROBLEM = "objective", "epoch", "problem"
# Less than any metric of a network that learned something.
WORST = -1.0


@dataclass(frozen=True)
class Tuning:
    """What is asked for.

    Attributes:
        space: settings to look for; those of the run hold for the rest.
        num_trials: settings to try, those of the run among them.
        metric: of the validation part, higher is better.
        cpus, gpus: of each trial; several can share a GPU by a part of it each.
        max_concurrent: trials at a time; 0: as many as the cluster has room for.
        grace: epochs that every trial has before it is first compared.
        seed: of the settings that are drawn.
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
        """With the method's own metric, and a quarter of the epochs as grace, where none are given."""
        metric = metric or get_method(run.method).tuning_metric
        grace = max(1, run.config.epochs // 4) if grace is None else grace
        return cls(space, num_trials, metric, grace=grace, **options)

    def to_plain(self) -> dict[str, Any]:
        """What makes a search what it is, for a file."""
        fields = ("num_trials", "metric", "grace", "seed")
        return {**{name: getattr(self, name) for name in fields}, "space": plain_space(self.space)}


@dataclass(frozen=True)
class Trial:
    """One trial: what it tried, and the best that came of it.

    Attributes:
        number: from 0, the settings as they are.
        settings: of the space.
        score: the best of the metric; None where it never got so far.
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
    """The space of `--search`; without it all that the method declares but what was given."""
    if texts:
        return parse_space(type(config), texts)
    declared = declared_space(type(config))
    return {name: dimension for name, dimension in declared.items() if name not in config.model_fields_set}


def tune(run: Run, tuning: Tuning, folder: Path) -> list[Trial]:
    """Tries settings, going on where an interrupted search stopped; returns the trials, the best one first.

    Leaves trials.json in the folder. Raises `InputError` for what cannot be, before anything starts.
    """
    folder = folder.absolute()
    _check(run, tuning, folder)
    if (folder / "trials.json").exists():
        say(f"{folder} is complete already; nothing to try")
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
        say(f"interrupted; {sum(is_done)} trials are done, and the same command goes on")
        raise KeyboardInterrupt
    trials = [_trial_of(result) for result in sorted(results, key=lambda result: str(result.path))]
    trials.sort(key=lambda trial: WORST if trial.score is None else trial.score, reverse=True)
    if trials[0].score is None:
        raise InputError(f"no trial came to a first {tuning.metric}: {trials[0].problem or 'see TUNE/ray'}")
    text = json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1)
    write_file(folder / "trials.json", text)
    return trials


def _check(run: Run, tuning: Tuning, folder: Path) -> None:
    if tuning.num_trials < 2:
        raise InputError(f"{tuning.num_trials} trials; at least 2 are needed, the first has the settings as they are")
    if not tuning.space:
        raise InputError("there is nothing to look for: every setting with a range is set; give --search KEY=LOW:HIGH")
    if not run.manifest.part("validation"):
        raise InputError("there is no validation part to compare settings by; leave --validation above 0")
    if not 1 <= tuning.grace <= run.config.epochs:
        raise InputError(f"{tuning.grace} epochs of grace; from 1 to epochs={run.config.epochs} are allowed")
    check_gpu_share("--gpus-per-trial", tuning.gpus, is_whole=False)
    if not (math.isfinite(tuning.cpus) and tuning.cpus >= 0 and tuning.cpus + tuning.gpus > 0):
        raise InputError(f"{tuning.cpus:g} CPUs and {tuning.gpus:g} GPUs per trial; one of them must be above 0")
    if tuning.max_concurrent < 0:
        raise InputError(f"--concurrent is {tuning.max_concurrent}; a number of trials, or 0 for no limit, is needed")
    for settings in (_corner(run, tuning.space, high) for high in (False, True)):
        # Whatever a setting may not be is told now, and not by every trial.
        configured(run, settings)
    search = folder / "search.yaml"
    if search.exists():
        there = yaml.safe_load(search.read_text())
        mine = json.loads(json.dumps(tuning.to_plain()))
        if other := [f"{key} was {there.get(key)!r}, is {mine[key]!r}" for key in mine if mine[key] != there.get(key)]:
            raise InputError(f"{folder} holds another search ({'; '.join(other)}); give another --out")
    elif folder.is_dir() and any(folder.iterdir()) and not (folder / "base").is_dir():
        raise InputError(f"{folder} is not empty and holds no search; give another --out")
    check_training(run, folder / "base")


def _corner(run: Run, space: Space, high: bool) -> dict[str, Any]:
    """The first or the last value of each setting."""

    def end(name: str) -> Any:
        dimension = space[name]
        if isinstance(dimension, Choice):
            return dimension.values[-1 if high else 0]
        value = dimension.high if high else dimension.low
        return int(value) if is_whole(type(run.config), name) else float(value)

    return {name: end(name) for name in space}


def configured(run: Run, settings: dict[str, Any]) -> Run:
    """`run` with other settings; `InputError` for those that it cannot have."""
    config = load_config(type(run.config), **{**run.config.model_dump(), **settings})
    return dataclasses.replace(run, config=config)


def best_config(run: Run, trials: Sequence[Trial]) -> str:
    """The YAML of the best trial's settings, for `train --config`; `trials` has the best first."""
    config = configured(run, trials[0].settings).config
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def _tuner(run: Run, tuning: Tuning, folder: Path) -> Any:
    """The search as it stands in the folder, or a new one."""
    # Or Ray Tune would print tables of its own on stdout, in the middle of our JSON.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune
    from ray.tune.search import BasicVariantGenerator

    trainable = ray_tune.with_resources(
        partial(_work, folder=str(folder / "base"), metric=tuning.metric, num_gpus=tuning.gpus),
        {"CPU": tuning.cpus, "GPU": tuning.gpus},
    )
    storage = str(folder / "ray")
    if ray_tune.Tuner.can_restore(storage):
        return ray_tune.Tuner.restore(storage, trainable)
    points = _points(run, tuning)
    return ray_tune.Tuner(
        trainable,
        param_space={name: _domain(type(run.config), name, tuning.space) for name in tuning.space},
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
    # Its id ends in its number.
    return f"trial_{trial.trial_id.rpartition('_')[2]}"


def _points(run: Run, tuning: Tuning) -> list[dict[str, Any]]:
    """The settings of each trial: as they are; then, in turn, drawn near them and from all of the space."""
    rng = np.random.default_rng(tuning.seed)
    domains = {name: _domain(type(run.config), name, tuning.space) for name in tuning.space}
    as_is = {name: _plain(getattr(run.config, name)) for name in tuning.space}
    points = [as_is]
    for number in range(1, tuning.num_trials):
        drawn = {name: domain.sample(random_state=rng) for name, domain in domains.items()}
        near = {name: _towards(as_is[name], drawn[name], tuning.space[name], rng) for name in domains}
        points.append(near if number % 2 else drawn)
    return points


def _towards(start: Any, end: Any, dimension: Dimension, rng: np.random.Generator) -> Any:
    """A value `NEAR` of the way from `start` to `end`; of those that have no order, `end` as often as that."""
    if isinstance(dimension, Choice):
        return end if rng.random() < NEAR else start
    is_log = not isinstance(dimension, Linear)
    if start is None or (is_log and start <= 0):
        return end
    value = start * (end / start) ** NEAR if is_log else start + NEAR * (end - start)
    return round(value) if isinstance(end, int) else value


def _domain(config: type[Any], name: str, space: Space) -> Any:
    from ray import tune as ray_tune

    dimension = space[name]
    if isinstance(dimension, Choice):
        return ray_tune.choice([_plain(value) for value in dimension.values])
    is_linear = isinstance(dimension, Linear)
    if is_whole(config, name):
        draw = ray_tune.randint if is_linear else ray_tune.lograndint
        return draw(int(dimension.low), int(dimension.high) + 1)
    return (ray_tune.uniform if is_linear else ray_tune.loguniform)(dimension.low, dimension.high)


def _plain(value: Any) -> Any:
    """As Ray Tune can draw it: it takes a list for a part of the space."""
    return json.dumps(value) if isinstance(value, tuple) else value


def _read_plain(value: Any) -> Any:
    return tuple(json.loads(value)) if isinstance(value, str) and value.startswith("[") else value


def _halving(defaults: dict[str, Any], epochs: int, grace: int) -> Any:
    """ASHA, but for the trial that has the settings as they are."""
    from ray.tune.schedulers import ASHAScheduler, TrialScheduler

    class Halving(ASHAScheduler):  # type: ignore[misc]
        def on_trial_result(self, tune_controller: Any, trial: Any, result: dict[str, Any]) -> str:
            decision = super().on_trial_result(tune_controller, trial, result)
            return str(TrialScheduler.CONTINUE if trial.config == defaults else decision)

    return Halving(time_attr=EPOCH, max_t=epochs, grace_period=grace, reduction_factor=REDUCTION)


def _work(settings: dict[str, Any], folder: str, metric: str, num_gpus: float) -> None:
    """Run one trial; its process has this number of GPUs."""
    device = device_for(num_gpus)
    from ray import tune as ray_tune

    from orbithash.trainers.loop.loop import train

    checkpoint = ray_tune.get_checkpoint()
    try:
        run = configured(open_run(Path(folder)), {name: _read_plain(value) for name, value in settings.items()})
        with checkpoint.as_directory() if checkpoint else nullcontext() as resume_from:
            train(
                run,
                _Reporter(metric),
                resume_from=Path(resume_from) if resume_from else None,
                device=device,
            )
    except InputError as error:
        # Settings that do not go together, or a loss that is not finite: the others go on.
        ray_tune.report({OBJECTIVE: WORST, EPOCH: 1, PROBLEM: str(error)})


class _Reporter:
    """The loop's observer in a trial."""

    def __init__(self, metric: str) -> None:
        self._name = f"validation/{metric}"

    def on_step(self, epoch: int, step: int, num_steps: int, images_per_s: float) -> None:
        """Nobody looks so closely."""

    def on_epoch(self, history: list[dict[str, Any]], write_checkpoint: Callable[[Path], None]) -> None:
        from ray import tune as ray_tune

        record = history[-1]
        if self._name not in record:
            if any(name.startswith("validation/") for name in record):
                there = ", ".join(name.partition("/")[2] for name in record if name.startswith("validation/"))
                raise InputError(
                    f"no metric {self._name.partition('/')[2]!r} of the validation part; there are {there}"
                )
            return
        with TemporaryDirectory() as temporary:
            write_checkpoint(Path(temporary))
            told = {OBJECTIVE: record[self._name], EPOCH: record["epoch"], PROBLEM: ""}
            ray_tune.report(told, checkpoint=ray_tune.Checkpoint.from_directory(temporary))


def _trial_of(result: Any) -> Trial:
    """From what Ray Tune kept of a trial."""
    number = int(Path(result.path).name.rpartition("_")[2])
    settings = {name: _read_plain(value) for name, value in (result.config or {}).items()}
    frame = result.metrics_dataframe
    problem = str(result.error).strip().splitlines()[-1] if result.error else ""
    if frame is None or not len(frame) or OBJECTIVE not in frame:
        return Trial(number, settings, None, 0, 0, problem)
    best = frame.loc[frame[OBJECTIVE].idxmax()]
    if best[OBJECTIVE] == WORST:
        return Trial(number, settings, None, 0, 0, str(best[PROBLEM]))
    return Trial(number, settings, float(best[OBJECTIVE]), int(best[EPOCH]), int(frame[EPOCH].max()), problem)


class _Shown:
    """What the listener tells, which Ray Tune keeps in a file and so may not know of a terminal."""

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
