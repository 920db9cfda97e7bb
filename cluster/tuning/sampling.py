"""Sample the settings of the trials of a search: near the given settings and at random first, then by Optuna's TPE."""

import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from orbithash.cluster.tuning.trials import Record
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.search_space import Choice, Dimension, Log, Space, conditions, is_active, is_whole

if TYPE_CHECKING:
    import optuna

__all__ = ["sample_settings"]

# Number of trials before TPE samples: the one with the given settings, then alternately near these and at random.
# Fewer would leave TPE without a good region, and most searches have 16 trials.
NUM_FIRST = 8

# Distance of a trial near the given settings, as a fraction of the distance to a sampled point. Good settings are
# usually not far from the given ones.
NEAR = 0.25


def sample_settings(
    config: TrainConfig, space: Space, number: int, seed: int, records: Sequence[Record]
) -> dict[str, Any]:
    """Return the settings of a trial, a value for each name of the space.

    The result depends on the arguments only, so that a resumed search samples what an uninterrupted one samples. A
    setting without effect, because of the value of another one, keeps its given value.

    Args:
        config: the given settings, those of trial 0.
        space: settings to vary.
        number: number of the trial.
        seed: seed of the search.
        records: other trials that were started. Those that have not ended count as poor, so that trials side by side do
            not all sample the same region.
    """
    import optuna

    if number == 0:
        return {name: getattr(config, name) for name in space}
    rng = np.random.default_rng((seed, number))
    sampler_seed = int(rng.integers(2**31))
    others = [record for record in records if record.number != number]
    if number < NUM_FIRST:
        sampler: optuna.samplers.BaseSampler = optuna.samplers.RandomSampler(seed=sampler_seed)
    else:
        sampler = _tpe(sampler_seed)
    # The default is a line per study on stderr.
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=sampler, direction="maximize")
    for record in others:
        study.add_trial(_told(config, space, record))
    is_near = number < NUM_FIRST and number % 2 == 1
    return _draw(config, space, study.ask(), lambda name, end: _near(config, space, name, end, rng) if is_near else end)


def _tpe(seed: int) -> "optuna.samplers.TPESampler":
    import optuna

    with warnings.catch_warnings():
        # `group` is marked as experimental. It is what makes multivariate sampling work with settings that are not part
        # of every trial.
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        return optuna.samplers.TPESampler(
            n_startup_trials=1, multivariate=True, group=True, constant_liar=True, seed=seed
        )


def _draw(config: TrainConfig, space: Space, trial: "optuna.Trial", moved: Callable[[str, Any], Any]) -> dict[str, Any]:
    """Return settings suggested by Optuna and changed by `moved`, in the order in which they depend on each other."""
    settings = {name: getattr(config, name) for name in space}
    for name in sorted(space, key=lambda name: bool(conditions(config, name))):
        dimension = space[name]
        if not is_active(config, name, settings):
            continue
        if isinstance(dimension, Choice):
            # By place: Optuna's categories cannot be tuples.
            value = dimension.values[trial.suggest_categorical(name, range(len(dimension.values)))]
        elif is_whole(type(config), name):
            value = trial.suggest_int(name, int(dimension.low), int(dimension.high), log=_is_log(dimension))
        else:
            value = trial.suggest_float(name, dimension.low, dimension.high, log=_is_log(dimension))
        settings[name] = moved(name, value)
    return settings


def _near(config: TrainConfig, space: Space, name: str, end: Any, rng: np.random.Generator) -> Any:
    """Return the value at the fraction `NEAR` from the given value to `end`; without an order, one of the two."""
    start, dimension = getattr(config, name), space[name]
    if isinstance(dimension, Choice):
        return end if rng.random() < NEAR else start
    if start is None or (_is_log(dimension) and start <= 0):
        return end
    value = start * (end / start) ** NEAR if _is_log(dimension) else start + NEAR * (end - start)
    return round(value) if isinstance(end, int) else value


def _told(config: TrainConfig, space: Space, record: Record) -> "optuna.trial.FrozenTrial":
    """Return a trial as Optuna reads it; values outside of their range, such as given ones, are left out.

    A trial that was stopped early has the state PRUNED, which TPE ranks by epoch and score below all complete trials. A
    trial that ended with an error has the state FAIL, which TPE ignores.
    """
    import optuna

    values = {
        name: _told_value(space[name], value)
        for name, value in record.settings.items()
        if name in space and is_active(config, name, record.settings)
    }
    params = {name: value for name, value in values.items() if value is not None}
    trial = record.trial()
    states = optuna.trial.TrialState
    num_epochs = min(config.epochs, record.settings.get("epochs", config.epochs))
    if not record.is_ended:
        state = states.RUNNING
    elif record.problem or trial.score is None:
        state = states.FAIL
    else:
        state = states.PRUNED if trial.epochs < num_epochs else states.COMPLETE
    return optuna.trial.create_trial(
        state=state,
        params=params,
        distributions={name: _distribution(config, name, space[name]) for name in params},
        value=trial.score if state in (states.COMPLETE, states.PRUNED) else None,
        intermediate_values=dict(record.scores),
    )


def _told_value(dimension: Dimension, value: Any) -> Any:
    """Return a value as Optuna suggests it: the place of a choice; None if it is outside of the range."""
    if isinstance(dimension, Choice):
        # Records are JSON, which has no tuples.
        value = tuple(value) if isinstance(value, list) else value
        return dimension.values.index(value) if value in dimension.values else None
    return value if value is not None and dimension.low <= value <= dimension.high else None


def _distribution(config: TrainConfig, name: str, dimension: Dimension) -> "optuna.distributions.BaseDistribution":
    """Return the distribution from which `_draw` suggests a value."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(dimension, Choice):
        return CategoricalDistribution(range(len(dimension.values)))
    if is_whole(type(config), name):
        return IntDistribution(int(dimension.low), int(dimension.high), log=_is_log(dimension))
    return FloatDistribution(dimension.low, dimension.high, log=_is_log(dimension))


def _is_log(dimension: Dimension) -> bool:
    return isinstance(dimension, Log)
