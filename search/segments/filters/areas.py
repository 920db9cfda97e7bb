"""Conditions on the place of a row: whether its outline meets an area, lies within it or apart from it.

The box of each outline is compared with those of the parts of the area first; outlines are read only for the rows that
this leaves. A row without an outline is a point at its centre; so is a row whose outline cannot be read.
"""

from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.search.segments.boxes import read_outlines
from orbithash.search.segments.filters.conditions import EXPENSIVE, FilterColumns, Mask, Test, Truth, part_of
from orbithash.search.segments.filters.grids import AreaGrid
from orbithash.search.segments.stop import Stop

__all__ = ["AreaCondition", "Relation"]

Relation = Literal["intersects", "within", "disjoint"]

# An area of more parts than this is divided at the meridian of Greenwich, which holds those at 180 degrees apart, too.
_MAX_BOXES = 16

# Outlines that are read at a time, in about half a millisecond: shapely holds the interpreter's lock meanwhile.
_MAX_READ = 1024

# After this many outlines of a segment, the area is divided into the cells of a grid.
_MANY_READ = 2**14


class AreaCondition:
    """The relation of the outline of a row to an area."""

    cost = EXPENSIVE

    def __init__(self, relation: Relation, area: Any) -> None:
        """`area`: a normalized shapely geometry."""
        import shapely

        self.relation = relation
        self.boxes = _boxes_of(area)
        self.wkb = shapely.to_wkb(area)

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""
        return _AreaTest(self, columns, stop)


class _AreaTest:
    """The test of the rows of one segment."""

    def __init__(self, condition: AreaCondition, columns: FilterColumns, stop: Stop) -> None:
        import shapely

        self._relation = condition.relation
        self._area_boxes = condition.boxes
        # A geometry of its own: a prepared one builds its index while it is used, which only one thread may do.
        self._area = shapely.from_wkb(condition.wkb)
        shapely.prepare(self._area)
        self._stop = stop
        self._arrays = [columns.array(name) for name in ("footprint", "lon", "lat")]
        self._boxes = columns.boxes()
        self._grid: AreaGrid | None = None
        self._num_read = 0

    def __call__(self, begin: int, end: int, among: Mask | None) -> Truth:
        footprint, *centres = (part_of(array, begin, end) for array in self._arrays)
        if self._boxes is None:
            lon, lat = (axis.to_numpy(zero_copy_only=False) for axis in centres)
            boxes = np.stack([lon, lat, lon, lat])
        else:
            boxes = self._boxes[:, begin:end]
        is_candidate = self._meets(boxes)
        has_place = ~np.isnan(boxes).any(axis=0)
        if among is not None:
            is_candidate &= among
        candidates = np.flatnonzero(is_candidate)
        yes = np.zeros(end - begin, np.bool_)
        if self._num_read > _MANY_READ and len(self._area_boxes):
            self._grid = self._grid or AreaGrid(self._area, self._stop)
            is_within, is_apart = self._grid.locate(*boxes[:, candidates])
            yes[candidates[is_within]] = True
            candidates = candidates[~is_within & ~is_apart]
        self._num_read += len(candidates)
        for first in range(0, len(candidates), _MAX_READ):
            self._stop.check()
            rows = candidates[first : first + _MAX_READ]
            picked = pa.array(rows)
            values = (array.take(picked).to_numpy(zero_copy_only=False) for array in (footprint, *centres))
            yes[rows], has_place[rows] = self._compare(*values)
        truth = Truth(yes, has_place & ~yes)
        return truth.inverted() if self._relation == "disjoint" else truth

    def _meets(self, boxes: npt.NDArray[Any]) -> Mask:
        """Return which boxes [4, N] meet a box of the area."""
        west, south, east, north = boxes
        meets = np.zeros(len(west), np.bool_)
        for w, s, e, n in self._area_boxes:
            meets |= (west <= e) & (east >= w) & (south <= n) & (north >= s)
        return meets

    def _compare(self, wkb: Any, lon: Any, lat: Any) -> tuple[Mask, Mask]:
        """Return which outlines meet the area, or lie within it, and which rows have an outline or a centre."""
        import shapely

        # Coordinates that are not finite are no reason to warn.
        with np.errstate(all="ignore"):
            outlines = read_outlines(wkb)
            _put_centres(outlines, lon, lat)
            try:
                passes = self._relate(outlines)
            except shapely.errors.GEOSException:
                # At least one of them cannot be compared: it has coordinates that are not finite.
                for row, outline in enumerate(outlines):
                    try:
                        self._relate(outline)
                    except shapely.errors.GEOSException:
                        outlines[row] = None
                _put_centres(outlines, lon, lat)
                passes = self._relate(outlines)
        return passes, ~shapely.is_missing(outlines)

    def _relate(self, outlines: Any) -> Any:
        import shapely

        if self._relation == "within":
            return shapely.contains_properly(self._area, outlines) | shapely.covers(self._area, outlines)
        return shapely.intersects(self._area, outlines)


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
