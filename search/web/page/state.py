"""The state of the page, which is the query string of its address, and nothing else.

An address may come from anywhere. A parameter that is invalid is left out of the state and reported with a sentence for
the user; the other parameters keep their effect.
"""

import base64
import binascii
import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from datetime import date
from typing import Any, TypeVar
from urllib.parse import urlencode

from orbithash.encoders.ranges import is_integer
from orbithash.search.protocol.queries import MAX_SENTENCE_CHARS
from orbithash.search.web.page.rings import Ring, parse_ring

__all__ = ["FINDS", "MAX_MARKS", "SORTS", "Parsed", "Problems", "State", "format_state", "parse_state"]

SORTS = ("near", "newest", "oldest")
FINDS = ("all", "unsure")

# Marked rows of one kind, and hidden rows.
MAX_MARKS = 300
MAX_LABELS = 100
# Addresses stay below the 64 KiB that servers and browsers handle.
MAX_LABEL_CHARS = 500
MAX_FILTER_CHARS = 4000
_MAX_CODE_BYTES = 1024
_MAX_DETECTOR_CHARS = 20_000
_MAX_PARAMETERS = 1000

Value = TypeVar("Value")
# By slot, the place on the page where a problem is shown: one sentence for the user.
Problems = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class State:
    """What is shown. Without a query (`q`, `like`, `code`, `good`, `near`, a detector), it is rows at random.

    Attributes:
        q: a sentence; for a model without a text encoder, the key of a row.
        like: id of the row that is searched for.
        code: a packed code, such as that of a dropped image.
        good, bad: ids of marked rows, in the order in which they were marked.
        near: longitude and latitude in degrees; rows are ordered by their distance from it.
        label: classes; a row has one of them.
        start, end: first and last day of acquisition, UTC.
        area: vertices of an outline, in degrees.
        filter: an expression in CQL2 text.
        radius: cut-off, in bits.
        sort: one of `SORTS`.
        hide: ids of rows that are not shown.
        find: one of `FINDS`, the rows that a detector fitted to the marks finds or is least certain of; "": none.
        detector: a stored detector, see `detector.py`.
        min_score: cut-off of the score of a detector.
        seed: of the rows at random.
    """

    q: str = ""
    like: int | None = None
    code: bytes = b""
    good: tuple[int, ...] = ()
    bad: tuple[int, ...] = ()
    near: tuple[float, float] | None = None
    label: tuple[str, ...] = ()
    start: date | None = None
    end: date | None = None
    area: Ring = ()
    filter: str = ""
    radius: int | None = None
    sort: str = "near"
    hide: tuple[int, ...] = ()
    find: str = ""
    detector: str = ""
    min_score: float | None = None
    seed: int = 0

    @property
    def has_content(self) -> bool:
        """Whether rows are ordered by the distance of their codes from a query."""
        return bool(self.q or self.like is not None or self.code or self.good)

    @property
    def is_filtered(self) -> bool:
        """Whether some rows of the archive are excluded by a filter."""
        return bool(self.label or self.start or self.end or self.area or self.filter)


@dataclass(frozen=True)
class Parsed:
    """The state of an address, the problems of its invalid parameters by slot, and the sentence as it was typed."""

    state: State
    problems: Problems
    typed: str


class _Invalid(ValueError):
    """A parameter is invalid; the message is a sentence for the user."""


def parse_state(pairs: Iterable[tuple[str, str]]) -> Parsed:
    """Return the state of the decoded parameters of an address. Unknown parameters are ignored; nothing is raised."""
    values: dict[str, list[str]] = {}
    for number, (name, value) in enumerate(pairs):
        if number < _MAX_PARAMETERS:
            values.setdefault(name, []).append(value)
    found: dict[str, Any] = {}
    problems: Problems = {}
    for parameter in _PARAMETERS:
        given = [value for value in values.get(parameter.name, ()) if value.strip()]
        if not given:
            continue
        try:
            found[parameter.field] = parameter.parse(given)
        except _Invalid as error:
            problems.setdefault(parameter.slot, str(error))
    if set(found.get("good", ())) & set(found.get("bad", ())):
        found["bad"] = tuple(row for row in found["bad"] if row not in set(found["good"]))
    if found.get("start") and found.get("end") and found["start"] > found["end"]:
        problems["dates"] = f"The first day, {found.pop('start')}, is after the last day, {found.pop('end')}."
    return Parsed(State(**found), problems, values.get("q", [""])[0][:_MAX_DETECTOR_CHARS])


def format_state(state: State, **changes: Any) -> str:
    """Return the query string of a state, with some fields changed; parameters with default values are left out."""
    pairs: list[tuple[str, str]] = []
    for parameter in _PARAMETERS:
        value = changes.get(parameter.field, getattr(state, parameter.field))
        if value != _DEFAULTS[parameter.field]:
            pairs += [(parameter.name, text) for text in parameter.format(value)]
    return urlencode(pairs)


@dataclass(frozen=True)
class _Parameter:
    """A parameter of the address: its name, the field of the state, the slot of its problems, and its two ways."""

    name: str
    field: str
    slot: str
    parse: Callable[[list[str]], Any]
    format: Callable[[Any], list[str]] = lambda value: [str(value)]


def _sentence(given: list[str]) -> str:
    text = given[0].strip()
    if len(text) > MAX_SENTENCE_CHARS:
        raise _Invalid(f"A sentence has at most {MAX_SENTENCE_CHARS:,} characters; this one has {len(text):,}.")
    return text


