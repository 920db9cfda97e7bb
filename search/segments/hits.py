"""Rows of a segment as serialised messages of hits."""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from google.protobuf.timestamp_pb2 import Timestamp

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids
from orbithash.search.segments.chunks import USUAL
from orbithash.search.segments.columns import Columns
from orbithash.v1 import search_pb2

__all__ = ["ReadyHits", "serialised_hits"]

Rows = npt.NDArray[np.integer[Any]]

# Maximum number of ready messages of a segment, and of their bytes.
_MAX_READY, _MAX_READY_BYTES = 2**16, 2**25


class _Rows(Protocol):
    """What hits are made of."""

    columns: Columns

    def ids_of(self, rows: Rows) -> Ids:
        """Return the ids of rows."""

    def codes_of(self, rows: Rows) -> Codes:
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


def serialised_hits(segment: _Rows, rows: Rows, include: Sequence[str], ready: ReadyHits) -> list[bytes]:
    """Return the messages of rows; see `Segment.hits`."""
    numbers = rows.tolist()
    found = [ready.get(row) for row in numbers]
    missing = [place for place, message in enumerate(found) if message is None]
    if missing:
        for place, message in zip(missing, _messages(segment, rows[missing]), strict=True):
            found[place] = message
            ready.put(numbers[place], message)
    messages = [message for message in found if message is not None]
    if not include:
        return messages
    names = [name for name in include if name != "code"]
    values = dict(zip(names, segment.columns.values(rows, names), strict=True))
    if "code" in include:
        values["code"] = [code.tobytes() for code in segment.codes_of(rows)]
    return [
        message + search_pb2.Hit(**dict(zip(values, extra, strict=True))).SerializeToString()
        for message, extra in zip(messages, zip(*values.values(), strict=True), strict=True)
    ]


def _messages(segment: _Rows, rows: Rows) -> Iterator[bytes]:
    ids = segment.ids_of(rows).tolist()
    for id_, key, label, lon, lat, time in zip(ids, *segment.columns.values(rows, USUAL), strict=True):
        yield search_pb2.Hit(
            id=id_, key=key, label=label, lon=_known(lon), lat=_known(lat), datetime=_timestamp(time)
        ).SerializeToString()


def _known(number: float | None) -> float | None:
    """Return a number, or None for NaN, which means unknown."""
    return None if number is None or number != number else number


def _timestamp(microseconds: int | None) -> Timestamp | None:
    if microseconds is None:
        return None
    seconds, rest = divmod(microseconds, 10**6)
    return Timestamp(seconds=seconds, nanos=1000 * rest)
