"""Orders of rows beside that of search, counts of rows, and pictures, as the gateway and the client see them.

Needs neither numpy nor protobuf.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, Literal, NamedTuple, get_args

from orbithash.encoders.ranges import is_integer
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import (
    LARGE_COLUMNS,
    MAX_K,
    MAX_LARGE_ROWS,
    Column,
    Coverage,
    Hit,
    Query,
    coverage_problems,
    filter_problems,
    has_large,
    include_problems,
)
from orbithash.search.protocol.rows import check_keys

__all__ = [
    "MAX_GROUPS",
    "By",
    "DistanceCounts",
    "GroupBy",
    "Groups",
    "HeatMap",
    "Linear",
    "Place",
    "RankAnswer",
    "RankCursor",
    "Ranking",
    "Shuffle",
    "TimeOrder",
    "View",
    "check_cells",
    "check_grouping",
    "check_side",
    "content_query",
]

MAX_GROUPS = 10_000
# Sides of a picture in pixels, cells along a side of a heat map.
MAX_VIEW_PX = 4096
MIN_CELLS, MAX_CELLS = 2, 16

# The sum of the magnitudes of weights is smaller, so that sums of int32 cannot overflow.
_MAX_WEIGHTS = 2**24

GroupBy = Literal["label", "month", "year"]


@dataclass(frozen=True)
class Linear:
    """By a linear function of stored vectors, the highest score first.

    Attributes:
        weights: one for each component of a stored vector, from -32,768 to 32,767; the sum of their magnitudes is at
            most 16,777,215.
        scale: the score of a row is `offset + scale * sum(weight * component)`; above 0.
        offset: see `scale`.
        least_certain: order by the magnitude of the score, ascending, instead. It is counted in whole units of `scale`.
    """

    weights: tuple[int, ...]
    scale: float = 1.0
    offset: float = 0.0
    least_certain: bool = False

    def score(self, dot: int) -> float:
        """Return the score of a row from the sum of weight * component."""
        return self.offset + self.scale * dot

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the values."""
        weights = self.weights
        if not isinstance(weights, Sequence) or isinstance(weights, str | bytes):
            return [("weights", f"a tuple of whole numbers, got {type(weights).__name__}")]
        if not weights:
            return [("weights", "give a weight for each component of a stored vector, got none")]
        for weight in weights:
            if not is_integer(weight, -(2**15), 2**15 - 1):
                return [("weights", f"a weight is a whole number from -32,768 to 32,767, got {weight!r}")]
        problems = []
        if (total := sum(map(abs, weights))) >= _MAX_WEIGHTS:
            problems.append(("weights", f"the sum of their magnitudes is at most {_MAX_WEIGHTS - 1:,}, got {total:,}"))
        if not (_is_finite(self.scale) and self.scale > 0):
            problems.append(("scale", f"a finite number above 0, got {self.scale!r}"))
        if not _is_finite(self.offset):
            problems.append(("offset", f"a finite number, got {self.offset!r}"))
        return [*problems, *_truth_problems("least_certain", self.least_certain)]


@dataclass(frozen=True)
class Place:
    """By the distance of the centre from a place, the nearest first.

    Attributes:
        lon, lat: degrees, WGS 84; longitudes from -360 to 360.
        max_distance_m: the largest distance of a hit in metres; None: no limit.
    """

    lon: float
    lat: float
    max_distance_m: float | None = None

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the values."""
        problems = []
        for name, limit in (("lon", 360), ("lat", 90)):
            value = getattr(self, name)
            if not (_is_finite(value) and -limit <= value <= limit):
                problems.append((name, f"a number of degrees from -{limit} to {limit}, got {value!r}"))
        limit_m = self.max_distance_m
        if limit_m is not None and not (_is_finite(limit_m) and limit_m >= 0):
            problems.append(("max_distance_m", f"a finite number of metres from 0, got {limit_m!r}"))
        return problems


@dataclass(frozen=True)
class Shuffle:
    """At random, in an order that depends on the seed and the ids only."""

    seed: int = 0

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the values."""
        is_valid = is_integer(self.seed, 0, 2**64 - 1)
        return [] if is_valid else [("seed", f"a whole number from 0 to 2^64 - 1, got {self.seed!r}")]


