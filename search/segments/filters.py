"""Filters: expressions over the columns of an archive in CQL2 text, the language of the OGC that STAC uses, too.

    label = 'harbor' AND datetime >= DATE('2024-05-01')
    S_INTERSECTS(footprint, POLYGON((3 50, 4 50, 4 51, 3 51, 3 50))) OR key LIKE 'scenes/2024/%'
    label IN ('beach', 'river') AND lon BETWEEN 3 AND 4 AND NOT caption IS NULL

Supported are the columns key, uri, label, caption, datetime, lon, lat and footprint; AND, OR, NOT; comparisons with a
constant, IN, BETWEEN, LIKE (% and _), IS NULL; S_INTERSECTS, S_WITHIN, S_DISJOINT with a geometry or BBOX; T_AFTER,
T_BEFORE, T_INTERSECTS with a time or INTERVAL.

A date is the whole day in UTC: `datetime <= DATE('2024-05-01')` includes all of that day, and `datetime =
DATE('2024-05-01')` is true within it. A row without a footprint is a point at its centre. As in SQL, a comparison with
an unknown value is neither true nor false; a row passes if the expression is true.

The parser returns a tree. Each node is checked against this list, and nothing else is evaluated.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.imagery.outlines import bounding_box, normalize
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments import bits
from orbithash.search.segments.stop import Stop

__all__ = ["COLUMNS", "Filter", "FilterColumns", "parse_filter"]

COLUMNS = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint")

# The parser recurses in native code: too many nested or joined expressions would overflow its stack.
_MAX_DEPTH, _MAX_CONDITIONS = 64, 1_000
_MAX_VERTICES = 10_000

_COMPARE: dict[str, Callable[..., Any]] = {
    "=": pc.equal,
    "<>": pc.not_equal,
    "<": pc.less,
    "<=": pc.less_equal,
    ">": pc.greater,
    ">=": pc.greater_equal,
}
_SPATIAL = ("s_intersects", "s_within", "s_disjoint")
_TEMPORAL = ("t_after", "t_before", "t_intersects")
_NUMBERS, _TEXTS = ("lon", "lat"), ("key", "uri", "label", "caption")

_QUOTED = re.compile(r"'(?:[^']|'')*'")
_BRACKETS = re.compile(r"[()]")
# The coordinates of a geometry, up to its closing bracket: at most four levels, of which Python's `re` needs each.
_COORDINATES = r"\([-+.\de,\s]*+\)"
for _ in range(3):
    _COORDINATES = rf"\((?:[-+.\de,\s]++|{_COORDINATES})*+\)"
_GEOMETRY = re.compile(rf"\b(?:(?:multi)?(?:point|linestring|polygon)|bbox)\s*z?\s*{_COORDINATES}", re.IGNORECASE)
# The minus of a negative number or exponent, which is not an operator.
_SIGN = re.compile(r"((?:[(,=<>]|\bbetween|\band)\s*|\de)-(?=[\d.])", re.IGNORECASE)
# Operators whose operands the parser reads by recursion.
_NESTING = re.compile(r"\bnot\b|[-+^*/%]", re.IGNORECASE)
_JOINS = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN, _END = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)

# Returns an Arrow array of booleans (null: unknown) for the rows of a table.
_Test = Callable[[pa.Table], Any]


class FilterColumns(Protocol):
    """What is asked of the columns of a segment."""

    def array(self, name: str) -> Any:
        """Return a column as an Arrow array, in the order of the rows."""

    def boxes(self) -> tuple[npt.NDArray[np.float32], ...] | None:
        """Return west, south, east and north of the outline of each row, float32 [N]; None: not known."""


@dataclass(frozen=True)
class Filter:
    """A valid expression.

    Attributes:
        text: the expression.
        columns: the columns that it reads.
        test: returns for a table with these columns an Arrow array of booleans.
    """

    text: str
    columns: tuple[str, ...]
    test: _Test

    def passing(self, columns: FilterColumns, num_rows: int, stop: Stop) -> bits.Bits:
        """Return the rows of a segment that pass; raise `Stopped` when `stop` is set."""
        stop.check()
        if not self.columns:
            return bits.empty(num_rows)
        arrays = {name: columns.array(name) for name in self.columns}
        types = {name: pa.large_string() for name in _TEXTS} | {"footprint": pa.binary()}
        table = pa.table({name: array.cast(types.get(name, array.type)) for name, array in arrays.items()})
        return bits.from_mask(self.mask(table))

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows of the table pass, bool [N]."""
        passes = self.test(table)
        if isinstance(passes, pa.ChunkedArray):
            passes = passes.combine_chunks()
        mask: npt.NDArray[np.bool_] = pc.fill_null(passes, False).to_numpy(zero_copy_only=False)
        return mask


