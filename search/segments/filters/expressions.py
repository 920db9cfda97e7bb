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
from dataclasses import dataclass, replace
from datetime import UTC, date, datetime, timedelta
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.imagery.outlines import bounding_box, normalize
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments import bits
from orbithash.search.segments.bits import Bits
from orbithash.search.segments.filters.areas import AreaCondition, Relation
from orbithash.search.segments.filters.conditions import (
    CHEAP,
    EXPENSIVE,
    MODERATE,
    ColumnCondition,
    Condition,
    FilterColumns,
    Junction,
    Negation,
    in_chunks,
)
from orbithash.search.segments.stop import Stop

__all__ = ["COLUMNS", "Filter", "parse_filter"]

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
_SPATIAL: dict[str, Relation] = {"s_intersects": "intersects", "s_within": "within", "s_disjoint": "disjoint"}
_TEMPORAL = ("t_after", "t_before", "t_intersects")
_NUMBERS, _TEXTS = ("lon", "lat"), ("key", "uri", "label", "caption")

# Line and column, from 1, in a message of the parser.
_PLACE = re.compile(r"-->\s*(\d+):(\d+)")
_QUOTED = re.compile(r"'(?:[^']|'')*'")
_BRACKETS = re.compile(r"[()]")
# The coordinates of a geometry, up to its closing bracket: at most four levels, of which Python's `re` needs each.
_COORDINATES = r"\([-+.\de,\s]*+\)"
for _ in range(3):
    _COORDINATES = rf"\((?:[-+.\de,\s]++|{_COORDINATES})*+\)"
_GEOMETRY = re.compile(rf"\b(?:(?:multi)?(?:point|linestring|polygon)|bbox)\s*z?\s*{_COORDINATES}", re.IGNORECASE)
_QUOTED_OR_GEOMETRY = re.compile(rf"{_QUOTED.pattern}|{_GEOMETRY.pattern}", re.IGNORECASE)
_POWERS = re.compile(r"(?<![\d.])(?:\d++\.?+\d*+|\.\d++)e[-+]?\d{1,3}+(?!\d)", re.IGNORECASE)
# The minus of a negative number or exponent, which is not an operator.
_SIGN = re.compile(r"((?:[(,=<>]|\bbetween|\band)\s*|\de)-(?=[\d.])", re.IGNORECASE)
# Operators whose operands the parser reads by recursion.
_NESTING = re.compile(r"\bnot\b|[-+^*/%]", re.IGNORECASE)
_JOINS = re.compile(r"\b(?:and|or)\b", re.IGNORECASE)

# Patterns of LIKE: their wildcards, and those in which Arrow looks for more than a beginning, an end or a part.
_WILDCARDS = re.compile("[%_]+")
_GAPS = re.compile("_|[^%]%+[^%]")
# A shorter part of a pattern is found in too many values for a test of its own.
_MIN_SUBSTRING = 3

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_BEGIN, _END = datetime.min.replace(tzinfo=UTC), datetime.max.replace(tzinfo=UTC)


