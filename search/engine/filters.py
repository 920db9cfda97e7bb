"""Which rows count: expressions over the columns of an archive, in CQL2 text, the OGC's language that STAC uses too.

    label = 'harbor' AND datetime >= DATE('2024-05-01')
    S_INTERSECTS(footprint, POLYGON((3 50, 4 50, 4 51, 3 51, 3 50))) OR key LIKE 'scenes/2024/%'
    label IN ('beach', 'river') AND lon BETWEEN 3 AND 4 AND NOT caption IS NULL

There are the columns key, uri, label, caption, datetime, lon, lat and footprint; AND, OR, NOT; comparisons with a
value, IN, BETWEEN, LIKE (% and _), IS NULL; S_INTERSECTS, S_WITHIN, S_DISJOINT with a geometry or BBOX; T_AFTER,
T_BEFORE, T_INTERSECTS with a time or INTERVAL. A row whose footprint is unknown stands at its centre. As in SQL, what
is unknown is neither true nor false, and a row counts when the expression is true.

Nothing is evaluated that is not named here: the parser gives a tree of which each node is checked.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.search.protocol.errors import InvalidQuery

__all__ = ["COLUMNS", "Filter", "parse_filter"]

COLUMNS = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint")

# The parser recurses in native code, where too deep an expression would end the process.
_MAX_DEPTH = 64
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

_BEGIN, _END = datetime(1, 1, 1, tzinfo=UTC), datetime(9999, 12, 31, tzinfo=UTC)

# A chunk of booleans, some of them unknown, of a table's rows.
_Test = Callable[[pa.Table], Any]


@dataclass(frozen=True)
class Filter:
    """A checked expression.

    Attributes:
        columns: those that it reads.
        test: a table with these columns to an Arrow array of booleans.
    """

    columns: tuple[str, ...]
    test: _Test

    def mask(self, table: pa.Table) -> npt.NDArray[np.bool_]:
        """Which rows of the table count, bool [N]."""
        found = self.test(table)
        if isinstance(found, pa.ChunkedArray):
            found = found.combine_chunks()
        mask: npt.NDArray[np.bool_] = pc.fill_null(found, False).to_numpy(zero_copy_only=False)
        return mask


def parse_filter(text: str) -> Filter:
    """The filter that `text` says; `InvalidQuery` with what is wrong with it."""
    import cql2

    _check_depth(text)
    try:
        tree = cql2.parse_text(text).to_json()
    except Exception as error:
        raise _wrong(f"not an expression in CQL2 ({_reason(error)})") from error
    used: dict[str, None] = {}
    test = _condition(tree, used)
    return Filter(tuple(used), test)


def _check_depth(text: str) -> None:
    # Quoted text has no structure.
    bare = re.sub(r"'(?:[^']|'')*'", "''", text)
    deepest = depth = 0
    for character in bare:
        depth += (character == "(") - (character == ")")
        deepest = max(deepest, depth)
    prefixes = len(re.findall(r"\bnot\b|[-+^*/%]", bare, re.IGNORECASE)) - len(re.findall(r"[(,\s]-\d", bare))
    if deepest > _MAX_DEPTH or prefixes > _MAX_DEPTH:
        raise _wrong(f"more than {_MAX_DEPTH} levels deep")


def _reason(error: Exception) -> str:
    lines = [line.strip(" =|") for line in str(error).splitlines()]
    return (next((line for line in lines if "expected" in line), "") or (lines[0] if lines else "unreadable"))[:200]


def _wrong(problem: str) -> InvalidQuery:
    return InvalidQuery(("filter", problem))


def _condition(node: Any, used: dict[str, None]) -> _Test:
    if not isinstance(node, dict) or not isinstance(node.get("args"), list):
        raise _wrong(f"{_shown(node)} is no condition; write one such as label = 'harbor'")
    name, args = str(node.get("op")), node["args"]
    if name in ("and", "or") and args:
        parts = [_condition(arg, used) for arg in args]
        join = pc.and_kleene if name == "and" else pc.or_kleene

        def joined(table: pa.Table) -> Any:
            found = parts[0](table)
            for part in parts[1:]:
                found = join(found, part(table))
            return found

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
        column = _column(args[0], used)
        values = pa.array([_value(column, value) for value in args[1]], _type(column))
        return lambda table: pc.if_else(pc.is_null(table[column]), None, pc.is_in(table[column], values))
    if name == "like" and len(args) == 2 and isinstance(args[1], str):
        column, pattern = _column(args[0], used), args[1]
        if column not in _TEXTS:
            raise _wrong(f"LIKE is for {', '.join(_TEXTS)}, not for {column}")
        return lambda table: pc.match_like(table[column], pattern)
    if name in _SPATIAL and len(args) == 2:
        return _spatial(name, args, used)
    if name in _TEMPORAL and len(args) == 2:
        return _temporal(name, args, used)
    raise _wrong(f"{name.upper()} with {len(args)} arguments is not known; see docs/search.md for what is")


def _comparison(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    if not _is_property(args[0]):
        turned = {"<": ">", "<=": ">=", ">": "<", ">=": "<="}
        name, args = turned.get(name, name), args[::-1]
    column = _column(args[0], used)
    if column == "footprint":
        raise _wrong("footprint has no order; ask with S_INTERSECTS, S_WITHIN or S_DISJOINT")
    value = pa.scalar(_value(column, args[1]), _type(column))
    return lambda table: _COMPARE[name](table[column], value)


def _spatial(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    import shapely

    if not _is_property(args[0]):
        raise _wrong(f"{name.upper()} begins with the column: {name.upper()}(footprint, …)")
    if (column := _column(args[0], used)) != "footprint":
        raise _wrong(f"{name.upper()} is for footprint, not for {column}")
    used.update(lon=None, lat=None)
    wanted = _geometry(args[1])
    shapely.prepare(wanted)

    def test(table: pa.Table) -> Any:
        outlines = shapely.from_wkb(table["footprint"].to_numpy(), on_invalid="ignore")
        lon, lat = (table[axis].to_numpy() for axis in _NUMBERS)
        at_centre = shapely.is_missing(outlines) & ~np.isnan(lon) & ~np.isnan(lat)
        outlines[at_centre] = shapely.points(lon[at_centre], lat[at_centre])
        if name == "s_within":
            found = shapely.contains_properly(wanted, outlines) | shapely.covers(wanted, outlines)
        else:
            found = shapely.intersects(wanted, outlines) ^ (name == "s_disjoint")
        return pa.array(found, mask=shapely.is_missing(outlines))

    return test


def _geometry(node: Any) -> Any:
    import shapely

    if isinstance(node, dict) and isinstance(node.get("bbox"), list) and len(node["bbox"]) == 4:
        west, south, east, north = node["bbox"]
        if west <= east:
            return shapely.box(west, south, east, north)
        # Across the antimeridian.
        return shapely.union(shapely.box(west, south, 180, north), shapely.box(-180, south, east, north))
    try:
        geometry = shapely.geometry.shape(node)
    except Exception as error:
        raise _wrong(
            f"{_shown(node)} is no geometry; give POLYGON(…), POINT(…) or BBOX(west, south, east, north)"
        ) from (error)
    if geometry.is_empty or not geometry.is_valid:
        raise _wrong(f"the geometry is empty or not valid ({shapely.is_valid_reason(geometry)})")
    if shapely.get_num_coordinates(geometry) > _MAX_VERTICES:
        raise _wrong(f"the geometry has more than {_MAX_VERTICES:,} vertices")
    return geometry


def _temporal(name: str, args: list[Any], used: dict[str, None]) -> _Test:
    if (column := _column(args[0], used)) != "datetime":
        raise _wrong(f"{name.upper()} is for datetime, not for {column}")
    begin, end = _span(args[1])
    first, last = (pa.scalar(time, _type("datetime")) for time in (begin, end))
    if name == "t_after":
        return lambda table: pc.greater(table["datetime"], last)
    if name == "t_before":
        return lambda table: pc.less(table["datetime"], first)
    return lambda table: pc.and_kleene(
        pc.greater_equal(table["datetime"], first), pc.less_equal(table["datetime"], last)
    )


def _span(node: Any) -> tuple[datetime, datetime]:
    """First and last moment of a time or an interval, both inclusive."""
    if isinstance(node, dict) and isinstance(node.get("interval"), list) and len(node["interval"]) == 2:
        ends = [end.get("timestamp", end.get("date")) if isinstance(end, dict) else end for end in node["interval"]]
        begin = _BEGIN if ends[0] == ".." else _moment(ends[0])
        return begin, _END if ends[1] == ".." else _last_moment(ends[1])
    if isinstance(node, dict) and "date" in node:
        return _moment(node["date"]), _last_moment(node["date"])
    time = _value("datetime", node)
    return time, time


def _last_moment(text: Any) -> datetime:
    """Of a day its last microsecond, of a time itself."""
    is_day = isinstance(text, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", text)
    return _moment(text) + (timedelta(days=1, microseconds=-1) if is_day else timedelta())


def _moment(text: Any) -> datetime:
    try:
        time = datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise _wrong(f"{_shown(text)} is no time; write TIMESTAMP('2024-05-01T12:00:00Z') or DATE('2024-05-01')") from (
            error
        )
    return time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)


def _is_property(node: Any) -> bool:
    return isinstance(node, dict) and "property" in node


def _column(node: Any, used: dict[str, None]) -> str:
    if not _is_property(node):
        raise _wrong(f"{_shown(node)} stands where a column belongs; there are {', '.join(COLUMNS)}")
    name = node["property"]
    if name not in COLUMNS:
        raise _wrong(f"no column {_shown(name)}; there are {', '.join(COLUMNS)} (text stands in 'single quotes')")
    used[name] = None
    return str(name)


def _type(column: str) -> pa.DataType:
    if column == "datetime":
        return pa.timestamp("us", "UTC")
    return pa.float64() if column in _NUMBERS else pa.string()


def _value(column: str, node: Any) -> Any:
    """A constant to compare the column with."""
    if column == "datetime":
        return _moment(node.get("timestamp", node.get("date")) if isinstance(node, dict) else node)
    kinds = (int, float) if column in _NUMBERS else (str,)
    if not isinstance(node, kinds) or isinstance(node, bool):
        kind = "a number" if column in _NUMBERS else "text in 'single quotes'"
        raise _wrong(f"{column} is compared with {kind}, got {_shown(node)}")
    return float(node) if column in _NUMBERS else node


def _shown(node: Any) -> str:
    return repr(node)[:80]
