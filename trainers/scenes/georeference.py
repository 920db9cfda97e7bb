"""The locations of scenes: a spiral of squares around a real place, in the UTM zone of that place."""

import math

from orbithash.trainers.scenes.geometry import EXTENT

__all__ = ["CRS", "PITCH_M", "PLACE", "PLACE_LAT", "PLACE_LON", "gsd_m", "upper_left"]

PLACE = "Almería, Spain"
PLACE_LON, PLACE_LAT = -2.4637, 36.8402
CRS = "EPSG:32630"
"""WGS 84 / UTM zone 30N, which reaches from 6° W to 0°."""

PITCH_M = 200.0
"""Distance between neighbouring scenes; scenes do not overlap."""

_EASTING, _NORTHING = 547_800.0, 4_077_300.0
"""Centre of the spiral in UTM, to the nearest hundred metres."""


def gsd_m(size_px: int) -> float:
    """Return the ground size of a pixel of the colour image in metres; a panchromatic pixel has half of it."""
    return EXTENT / size_px


def upper_left(index: int) -> tuple[float, float]:
    """Return easting and northing in metres of a scene's upper left corner. A million scenes stay within 105 km."""
    column, row = _spiral(index)
    return _EASTING + column * PITCH_M, _NORTHING - row * PITCH_M


def _spiral(index: int) -> tuple[int, int]:
    """Return square number `index` of a spiral from (0, 0); consecutive squares are adjacent."""
    if index == 0:
        return 0, 0
    ring = (math.isqrt(index) + 1) // 2
    side, step = divmod(index - (2 * ring - 1) ** 2, 2 * ring)
    along = step + 1 - ring
    return ((ring, along), (-along, ring), (-ring, -along), (along, -ring))[side]
