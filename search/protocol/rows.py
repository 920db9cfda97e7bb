"""Rows of an archive and changes of them, as the gateway and the client see them. Needs neither numpy nor protobuf."""

import datetime as dt
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any, TypedDict

from orbithash.encoders.keys import MAX_KEY_CHARS, key_problem
from orbithash.encoders.ranges import is_integer
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.forms import (
    CODE,
    IMAGE,
    MAX_IMAGE_BYTES,
    VECTOR,
    CodeField,
    ImageField,
    VectorField,
    vector_problem,
)

__all__ = ["MAX_ROWS", "Columns", "PreparedRow", "Row", "RowUpdate", "check_ids", "check_keys"]

# Rows, updates or keys of one message.
MAX_ROWS = 1000

_MAX_CHARS = {"uri": MAX_KEY_CHARS, "label": 10_000, "caption": 10_000}
_MAX_BYTES = {"footprint": 64 * 2**10, "thumbnail": 256 * 2**10}
# Longitudes beyond 180 degrees are stored in the range from -180 to 180, as everywhere.
_MAX_DEGREES = {"lon": 360, "lat": 90}
_TYPES: dict[str, Any] = {
    **dict.fromkeys(_MAX_CHARS, str),
    **dict.fromkeys(_MAX_BYTES, bytes),
    **dict.fromkeys(_MAX_DEGREES, Real),
    "datetime": dt.datetime,
}
_NOUNS: dict[Any, str] = {str: "text", bytes: "bytes", Real: "a number of degrees", dt.datetime: "a datetime"}


class Columns(TypedDict, total=False):
    """New values of columns of a row; None clears a column."""

    uri: str | None
    label: str | None
    caption: str | None
    datetime: dt.datetime | None
    lon: float | None
    lat: float | None
    footprint: bytes | None
    thumbnail: bytes | None