def parse_filter(text: str) -> Filter:
    """Return the filter of an expression; raise `InvalidQuery` if it is invalid."""
    import cql2

    _check_size(text)
    try:
        tree = cql2.parse_text(text).to_json()
    except Exception as error:
        raise _invalid(f"not an expression in CQL2 ({_reason(error)})") from error
    used: dict[str, None] = {}
    test = _condition(tree, used)
    return Filter(text, tuple(used), test)


def _check_size(text: str) -> None:
    """Raise `InvalidQuery` for expressions that could overflow the stack of the parser."""
    # Quoted text has no structure.
    bare = _QUOTED.sub("''", text)
    depth = max(accumulate(1 if bracket == "(" else -1 for bracket in _BRACKETS.findall(bare)), default=0)
    operators = _SIGN.sub(r"\1", _GEOMETRY.sub("", bare))
    if depth > _MAX_DEPTH or len(_NESTING.findall(operators)) > _MAX_DEPTH:
        raise _invalid(f"more than {_MAX_DEPTH} levels deep")
    if len(_JOINS.findall(operators)) >= _MAX_CONDITIONS:
        raise _invalid(f"more than {_MAX_CONDITIONS:,} conditions; use IN for a list of values")


def _reason(error: Exception) -> str:
    lines = [line.strip(" =|") for line in str(error).splitlines()]
    return (next((line for line in lines if "expected" in line), "") or (lines[0] if lines else "unreadable"))[:200]


def _invalid(problem: str) -> InvalidQuery:
    return InvalidQuery(("filter", problem))


def _condition(node: Any, used: dict[str, None]) -> _Test:
    if not isinstance(node, dict) or not isinstance(node.get("args"), list):
        raise _invalid(f"{_shown(node)} is not a condition; write one such as label = 'harbor'")
    name, args = str(node.get("op")), node["args"]
    if name in ("and", "or") and args:
        parts = [_condition(arg, used) for arg in args]
        join = pc.and_kleene if name == "and" else pc.or_kleene

        def joined(table: pa.Table) -> Any:
            passes = parts[0](table)
            for part in parts[1:]:
                passes = join(passes, part(table))
            return passes

        return joined
    if name == "not" and len(args) == 1:
        inner = _condition(args[0], used)
        return lambda table: pc.invert(inner(table))
    if name == "isNull" and len(args) == 1:
        column = _column(args[0], used)
        return lambda table: pc.is_null(table[column])
    if name in _COMPARE and len(args) == 2:
        return _comparison(name, args, used)
    if name == "between" and len(args) == 3:
        low, high = (_comparison(op, [args[0], bound], used) for op, bound in ((">=", args[1]), ("<=", args[2])))
        return lambda table: pc.and_kleene(low(table), high(table))
    if name == "in" and len(args) == 2 and isinstance(args[1], list) and args[1]:
        return _membership(args[0], args[1], used)
    if name == "like" and len(args) == 2 and isinstance(args[1], str):
        column, pattern = _column(args[0], used), args[1]
        if column not in _TEXTS:
            raise _invalid(f"LIKE is allowed for {', '.join(_TEXTS)}, not for {column}")
        return lambda table: pc.match_like(table[column], pattern)
    if name in _SPATIAL and len(args) == 2:
        return _spatial(name, args, used)
    if name in _TEMPORAL and len(args) == 2:
        return _temporal(name, args, used)
    raise _invalid(
        f"{name.upper()} with {len(args)} arguments is not supported; docs/search.md lists the supported operators"
    )


