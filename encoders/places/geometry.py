"""Geometries of rows, their boxes, and their order along the Hilbert curve."""

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = [
    "NO_PLACE",
    "Geometries",
    "geometries_of",
    "hilbert_positions",
    "is_nested_deeply",
    "item_bbox",
    "table_geometries",
]

# Hilbert position of rows without a place: after all others.
NO_PLACE = 2**32

# Collections within collections. GEOS and the JSON modules read them by recursion, and crash where there are too many.
MAX_COLLECTIONS = 32
# Bytes of a collection of one element before its element.
_HEADER = 9
# The headers of a geometry collection in WKB: little and big endian; ISO (Z, M, ZM) and extended.
_COLLECTION = re.compile(
    rb"\x01(?:\x07\x00|\xef\x03|\xd7\x07|\xbf\x0b)\x00[\x00-\xff]|\x00[\x00-\xff]\x00(?:\x00\x07|\x03\xef|\x07\xd7|\x0b\xbf)",
    re.DOTALL,
)

_ORDER = 16


class Geometries(NamedTuple):
    """The geometries of N rows.

    Attributes:
        shapes: object [N], shapely geometries in longitude and latitude; None without a place.
        wkb: WKB of the shapes, 2D; the bytes of the footprint where they can be kept.
        keeps_footprint: bool [N], where the WKB is the footprint, byte for byte.
        num_unusable: number of rows whose footprint is no valid outline; their geometry is their point.
    """

    shapes: npt.NDArray[Any]
    wkb: list[bytes | None]
    keeps_footprint: npt.NDArray[np.bool_]
    num_unusable: int


def geometries_of(footprints: Sequence[bytes | None], lon: npt.NDArray[Any], lat: npt.NDArray[Any]) -> Geometries:
    """Return the geometry of each row: its footprint (WKB) if that is a valid outline, else its point, else None.

    Args:
        footprints: N outlines as WKB; None: unknown.
        lon: degrees east of the centres, float64 [N]; NaN: unknown.
        lat: degrees north of the centres, float64 [N]; NaN: unknown.
    """
    import shapely

    readable = [None if one is None or is_nested_deeply(one) else one for one in footprints]
    shapes = shapely.from_wkb(np.array(readable, object), on_invalid="ignore")
    shapes[shapely.is_empty(shapes)] = None
    coordinates, rows = shapely.get_coordinates(shapes, return_index=True)
    shapes[rows[~np.isfinite(coordinates).all(axis=1)]] = None
    is_outline = ~shapely.is_missing(shapes)
    num_unusable = sum(one is not None for one in footprints) - int(is_outline.sum())
    # Other programs expect two dimensions and no identifier of a coordinate system.
    is_plain = ~(shapely.has_z(shapes) | shapely.has_m(shapes)) & (shapely.get_srid(shapes) <= 0)
    keeps = is_outline & is_plain
    shapes[is_outline & ~is_plain] = shapely.set_srid(shapely.force_2d(shapes[is_outline & ~is_plain]), 0)
    is_point = ~is_outline & np.isfinite(lon) & np.isfinite(lat)
    shapes[is_point] = shapely.points(lon[is_point], lat[is_point])
    wkb = shapely.to_wkb(shapes).tolist()
    for row in np.flatnonzero(keeps).tolist():
        wkb[row] = footprints[row]
    return Geometries(shapes, wkb, keeps, num_unusable)


def table_geometries(rows: Any) -> Geometries:
    """Return the geometries of an Arrow table with the columns `footprint`, `lon` and `lat`."""
    return geometries_of(rows["footprint"].to_pylist(), rows["lon"].to_numpy(), rows["lat"].to_numpy())


def is_nested_deeply(wkb: bytes) -> bool:
    """Return whether more collections are nested in a geometry than other programs can read."""
    return len(wkb) > _HEADER * MAX_COLLECTIONS and len(_COLLECTION.findall(wkb)) > MAX_COLLECTIONS


def item_bbox(shape: Any) -> list[float]:
    """Return [west, south, east, north] of a geometry, as RFC 7946 asks: west > east if it crosses 180 degrees."""
    import shapely

    west, south, east, north = (float(value) for value in shape.bounds)
    if (west, east) == (-180, 180):
        bounds = shapely.bounds(shapely.get_parts(shape))
        is_eastern = bounds[:, 0] > 0
        # Only parts on both sides of the antimeridian, which touch it, and nothing between them.
        if is_eastern.any() and (bounds[~is_eastern, 2] < 0).all() and not is_eastern.all():
            west, east = float(bounds[is_eastern, 0].min()), float(bounds[~is_eastern, 2].max())
    return [west, south, east, north]


def hilbert_positions(lon: npt.NDArray[Any], lat: npt.NDArray[Any]) -> npt.NDArray[np.uint64]:
    """Return the positions, uint64 [N], of places along a Hilbert curve of 2^16 x 2^16 cells over the Earth.

    A place that is not finite has the position `NO_PLACE`.
    """
    is_known = np.isfinite(lon) & np.isfinite(lat)
    side = 1 << _ORDER

    def cells(degrees: npt.NDArray[Any], half: float) -> npt.NDArray[np.int64]:
        share = (np.where(is_known, degrees, 0.0) + half) / (2 * half)
        return np.clip(np.floor(share * side), 0, side - 1).astype(np.int64)

    x, y = cells(lon, 180.0), cells(lat, 90.0)
    positions = np.zeros(len(x), np.int64)
    step = side >> 1
    while step:
        right, upper = (x & step) > 0, (y & step) > 0
        positions += step * step * ((3 * right) ^ upper)
        # Turn the quadrant, so that the curve continues where it enters the next one.
        is_flipped = ~upper & right
        x, y = np.where(is_flipped, side - 1 - x, x), np.where(is_flipped, side - 1 - y, y)
        x, y = np.where(upper, x, y), np.where(upper, y, x)
        step >>= 1
    return np.where(is_known, positions, NO_PLACE).astype(np.uint64)
