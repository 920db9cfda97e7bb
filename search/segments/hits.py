"""Rows of a segment as serialised `orbithash.v1.Hit` messages, written from the memory of the columns.

Building a message through protobuf takes a Python object for each value; a compiled kernel writes ten messages in a few
microseconds, so that none needs to be kept.
"""

# ruff: noqa: ANN001, ANN202 (numba derives the types of kernels)
from collections.abc import Sequence
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import pyarrow as pa
from google.protobuf.timestamp_pb2 import Timestamp

from orbithash.encoders.compiled import Kernel, read_only
from orbithash.search.index.answers import Ids
from orbithash.search.segments.chunks import ROWS_PER_CHUNK, Labels
from orbithash.v1 import search_pb2

__all__ = ["HIT_COLUMNS", "HitMemory"]

# Columns of a hit, in the order of their fields in the message.
HIT_COLUMNS = ("key", "label", "lon", "lat", "datetime", "uri", "caption", "footprint")
_LABEL, _LON, _LAT, _TIME = (HIT_COLUMNS.index(name) for name in ("label", "lon", "lat", "datetime"))
# Number of a field and form of its value: 1 is 8 bytes, 2 a length and bytes. Numbers below 16 have tags of one byte.
_FIELDS = [search_pb2.Hit.DESCRIPTOR.fields_by_name[name] for name in HIT_COLUMNS]
_TAGS = read_only(
    np.array([field.number << 3 | (1 if field.name in ("lon", "lat") else 2) for field in _FIELDS], np.uint8)
)
_ID_TAG = search_pb2.Hit.ID_FIELD_NUMBER << 3
_SECONDS_TAG, _NANOS_TAG = Timestamp.SECONDS_FIELD_NUMBER << 3, Timestamp.NANOS_FIELD_NUMBER << 3

# In the place of the bits of the values that are not null.
_NO_NULLS, _ALL_NULL = -1, -2
# Bytes of a field beside the bytes of a text: tag and length, or a whole time or number.
_MAX_FIELD = 40

_NO_IDS = np.empty(0, np.uint64)


