"""Conditions on the place of a row: whether its outline meets an area, lies within it or apart from it.

The box of each outline is compared with those of the parts of the area first; outlines are read only for the rows that
this leaves. A row without an outline is a point at its centre; so is a row whose outline cannot be read.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.search.segments.chunks import read_outlines
from orbithash.search.segments.filters.conditions import EXPENSIVE, FilterColumns, Mask, Test, Truth, part_of
from orbithash.search.segments.stop import Stop

__all__ = ["AreaCondition", "Relation"]

Relation = Literal["intersects", "within", "disjoint"]

# An area of more parts than this is divided at the meridian of Greenwich, which holds those at 180 degrees apart, too.
_MAX_BOXES = 16

# Outlines that are read at a time, in about half a millisecond: shapely holds the interpreter's lock meanwhile.
_MAX_READ = 1024


class AreaCondition:
    """The relation of the outline of a row to an area."""

    cost = EXPENSIVE

    def __init__(self, relation: Relation, area: Any) -> None:
        """`area`: a normalized shapely geometry."""
        import shapely

        self._relation = relation
        self._boxes = _boxes_of(area)
        # Each test prepares a geometry of its own: a prepared one builds its index while it is used, by one thread.
        self._wkb = shapely.to_wkb(area)

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""
        import shapely

        area = shapely.from_wkb(self._wkb)
        shapely.prepare(area)
        arrays = [columns.array(name) for name in ("footprint", "lon", "lat")]
        boxes = columns.boxes()

        def test(begin: int, end: int, among: Mask | None) -> Truth:
            footprint, *centres = (part_of(array, begin, end) for array in arrays)
            if boxes is None:
                west, south = east, north = [axis.to_numpy(zero_copy_only=False) for axis in centres]
            else:
                west, south, east, north = boxes[:, begin:end]
            is_candidate = self._meets(west, south, east, north)
            has_place = ~np.isnan(west + south)
            if not has_place.all():
                is_candidate |= ~has_place & footprint.is_valid().to_numpy(zero_copy_only=False)
            if among is not None:
                is_candidate &= among
            yes = np.zeros(end - begin, np.bool_)
            candidates = np.flatnonzero(is_candidate)
            for first in range(0, len(candidates), _MAX_READ):
                stop.check()
                rows = candidates[first : first + _MAX_READ]
                picked = pa.array(rows)
                values = (array.take(picked).to_numpy(zero_copy_only=False) for array in (footprint, *centres))
                yes[rows], has_place[rows] = self._compare(area, *values)
            truth = Truth(yes, has_place & ~yes)
            return truth.inverted() if self._relation == "disjoint" else truth

        return test

    def _meets(self, west: Any, south: Any, east: Any, north: Any) -> Mask:
        """Return which boxes of rows meet a box of the area."""
        meets = np.zeros(len(west), np.bool_)
        for w, s, e, n in self._boxes:
            meets |= (west <= e) & (east >= w) & (south <= n) & (north >= s)
        return meets

    def _compare(self, area: Any, wkb: Any, lon: Any, lat: Any) -> tuple[Mask, Mask]:
        """Return which outlines meet the area, or lie within it, and which rows have an outline or a centre."""
        import shapely

        # Coordinates that are not finite are no reason to warn.
        with np.errstate(all="ignore"):
            outlines = read_outlines(wkb)
            _put_centres(outlines, lon, lat)
            try:
                passes = self._relate(area, outlines)
            except shapely.errors.GEOSException:
                # At least one of them cannot be compared: it has coordinates that are not finite.
                for row, outline in enumerate(outlines):
                    try:
                        self._relate(area, outline)
                    except shapely.errors.GEOSException:
                        outlines[row] = None
                _put_centres(outlines, lon, lat)
                passes = self._relate(area, outlines)
        return passes, ~shapely.is_missing(outlines)

    def _relate(self, area: Any, outlines: Any) -> Any:
        import shapely

        if self._relation == "within":
            return shapely.contains_properly(area, outlines) | shapely.covers(area, outlines)
        return shapely.intersects(area, outlines)


def _put_centres(outlines: Any, lon: Any, lat: Any) -> None:
    """Put the centre of a row in the place of a missing outline, where both coordinates are known."""
    import shapely

    at_centre = shapely.is_missing(outlines) & ~np.isnan(lon) & ~np.isnan(lat)
    outlines[at_centre] = shapely.points(lon[at_centre], lat[at_centre])


def _boxes_of(area: Any) -> npt.NDArray[np.float32]:
    """Return west, south, east and north, float32 [n, 4], of boxes that together contain the area."""
    import shapely

    boxes = shapely.bounds(shapely.get_parts(area))
    if len(boxes) > _MAX_BOXES:
        is_east = boxes[:, 0] + boxes[:, 2] >= 0
        sides = [boxes[side] for side in (is_east, ~is_east) if side.any()]
        boxes = np.array([[*side[:, :2].min(axis=0), *side[:, 2:].max(axis=0)] for side in sides])
    # Rounded outwards: compared as float32, a box may be larger than the area, never smaller.
    nearest: npt.NDArray[np.float32] = boxes.astype(np.float32)
    down, up = np.nextafter(nearest, np.float32(-np.inf)), np.nextafter(nearest, np.float32(np.inf))
    nearest[:, :2] = np.where(nearest > boxes, down, nearest)[:, :2]
    nearest[:, 2:] = np.where(nearest < boxes, up, nearest)[:, 2:]
    return nearest
