"""Sample the settings of the trials of a search."""

import json
from typing import Any

import numpy as np

from orbithash.trainers.config import TrainConfig
from orbithash.trainers.search_space import Choice, Dimension, Linear, Space, is_whole

__all__ = ["sample_points"]

# Distance of a trial near the given settings, as a fraction of the distance to a sampled point. Good settings are
# usually not far from the given ones.
NEAR = 0.25


def sample_points(config: TrainConfig, space: Space, num_trials: int, seed: int) -> list[dict[str, Any]]:
    """Return the settings of each trial: as given; then alternately near these and sampled from the whole space."""
    rng = np.random.default_rng(seed)
    domains = {name: _domain(type(config), name, space) for name in space}
    given = {name: _plain(getattr(config, name)) for name in space}
    points = [given]
    for number in range(1, num_trials):
        sampled = {name: each.sample(random_state=rng) for name, each in domains.items()}
        near = {name: _towards(given[name], sampled[name], space[name], rng) for name in domains}
        points.append(near if number % 2 else sampled)
    return [_read(point) for point in points]


def _towards(start: Any, end: Any, dimension: Dimension, rng: np.random.Generator) -> Any:
    """Return the value at the fraction `NEAR` from `start` to `end`; without an order, `end` with this probability."""
    if isinstance(dimension, Choice):
        return end if rng.random() < NEAR else start
    is_log = not isinstance(dimension, Linear)
    if start is None or (is_log and start <= 0):
        return end
    value = start * (end / start) ** NEAR if is_log else start + NEAR * (end - start)
    return round(value) if isinstance(end, int) else value


def _domain(config: type[Any], name: str, space: Space) -> Any:
    """Return the domain of a setting as Ray Tune samples it; whole numbers for a setting of whole numbers."""
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
    """Return a value that Ray Tune can sample: it would read a list as a part of the space."""
    return json.dumps(value) if isinstance(value, tuple) else value


def _read(point: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of a trial from values that Ray Tune has sampled."""

    def read(value: Any) -> Any:
        return tuple(json.loads(value)) if isinstance(value, str) and value.startswith("[") else value

    return {name: read(value) for name, value in point.items()}