@dataclass(frozen=True)
class Filter:
    """A valid expression.

    Attributes:
        text: the expression.
        columns: the columns that it reads.
        condition: the condition that it states.
    """

    text: str
    columns: tuple[str, ...]
    condition: Condition

    def passing(self, columns: FilterColumns, num_rows: int, stop: Stop) -> Bits:
        """Return the rows of a segment for which the condition is true; raise `Stopped` when `stop` is set."""
        passing = bits.empty(num_rows)
        for begin, truth in in_chunks(self.condition.bind(columns, stop), num_rows, stop):
            part = bits.from_mask(truth.yes)
            passing[begin // 8 : begin // 8 + len(part)] = part
        return passing

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Return which rows of a table pass, bool [N]."""
        return bits.to_mask(self.passing(_TableColumns(table), len(table), Stop()), len(table))


class _TableColumns:
    """The columns of a table. Each box is the whole plane: no outline is excluded by its box."""

    def __init__(self, table: pa.Table) -> None:
        self.array = table.column
        self._num_rows = len(table)

    def boxes(self) -> npt.NDArray[np.float32]:
        return np.repeat(np.array([[-np.inf], [-np.inf], [np.inf], [np.inf]], np.float32), self._num_rows, axis=1)


def parse_filter(text: str) -> Filter:
    """Return the filter of an expression; raise `InvalidQuery` if it is invalid."""
    import cql2

    _check_size(text)
    plain = _without_exponents(text)
    try:
        tree = cql2.parse_text(plain).to_json()
    except Exception as error:
        raise _invalid(f"not an expression in CQL2: {_reason(error, plain)}") from error
    used: dict[str, None] = {}
    condition = _condition(tree, used)
    return Filter(text, tuple(used), condition)


def _without_exponents(text: str) -> str:
    """Return an expression whose geometries have no exponents, such as 1e-05, which the parser does not read there."""

    def plain(part: re.Match[str]) -> str:
        return part[0] if part[0][0] == "'" else _POWERS.sub(lambda n: np.format_float_positional(float(n[0])), part[0])

    return _QUOTED_OR_GEOMETRY.sub(plain, text) if _POWERS.search(text) else text


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


def _reason(error: Exception, text: str) -> str:
    """Return where the parser stopped. What it says it expects are names of its own rules."""
    place = _PLACE.search(str(error))
    if place is None:
        return "it cannot be read"
    line, column = int(place[1]), int(place[2])
    rest = "\n".join(text.splitlines()[line - 1 :])[column - 1 :].strip()
    return f"{_shown(rest)} is not expected" if rest else "it ends too early"


def _invalid(problem: str) -> InvalidQuery:
    return InvalidQuery(("filter", problem))


def _condition(node: Any, used: dict[str, None]) -> Condition:
    if not isinstance(node, dict) or not isinstance(node.get("args"), list):
        raise _invalid(f"{_shown(node)} is not a condition; write one such as label = 'harbor'")
    name, args = str(node.get("op")), node["args"]
    if name in ("and", "or") and args:
        return Junction(name == "and", [_condition(arg, used) for arg in args])
    if name == "not" and len(args) == 1:
        return Negation(_condition(args[0], used))
    if name == "isNull" and len(args) == 1:
        return _on(_column(args[0], used), pc.is_null, CHEAP)
    if name in _COMPARE and len(args) == 2:
        return _comparison(name, args, used)
    if name == "between" and len(args) == 3:
        bounds = ((">=", args[1]), ("<=", args[2]))
        return Junction(True, [_comparison(operator, [args[0], bound], used) for operator, bound in bounds])
    if name == "in" and len(args) == 2 and isinstance(args[1], list) and args[1]:
        return _membership(args[0], args[1], used)
    if name == "like" and len(args) == 2 and isinstance(args[1], str):
        return _like(_column(args[0], used), args[1])
    if name in _SPATIAL and len(args) == 2:
        return _spatial(name, args, used)
    if name in _TEMPORAL and len(args) == 2:
        return _temporal(name, args, used)
    raise _invalid(
        f"{name.upper()} with {len(args)} arguments is not supported; docs/operate/search.md lists what is supported"
    )


def _on(column: str, kernel: Callable[[pa.Array], pa.Array], cost: int | None = None) -> ColumnCondition:
    """Return a condition on a column. By default, labels and numbers are cheap to test, and texts are not."""
    if cost is None:
        cost = MODERATE if column in _TEXTS and column != "label" else CHEAP
    return ColumnCondition(column, _type(column), kernel, cost)


def _comparison(name: str, args: list[Any], used: dict[str, None]) -> Condition:
    if not _is_property(args[0]):
        mirrored = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
        name, args = mirrored.get(name, name), args[::-1]
    column = _column(args[0], used)
    if column == "footprint":
        raise _invalid("footprint cannot be compared; use S_INTERSECTS, S_WITHIN or S_DISJOINT")
    if column == "datetime":
        return _time_comparison(name, *_span(args[1]))
    value = pa.scalar(_value(column, args[1]), _type(column))
    return _on(column, lambda values: _COMPARE[name](values, value))


def _time_comparison(name: str, first: datetime, last: datetime) -> Condition:
    """Compare the column datetime with a span of time, such as a day: its first and last moment, inclusive."""
    begin, end = (pa.scalar(time, _type("datetime")) for time in (first, last))
    if name in ("=", "<>"):
        is_within = _on(
            "datetime", lambda times: pc.and_kleene(pc.greater_equal(times, begin), pc.less_equal(times, end))
        )
        return is_within if name == "=" else Negation(is_within)
    bound = begin if name in ("<", ">=") else end
    return _on("datetime", lambda times: _COMPARE[name](times, bound))


def _membership(node: Any, values: list[Any], used: dict[str, None]) -> Condition:
    """Return the condition that a column has one of several values."""
    column = _column(node, used)
    if column == "datetime":
        spans = sorted({_span(value) for value in values})
        begins, ends = (np.array([_microseconds(span[end]) for span in spans]) for end in (0, 1))
        # Of the spans that begin at or before a time, one contains it if the latest of their ends does.
        latest_end = np.maximum.accumulate(ends)

        def is_in_span(array: pa.Array) -> pa.Array:
            times = pc.fill_null(array.cast(pa.int64()), begins[0] - 1).to_numpy()
            before = np.searchsorted(begins, times, side="right") - 1
            passes = (before >= 0) & (times <= latest_end[before])
            return pa.array(passes, mask=array.is_null().to_numpy(zero_copy_only=False))

        return _on(column, is_in_span)
    options = pa.array([_value(column, value) for value in values], _type(column))
    return _on(column, lambda array: pc.if_else(array.is_null(), None, pc.is_in(array, options)))


def _like(column: str, pattern: str) -> Condition:
    if column not in _TEXTS:
        raise _invalid(f"LIKE is allowed for {', '.join(_TEXTS)}, not for {column}")
    try:
        # Patterns are compiled with the first value.
        pc.match_like(pa.array([""]), pattern)
    except pa.ArrowInvalid as error:
        raise _invalid(f"the pattern of LIKE is too long ({len(pattern):,} characters)") from error
    matches = _on(column, lambda array: pc.match_like(array, pattern))
    if "\\" in pattern or not _GAPS.search(pattern):
        return matches
    # Arrow matches these with a regular expression; it begins and ends as the pattern does, which is faster to test.
    beginning, *middle, end = _WILDCARDS.split(pattern)
    needed = []
    if beginning:
        needed.append(_on(column, lambda array: pc.starts_with(array, beginning)))
    if end:
        needed.append(_on(column, lambda array: pc.ends_with(array, end)))
    longest = max(middle, key=len, default="")
    if not needed and len(longest) >= _MIN_SUBSTRING:
        needed.append(_on(column, lambda array: pc.match_substring(array, longest)))
    return Junction(True, [*needed, replace(matches, cost=EXPENSIVE)])


def _spatial(name: str, args: list[Any], used: dict[str, None]) -> Condition:
    if not _is_property(args[0]):
        raise _invalid(f"the first argument of {name.upper()} is the column: {name.upper()}(footprint, …)")
    if (column := _column(args[0], used)) != "footprint":
        raise _invalid(f"{name.upper()} is allowed for footprint, not for {column}")
    used.update(lon=None, lat=None)
    return AreaCondition(_SPATIAL[name], _geometry(args[1]))


def _geometry(node: Any) -> Any:
    import shapely

    if isinstance(node, dict) and isinstance(node.get("bbox"), list) and len(node["bbox"]) == 4:
        edges = node["bbox"]
        if not all(isinstance(edge, int | float) and not isinstance(edge, bool) for edge in edges):
            raise _invalid(f"BBOX requires four numbers, got {_shown(edges)}")
        try:
            return bounding_box(*edges)
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


def _temporal(name: str, args: list[Any], used: dict[str, None]) -> Condition:
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
    """Return the type of the values of a column while they are tested."""
    if column == "datetime":
        return pa.timestamp("us", "UTC")
    if column == "footprint":
        return pa.large_binary()
    return pa.float64() if column in _NUMBERS else pa.large_string()


def _value(column: str, node: Any) -> Any:
    """Return a constant to compare a number or text column with."""
    kinds = (int, float) if column in _NUMBERS else (str,)
    if not isinstance(node, kinds) or isinstance(node, bool):
        kind = "a number" if column in _NUMBERS else "text in 'single quotes'"
        raise _invalid(f"{column} must be compared with {kind}, got {_shown(node)}")
    return float(node) if column in _NUMBERS else node


def _shown(node: Any) -> str:
    return repr(node)[:80]
