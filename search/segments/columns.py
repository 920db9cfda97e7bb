"""Columns of the rows of a segment, in row order.

They are Arrow arrays in chunks of `ROWS_PER_CHUNK` rows: in a file that is mapped, in memory, or read from the archive
when they are needed.
"""

import itertools
import threading
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.search.index.answers import Ids
from orbithash.search.segments.boxes import Boxes
from orbithash.search.segments.chunks import (
    BOX_COLUMNS,
    COLUMNS,
    ROWS_PER_CHUNK,
    USUAL,
    ChunkEncoder,
    Labels,
    chunk_tables,
    decoded_chunks,
)
from orbithash.search.segments.hits import HitMemory
from orbithash.search.segments.ids import SortedIds

__all__ = ["ArchiveColumns", "ArrowColumns", "Columns", "ColumnsInMemory", "ReadColumns", "batches_in"]

Chunks = Sequence[pa.Array]
Rows = npt.NDArray[np.integer[Any]]

# Up to this number of rows a column of the archive is kept in memory: about 80 bytes a row for the usual columns.
_MAX_KEPT = {**dict.fromkeys(USUAL, 2**24), "vector": 2**22}
# Up to this number of rows, one slice a row is faster than a selection in each chunk.
_FEW_ROWS = 256


class ReadColumns(Protocol):
    """Reads columns of an archive."""

    def __call__(self, names: Sequence[str], ids: Ids | None = None) -> tuple[Ids, pa.Table]:
        """Return ids and columns, in any order, of the rows with these ids; None: of at least the rows of a segment."""


class Columns:
    """Columns in memory or in a mapped file. Safe for concurrent calls.

    Attributes:
        num_rows: number of rows.
        names: those of `COLUMNS` that the archive has.
    """

    def __init__(self, num_rows: int, chunks: Mapping[str, Chunks], boxes: Boxes | None = None) -> None:
        """Take the chunks of each column; all but the last have `ROWS_PER_CHUNK` rows. `boxes`: see `boxes`."""
        self.num_rows = num_rows
        self.names = tuple(chunks)
        self._chunks = dict(chunks)
        self._boxes = boxes
        self._memory = HitMemory(num_rows, pa.py_buffer(b""), [], Labels.of([]))

    def chunks(self, name: str) -> Chunks:
        """Return a column as its chunks, each with `ROWS_PER_CHUNK` rows except for the last. May read the archive."""
        return self._chunks[name]

    def array(self, name: str) -> pa.ChunkedArray:
        """Return a column.

        Texts are large_string, labels a dictionary of large_string with int32 indices, footprints large_binary,
        datetime is timestamp[us, UTC], lon and lat are float64, vectors lists of int8 of one size.
        """
        return pa.chunked_array(self.chunks(name))

    def take(self, rows: Rows, names: Sequence[str]) -> pa.Table:
        """Return columns of rows, in the order of `rows`, which may repeat. Labels are large_string.

        Each column is one array. `fixed_size_rows` returns vectors int8 [N, d], contiguous.
        """
        return pa.table({name: _decoded(_take(self.chunks(name), rows)) for name in names})

    def messages(self, rows: Rows, names: Sequence[str], ids: Ids | None = None) -> list[bytes]:
        """Return rows as serialised `orbithash.v1.Hit` with these columns, and with `ids` if given."""
        return self._memory.messages(rows, names, ids)

    def boxes(self) -> Boxes | None:
        """Return the bounding box of each row in degrees, float32 [4, N]: west, south, east, north.

        The box of a footprint is rounded outwards, so that it contains the footprint; an empty footprint has an
        infinite box. A row without a valid footprint has the point (lon, lat), a row without both NaN. None: no row
        has a footprint.
        """
        return self._boxes


class ArrowColumns(Columns):
    """The columns of an Arrow file, which is mapped or in memory."""

    def __init__(self, memory: pa.Buffer, labels: Labels, boxes: Boxes | None) -> None:
        """Take the content of the file, whose labels are numbers of `labels`."""
        batches = batches_in(memory)
        num_rows = sum(map(len, batches))
        super().__init__(num_rows, decoded_chunks(batches, labels.array()), boxes)
        self._memory = HitMemory(num_rows, memory, batches, labels)


class ColumnsInMemory:
    """Columns that are kept in memory, while they are made."""

    def __init__(self) -> None:
        self._encoder = ChunkEncoder()
        self._memory = pa.BufferOutputStream()
        self._writer: Any = None

    @classmethod
    def of(cls, table: pa.Table) -> ArrowColumns:
        """Return the columns of a table."""
        made = cls()
        for chunk in chunk_tables([table]):
            made.write(chunk)
        return made.columns()

    def write(self, chunk: pa.Table) -> None:
        """Take the next chunk; all but the last have `ROWS_PER_CHUNK` rows."""
        batch = self._encoder.encode(chunk)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._memory, batch.schema)
        self._writer.write_batch(batch)

    def columns(self) -> ArrowColumns:
        """Return all columns; no chunk may follow."""
        self._writer.close()
        memory = self._memory.getvalue()
        return ArrowColumns(memory, Labels.of(self._encoder.labels), self._encoder.boxes(batches_in(memory)))


def batches_in(memory: pa.Buffer) -> list[pa.RecordBatch]:
    """Return the batches of an Arrow file without copying them."""
    reader = pa.ipc.open_file(pa.BufferReader(memory))
    return [reader.get_batch(number) for number in range(reader.num_record_batches)]