@dataclass(frozen=True)
class TimeOrder:
    """By time of acquisition, the oldest first.

    Attributes:
        newest_first: the newest first instead.
        same_place_as: only rows that show the place of the row with this key: those whose outline contains its centre,
            and, of rows without an outline, those whose centre is at most 1 m away in longitude and in latitude. "":
            all rows.
    """

    newest_first: bool = False
    same_place_as: str = ""

    def problems(self) -> list[tuple[str, str]]:
        """Return what is wrong with the values."""
        problems = _truth_problems("newest_first", self.newest_first)
        if self.same_place_as:
            try:
                check_keys([self.same_place_as])
            except InvalidQuery as error:
                problems += [("same_place_as", problem) for _, problem in error.violations]
        return problems


By = Linear | Place | Shuffle | TimeOrder


class RankCursor(NamedTuple):
    """A position in the answer to a `Ranking`; the next page begins after it."""

    key: int
    id: int


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """In which order to return which rows. Rows without the value that decides the order are left out.

    Attributes:
        by: the order.
        k: maximum number of hits, as in `Query`.
        filter: see `Query`.
        min_score: the smallest score of a hit; only with `Linear`.
        after: return hits after this position, `RankAnswer.next` of the page before.
        include: see `Query`.
        min_coverage: see `Query`.
    """

    by: By
    k: int = 10
    filter: str = ""
    min_score: float | None = None
    after: RankCursor | None = None
    include: tuple[Column, ...] = ()
    min_coverage: float = 0.0

    def check(self) -> None:
        """Raise `InvalidQuery` with everything that can be checked without the archive."""
        if not isinstance(self.by, By):
            kinds = ", ".join(kind.__name__ for kind in get_args(By))
            raise InvalidQuery(("by", f"one of {kinds}, got {type(self.by).__name__}"))
        problems = [*self.by.problems(), *filter_problems(self.filter), *include_problems(self.include)]
        if not is_integer(self.k, 1, MAX_K):
            problems.append(("k", f"k is a whole number from 1 to {MAX_K:,}, got {self.k!r}"))
        elif self.k > MAX_LARGE_ROWS and has_large(self.include):
            columns = " or ".join(LARGE_COLUMNS)
            problems.append(("k", f"at most {MAX_LARGE_ROWS:,} hits with {columns}, got k {self.k:,}; use pages"))
        if self.min_score is not None:
            if not isinstance(self.by, Linear):
                problems.append(("min_score", "a smallest score belongs to an order by Linear"))
            elif self.by.least_certain:
                problems.append(("min_score", "an order by least_certain has no smallest score"))
            elif not _is_finite(self.min_score):
                problems.append(("min_score", f"a finite number, got {self.min_score!r}"))
        if self.after is not None and not _is_cursor(self.after):
            problems.append(("after", f"a cursor is the key and the id of a hit, got {self.after!r}"))
        problems += coverage_problems(self.min_coverage)
        if problems:
            raise InvalidQuery(*problems)


class RankAnswer(NamedTuple):
    """The rows in the order that was asked for, and how complete they are.

    Attributes:
        hits: at most k; their `distance` is 0, their `score` the linear score or the distance from the place in metres.
        coverage: the part of the archive that was searched.
        took_ms: time in the search engine, in milliseconds.
        model_id: content hash of the model that made the archive's codes.
        archive_version: version of the archive that was searched.
        next: position after which the next page begins; None if there is no next page.
        matching_rows: number of rows that pass the filter and show the place of `TimeOrder.same_place_as`; None without
            a filter.
        ranked_rows: number of rows that do so and have the value that decides the order.
        rows_within: number of these rows that also pass `min_score` or `max_distance_m`.
    """

    hits: Sequence[Hit]
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
    next: RankCursor | None
    matching_rows: int | None
    ranked_rows: int
    rows_within: int


