"""A grid over an area: rows whose boxes meet only cells inside it, or only cells apart from it, need not be read."""

from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.search.segments.filters.conditions import Mask
from orbithash.search.segments.stop import Stop

__all__ = ["AreaGrid"]

# Cells from west to east and from south to north.
_SIZE = 64

# Boxes are taken to be larger by this share of a cell, which is more than the error of rounding.
_MARGIN = 1e-6


class AreaGrid:
    """The cells of the bounding box of an area: those that lie within it, and those that do not touch it."""

    def __init__(self, area: Any, stop: Stop) -> None:
        """Test each cell. `area`: a prepared shapely geometry, not empty. Raises `Stopped`."""
        import shapely

        west, south, east, north = area.bounds
        self._origin = west, south
        self._steps = (east - west) / _SIZE, (north - south) / _SIZE
        x, y = np.linspace(west, east, _SIZE + 1), np.linspace(south, north, _SIZE + 1)
        is_within, is_apart = np.zeros((2, _SIZE, _SIZE), np.int32)
        for row in range(_SIZE):
            stop.check()
            cells = shapely.box(x[:-1], y[row], x[1:], y[row + 1])
            is_within[row] = shapely.covers(area, cells)
            is_apart[row] = shapely.disjoint(area, cells)
        self._num_within, self._num_apart = _counts(is_within), _counts(is_apart)

    def locate(self, west: Any, south: Any, east: Any, north: Any) -> tuple[Mask, Mask]:
        """Return which boxes [N] lie within the area and which do not touch it, as far as the cells tell."""
        left, right = self._cells(0, west, east)
        bottom, top = self._cells(1, south, north)
        is_on_grid = (left >= 0) & (right < _SIZE) & (bottom >= 0) & (top < _SIZE)
        cells = (np.where(is_on_grid, cell, 0).astype(np.int32) for cell in (left, bottom, right, top))
        left, bottom, right, top = cells
        num_cells = np.where(is_on_grid, (right + 1 - left) * (top + 1 - bottom), -1)
        is_within, is_apart = (
            counts[top + 1, right + 1] - counts[top + 1, left] - counts[bottom, right + 1] + counts[bottom, left]
            == num_cells
            for counts in (self._num_within, self._num_apart)
        )
        return is_within, is_apart

    def _cells(self, axis: int, low: npt.NDArray[Any], high: npt.NDArray[Any]) -> tuple[npt.NDArray[Any], ...]:
        """Return the numbers of the first and the last cell that each interval meets, as float64."""
        origin, step = self._origin[axis], self._steps[axis]
        # An area without width has no step, and boxes may reach to infinity: neither is on the grid.
        with np.errstate(all="ignore"):
            first = np.floor((low.astype(np.float64) - origin) / step - _MARGIN)
            last = np.floor((high.astype(np.float64) - origin) / step + _MARGIN)
        return first, last


def _counts(cells: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Return the sum of the cells south and west of each corner of the grid."""
    counts = np.zeros((_SIZE + 1, _SIZE + 1), np.int32)
    counts[1:, 1:] = cells.cumsum(axis=0).cumsum(axis=1)
    return counts
