"""The options of a search for settings, and the checks before it starts."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from orbithash.cluster.runtime import check_gpu_share
from orbithash.cluster.tuning.worker import configured
from orbithash.encoders.errors import InputError
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.locks import LOCK
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import check_training
from orbithash.trainers.methods import get_method
from orbithash.trainers.search_space import (
    Choice,
    Dimension,
    Space,
    conditions,
    declared_space,
    is_whole,
    parse_space,
    plain_space,
)

__all__ = ["Tuning", "asked_space", "check_tuning"]

# Default of the number of finalists.
NUM_FINALISTS = 3


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
        num_finalists: number of settings in the finals besides the given ones; 0: no finals.
        num_seeds: number of runs of each of them.
    """

    space: Space
    num_trials: int
    metric: str
    cpus: float = 1
    gpus: float = 0
    max_concurrent: int = 0
    grace: int = 1
    seed: int = 0
    num_finalists: int = 0
    num_seeds: int = 1

    @classmethod
    def of(
        cls,
        run: Run,
        space: Space,
        num_trials: int,
        metric: str | None,
        grace: int | None,
        num_finalists: int | None,
        **options: Any,
    ) -> "Tuning":
        """Return the options; defaults are the method's metric, a quarter of the epochs as grace, three finalists."""
        metric = metric or get_method(run.method).tuning_metric
        grace = max(1, run.config.epochs // 4) if grace is None else grace
        num_finalists = min(NUM_FINALISTS, num_trials - 1) if num_finalists is None else num_finalists
        return cls(space, num_trials, metric, grace=grace, num_finalists=num_finalists, **options)

    def to_plain(self) -> dict[str, Any]:
        """Return the options that decide which trials run, for search.yaml; resources do not."""
        fields = ("num_trials", "metric", "grace", "seed", "num_finalists", "num_seeds")
        return {**{name: getattr(self, name) for name in fields}, "space": plain_space(self.space)}


def asked_space(config: TrainConfig, texts: Sequence[str] | None) -> dict[str, Dimension]:
    """Return the search space: that of `--search`, else all declared ranges of settings that are not given.

    Settings without effect in every trial are refused in the first case and left out in the second.
    """
    if texts:
        space = parse_space(type(config), texts)
        for name in space:
            if not _can_be_active(config, name, space):
                when = conditions(config, name)[0]
                raise InputError(
                    f"--search {name}: it has no effect with {when.name}={getattr(config, when.name)}; set {when.name} "
                    f"to {' or '.join(map(str, when.values))}, or leave {name} out"
                )
        return space
    declared = declared_space(type(config))
    space = {name: dimension for name, dimension in declared.items() if name not in config.model_fields_set}
    return {name: dimension for name, dimension in space.items() if _can_be_active(config, name, space)}


def _can_be_active(config: TrainConfig, name: str, space: Space) -> bool:
    """Return whether a setting of the space has an effect in some trial."""

    def allowed(parent: str) -> tuple[Any, ...]:
        dimension = space.get(parent)
        return (getattr(config, parent), *(dimension.values if isinstance(dimension, Choice) else ()))

    return all(set(allowed(when.name)) & set(when.values) for when in conditions(config, name))


def check_tuning(run: Run, tuning: Tuning, folder: Path) -> None:
    """Raise `InputError` for wrong options, or if `folder` holds something else than this search."""
    if tuning.num_trials < 2:
        raise InputError(
            f"--trials is {tuning.num_trials}; at least 2 are needed, because the first uses the settings as given"
        )
    if not 0 <= tuning.num_finalists < tuning.num_trials:
        raise InputError(
            f"--finalists is {tuning.num_finalists}; from 0 (no finals) to {tuning.num_trials - 1} are allowed, the "
            "trials besides the one with the settings as given"
        )
    if tuning.num_seeds < 1:
        raise InputError(f"--seeds is {tuning.num_seeds}; a number of runs of each finalist, 1 or more, is needed")
    if tuning.seed < 0:
        raise InputError(f"--seed is {tuning.seed}; a seed of the sampled settings, 0 or more, is needed")
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
    elif folder.is_dir() and any(not path.name.startswith((".search.yaml.", LOCK)) for path in folder.iterdir()):
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
