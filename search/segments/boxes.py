"""Bounding boxes of the rows of a segment, from footprints (WKB) and centres."""

# ruff: noqa: ANN001, ANN202 (numba derives the types of kernels)
from contextlib import suppress

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.compiled import Kernel, read_only

__all__ = ["Boxes", "boxes_of", "points_of", "read_outlines"]

Boxes = npt.NDArray[np.float32]

_EVERYWHERE = np.array([[-np.inf], [-np.inf], [np.inf], [np.inf]])


def boxes_of(footprints: pa.Array, lons: pa.Array, lats: pa.Array) -> Boxes | None:
    """Return the boxes of rows, float32 [4, N], see `Columns.boxes`; None if no row has a footprint."""
    if footprints.null_count == len(footprints):
        return None
    bounds, is_simple = _simple_bounds(footprints)
    others = np.flatnonzero(~is_simple & footprints.is_valid().to_numpy(zero_copy_only=False))
    has_outline = is_simple
    if len(others):
        bounds[:, others], has_outline[others] = _any_bounds(footprints.take(pa.array(others)))
    if has_outline.all():
        return _rounded_outwards(bounds)
    boxes = points_of(lons, lats)
    boxes[:, has_outline] = _rounded_outwards(bounds[:, has_outline])
    return boxes


def points_of(lons: pa.Array, lats: pa.Array) -> Boxes:
    """Return the boxes of rows without footprints: their centres; NaN where one coordinate is not known."""
    lon, lat = (pc.fill_null(axis, np.nan).to_numpy() for axis in (lons, lats))
    is_unknown = np.isnan(lon) | np.isnan(lat)
    boxes = _rounded_outwards(np.stack([lon, lat, lon, lat]))
    boxes[:, is_unknown] = np.nan
    return boxes


def read_outlines(footprints: npt.NDArray[np.object_]) -> npt.NDArray[np.object_]:
    """Return geometries from WKB [N]; None where it is missing, damaged, or of a kind that shapely does not read."""
    import shapely

    # Coordinates that are not finite are no reason to warn.
    with np.errstate(invalid="ignore"):
        try:
            outlines: npt.NDArray[np.object_] = shapely.from_wkb(footprints, on_invalid="ignore")
        except NotImplementedError:
            # Curves raise it whatever `on_invalid` is.
            outlines = np.full(len(footprints), None, object)
            for row, footprint in enumerate(footprints):
                with suppress(NotImplementedError):
                    outlines[row] = shapely.from_wkb(footprint, on_invalid="ignore")
    return outlines


def _any_bounds(footprints: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return the bounds of footprints of any kind, float64 [4, N], and which of them are outlines that can be read."""
    import shapely

    outlines = read_outlines(footprints.to_numpy(zero_copy_only=False))
    points, rows = shapely.get_coordinates(outlines, return_index=True)
    # An outline without points, or with one that is not finite, can be anywhere.
    bounds = _EVERYWHERE.repeat(len(outlines), axis=1)
    if len(points):
        starts = np.flatnonzero(np.diff(rows, prepend=-1))
        lowest, highest = np.minimum.reduceat(points, starts), np.maximum.reduceat(points, starts)
        is_finite = np.isfinite(lowest).all(axis=1) & np.isfinite(highest).all(axis=1)
        bounds[:, rows[starts][is_finite]] = np.concatenate([lowest, highest], axis=1)[is_finite].T
    return bounds, ~shapely.is_missing(outlines)


def _simple_bounds(footprints: pa.Array) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.bool_]]:
    """Return bounds float64 [4, N] of the footprints that are simple, and which are; shapely takes 20 times as long."""
    _, offsets, data = footprints.buffers()
    bounds = np.empty((4, len(footprints)))
    is_simple = np.zeros(len(footprints), np.bool_)
    _bound_simple(
        read_only(np.frombuffer(offsets, np.int64)[footprints.offset :][: len(footprints) + 1]),
        read_only(np.frombuffer(data or b"", np.uint8)),
        bounds,
        is_simple,
    )
    return bounds, is_simple & footprints.is_valid().to_numpy(zero_copy_only=False)


@numba.njit(nogil=True)
def _integer(data, place):  # type: ignore[no-untyped-def]
    """Return the little-endian uint32 at a place."""
    value = np.int64(0)
    for byte in range(4):
        value |= np.int64(data[place + byte]) << (8 * byte)
    return value


@Kernel
def _bound_simple(offsets, data, bounds, is_simple):  # type: ignore[no-untyped-def]
    """Write the bounds of polygons and multipolygons in little-endian WKB with two coordinates a point.

    A footprint is simple if it is one of these, is as long as its numbers of points say, has finite coordinates, and
    each ring has at least four points and ends where it begins. GEOS reads all of these.
    """
    scratch = np.empty(1, np.uint64)
    number = scratch.view(np.float64)
    for row in range(len(is_simple)):
        place, stop = offsets[row], offsets[row + 1]
        if stop - place < 9 or data[place] != 1:
            continue
        kind, num_polygons = _integer(data, place + 1), 1
        if kind == 6:
            num_polygons = _integer(data, place + 5)
            place += 9
        is_read = num_polygons > 0 and (kind in (3, 6))
        west = south = np.inf
        east = north = -np.inf
        for _ in range(num_polygons):
            if not is_read or stop - place < 9 or data[place] != 1 or _integer(data, place + 1) != 3:
                is_read = False
                break
            num_rings = _integer(data, place + 5)
            place += 9
            is_read = num_rings > 0
            for _ in range(num_rings):
                if not is_read or stop - place < 4:
                    is_read = False
                    break
                num_points = _integer(data, place)
                place += 4
                if num_points < 4 or (stop - place) // 16 < num_points:
                    is_read = False
                    break
                for byte in range(16):
                    is_read = is_read and data[place + byte] == data[place + 16 * (num_points - 1) + byte]
                for _ in range(num_points):
                    for axis in range(2):
                        word = np.uint64(0)
                        for byte in range(8):
                            word |= np.uint64(data[place + byte]) << np.uint64(8 * byte)
                        scratch[0] = word
                        value = number[0]
                        is_read = is_read and np.isfinite(value)
                        if axis == 0:
                            west, east = min(west, value), max(east, value)
                        else:
                            south, north = min(south, value), max(north, value)
                        place += 8
        if is_read and place == stop:
            is_simple[row] = True
            bounds[0, row], bounds[1, row], bounds[2, row], bounds[3, row] = west, south, east, north


def _rounded_outwards(bounds: npt.NDArray[np.float64]) -> Boxes:
    """Return float32 boxes that contain the boxes float64 [4, N]."""
    # Beyond the range of float32 is infinity, which contains everything.
    with np.errstate(over="ignore"):
        boxes = bounds.astype(np.float32)
    low, high = boxes[:2], boxes[2:]
    np.copyto(low, np.nextafter(low, np.float32(-np.inf)), where=low > bounds[:2])
    np.copyto(high, np.nextafter(high, np.float32(np.inf)), where=high < bounds[2:])
    return boxes
