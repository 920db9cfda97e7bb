"""Hits as messages, and as serialised rows that are put together without parsing them.

A serialised row is an `orbithash.v1.Hit` without rank, distance and score. The fields of a protobuf message may have
any order, so a hit is serialised by writing these three fields before the row.
"""

import struct
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Any, overload

from google.protobuf.timestamp_pb2 import Timestamp

from orbithash.search.protocol.queries import INCLUDABLE, Hit
from orbithash.v1 import search_pb2

__all__ = ["RowHits", "delimited", "hit_from_pb", "hit_to_pb", "row_of", "time_from_pb", "time_to_pb"]

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


def _varint(number: int) -> bytes:
    parts = bytearray()
    while number > 0x7F:
        parts.append(number & 0x7F | 0x80)
        number >>= 7
    parts.append(number)
    return bytes(parts)


# Tags of the fields of a Hit: number and wire type.
_RANK, _DISTANCE, _SCORE = b"\x08", b"\x10", b"\x71"
# Serialised fields by their value, for the usual values.
_VARINTS = [_varint(number) for number in range(1024)]
_RANKS = [_RANK + number for number in _VARINTS]
# A distance of 0 is the default of its field, and is left out.
_DISTANCES = [b"", *(_DISTANCE + number for number in _VARINTS[1:])]


def delimited(tag: bytes, message: bytes) -> bytes:
    """Return a field that holds a message: its tag, its length and its bytes."""
    length = len(message)
    return b"".join((tag, _VARINTS[length] if length < 1024 else _varint(length), message))


class RowHits(Sequence[Hit]):
    """The hits of one answer as serialised rows, which are parsed when a hit is first read. Equal to their tuple."""

    def __init__(
        self, distances: Sequence[int], rows: Sequence[bytes], scores: Sequence[float | None] | None = None
    ) -> None:
        """Create hits of the ranks 1 to N from N distances, serialised rows and, for a rescored answer, scores."""
        self._distances = distances
        self._rows = rows
        self._scores = scores
        self._hits: tuple[Hit, ...] | None = None

    def serialised(self) -> bytes:
        """Return the field `hits` of a `SearchResponse`."""
        parts: list[bytes] = []
        for rank, (distance, row) in enumerate(zip(self._distances, self._rows, strict=True), 1):
            head = _RANKS[rank] if rank < 1024 else _RANK + _varint(rank)
            head += _DISTANCES[distance]
            score = None if self._scores is None else self._scores[rank - 1]
            if score is not None:
                head += _SCORE + struct.pack("<d", score)
            length = len(head) + len(row)
            parts += (b"\x0a", _VARINTS[length] if length < 1024 else _varint(length), head, row)
        return b"".join(parts)

    def _parsed(self) -> tuple[Hit, ...]:
        if self._hits is None:
            response = search_pb2.SearchResponse.FromString(self.serialised())
            self._hits = tuple(map(hit_from_pb, response.hits))
        return self._hits

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, place: int) -> Hit: ...
    @overload
    def __getitem__(self, place: slice) -> tuple[Hit, ...]: ...
    def __getitem__(self, place: int | slice) -> Hit | tuple[Hit, ...]:
        return self._parsed()[place]

    def __iter__(self) -> Iterator[Hit]:
        return iter(self._parsed())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sequence) and self._parsed() == tuple(other)

    def __hash__(self) -> int:
        return hash(self._parsed())

    def __repr__(self) -> str:
        return repr(self._parsed())


def row_of(hit: Hit) -> bytes:
    """Return the serialised row of a hit."""
    message = hit_to_pb(hit)
    for field in ("rank", "distance", "score"):
        message.ClearField(field)
    return message.SerializeToString()


def hit_to_pb(hit: Hit) -> search_pb2.Hit:
    """Return the message of a hit."""
    extra: dict[str, Any] = hit.extra
    return search_pb2.Hit(
        rank=hit.rank,
        distance=hit.distance,
        id=hit.id,
        key=hit.key,
        label=hit.label,
        lon=hit.lon,
        lat=hit.lat,
        datetime=time_to_pb(hit.datetime),
        score=hit.score,
        **extra,
    )


def hit_from_pb(message: search_pb2.Hit) -> Hit:
    """Return the hit of a message."""
    hit: Any = message
    return Hit(
        hit.rank,
        hit.distance,
        hit.id,
        hit.key,
        hit.label if hit.HasField("label") else None,
        hit.lon if hit.HasField("lon") else None,
        hit.lat if hit.HasField("lat") else None,
        time_from_pb(hit, "datetime"),
        {name: getattr(hit, name) for name in INCLUDABLE if hit.HasField(name)},
        hit.score if hit.HasField("score") else None,
    )


def time_to_pb(time: datetime | None) -> Timestamp | None:
    """Return the message of a time; one without a time zone is UTC."""
    if time is None:
        return None
    since = (time if time.tzinfo else time.replace(tzinfo=UTC)) - _EPOCH
    return Timestamp(seconds=since.days * 86_400 + since.seconds, nanos=since.microseconds * 1000)


def time_from_pb(message: Any, field: str) -> datetime | None:
    """Return the time in a field of a message, None if it is not set. Raises `ValueError` and `OverflowError`."""
    if not message.HasField(field):
        return None
    time: datetime = getattr(message, field).ToDatetime(UTC)
    return time
