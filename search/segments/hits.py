"""Rows of a segment as serialised messages of hits."""

from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids
from orbithash.search.segments.chunks import ROWS_PER_CHUNK
from orbithash.search.segments.columns import Columns
from orbithash.v1 import search_pb2

__all__ = ["ReadyHits", "serialised_hits"]

# Columns of every hit beside the id.
_USUAL = ("key", "label", "lon", "lat", "datetime")
# Maximum number of ready messages of a segment, and of their bytes.
_MAX_READY, _MAX_READY_BYTES = 2**16, 2**25


class _Rows(Protocol):
    """What hits are made of."""

    columns: Columns

    def ids_of(self, rows: npt.NDArray[np.integer]) -> Ids:
        """Return the ids of rows."""

    def codes_of(self, rows: npt.NDArray[np.integer]) -> Codes:
        """Return the codes of rows."""


class ReadyHits:
    """Messages of the rows that were shown recently, by row.

    New messages go into the younger of two dicts. When it is half as large as allowed, it takes the place of the older
    one, whose messages are forgotten; a message that is found in the older one moves to the younger one. A lookup needs
    no lock, because every step is one operation on a dict.
    """

    def __init__(self) -> None:
        self._younger: dict[int, bytes] = {}
        self._older: dict[int, bytes] = {}
        self._num_bytes = 0

    def get(self, row: int) -> bytes | None:
        """Return the message of a row, or None."""
        message = self._younger.get(row)
        if message is None and (message := self._older.get(row)) is not None:
            self.put(row, message)
        return message

    def put(self, row: int, message: bytes) -> None:
        """Keep the message of a row."""
        if len(self._younger) >= _MAX_READY // 2 or self._num_bytes >= _MAX_READY_BYTES // 2:
            self._older, self._younger, self._num_bytes = self._younger, {}, 0
        self._younger[row] = message
        self._num_bytes += len(message)


def serialised_hits(
    segment: _Rows, rows: npt.NDArray[np.integer], include: Sequence[str], ready: ReadyHits
) -> list[bytes]:
    """Return the messages of rows; see `Segment.hits`."""
    numbers = rows.tolist()
    messages = [ready.get(row) for row in numbers]
    missing = [place for place, message in enumerate(messages) if message is None]
    if missing:
        ids = segment.ids_of(rows[missing]).tolist()
        for place, id_ in zip(missing, ids, strict=True):
            messages[place] = message = _hit(segment.columns, numbers[place], id_).SerializeToString()
            ready.put(numbers[place], message)
    if not include:
        return messages
    codes = segment.codes_of(rows) if "code" in include else None
    names = [name for name in include if name != "code"]
    return [
        message + _extra(segment.columns, row, names, None if codes is None else codes[place].tobytes())
        for place, (row, message) in enumerate(zip(numbers, messages, strict=True))
    ]


def _hit(columns: Columns, row: int, id_: int) -> search_pb2.Hit:
    hit = search_pb2.Hit(id=id_)
    for name in _USUAL:
        value = _value(columns, name, row)
        # Not a number: unknown, as null.
        if value is None or value != value:
            continue
        if name == "datetime":
            seconds, microseconds = divmod(value, 10**6)
            hit.datetime.CopyFrom(Timestamp(seconds=seconds, nanos=1000 * microseconds))
        else:
            setattr(hit, name, value)
    return hit


def _extra(columns: Columns, row: int, names: Sequence[str], code: bytes | None) -> bytes:
    values: dict[str, Any] = {name: _value(columns, name, row) for name in names}
    return search_pb2.Hit(code=code, **values).SerializeToString()


def _value(columns: Columns, name: str, row: int) -> Any:
    """Return the value of a row in a column; times in microseconds since 1970."""
    if name not in columns.names:
        return None
    scalar = columns.chunks(name)[row // ROWS_PER_CHUNK][row % ROWS_PER_CHUNK]
    return scalar.value if isinstance(scalar, pa.TimestampScalar) else scalar.as_py()
