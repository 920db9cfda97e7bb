"""Search for settings of a method on Ray Tune: concurrent trials, unpromising ones are stopped early (ASHA).

TUNE/base/         the settings that all trials share and the split, as in a run folder
TUNE/search.yaml   the search space and the options of the search
TUNE/trials/       checkpoint and outcome of each trial
TUNE/ray/          Ray Tune's storage, with the logs of each start of the search
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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.output import say, track
from orbithash.cluster.runtime import check_gpu_share, check_resources, connected
from orbithash.cluster.tuning.sampling import sample_points
from orbithash.cluster.tuning.trials import Outcome, Trial, name_of, read_outcomes
from orbithash.cluster.tuning.worker import NUMBER, WORST, configured, work
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import new_folder, write_file
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

__all__ = ["Tuning", "asked_space", "best_config", "remaining", "tune"]

# Number of times that a trial whose process died is resumed from its last epoch.
MAX_FAILURES = 2


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
    if len(read_outcomes(folder)) < tuning.num_trials:
        _run_trials(run, tuning, folder)
    outcomes = read_outcomes(folder)
    if len(outcomes) < tuning.num_trials:
        # Ray Tune handles the interrupt itself: it ends the trials and returns.
        say(f"interrupted; {len(outcomes)} trials are complete, and the same command resumes")
        raise KeyboardInterrupt
    trials = [outcome.trial() for outcome in outcomes]
    trials.sort(key=lambda trial: WORST if trial.score is None else trial.score, reverse=True)
    if trials[0].score is None:
        raise InputError(f"no trial has a {tuning.metric}: {trials[0].problem or f'see the logs in {folder}/ray'}")
    text = json.dumps([dataclasses.asdict(trial) for trial in trials], indent=1)
    write_file(folder / "trials.json", text)
    return trials


def _run_trials(run: Run, tuning: Tuning, folder: Path) -> None:
    """Run the trials without an outcome; after an interrupt, some still have none."""
    with connected():
        import ray

        check_resources("a trial", [{"CPU": tuning.cpus, "GPU": tuning.gpus}])
        _claim(run, tuning, folder)
        room = int(ray.cluster_resources()["CPU"] // tuning.cpus) if tuning.cpus else tuning.num_trials
        at_a_time = min(room, tuning.num_trials, tuning.max_concurrent or room)
        say(f"{tuning.num_trials} trials of {run.method}, {at_a_time} at a time, compared by {tuning.metric}")
        with track("tuning", tuning.num_trials, "trials") as show:
            _tuner(run, tuning, folder, read_outcomes(folder), show).fit()


def _claim(run: Run, tuning: Tuning, folder: Path) -> None:
    """Write the options of the search, and the run folder that its trials share."""
    try:
        write_file(folder / "search.yaml", yaml.safe_dump(tuning.to_plain(), sort_keys=False))
        # Whole or not at all: a killed search would refuse an incomplete run folder when it is run again.
        if not (folder / "base" / "config.yaml").exists():
            with new_folder(folder / "base") as part:
                claim_folder(run, part)
    except OSError as error:
        raise InputError(f"{folder}: cannot be written ({error.strerror}); give another --out") from error


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
    elif folder.is_dir() and any(not path.name.startswith(".search.yaml.") for path in folder.iterdir()):
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


def remaining(tuning: Tuning, outcomes: Sequence[Outcome]) -> list[int]:
    """Return the numbers of the trials without an outcome."""
    ended = {outcome.number for outcome in outcomes}
    return [number for number in range(tuning.num_trials) if number not in ended]


def _tuner(
    run: Run, tuning: Tuning, folder: Path, outcomes: Sequence[Outcome], show: Callable[[int, str], None]
) -> Any:
    """Return the Ray Tune run of the trials without an outcome."""
    # Otherwise Ray Tune prints tables on stdout, which carries the JSON of the command.
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    from ray import tune as ray_tune

    from orbithash.cluster.tuning.scheduling import Halving, Listener

    points = sample_points(run.config, tuning.space, tuning.num_trials, tuning.seed)
    trainable = ray_tune.with_resources(
        partial(work, folder=str(folder), points=points, metric=tuning.metric, num_gpus=tuning.gpus),
        {"CPU": tuning.cpus, "GPU": tuning.gpus},
    )
    return ray_tune.Tuner(
        trainable,
        param_space={NUMBER: ray_tune.grid_search(remaining(tuning, outcomes))},
        tune_config=ray_tune.TuneConfig(
            scheduler=Halving(run.config.epochs, tuning.grace, outcomes),
            max_concurrent_trials=tuning.max_concurrent or None,
            trial_dirname_creator=lambda trial: name_of(trial.config[NUMBER]),
        ),
        # Without a name: each start has a folder of its own.
        run_config=ray_tune.RunConfig(
            storage_path=str(folder / "ray"),
            verbose=0,
            callbacks=[Listener(folder, points, outcomes, show)],
            failure_config=ray_tune.FailureConfig(max_failures=MAX_FAILURES),
        ),
    )
