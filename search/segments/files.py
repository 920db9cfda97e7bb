"""Segments as files: NAME.columns, an Arrow file, and NAME.codes, the codes, the index and the ids (`layout.py`).

A segment is written whole or not at all: both files get their names when they are complete, the codes last, which hold
the checksum of the columns. Without its codes a segment does not exist. NAME is a hash of the content, so two writers
of the same rows write the same files. Files are not flushed to the disk: they can be made again from the archive, and
after a power failure the checksums show what is missing.
"""

import fcntl
import os
import secrets
import shutil
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.codes import Codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.index.row_index import CodeRows, RowIndex, build_row_index
from orbithash.search.index.row_index import warm_up as warm_up_index
from orbithash.search.segments.bits import Bits, full
from orbithash.search.segments.bits import rows as set_rows
from orbithash.search.segments.chunks import ROWS_PER_CHUNK, Labels
from orbithash.search.segments.columns import ArchiveColumns, ArrowColumns, ColumnsInMemory, ReadColumns
from orbithash.search.segments.ids import SortedIds
from orbithash.search.segments.layout import DamagedSegment, checksum_of, map_file, read_arrays, write_arrays
from orbithash.search.segments.segment import Segment, code_numbers
from orbithash.search.segments.writing import (
    Batches,
    ColumnsWriter,
    FinishedColumns,
    create_file,
    write_columns,
)

__all__ = [
    "DamagedSegment",
    "build_segment",
    "merge_segments",
    "open_segment",
    "remove_segments",
    "warm_up",
    "write_segment",
]

Rows = npt.NDArray[np.uint32]
Sources = npt.NDArray[np.uint16]

# Begins the names of the arrays of the index.
_INDEX = "index."
_COLUMNS, _CODES, _PART, _LOCK = ".columns", ".codes", ".part", ".lock"


def write_segment(folder: Path, batches: Batches, bits: int, index: str = "exact") -> Segment:
    """Write a segment and return it, mapped from its files.

    Batches are written as they come if their ids ascend. Otherwise they are written in their order first and then once
    more, sorted. The memory that this takes grows with the codes and ids of all rows, and with one batch.

    Args:
        folder: created with mode 0700 if it does not exist.
        batches: unique ids uint64 [n], in any order, and tables with the column code and any of `chunks.COLUMNS`; at
            least one batch, which may have no rows.
        bits: bits of a code.
        index: the name of an index; see `build_row_index`.

    Raises:
        InputError: an id occurs twice, codes of another width, an unknown index, or a folder that other users can
            write.
        OSError: the folder cannot be written, or the disk is full; nothing remains of the segment.
    """
    _make_folder(folder)
    with _temporary_folder(folder) as part, ColumnsWriter(part) as writer:
        (ids, codes), file = write_columns(writer.new_file, batches, bits)
        # The thread completes the file while the codes are sorted here.
        finished = file.finish()
        code_rows = CodeRows.build(codes, bits)
        del codes
        row_index = build_row_index(index, code_rows, bits)
        sorted_ids = SortedIds.of(ids)
        del ids
        name = _write_codes(part / "codes", sorted_ids, code_rows, bits, index, row_index, finished.result())
        del sorted_ids, code_rows
        return _publish(folder, name, file.path, part / "codes", bits, index, row_index)


def build_segment(
    batches: Batches, bits: int, index: str = "exact", read: ReadColumns | None = None, names: Sequence[str] = ()
) -> Segment:
    """Return a segment in memory.

    Args:
        batches: as for `write_segment`; with `read`, only the column code is used.
        bits: bits of a code.
        index: the name of an index.
        read: reads columns from the archive when they are needed; None: the columns of the batches are kept in memory.
        names: the columns that `read` can read.

    Raises:
        InputError: as `write_segment`.
    """
    if read is not None:
        batches = ((ids, table.select(["code"])) for ids, table in batches)
    (ids, codes), in_memory = write_columns(ColumnsInMemory, batches, bits)
    columns = in_memory.columns() if read is None else ArchiveColumns(SortedIds.of(ids), names, read)
    return Segment.build(ids, codes, bits, index, columns)


def open_segment(folder: Path, name: str, bits: int, index: str = "exact") -> Segment:
    """Return a segment, mapped from its files, after a comparison of all checksums.

    Args:
        folder: the folder that `write_segment` wrote it to.
        name: `Segment.name`.
        bits: bits of a code.
        index: the name of an index. If it is not that of the file, the index is built in memory.

    Raises:
        DamagedSegment: a file is missing, truncated, changed, of another format version or can be written by other
            users; the codes have other `bits`.
    """
    return _open(folder / f"{name}{_COLUMNS}", folder / f"{name}{_CODES}", name, bits, index)