UPDATABLE = tuple(Columns.__annotations__)


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of an archive.

    To write a row, give its key and exactly one of its code, a vector, from which the server makes the code, and an
    image, from which it makes the code and the thumbnail. Rows that are read have an id, and `uri`, `caption`,
    `footprint`, `thumbnail` and `code` only if these columns were requested.

    Attributes:
        key: unique in the archive; writing a row replaces the row with the same key.
        image: an encoded image file of at most `MAX_IMAGE_BYTES`; may be given as bytes, as a path or as a PIL image.
        code: a packed code of the archive's model; may be given as bytes or as a uint8 array.
        vector: the input of the model's head of images; may be given as a float array or as a list of numbers.
        uri: the path or URI of the image; "": the key.
        label: the class.
        caption: a sentence about the image.
        datetime: time of acquisition; without a time zone it is UTC.
        lon, lat: the centre in degrees, WGS 84; longitudes from -360 to 360 are stored as -180 to 180.
        footprint: the outline as WKB, WGS 84.
        thumbnail: a JPEG of at most 128 pixels a side.
        id: the row's id; None in rows to write, because the archive assigns ids.
        stored_vector: the stored vector, int8 [d] as bytes; in rows that are read. The server computes it for rows that
            are written.
    """

    key: str
    image: ImageField = IMAGE
    code: CodeField = CODE
    vector: VectorField = VECTOR
    uri: str = ""
    label: str | None = None
    caption: str | None = None
    datetime: dt.datetime | None = None
    lon: float | None = None
    lat: float | None = None
    footprint: bytes | None = None
    thumbnail: bytes | None = None
    id: int | None = None
    stored_vector: bytes | None = None

    @property
    def num_bytes(self) -> int:
        """The approximate size of the row in memory and in a message, in bytes."""
        texts = len(self.key) + len(self.uri) + len(self.label or "") + len(self.caption or "")
        blobs = (self.image, self.code, self.vector, self.footprint, self.thumbnail)
        # Characters have up to four bytes.
        return 4 * texts + sum(len(blob or b"") for blob in blobs)

    def check(self) -> None:
        """Raise `InvalidQuery` with everything that can be checked without the archive, to write the row."""
        problems = _key_problems(self.key)
        if [self.image, self.code, self.vector].count(None) != 2:
            problems.append(("content", "give exactly one of image, code and vector"))
        if self.image is not None and not 0 < len(self.image) <= MAX_IMAGE_BYTES:
            problems.append(("image", f"an image file has 1 to {MAX_IMAGE_BYTES:,} bytes, got {len(self.image):,}"))
        if self.vector is not None and (problem := vector_problem(self.vector)):
            problems.append(("vector", problem))
        problems += _column_problems({name: getattr(self, name) for name in UPDATABLE})
        if problems:
            raise _invalid(problems, self.key)


@dataclass(frozen=True, kw_only=True)
class PreparedRow(Row):
    """A row ready to be written: its code is known, and its stored vector unless it was given by its code."""


@dataclass(frozen=True)
class RowUpdate:
    """New values for some columns of the row with a key; the other columns and the code stay."""

    key: str
    columns: Columns

    @property
    def num_bytes(self) -> int:
        """The approximate size of the update in memory and in a message, in bytes."""
        values = [self.key, *self.columns.values()]
        texts = sum(len(value) for value in values if isinstance(value, str))
        # Characters have up to four bytes.
        return 4 * texts + sum(len(value) for value in values if isinstance(value, bytes))

    def check(self) -> None:
        """Raise `InvalidQuery` with everything that can be checked without the archive."""
        problems = _key_problems(self.key)
        names = ", ".join(UPDATABLE)
        if unknown := [name for name in self.columns if name not in UPDATABLE]:
            problems.append(("columns", f"unknown column {str(unknown[0])[:80]!r}; columns to update: {names}"))
        elif not self.columns:
            problems.append(("columns", f"no column to update; give any of {names}"))
        else:
            problems += _column_problems(self.columns)
        if problems:
            raise _invalid(problems, self.key)


def check_keys(keys: Sequence[str]) -> None:
    """Check keys of rows. Raises `InvalidQuery`."""
    if problems := [problem for key in keys for problem in _key_problems(key)]:
        raise InvalidQuery(*problems)


def check_ids(ids: Sequence[int]) -> None:
    """Check ids of rows. Raises `InvalidQuery`."""
    for id_ in ids:
        if not is_integer(id_, 0, 2**64 - 1):
            raise InvalidQuery(("ids", f"an id is a whole number from 0 to 2^64 - 1, got {str(id_)[:80]!r}"))


def _key_problems(key: str) -> list[tuple[str, str]]:
    if not isinstance(key, str):
        return [("key", f"a key is a string, got {type(key).__name__}")]
    problem = key_problem(key)
    return [] if problem is None else [("key", problem)]


def _column_problems(columns: Mapping[str, Any]) -> list[tuple[str, str]]:
    problems = []
    for name, value in columns.items():
        if value is None:
            continue
        if not isinstance(value, _TYPES[name]) or isinstance(value, bool):
            problems.append((name, f"{_NOUNS[_TYPES[name]]}, got {type(value).__name__}"))
        elif name in _MAX_CHARS and len(value) > _MAX_CHARS[name]:
            problems.append((name, f"at most {_MAX_CHARS[name]:,} characters, got {len(value):,}"))
        elif name in _MAX_BYTES and len(value) > _MAX_BYTES[name]:
            problems.append((name, f"at most {_MAX_BYTES[name]:,} bytes, got {len(value):,}"))
        elif name in _MAX_DEGREES and not -_MAX_DEGREES[name] <= value <= _MAX_DEGREES[name]:
            problems.append((name, f"from -{_MAX_DEGREES[name]} to {_MAX_DEGREES[name]} degrees, got {value!r}"))
    return problems


def _invalid(problems: list[tuple[str, str]], key: str) -> InvalidQuery:
    return InvalidQuery(*((field, f"{problem} (row {str(key)[:80]!r})") for field, problem in problems))
