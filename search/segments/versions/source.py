"""Segments of one shard, read from its archive."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.changes import Changes, num_ids, part_batches
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import Ids
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.segments.chunks import COLUMNS
from orbithash.search.segments.columns import ReadColumns
from orbithash.search.segments.dealing import ShardPart
from orbithash.search.segments.files import build_segment, write_segment
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.versions.merging import MAX_ROWS

__all__ = ["MAX_ROWS_IN_MEMORY", "ShardSource"]

logger = logging.getLogger(__name__)

Batches = Iterator[tuple[Ids, pa.Table]]

# With fewer rows, a change stays in memory until it is merged with others.
_MIN_ROWS_IN_FILE = 2**16
# Without files, the columns of at most this number of rows are kept in memory; those of more are read when needed.
MAX_ROWS_IN_MEMORY = 2**16


class ShardSource:
    """Reads one shard of the archive at a location.

    Attributes:
        folder: where segments are written; None: they are in memory.
        is_stale: whether columns of a segment could not be read any more, so that all rows have to be read again.
    """

    def __init__(self, location: str, bits: int, part: ShardPart, index: str) -> None:
        self.folder: Path | None = None
        self.is_stale = False
        self.part = part
        self._location = location
        self._bits = bits
        self._index = index
        self._model_id: str | None = None

    def open(self, version: int) -> Archive:
        """Return a version of the archive; `InputError` if it cannot be read or is of another model than before."""
        archive = Archive.open(self._location, version)
        if archive.bits != self._bits or self._model_id not in (None, archive.model_id):
            raise InputError(f"{self._location} was replaced by an archive of another model; open it anew")
        self._model_id = archive.model_id
        return archive

    def all_rows(self, archive: Archive) -> list[Segment]:
        """Return segments of all rows of the shard."""
        count = num_ids(archive)
        # Whole blocks of all shards, with `MAX_ROWS` ids of each.
        step = MAX_ROWS * self.part.deal.num_shards
        parts = [replace(self.part, first=first, end=min(first + step, count)) for first in range(0, count, step)]
        return [self._segment_of(archive, part, count) for part in parts]

    def written_rows(self, archive: Archive, changes: Changes) -> Segment | None:
        """Return a segment of the rows that changes have written; None if there are none."""
        if not len(changes.written):
            return None
        batches = _with_first(changes.batches(_columns(archive, with_code=True)), archive)
        if self.folder is not None and len(changes.written) >= _MIN_ROWS_IN_FILE:
            try:
                return write_segment(self.folder, batches, self._bits, self._index)
            except OSError as error:
                self._log_no_files(error)
                batches = _with_first(changes.batches(_columns(archive, with_code=True)), archive)
        return build_segment(batches, self._bits, self._index)

    def reader(self, version: int, part: ShardPart | None = None) -> ReadColumns:
        """Return the function that reads columns of a part of the shard (None: all of it) in one version.

        The function raises `Unavailable` when the version has been removed.
        """

        def read(names: Sequence[str], ids: Ids | None = None) -> tuple[Ids, pa.Table]:
            try:
                archive = self.open(version)
            except InputError as error:
                self.is_stale = True
                raise Unavailable(f"columns of version {version} were removed: {error}; try again later") from error
            if ids is not None:
                return archive.scan(names, ids)
            batches = list(
                _with_first(part_batches(archive, names, part or self.part, num_ids(archive)), archive, names)
            )
            return np.concatenate([ids for ids, _ in batches]), pa.concat_tables([table for _, table in batches])

        return read

    def _segment_of(self, archive: Archive, part: ShardPart, count: int) -> Segment:
        if self.folder is not None:
            batches = part_batches(archive, _columns(archive, with_code=True), part, count)
            try:
                return write_segment(self.folder, _with_first(batches, archive), self._bits, self._index)
            except OSError as error:
                self._log_no_files(error)
        if count <= MAX_ROWS_IN_MEMORY:
            batches = part_batches(archive, _columns(archive, with_code=True), part, count)
            return build_segment(_with_first(batches, archive), self._bits, self._index)
        batches = _with_first(part_batches(archive, ["code"], part, count), archive, ["code"])
        read = self.reader(archive.version, part)
        return build_segment(batches, self._bits, self._index, read, _columns(archive, with_code=False))

    def _log_no_files(self, error: OSError) -> None:
        logger.warning(
            "shard %d keeps rows in memory, because they cannot be written to %s: %s",
            self.part.number,
            self.folder,
            error,
        )


def _columns(archive: Archive, with_code: bool) -> list[str]:
    """Return the columns that segments of an archive have."""
    return [*(["code"] if with_code else []), *(name for name in COLUMNS if name in archive.schema.names)]


def _with_first(batches: Batches, archive: Archive, columns: Sequence[str] | None = None) -> Batches:
    """Yield a batch without rows, and then `batches`."""
    names = _columns(archive, with_code=True) if columns is None else columns
    yield np.empty(0, np.uint64), pa.schema([archive.schema.field(name) for name in names]).empty_table()
    yield from batches