def _integer(what: str, least: int, most: int) -> Callable[[list[str]], int]:
    def parse(given: list[str]) -> int:
        text = given[0].strip()
        # int() also takes underscores, and very long numbers for a long time.
        if len(text) > 20 or not text.isascii() or not text.isdigit() or not is_integer(int(text), least, most):
            raise _Invalid(f"{what} is a whole number from {least} to {most:,}, not “{_short(text)}”.")
        return int(text)

    return parse


def _ids(what: str) -> Callable[[list[str]], tuple[int, ...]]:
    one = _integer(f"The number of a {what} tile", 0, 2**64 - 1)

    def parse(given: list[str]) -> tuple[int, ...]:
        texts = [text for text in given[0].split(",") if text.strip()]
        if len(texts) > MAX_MARKS:
            raise _Invalid(f"At most {MAX_MARKS} {what} tiles fit into an address; this one has {len(texts):,}.")
        return tuple(dict.fromkeys(one([text]) for text in texts))

    return parse


def _one_of(what: str, allowed: tuple[str, ...]) -> Callable[[list[str]], str]:
    def parse(given: list[str]) -> str:
        if given[0] not in allowed:
            raise _Invalid(f"{what} is {' or '.join(allowed)}, not “{_short(given[0])}”.")
        return given[0]

    return parse


def _day(what: str) -> Callable[[list[str]], date]:
    def parse(given: list[str]) -> date:
        try:
            return date.fromisoformat(given[0].strip())
        except ValueError:
            raise _Invalid(f"{what} is a date such as 2024-05-01, not “{_short(given[0])}”.") from None

    return parse


def _number(what: str) -> Callable[[list[str]], float]:
    def parse(given: list[str]) -> float:
        try:
            number = float(given[0])
        except ValueError:
            number = math.nan
        if not math.isfinite(number):
            raise _Invalid(f"{what} is a number, not “{_short(given[0])}”.")
        # -0.0 and 0.0 are one cut-off.
        return number + 0.0

    return parse


def _code(given: list[str]) -> bytes:
    text = given[0].strip()
    try:
        code = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        code = b""
    if not 0 < len(code) <= _MAX_CODE_BYTES:
        raise _Invalid("The address holds a damaged code of an image. Drop the image again.")
    return code


def _place(given: list[str]) -> tuple[float, float]:
    try:
        lon, lat = map(float, given[0].split(","))
    except ValueError:
        lon = lat = math.nan
    if not (abs(lon) <= 360 and abs(lat) <= 90):
        raise _Invalid(f"A place is a longitude and a latitude such as 3.2,51.3, not “{_short(given[0])}”.")
    return (lon, lat)


def _area(given: list[str]) -> Ring:
    try:
        return parse_ring(given[0])
    except ValueError as error:
        raise _Invalid(str(error)) from None


def _labels(given: list[str]) -> tuple[str, ...]:
    labels = tuple(dict.fromkeys(given))
    if len(labels) > MAX_LABELS:
        raise _Invalid(f"At most {MAX_LABELS} classes can be chosen; the address has {len(labels):,}.")
    if any(len(label) > MAX_LABEL_CHARS for label in labels):
        raise _Invalid(f"The name of a class has at most {MAX_LABEL_CHARS} characters.")
    return labels


def _text(what: str, max_chars: int) -> Callable[[list[str]], str]:
    def parse(given: list[str]) -> str:
        text = given[0].strip()
        if len(text) > max_chars:
            raise _Invalid(f"{what} has at most {max_chars:,} characters; this one has {len(text):,}.")
        return text

    return parse


def _expression(given: list[str]) -> str:
    text = _text("An expression", MAX_FILTER_CHARS)(given)
    # Beside other filters, it stands in brackets of its own, which it must not close.
    depth = 0
    for char in re.sub(r"'[^']*'|\"[^\"]*\"", "", text):
        depth += (char == "(") - (char == ")")
        if depth < 0:
            break
    if depth:
        raise _Invalid("The brackets of the expression do not match.")
    return text


def _short(text: str) -> str:
    text = text.strip()
    return text if len(text) <= 40 else text[:39] + "…"


def _joined(ids: tuple[int, ...]) -> list[str]:
    return [",".join(map(str, ids))]


_PARAMETERS = (
    _Parameter("q", "q", "q", _sentence),
    _Parameter("like", "like", "like", _integer("The number of a tile", 0, 2**64 - 1)),
    _Parameter("code", "code", "image", _code, lambda code: [base64.urlsafe_b64encode(code).decode().rstrip("=")]),
    _Parameter("good", "good", "marks", _ids("good"), _joined),
    _Parameter("bad", "bad", "marks", _ids("bad"), _joined),
    _Parameter("near", "near", "area", _place, lambda place: [f"{place[0]!r},{place[1]!r}"]),
    _Parameter("label", "label", "filter", _labels, list),
    _Parameter("from", "start", "dates", _day("The first day")),
    _Parameter("to", "end", "dates", _day("The last day")),
    _Parameter("area", "area", "area", _area, lambda ring: [",".join(f"{lon!r} {lat!r}" for lon, lat in ring)]),
    _Parameter("filter", "filter", "filter", _expression),
    _Parameter("radius", "radius", "radius", _integer("The cut-off", 0, 2**31 - 1)),
    _Parameter("sort", "sort", "address", _one_of("The order", SORTS)),
    _Parameter("hide", "hide", "address", _ids("hidden"), _joined),
    _Parameter("find", "find", "marks", _one_of("What to find", FINDS)),
    _Parameter("detector", "detector", "detector", _text("A detector in an address", _MAX_DETECTOR_CHARS)),
    _Parameter("min", "min_score", "radius", _number("The smallest score"), lambda number: [repr(number)]),
    _Parameter("seed", "seed", "address", _integer("The seed of the random tiles", 0, 2**53 - 1)),
)
_DEFAULTS = {field.name: field.default for field in fields(State)}
