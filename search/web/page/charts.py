"""Small charts of numbers of rows."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate

__all__ = ["Bar", "Cell", "DistanceChart", "HeatChart", "distance_chart", "group_chart", "heat_chart"]

# Height of a chart.
_HEIGHT = 100
_MAX_BARS = 60


@dataclass(frozen=True)
class Bar:
    """One bar: its name, its rows, and its height, from 0 to 100."""

    name: str
    rows: int
    height: int


@dataclass(frozen=True)
class DistanceChart:
    """Rows at each distance, and rows up to each distance."""

    bars: tuple[Bar, ...]
    cumulative: tuple[int, ...]


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map: its place as fractions of the image, how opaque it is drawn, and its meaning."""

    x: float
    y: float
    width: float
    height: float
    opacity: float
    title: str


@dataclass(frozen=True)
class HeatChart:
    """Cells of a heat map, and the largest number of bits by which covering one of them moves the row away."""

    cells: tuple[Cell, ...]
    largest: float


def distance_chart(rows: Sequence[int]) -> DistanceChart:
    """Return the chart of the number of rows at each distance from 0."""
    return DistanceChart(_bars({str(distance): count for distance, count in enumerate(rows)}), tuple(accumulate(rows)))


def group_chart(rows: Mapping[str, int]) -> tuple[Bar, ...]:
    """Return the chart of the number of rows of each month such as 2024-05; of each year if there are many months."""
    if len(rows) > _MAX_BARS:
        years: dict[str, int] = {}
        for month, count in rows.items():
            years[month[:4]] = years.get(month[:4], 0) + count
        rows = years
    return _bars(rows)


def heat_chart(values: Sequence[Sequence[float]], box: Sequence[float]) -> HeatChart:
    """Return the cells that values divide a box (left, top, right, bottom, as fractions of the image) into."""
    left, top, right, bottom = box
    largest = max((value for row in values for value in row), default=0.0)
    cells = []
    for y, row in enumerate(values):
        for x, value in enumerate(row):
            width, height = (right - left) / len(row), (bottom - top) / len(values)
            opacity = 0.75 * max(0.0, value) / largest if largest > 0 else 0.0
            way = "further away" if value >= 0 else "nearer"
            title = f"Without this cell: {abs(value):.1f} bits {way}"
            x_y = (round(left + x * width, 4), round(top + y * height, 4))
            cells.append(Cell(*x_y, round(width, 4), round(height, 4), round(opacity, 4), title))
    return HeatChart(tuple(cells), largest)


def _bars(rows: Mapping[str, int]) -> tuple[Bar, ...]:
    most = max(rows.values(), default=0)
    # The square root keeps small numbers visible beside large ones.
    return tuple(
        Bar(name, count, max(4, round(_HEIGHT * (count / most) ** 0.5)) if count else 0) for name, count in rows.items()
    )
