"""The land-use classes of scenes and the function that draws each."""

from collections.abc import Callable

import numpy as np

from orbithash.trainers.scenes.canvas import Canvas
from orbithash.trainers.scenes.facts import Facts
from orbithash.trainers.scenes.landuse.built import (
    draw_dense_residential,
    draw_solar_farm,
    draw_sparse_residential,
    draw_storage_tanks,
)
from orbithash.trainers.scenes.landuse.fields import draw_circular_farmland, draw_farmland
from orbithash.trainers.scenes.landuse.harbor import draw_harbor
from orbithash.trainers.scenes.landuse.leisure import draw_golf_course, draw_running_track, draw_tennis_courts
from orbithash.trainers.scenes.landuse.nature import draw_beach, draw_desert, draw_forest, draw_river
from orbithash.trainers.scenes.landuse.transport import (
    draw_airport,
    draw_motorway,
    draw_parking_lot,
    draw_railway_yard,
)

__all__ = ["CLASSES", "WITHOUT_SNOW", "Draw"]

Draw = Callable[[Canvas, np.random.Generator], Facts]
"""A function that draws one land use over the whole canvas and returns the facts of the scene."""

CLASSES: dict[str, Draw] = {
    "airport": draw_airport,
    "beach": draw_beach,
    "circular_farmland": draw_circular_farmland,
    "dense_residential": draw_dense_residential,
    "desert": draw_desert,
    "farmland": draw_farmland,
    "forest": draw_forest,
    "golf_course": draw_golf_course,
    "harbor": draw_harbor,
    "motorway": draw_motorway,
    "parking_lot": draw_parking_lot,
    "railway_yard": draw_railway_yard,
    "river": draw_river,
    "running_track": draw_running_track,
    "solar_farm": draw_solar_farm,
    "sparse_residential": draw_sparse_residential,
    "storage_tanks": draw_storage_tanks,
    "tennis_courts": draw_tennis_courts,
}
"""Drawing function by class name. Scene i shows class i modulo the number of classes, in this order."""

WITHOUT_SNOW = frozenset(
    {"beach", "circular_farmland", "desert", "golf_course", "harbor", "solar_farm", "tennis_courts"}
)
"""Classes that are never drawn with snow."""
