"""A scene and how it is drawn from its number: class, facts, acquisition time and both images."""

from dataclasses import dataclass
from datetime import datetime

import numpy as np
from numpy.typing import NDArray

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.classes import CLASSES, WITHOUT_SNOW
from orbithash.trainers.scenes.facts import Facts
from orbithash.trainers.scenes.georeference import PLACE_LAT, PLACE_LON
from orbithash.trainers.scenes.moment import SEASONS, Light, Season, light_at, random_moment
from orbithash.trainers.scenes.sensors import photograph

__all__ = ["Scene", "draw_scene"]


@dataclass(frozen=True)
class Scene:
    """A drawn scene.

    Args:
        index: number of the scene, from 0.
        label: name of the land-use class.
        season: season in which the scene was acquired.
        taken: acquisition time in UTC.
        light: position of the sun at the acquisition time.
        facts: object counts, colours and directions that captions can state.
        color: uint8 [S, S, 3], RGB.
        panchromatic: uint8 [2 S, 2 S].
    """

    index: int
    label: str
    season: Season
    taken: datetime
    light: Light
    facts: Facts
    color: NDArray[np.uint8]
    panchromatic: NDArray[np.uint8]


def draw_scene(index: int, seed: int, size_px: int) -> Scene:
    """Draw scene number `index` of a seed. It depends on nothing but the arguments."""
    rng = np.random.default_rng([seed, index])
    label = list(CLASSES)[index % len(CLASSES)]
    seasons = [season for season in SEASONS.values() if not (season.snow and label in WITHOUT_SNOW)]
    season = seasons[rng.integers(len(seasons))]
    taken = random_moment(season, rng)
    light = light_at(taken, PLACE_LON, PLACE_LAT)
    canvas = Canvas(size_px, season, light, rng)
    facts = CLASSES[label](canvas, rng)
    color, panchromatic = photograph(canvas)
    return Scene(index, label, season, taken, light, facts, color, panchromatic)