def merge_segments(
    folder: Path | None,
    parts: Sequence[tuple[Segment, Bits | None]],
    bits: int,
    index: str = "exact",
    read: ReadColumns | None = None,
) -> Segment:
    """Return a segment of the rows of several segments, the same that `write_segment` makes of these rows.

    Args:
        folder: where to write it; None: in memory.
        parts: at least one segment, each with the bits of the rows to take; None: all. No id is taken twice.
        bits: bits of a code.
        index: the name of an index.
        read: reads the columns of a segment in memory from the archive when they are needed; None: the columns are
            taken from the parts.

    Raises:
        InputError, OSError: as `write_segment`.
    """
    segments = [segment for segment, _ in parts]
    rows = [set_rows(full(segment.num_rows) if taken is None else taken) for segment, taken in parts]
    ids = np.concatenate([segment.ids_of(part) for segment, part in zip(segments, rows, strict=True)])
    order = np.argsort(ids, kind="stable")
    ids, numbers = ids[order], np.concatenate(rows)[order]
    sources = np.repeat(np.arange(len(parts), dtype=np.uint16), list(map(len, rows)))[order]
    del order, rows
    names = segments[0].columns.names

    if folder is None and read is not None:
        codes = _take_codes(segments, sources, numbers, bits)
        return Segment.build(ids, codes, bits, index, ArchiveColumns(SortedIds.of(ids), names, read))

    def batches() -> Batches:
        # A segment without rows needs an empty batch.
        for start in range(0, max(len(ids), 1), ROWS_PER_CHUNK):
            chunk = slice(start, start + ROWS_PER_CHUNK)
            codes = _take_codes(segments, sources[chunk], numbers[chunk], bits)
            table = _take_columns(segments, sources[chunk], numbers[chunk], names)
            array = pa.FixedSizeListArray.from_arrays(codes.reshape(-1), num_bytes(bits))
            yield ids[chunk], table.append_column("code", array)

    return build_segment(batches(), bits, index) if folder is None else write_segment(folder, batches(), bits, index)


def warm_up(bits: int) -> float:
    """Compile, or load, all kernels that segments of codes of `bits` bits need; return the seconds."""
    begun = time.perf_counter()
    warm_up_index(bits)
    codes = pa.FixedSizeListArray.from_arrays(pa.nulls(num_bytes(bits), pa.uint8()).fill_null(0), num_bytes(bits))
    footprint = pa.array([bytes(1)], pa.binary())
    place = pa.array([0.0])
    table = pa.table({"code": codes, "key": ["a"], "lon": place, "lat": place, "footprint": footprint})
    build_segment([(np.zeros(1, np.uint64), table)], bits).hits(np.zeros(1, np.uint32))
    return time.perf_counter() - begun


def remove_segments(folder: Path, keep: Iterable[str]) -> bool:
    """Remove the segments whose names are not in `keep`, and what writers that were killed have left.

    Segments that are mapped stay readable for the processes that mapped them. Returns False, and removes nothing, while
    a segment is being written into the folder, and if the folder cannot be written.
    """
    kept = {f"{name}{suffix}" for name in keep for suffix in (_COLUMNS, _CODES)}
    with _locked(folder, fcntl.LOCK_EX | fcntl.LOCK_NB) as is_locked:
        if not is_locked:
            return not folder.exists()
        # Codes first: columns without codes are no segment.
        for path in sorted(folder.iterdir()):
            if path.suffix == _PART:
                shutil.rmtree(path, ignore_errors=True)
            elif path.suffix in (_COLUMNS, _CODES) and path.name not in kept:
                path.unlink(missing_ok=True)
    return True


def _write_codes(
    path: Path,
    ids: SortedIds,
    code_rows: CodeRows,
    bits: int,
    index: str,
    row_index: RowIndex,
    columns: FinishedColumns,
) -> str:
    """Write the file of codes; return the name of the segment."""
    arrays = {
        "ids": ids.offsets,
        "words": code_rows.words,
        "starts": code_rows.starts,
        "rows": code_rows.rows,
        "code_numbers": code_numbers(code_rows),
        "boxes": columns.boxes,
        "label_offsets": columns.labels.offsets,
        "label_text": columns.labels.text,
        **{f"{_INDEX}{name}": array for name, array in row_index.arrays().items()},
    }
    description = {
        "bits": bits,
        "index": index,
        "first_id": ids.base,
        "num_rows": ids.num_rows,
        "columns": {"num_bytes": columns.num_bytes, "checksum": columns.checksum},
    }
    with os.fdopen(create_file(path), "wb") as file:
        return write_arrays(file, {name: array for name, array in arrays.items() if array is not None}, description)


