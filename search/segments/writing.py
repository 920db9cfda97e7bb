"""The parts of a segment while it is made: columns in a file or in memory, ids and codes of its batches."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, Protocol, Self, TypeVar

import numpy as np
import pyarrow as pa

from orbithash.encoders.codes import Codes, check_codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import Ids
from orbithash.search.segments.boxes import Boxes
from orbithash.search.segments.chunks import (
    COLUMNS,
    ROWS_PER_CHUNK,
    ChunkEncoder,
    Labels,
    chunk_tables,
)
from orbithash.search.segments.columns import ArrowColumns, Columns, batches_in
from orbithash.search.segments.layout import checksum_of, map_file
from orbithash.search.segments.segment import check_unique, is_ascending

__all__ = [
    "Batches",
    "ColumnsWriter",
    "FinishedColumns",
    "SortedCodes",
    "create_file",
    "write_columns",
]

Batches = Iterable[tuple[Ids, pa.Table]]

# Chunks that wait for the thread that writes.
_MAX_WAITING = 2


class SortedCodes(NamedTuple):
    """Ids uint64 [N] and codes uint8 [N, B] of rows by ascending id."""

    ids: Ids
    codes: Codes


class _Target(Protocol):
    """Takes the chunks of a segment in their order."""

    def write(self, chunk: pa.Table) -> None:
        """Take the next chunk."""

    def columns(self) -> Columns:
        """Return all columns; no chunk may follow."""


TargetT = TypeVar("TargetT", bound=_Target)


class FinishedColumns(NamedTuple):
    """A complete file of columns: its size, checksum, labels and boxes."""

    num_bytes: int
    checksum: str
    labels: Labels
    boxes: Boxes | None


class ColumnsWriter:
    """A thread that writes files of columns into a folder; at the end of its context they are closed."""

    def __init__(self, folder: Path) -> None:
        """Take the folder."""
        self._folder = folder
        self._files: list[ColumnsFile] = []

    def __enter__(self) -> Self:
        self._executor = ThreadPoolExecutor(1, "segment-columns")
        return self

    def __exit__(self, *error: object) -> None:
        self._executor.shutdown(cancel_futures=True)
        # An open file takes its room on the disk even when it is removed.
        for file in self._files:
            file.close()

    def new_file(self) -> "ColumnsFile":
        """Return a new file."""
        file = ColumnsFile(self._folder / f"columns-{len(self._files)}", self._executor)
        self._files.append(file)
        return file


class ColumnsFile:
    """A file of columns that a thread of an executor writes."""

    def __init__(self, path: Path, executor: Executor) -> None:
        """Create the file, which must not exist."""
        self.path = path
        self._executor = executor
        self._waiting: deque[Future[None]] = deque()
        self._encoder = ChunkEncoder()
        self._writer: Any = None
        os.close(create_file(path))
        self._file = pa.OSFile(str(path), "wb")

    def write(self, chunk: pa.Table) -> None:
        """Let the thread write the next chunk; waits while it is late. Raises `OSError` for an earlier chunk."""
        self._waiting.append(self._executor.submit(self._write, chunk))
        if len(self._waiting) > _MAX_WAITING:
            self._waiting.popleft().result()

    def finish(self) -> "Future[FinishedColumns]":
        """Complete the file in the thread."""
        return self._executor.submit(self._finish)

    def columns(self) -> Columns:
        """Complete the file and return its columns, mapped."""
        finished = self.finish().result()
        return ArrowColumns(pa.py_buffer(map_file(self.path)), finished.labels, finished.boxes)

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()

    def _write(self, chunk: pa.Table) -> None:
        batch = self._encoder.encode(chunk)
        if self._writer is None:
            self._writer = pa.ipc.new_file(self._file, batch.schema)
        self._writer.write_batch(batch)

    def _finish(self) -> FinishedColumns:
        for written in self._waiting:
            written.result()
        self._writer.close()
        self._file.close()
        mapped = map_file(self.path)
        boxes = self._encoder.boxes(batches_in(pa.py_buffer(mapped)))
        return FinishedColumns(len(mapped), checksum_of(mapped), Labels.of(self._encoder.labels), boxes)


def write_columns(new_target: Callable[[], TargetT], batches: Batches, bits: int) -> tuple[SortedCodes, TargetT]:
    """Write the columns of batches by ascending id; return ids and codes, and the target that has the columns.

    Batches are written as they come. If their ids do not ascend, the rows are written once more, sorted. Raises
    `InputError` for an id that occurs twice and for codes of another width.
    """
    collected: list[SortedCodes] = []
    target = new_target()
    for chunk in chunk_tables(_without_codes(batches, bits, collected)):
        target.write(chunk)
    ids, codes = (np.concatenate(parts) for parts in zip(*collected, strict=True))
    collected.clear()
    is_sorted = is_ascending(ids)
    if not is_sorted:
        order = np.argsort(ids, kind="stable")
        ids, codes = ids[order], codes[order]
    check_unique(ids)
    if not is_sorted:
        arrived, target = target.columns(), new_target()
        for start in range(0, len(order), ROWS_PER_CHUNK):
            target.write(arrived.take(order[start : start + ROWS_PER_CHUNK], arrived.names))
    return SortedCodes(ids, codes), target


def _without_codes(batches: Batches, bits: int, collected: list[SortedCodes]) -> Iterator[pa.Table]:
    """Yield the columns of each batch that a segment keeps, and append its ids and codes to `collected`."""
    for ids, table in batches:
        # Copies: values of a slice would keep its whole batch in memory.
        codes = np.concatenate([np.empty(0, np.uint8), *(part.flatten().to_numpy() for part in table["code"].chunks)])
        if len(codes) != len(ids) * num_bytes(bits):
            raise InputError(f"{len(ids):,} codes of {bits} bits have {num_bytes(bits)} bytes each, got {len(codes):,}")
        codes = check_codes(codes.reshape(-1, num_bytes(bits)), bits)
        collected.append(SortedCodes(np.array(ids, np.uint64), codes))
        yield table.select([name for name in COLUMNS if name in table.column_names])


def create_file(path: Path) -> int:
    """Return the descriptor of a new file that only this user may read and write."""
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o600)