class ArchiveColumns(Columns):
    """Columns that are read from the archive when they are needed.

    The columns that every hit has, and stored vectors, are read for all rows at once and then kept in memory, unless
    there are very many rows. A column that a filter tests is kept, too. Other columns are read for single rows.
    """

    def __init__(self, ids: SortedIds, names: Sequence[str], read: ReadColumns) -> None:
        """Take the ids of the rows, the names of the columns that the archive has, and a function that reads them."""
        super().__init__(ids.num_rows, {name: () for name in COLUMNS if name in names})
        self._ids = ids
        self._read = read
        self._lock = threading.Lock()
        self._kept: set[str] = set()
        self._memories: dict[str, HitMemory] = {}

    def chunks(self, name: str) -> Chunks:
        """Return the column; the first call reads it."""
        if name not in self._kept:
            with self._lock:
                if name not in self._kept:
                    self._load(name)
        return self._chunks[name]

    def take(self, rows: Rows, names: Sequence[str]) -> pa.Table:
        """Return columns of rows; see `Columns.take`."""
        if self._is_to_keep(names):
            return super().take(rows, names)
        columns, places = self._some(rows, names)
        return columns.take(places, names)

    def messages(self, rows: Rows, names: Sequence[str], ids: Ids | None = None) -> list[bytes]:
        """Return rows as serialised hits; see `Columns.messages`."""
        parts = [self._memory.messages(rows, (), ids)]
        kept: dict[HitMemory, list[str]] = {}
        others = []
        for name in names:
            if self._is_to_keep([name]):
                self.chunks(name)
                # Columns that were read together are in the same memory.
                kept.setdefault(self._memories[name], []).append(name)
            elif name in self.names:
                others.append(name)
        parts += [memory.messages(rows, together) for memory, together in kept.items()]
        if others:
            columns, places = self._some(rows, others)
            parts.append(columns.messages(places, others))
        # The concatenation of two serialised messages is their union.
        return [b"".join(fields) for fields in zip(*parts, strict=True)]

    def boxes(self) -> Boxes | None:
        """Return the boxes; the first call reads the footprints."""
        self.chunks("footprint")
        return self._boxes

    def _is_to_keep(self, names: Sequence[str]) -> bool:
        return all(
            name in self._kept or (name in self.names and self.num_rows <= _MAX_KEPT.get(name, 0)) for name in names
        )

    def _some(self, rows: Rows, names: Sequence[str]) -> tuple[Columns, Rows]:
        """Read rows from the archive; return columns, and where in them the rows are."""
        ids = self._ids.of_rows(rows)
        found, table = self._read(names, np.unique(ids))
        order = np.argsort(found)
        places = order[np.minimum(found.searchsorted(ids, sorter=order), len(found) - 1)] if len(found) else order
        _check_found(np.array_equal(found[places], ids), len(ids), len(found))
        return ColumnsInMemory.of(table), places

    def _load(self, name: str) -> None:
        """Read a column of all rows, and those that are needed together with it."""
        names: Sequence[str] = [name]
        if name == "footprint":
            names = BOX_COLUMNS
        elif name in USUAL and self._is_to_keep([name]):
            names = [each for each in USUAL if each in self.names]
        ids, table = self._read(names)
        rows = self._ids.rows_of(ids)
        order = np.argsort(rows, kind="stable")[int((rows < 0).sum()) :]
        _check_found(np.array_equal(rows[order], np.arange(self.num_rows)), self.num_rows, len(order))
        columns = ColumnsInMemory.of(table)
        if len(order) < len(rows) or (np.diff(order) != 1).any():
            ordered = ColumnsInMemory()
            for start in range(0, max(len(order), 1), ROWS_PER_CHUNK):
                ordered.write(columns.take(order[start : start + ROWS_PER_CHUNK], names))
            columns = ordered.columns()
        self._chunks.update({each: columns.chunks(each) for each in names})
        self._memories.update(dict.fromkeys(names, columns._memory))
        if name == "footprint":
            self._boxes = columns.boxes()
        self._kept.update(names)


def _check_found(is_found: bool, num_rows: int, num_found: int) -> None:
    if not is_found:
        raise LookupError(f"the archive has {num_found:,} of {num_rows:,} rows of a segment")


def _take(chunks: Chunks, rows: Rows) -> pa.Array:
    """Return rows of a column. `ChunkedArray.take` would first join all chunks of a text column."""
    if not len(rows):
        return chunks[0].slice(0, 0)
    if len(chunks) == 1:
        return chunks[0].take(pa.array(rows))
    first, last = int(rows[0]), int(rows[-1])
    if last - first == len(rows) - 1 and (np.diff(rows.astype(np.int64)) == 1).all():
        return pa.concat_arrays(pa.chunked_array(chunks).slice(first, len(rows)).chunks)
    if len(rows) <= _FEW_ROWS:
        pairs = (divmod(row, ROWS_PER_CHUNK) for row in rows.tolist())
        return pa.concat_arrays([chunks[number].slice(place, 1) for number, place in pairs])
    numbers, places = np.divmod(rows, ROWS_PER_CHUNK)
    order = np.argsort(numbers, kind="stable")
    numbers, places = numbers[order], places[order]
    bounds = [0, *(np.flatnonzero(np.diff(numbers)) + 1).tolist(), len(rows)]
    parts = [
        chunks[int(numbers[start])].take(pa.array(places[start:stop])) for start, stop in itertools.pairwise(bounds)
    ]
    joined = parts[0] if len(parts) == 1 else pa.concat_arrays(parts)
    if (np.diff(order) == 1).all():
        return joined
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return joined.take(pa.array(back))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
