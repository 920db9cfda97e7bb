"""The locations of scenes: squares along a spiral around a real place, in the UTM zone of that place."""

import math

from orbithash.trainers.scenes.geometry import EXTENT

__all__ = ["CRS", "PITCH_M", "PLACE", "PLACE_LAT", "PLACE_LON", "gsd_m", "upper_left"]

PLACE = "Almería, Spain"
PLACE_LON, PLACE_LAT = -2.4637, 36.8402
CRS = "EPSG:32630"
"""WGS 84 / UTM zone 30N, which extends from 6° W to 0°."""

PITCH_M = 200.0
"""Distance in metres between the corners of neighbouring scenes, more than their side: scenes do not overlap."""

_EASTING, _NORTHING = 547_800.0, 4_077_300.0
"""Centre of the spiral in UTM coordinates, rounded to 100 m."""


def gsd_m(size_px: int) -> float:
    """Return the ground sampling distance of the RGB image in metres; that of the panchromatic image is half of it."""
    return EXTENT / size_px


def upper_left(index: int) -> tuple[float, float]:
    """Return the easting and northing in metres of the upper left corner of a scene.

    A million scenes lie within 105 km of the centre of the spiral in each direction.
    """
    column, row = _spiral(index)
    return _EASTING + column * PITCH_M, _NORTHING - row * PITCH_M


def _spiral(index: int) -> tuple[int, int]:
    """Return column and row of square number `index` of a spiral from (0, 0); consecutive squares are adjacent."""
    if index == 0:
        return 0, 0
    ring = (math.isqrt(index) + 1) // 2
    side, step = divmod(index - (2 * ring - 1) ** 2, 2 * ring)
    along = step + 1 - ring
    return ((ring, along), (-along, ring), (-ring, -along), (along, -ring))[side]