class HitMemory:
    """The memory that holds columns, as the kernel reads it: where in it the buffers of each chunk begin."""

    def __init__(self, num_rows: int, memory: pa.Buffer, batches: Sequence[pa.RecordBatch], labels: Labels) -> None:
        """Take the memory of an Arrow file, its batches, and the labels."""
        places = np.full((-(-num_rows // ROWS_PER_CHUNK), len(HIT_COLUMNS), 3), _ALL_NULL, np.int64)
        for chunk, batch in enumerate(batches[: len(places)]):
            for column, name in enumerate(HIT_COLUMNS):
                if name in batch.schema.names:
                    places[chunk, column] = _places(batch[name], memory.address)
        memory_ = np.frombuffer(memory, np.uint8)
        self._num_rows = num_rows
        self._arrays = (
            read_only(memory_),
            read_only(memory_[: len(memory_) // 4 * 4].view(np.int32)),
            read_only(memory_[: len(memory_) // 8 * 8].view(np.int64)),
            read_only(places),
            read_only(labels.offsets),
            read_only(labels.text),
        )

    def messages(self, rows: npt.NDArray[np.integer[Any]], names: Sequence[str], ids: Ids | None = None) -> list[bytes]:
        """Return for each row the message with these columns and, if `ids` are given, the id of the row.

        Columns that are null, not a number, or not here are left out.
        """
        columns = np.array([column for column, name in enumerate(HIT_COLUMNS) if name in names], np.int64)
        out, ends = _write_messages(
            rows.astype(np.int64),
            _NO_IDS if ids is None else ids,
            columns,
            _TAGS,
            self._num_rows,
            ROWS_PER_CHUNK,
            *self._arrays,
        )
        data, start, messages = out.tobytes(), 0, []
        for end in ends.tolist():
            messages.append(data[start:end])
            start = end
        return messages


def _places(array: pa.Array, address: int) -> tuple[int, int, int]:
    """Return where the bits of nulls, the values or offsets, and the bytes of a text begin."""
    assert not array.offset, "an array of a file begins with its buffers"
    nulls, *buffers = array.buffers()
    values, text = (0 if buffer is None else buffer.address - address for buffer in (*buffers, None)[:2])
    return _NO_NULLS if nulls is None else nulls.address - address, values, text


@numba.njit(nogil=True)
def _put_varint(out, place, value):  # type: ignore[no-untyped-def]
    """Write a uint64 in groups of 7 bits; return the place after it."""
    while value > np.uint64(127):
        out[place] = (value & np.uint64(127)) | np.uint64(128)
        value >>= np.uint64(7)
        place += 1
    out[place] = value
    return place + 1


@numba.njit(nogil=True)
def _is_null(memory, nulls, row):  # type: ignore[no-untyped-def]
    if nulls < 0:
        return nulls == _ALL_NULL
    return (memory[nulls + (row >> 3)] >> (row & 7)) & 1 == 0


@numba.njit(nogil=True)
def _text(longs, ints, place, column, row, label_offsets):  # type: ignore[no-untyped-def]
    """Return where a text begins and ends, in the memory or, for a label, in the text of the labels."""
    if column == _LABEL:
        label = ints[place[1] // 4 + row]
        return label_offsets[label], label_offsets[label + 1]
    first = place[1] // 8 + row
    return place[2] + longs[first], place[2] + longs[first + 1]


@Kernel
def _write_messages(  # type: ignore[no-untyped-def]
    rows, ids, columns, tags, num_rows, rows_per_chunk, memory, ints, longs, places, label_offsets, label_text
):
    """Return the messages of rows one after the other, uint8, and where each ends, int64."""
    size = 0
    for row in rows:
        if row < 0 or row >= num_rows:
            raise IndexError("a row number is out of range")
        size += 11
        for column in columns:
            size += _MAX_FIELD
            place = places[row // rows_per_chunk, column]
            if column not in (_LON, _LAT, _TIME) and not _is_null(memory, place[0], row % rows_per_chunk):
                begin, end = _text(longs, ints, place, column, row % rows_per_chunk, label_offsets)
                size += end - begin
    out, ends = np.empty(size, np.uint8), np.empty(len(rows), np.int64)
    at = 0
    for number in range(len(rows)):
        chunk, row = rows[number] // rows_per_chunk, rows[number] % rows_per_chunk
        # A number or a text that is 0 or empty is left out where the field cannot tell it from an absent one.
        if len(ids) and ids[number]:
            out[at] = _ID_TAG
            at = _put_varint(out, at + 1, ids[number])
        for column in columns:
            place = places[chunk, column]
            if _is_null(memory, place[0], row):
                continue
            if column in (_LON, _LAT):
                value = longs[place[1] // 8 + row]
                if value & 0x7FFFFFFFFFFFFFFF > 0x7FF0000000000000:
                    continue
                out[at] = tags[column]
                for byte in range(8):
                    out[at + 1 + byte] = (value >> (8 * byte)) & 255
                at += 9
            elif column == _TIME:
                value = longs[place[1] // 8 + row]
                seconds = value // 1_000_000
                nanos = 1000 * (value - 1_000_000 * seconds)
                begin = at + 2
                at = begin
                if seconds:
                    out[at] = _SECONDS_TAG
                    at = _put_varint(out, at + 1, np.uint64(seconds))
                if nanos:
                    out[at] = _NANOS_TAG
                    at = _put_varint(out, at + 1, np.uint64(nanos))
                out[begin - 2], out[begin - 1] = tags[column], at - begin
            else:
                begin, end = _text(longs, ints, place, column, row, label_offsets)
                if column == 0 and begin == end:
                    continue
                out[at] = tags[column]
                at = _put_varint(out, at + 1, np.uint64(end - begin))
                text = label_text if column == _LABEL else memory
                for byte in range(begin, end):
                    out[at] = text[byte]
                    at += 1
        ends[number] = at
    return out[:at], ends