class DistanceCounts(NamedTuple):
    """Number of searched rows at each distance of a query.

    Attributes:
        rows: number of rows at distance 0, 1, 2, ... up to the bits of a code.
        coverage: the part of the archive that was searched.
        took_ms: time in the search engine, in milliseconds.
        model_id: content hash of the model that made the archive's codes.
        archive_version: version of the archive that was searched.
        matching_rows: number of rows that pass the filter; None without a filter.
    """

    rows: tuple[int, ...]
    coverage: Coverage
    took_ms: float
    model_id: str
    archive_version: int
    matching_rows: int | None


class Groups(NamedTuple):
    """Number of rows of each class, month or year.

    Attributes:
        rows: number of rows by value; classes with the most rows first, equally many by name; months ("2024-05") and
            years ("2024") in ascending order. At most `MAX_GROUPS`.
        without: rows without a class or a time.
        others: rows of further groups.
        coverage: the part of the archive that was counted.
        archive_version: version of the archive.
    """

    rows: Mapping[str, int]
    without: int
    others: int
    coverage: Coverage
    archive_version: int


class View(NamedTuple):
    """A picture of a row.

    Attributes:
        image: a JPEG file.
        width, height: pixels.
        is_thumbnail: whether it is the thumbnail, because the server may not or cannot read the image of the row.
    """

    image: bytes
    width: int
    height: int
    is_thumbnail: bool


class HeatMap(NamedTuple):
    """Which parts of a row's image make it near a query.

    Attributes:
        values: by how many bits the row moves away from the query when a cell of its image is covered, row by row.
        num_passes: number of times that the network ran.
        is_thumbnail: whether the thumbnail was used, because the server may not or cannot read the image of the row.
        model_id: content hash of the model.
        box: the part of the image that the cells divide: left, top, right and bottom as fractions of width and height.
    """

    values: tuple[tuple[float, ...], ...]
    num_passes: int
    is_thumbnail: bool
    model_id: str
    box: tuple[float, float, float, float]


def check_grouping(by: str, filter_text: str, min_coverage: float) -> None:
    """Check what to count rows by, and which rows. Raises `InvalidQuery`."""
    problems = [*filter_problems(filter_text), *coverage_problems(min_coverage)]
    if by not in get_args(GroupBy):
        problems.append(("by", f"label, month or year, got {str(by)[:80]!r}"))
    if problems:
        raise InvalidQuery(*problems)


def check_side(max_side: int) -> None:
    """Check the maximum width and height of a picture. Raises `InvalidQuery`."""
    if not is_integer(max_side, 1, MAX_VIEW_PX):
        raise InvalidQuery(("max_side", f"a whole number of pixels from 1 to {MAX_VIEW_PX:,}, got {max_side!r}"))


def check_cells(cells: int) -> None:
    """Check the number of cells along a side of a heat map. Raises `InvalidQuery`."""
    if not is_integer(cells, MIN_CELLS, MAX_CELLS):
        raise InvalidQuery(("cells", f"a whole number from {MIN_CELLS} to {MAX_CELLS}, got {cells!r}"))


def content_query(content: Mapping[str, Any]) -> Query:
    """Return the query by the one of image, text and vector that is given, checked. Raises `InvalidQuery`."""
    if len(content) != 1:
        got = " and ".join(content) or "none"
        raise InvalidQuery(("content", f"give exactly one of image, text and vector, got {got}"))
    query = Query(**content)
    query.check()
    return query


def _truth_problems(name: str, value: object) -> list[tuple[str, str]]:
    return [] if isinstance(value, bool) else [(name, f"True or False, got {value!r}")]


def _is_finite(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def _is_cursor(value: object) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == 2
        and is_integer(value[0], -(2**63), 2**63 - 1)
        and is_integer(value[1], 0, 2**64 - 1)
    )
