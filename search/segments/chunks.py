"""The form in which segments keep columns: chunks of rows, labels as numbers, bounding boxes of footprints.

The same rows in the same order give the same chunks, byte for byte, however they arrive.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.search.segments.boxes import Boxes, boxes_of, points_of

__all__ = [
    "BOX_COLUMNS",
    "COLUMNS",
    "ROWS_PER_CHUNK",
    "USUAL",
    "ChunkEncoder",
    "Labels",
    "chunk_tables",
    "decoded_chunks",
]

# The columns that a segment keeps, if the archive has them.
COLUMNS = ("key", "uri", "label", "caption", "datetime", "lon", "lat", "footprint", "vector")

# The columns of every hit.
USUAL = ("key", "label", "lon", "lat", "datetime")

ROWS_PER_CHUNK = 2**16

# Large types: the texts of one chunk can exceed the 2^31 bytes of the small ones.
_TYPES: dict[str, pa.DataType] = {
    **dict.fromkeys(("key", "uri", "label", "caption"), pa.large_string()),
    "datetime": pa.timestamp("us", "UTC"),
    "lon": pa.float64(),
    "lat": pa.float64(),
    "footprint": pa.large_binary(),
}
# The columns that bounding boxes are made of.
BOX_COLUMNS = ("footprint", "lon", "lat")


def chunk_tables(tables: Iterable[pa.Table]) -> Iterator[pa.Table]:
    """Yield the rows of tables in tables of `ROWS_PER_CHUNK` rows; the last may have fewer, and none without rows.

    There is at least one input table.
    """
    waiting: list[pa.Table] = []
    num_waiting = 0
    is_first = True
    for table in tables:
        waiting.append(table)
        num_waiting += len(table)
        while num_waiting >= ROWS_PER_CHUNK:
            joined = pa.concat_tables(waiting)
            yield joined.slice(0, ROWS_PER_CHUNK)
            is_first = False
            waiting = [joined.slice(ROWS_PER_CHUNK)]
            num_waiting = len(waiting[0])
    if num_waiting or is_first:
        yield pa.concat_tables(waiting)


class Labels(NamedTuple):
    """The labels of a segment as arrays: label n is text[offsets[n] : offsets[n + 1]], UTF-8."""

    offsets: npt.NDArray[np.int64]
    text: npt.NDArray[np.uint8]

    @classmethod
    def of(cls, labels: Sequence[str]) -> "Labels":
        """Return these labels as arrays."""
        text = [label.encode() for label in labels]
        offsets = np.cumsum([0, *map(len, text)], dtype=np.int64)
        return cls(offsets, np.frombuffer(b"".join(text), np.uint8))

    def array(self) -> pa.Array:
        """Return the labels as Arrow's large_string over the same memory."""
        buffers = (pa.py_buffer(part) for part in self)
        return pa.LargeStringArray.from_buffers(len(self.offsets) - 1, *buffers)


class ChunkEncoder:
    """Encodes the chunks of one segment in their order.

    Attributes:
        labels: the distinct labels in order of appearance; the column label holds their numbers.
    """

    def __init__(self) -> None:
        self.labels: list[str] = []
        self._label_numbers: dict[str, int] = {}
        self._boxes: list[Boxes | None] = []

    def encode(self, chunk: pa.Table) -> pa.RecordBatch:
        """Return the next chunk in the form of a segment, with int32 numbers as labels."""
        arrays = {}
        for name in chunk.column_names:
            array = _canonical(chunk.column(name), _TYPES.get(name))
            arrays[name] = self._label_array(array) if name == "label" else array
        if all(name in arrays for name in BOX_COLUMNS):
            self._boxes.append(boxes_of(*(arrays[name] for name in BOX_COLUMNS)))
        return pa.record_batch(arrays)

    def boxes(self, batches: Sequence[pa.RecordBatch]) -> Boxes | None:
        """Return the boxes of all rows, float32 [4, N], from all encoded chunks; None if no row has a footprint."""
        if all(part is None for part in self._boxes):
            return None
        parts = [
            points_of(batch["lon"], batch["lat"]) if part is None else part
            for part, batch in zip(self._boxes, batches, strict=True)
        ]
        return np.concatenate(parts, axis=1)

    def _label_array(self, labels: pa.Array) -> pa.Array:
        encoded = labels.dictionary_encode()
        numbers = []
        for label in encoded.dictionary.to_pylist():
            number = self._label_numbers.setdefault(label, len(self.labels))
            if number == len(self.labels):
                self.labels.append(label)
            numbers.append(number)
        return pa.array(numbers, pa.int32()).take(encoded.indices)


def decoded_chunks(batches: Sequence[pa.RecordBatch], labels: pa.Array) -> dict[str, list[pa.Array]]:
    """Return the chunks of each column of encoded chunks; labels are dictionary arrays over `labels`."""
    chunks = {name: [batch[name] for batch in batches] for name in batches[0].schema.names}
    if "label" in chunks:
        chunks["label"] = [pa.DictionaryArray.from_arrays(numbers, labels) for numbers in chunks["label"]]
    return chunks


def _canonical(column: pa.ChunkedArray, type_: pa.DataType | None) -> pa.Array:
    """Return a column as one array whose buffers depend on its values only."""
    if type_ is not None:
        column = column.cast(type_)
    array = column.combine_chunks()
    if isinstance(array, pa.ChunkedArray):
        # Arrow does not join arrays that together exceed a limit of their type.
        array = pa.concat_arrays(array.chunks)
    if array.null_count == len(array):
        return pa.nulls(len(array), array.type)
    if pa.types.is_fixed_size_list(array.type):
        values, is_known = fixed_size_rows(pa.chunked_array([array]))
        mask = None if is_known.all() else pa.array(~is_known)
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), type=array.type, mask=mask)
    # The buffers of a slice can hold anything where a value is null; `take` writes them anew.
    return array.take(pa.array(np.arange(len(array)))) if array.null_count else array
