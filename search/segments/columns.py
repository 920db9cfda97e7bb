"""Columns of the rows of a segment, in row order.

They are Arrow arrays in chunks of `ROWS_PER_CHUNK` rows: of a file that is mapped, of a table in memory, or read from
the archive when they are needed.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.search.index.answers import Ids
from orbithash.search.segments.chunks import (
    BOX_COLUMNS,
    ROWS_PER_CHUNK,
    Boxes,
    ChunkEncoder,
    chunk_tables,
    decoded_chunks,
)
from orbithash.search.segments.ids import SortedIds

__all__ = ["ArchiveColumns", "Columns", "ReadColumns"]

Chunks = Sequence[pa.Array]


class ReadColumns(Protocol):
    """Reads columns of an archive."""

    def __call__(self, names: Sequence[str], ids: Ids | None = None) -> tuple[Ids, pa.Table]:
        """Return ids and columns, in any order, of the rows with these ids; None: of at least the rows of a segment."""


class Columns:
    """Columns in memory or in a mapped file. Safe for concurrent calls.

    Attributes:
        num_rows: number of rows.
        names: any of key, uri, label, caption, datetime, lon, lat, footprint and vector.
    """

    def __init__(self, num_rows: int, chunks: Mapping[str, Chunks], boxes: Boxes | None = None) -> None:
        """Take the chunks of each column; all but the last have `ROWS_PER_CHUNK` rows. `boxes`: see `boxes`."""
        self.num_rows = num_rows
        self.names = tuple(chunks)
        self._chunks = dict(chunks)
        self._boxes = boxes

    def chunks(self, name: str) -> Chunks:
        """Return a column as its chunks, each with `ROWS_PER_CHUNK` rows except for the last. May read the archive."""
        return self._chunks[name]

    def array(self, name: str) -> pa.ChunkedArray:
        """Return a column.

        Texts are large_string, labels a dictionary of large_string with int32 indices, footprints large_binary,
        datetime is timestamp[us, UTC], lon and lat are float64, vectors lists of int8 of one size.
        """
        return pa.chunked_array(self.chunks(name))

    def take(self, rows: npt.NDArray[np.integer], names: Sequence[str]) -> pa.Table:
        """Return columns of rows, in the order of `rows`, which may repeat. Labels are large_string."""
        return pa.table({name: _decoded(_take(self.chunks(name), rows)) for name in names})

    def boxes(self) -> Boxes | None:
        """Return the bounding box of each row in degrees, float32 [4, N]: west, south, east, north.

        The box of a footprint is rounded outwards, so that it contains the footprint. A row without a footprint has
        the point (lon, lat), a row without both NaN. None: no row has a footprint.
        """
        return self._boxes


class ArchiveColumns(Columns):
    """Columns that are read from the archive: each column once, when it is needed first, and then kept in memory."""

    def __init__(self, ids: SortedIds, names: Sequence[str], read: ReadColumns) -> None:
        """Take the ids of the rows, the names of the columns that the archive has, and a function that reads them."""
        super().__init__(ids.num_rows, dict.fromkeys(names, ()))
        self._ids = ids
        self._read = read
        self._lock = threading.Lock()
        self._loaded: set[str] = set()

    def chunks(self, name: str) -> Chunks:
        """Return the column; the first call reads it."""
        if name not in self._loaded:
            with self._lock:
                if name not in self._loaded:
                    self._load([*BOX_COLUMNS] if name == "footprint" else [name])
        return self._chunks[name]

    def boxes(self) -> Boxes | None:
        """Return the boxes; the first call reads the footprints."""
        self.chunks("footprint")
        return self._boxes

    def _load(self, names: Sequence[str]) -> None:
        ids, table = self._read(names)
        rows = self._ids.rows_of(ids)
        order = np.argsort(rows, kind="stable")[int((rows < 0).sum()) :]
        if not np.array_equal(rows[order], np.arange(self.num_rows)):
            raise LookupError(f"the archive has {len(order):,} of the {self.num_rows:,} rows of a segment")
        encoder = ChunkEncoder()
        batches = [encoder.encode(chunk) for chunk in chunk_tables([table.take(pa.array(order))])]
        self._chunks.update(decoded_chunks(batches, pa.array(encoder.labels, pa.large_string())))
        self._boxes = encoder.boxes(batches) if "footprint" in names else self._boxes
        self._loaded.update(names)


def _take(chunks: Chunks, rows: npt.NDArray[np.integer]) -> pa.Array:
    """Return rows of a column. `ChunkedArray.take` joins the chunks of a text before it takes from them."""
    if not len(rows):
        return chunks[0].slice(0, 0)
    numbers, places = np.divmod(rows, ROWS_PER_CHUNK)
    order = np.argsort(numbers, kind="stable")
    numbers, places = numbers[order], places[order]
    bounds = np.flatnonzero(np.diff(numbers)) + 1
    parts = [
        chunks[int(numbers[start])].take(pa.array(places[start:stop]))
        for start, stop in zip([0, *bounds], [*bounds, len(rows)], strict=True)
    ]
    if len(parts) == 1 and (np.diff(order) == 1).all():
        return parts[0]
    back = np.empty(len(rows), np.int64)
    back[order] = np.arange(len(rows))
    return pa.concat_arrays(parts).take(pa.array(back))


def _decoded(array: pa.Array) -> pa.Array:
    return array.dictionary_decode() if pa.types.is_dictionary(array.type) else array