def _publish(
    folder: Path, name: str, columns: Path, codes: Path, bits: int, index: str, row_index: RowIndex
) -> Segment:
    """Give the files of a segment their names, unless they are already there; return the segment."""
    with suppress(DamagedSegment):
        return open_segment(folder, name, bits, index)
    # Mapped before the rename: from then on another process may remove them.
    segment = _open(columns, codes, name, bits, index, row_index)
    columns.replace(folder / f"{name}{_COLUMNS}")
    codes.replace(folder / f"{name}{_CODES}")
    return segment


def _open(
    columns: Path, codes: Path, name: str, bits: int, index: str, written_index: RowIndex | None = None
) -> Segment:
    """Return the segment of two files; `written_index`: they were just written, with this index."""
    is_verified = written_index is not None
    name_in_file, description, arrays = read_arrays(codes, map_file(codes), is_verified)
    if name_in_file != name:
        raise DamagedSegment(f"{codes} holds the segment {name_in_file}, not {name}")
    if description["bits"] != bits:
        raise DamagedSegment(f"{codes} holds codes of {description['bits']} bits, not of {bits}")
    mapped = map_file(columns)
    if len(mapped) != description["columns"]["num_bytes"]:
        raise DamagedSegment(f"{columns} has {len(mapped):,} bytes instead of {description['columns']['num_bytes']:,}")
    if not is_verified and checksum_of(mapped) != description["columns"]["checksum"]:
        raise DamagedSegment(f"{columns} is damaged: wrong checksum")
    labels = Labels(arrays["label_offsets"], arrays["label_text"])
    code_rows = CodeRows(arrays["words"], arrays.get("starts"), arrays["rows"])
    index_arrays = {key.removeprefix(_INDEX): array for key, array in arrays.items() if key.startswith(_INDEX)}
    if description["index"] != index:
        index_arrays = {}
    if written_index is None or index_arrays:
        written_index = build_row_index(index, code_rows, bits, index_arrays or None)
    return Segment(
        name,
        bits,
        SortedIds(description["first_id"], description["num_rows"], arrays.get("ids")),
        code_rows,
        index,
        written_index,
        ArrowColumns(pa.py_buffer(mapped), labels, arrays.get("boxes")),
        arrays["code_numbers"],
    )


def _take_codes(segments: Sequence[Segment], sources: Sources, numbers: Rows, bits: int) -> Codes:
    """Return codes of rows of several segments: row i is row numbers[i] of segment sources[i]."""
    codes = np.empty((len(numbers), num_bytes(bits)), np.uint8)
    for source, segment in enumerate(segments):
        is_here = sources == source
        codes[is_here] = segment.codes_of(numbers[is_here])
    return codes


def _take_columns(segments: Sequence[Segment], sources: Sources, numbers: Rows, names: Sequence[str]) -> pa.Table:
    """Return columns of rows of several segments; see `_take_codes`."""
    tables = [segment.columns.take(numbers[sources == source], names) for source, segment in enumerate(segments)]
    tables = [table for table in tables if len(table)] or tables[:1]
    if len(tables) == 1:
        return tables[0]
    back = np.empty(len(numbers), np.int64)
    back[np.argsort(sources, kind="stable")] = np.arange(len(numbers))
    return pa.concat_tables(tables).combine_chunks().take(pa.array(back))


def _make_folder(folder: Path) -> None:
    """Create the folder; `InputError` if other users can write it."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = folder.stat()
    if status.st_uid not in (os.geteuid(), 0) or status.st_mode & 0o022:
        raise InputError(f"{folder} can be written by other users; give another folder, or run chmod go-w on this one")


@contextmanager
def _temporary_folder(folder: Path) -> Iterator[Path]:
    """Yield a new folder in `folder`, which is removed at the end. Holds the lock that keeps `remove_segments` away."""
    with _locked(folder, fcntl.LOCK_SH):
        part = folder / f".{secrets.token_hex(8)}{_PART}"
        part.mkdir(mode=0o700)
        try:
            yield part
        finally:
            shutil.rmtree(part, ignore_errors=True)


@contextmanager
def _locked(folder: Path, operation: int) -> Iterator[bool]:
    """Lock the folder; yield whether that was possible."""
    with ExitStack() as stack:
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            stack.callback(os.close, lock)
            fcntl.flock(lock, operation)
        except OSError:
            is_locked = False
        else:
            is_locked = True
        yield is_locked