def _comparison(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    if not _is_property(args[0]):
        mirrored = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
        name, args = mirrored.get(name, name), args[::-1]
    column = _column(args[0], used)
    if column == "footprint":
        raise _invalid("footprint cannot be compared; use S_INTERSECTS, S_WITHIN or S_DISJOINT")
    if column == "datetime":
        return _time_comparison(name, *_span(args[1]))
    value = pa.scalar(_value(column, args[1]), _type(column))
    return lambda table: _COMPARE[name](table[column], value)


def _time_comparison(name: str, first: datetime, last: datetime) -> _Test:
    """Compare the column datetime with a span of time, such as a day: its first and last moment, inclusive."""
    begin, end = (pa.scalar(time, _type("datetime")) for time in (first, last))
    if name in ("=", "<>"):

        def is_within(table: pa.Table) -> Any:
            times = table["datetime"]
            return pc.and_kleene(pc.greater_equal(times, begin), pc.less_equal(times, end))

        return is_within if name == "=" else lambda table: pc.invert(is_within(table))
    bound = begin if name in ("<", ">=") else end
    return lambda table: _COMPARE[name](table["datetime"], bound)


def _membership(node: Any, values: list[Any], used: dict[str, None]) -> _Test:
    """Test whether a column has one of several values."""
    column = _column(node, used)
    if column == "datetime":
        spans = sorted({_span(value) for value in values})
        begins, ends = (np.array([_microseconds(span[end]) for span in spans]) for end in (0, 1))

        def is_in_span(table: pa.Table) -> Any:
            times = pc.fill_null(table["datetime"].cast(pa.int64()), begins[0] - 1).to_numpy()
            # Of the spans that begin at or before a time, one contains it if the latest of their ends does.
            latest_end = np.maximum.accumulate(ends)
            before = np.searchsorted(begins, times, side="right") - 1
            passes = (before >= 0) & (times <= latest_end[before])
            return pa.array(passes, mask=pc.is_null(table["datetime"]).to_numpy())

        return is_in_span
    array = pa.array([_value(column, value) for value in values], _type(column))
    return lambda table: pc.if_else(pc.is_null(table[column]), None, pc.is_in(table[column], array))


def _spatial(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    import shapely

    if not _is_property(args[0]):
        raise _invalid(f"the first argument of {name.upper()} is the column: {name.upper()}(footprint, …)")
    if (column := _column(args[0], used)) != "footprint":
        raise _invalid(f"{name.upper()} is allowed for footprint, not for {column}")
    used.update(lon=None, lat=None)
    area = _geometry(args[1])
    shapely.prepare(area)

    def test(table: pa.Table) -> Any:
        outlines = shapely.from_wkb(table["footprint"].to_numpy(), on_invalid="ignore")
        lon, lat = (table[axis].to_numpy() for axis in _NUMBERS)
        at_centre = shapely.is_missing(outlines) & ~np.isnan(lon) & ~np.isnan(lat)
        outlines[at_centre] = shapely.points(lon[at_centre], lat[at_centre])
        if name == "s_within":
            passes = shapely.contains_properly(area, outlines) | shapely.covers(area, outlines)
        else:
            passes = shapely.intersects(area, outlines) ^ (name == "s_disjoint")
        return pa.array(passes, mask=shapely.is_missing(outlines))

    return test


def _geometry(node: Any) -> Any:
    import shapely

    if isinstance(node, dict) and isinstance(node.get("bbox"), list) and len(node["bbox"]) == 4:
        try:
            return bounding_box(*node["bbox"])
        except ValueError as error:
            raise _invalid(f"BBOX is not in degrees: {error}") from error
    try:
        geometry = shapely.geometry.shape(node)
    except Exception as error:
        raise _invalid(
            f"{_shown(node)} is not a geometry; write POLYGON(…), POINT(…) or BBOX(west, south, east, north)"
        ) from (error)
    if geometry.is_empty or not geometry.is_valid:
        raise _invalid(f"the geometry is empty or not valid ({shapely.is_valid_reason(geometry)})")
    if shapely.get_num_coordinates(geometry) > _MAX_VERTICES:
        raise _invalid(f"the geometry has more than {_MAX_VERTICES:,} vertices")
    try:
        # Outlines of rows keep the same rule.
        return normalize(geometry)
    except ValueError as error:
        raise _invalid(f"the geometry is not in degrees: {error}") from error


def _temporal(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    if (column := _column(args[0], used)) != "datetime":
        raise _invalid(f"{name.upper()} is allowed for datetime, not for {column}")
    operator = {"t_after": ">", "t_before": "<", "t_intersects": "="}[name]
    return _time_comparison(operator, *_span(args[1]))


def _span(node: Any) -> tuple[datetime, datetime]:
    """Return the first and the last moment of a time, a date or an interval, both inclusive."""
    if isinstance(node, dict) and isinstance(node.get("interval"), list) and len(node["interval"]) == 2:
        begin, end = map(_time_text, node["interval"])
        span = (_BEGIN if begin == ".." else _moments(begin)[0], _END if end == ".." else _moments(end)[1])
        if span[0] > span[1]:
            raise _invalid(f"the interval from {_shown(begin)} to {_shown(end)} ends before it begins")
        return span
    return _moments(_time_text(node))


def _time_text(node: Any) -> Any:
    return node.get("timestamp", node.get("date")) if isinstance(node, dict) else node


def _moments(text: Any) -> tuple[datetime, datetime]:
    """Return the first and the last moment of a day, or a time twice; without a zone it is UTC."""
    try:
        time = datetime.fromisoformat(text)
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (TypeError, ValueError, OverflowError) as error:
        raise _invalid(
            f"{_shown(text)} is not a time; write TIMESTAMP('2024-05-01T12:00:00Z') or DATE('2024-05-01')"
        ) from error
    try:
        date.fromisoformat(text)
    except ValueError:
        return time, time
    # Not one day more, less a microsecond: there is no day after 9999-12-31.
    return time, time.replace(hour=23, minute=59, second=59, microsecond=999_999)


def _microseconds(time: datetime) -> int:
    return (time - _EPOCH) // timedelta(microseconds=1)


def _is_property(node: Any) -> bool:
    return isinstance(node, dict) and "property" in node


def _column(node: Any, used: dict[str, None]) -> str:
    if not _is_property(node):
        raise _invalid(f"{_shown(node)} is not a column; the columns are {', '.join(COLUMNS)}")
    name = node["property"]
    if name not in COLUMNS:
        raise _invalid(f"no column {_shown(name)}; the columns are {', '.join(COLUMNS)} (text needs 'single quotes')")
    used[name] = None
    return str(name)


def _type(column: str) -> pa.DataType:
    if column == "datetime":
        return pa.timestamp("us", "UTC")
    return pa.float64() if column in _NUMBERS else pa.string()


def _value(column: str, node: Any) -> Any:
    """Return a constant to compare a number or text column with."""
    kinds = (int, float) if column in _NUMBERS else (str,)
    if not isinstance(node, kinds) or isinstance(node, bool):
        kind = "a number" if column in _NUMBERS else "text in 'single quotes'"
        raise _invalid(f"{column} must be compared with {kind}, got {_shown(node)}")
    return float(node) if column in _NUMBERS else node


def _shown(node: Any) -> str:
    return repr(node)[:80]
