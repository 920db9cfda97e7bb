"""Read a part of the rows of a version, and what changed in it between two versions.

A row that is replaced keeps its id, and compaction moves rows without changing them. New and replaced rows are in data
files that the older version lacks; Lance knows for each row the version that last wrote it, so rows that compaction has
only moved are skipped. Lance also lists the rows that were deleted.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.storage import open_dataset
from orbithash.encoders.errors import InputError
from orbithash.encoders.lance_errors import one_line_errors

__all__ = ["CannotFollow", "Changes", "RowPart", "changes_since", "commit_id", "num_ids", "part_batches"]

Ids = npt.NDArray[np.uint64]

# Operations of Lance that can be followed: rows keep their ids, and the versions that last wrote them are known.
# Operations that Lance does not describe have the type of the base class; they change no rows.
_FOLLOWED = ("Append", "BaseOperation", "CreateIndex", "Delete", "Rewrite", "Update", "UpdateConfig")
_WRITING = ("Append", "Update")

_ROWS_PER_BATCH = 2**16
# Maximum number of ids, and of ranges of ids, that Lance is asked to select; with more, all rows are read.
_MAX_IDS, _MAX_RANGES = 2**12, 2**10


class CannotFollow(InputError):
    """The changes between two versions are not known: the newer one has to be read as a whole."""


class RowPart(Protocol):
    """A part of the rows of an archive."""

    def contains(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which rows belong to the part, bool [N]."""

    def ranges(self, num_ids: int, max_ranges: int) -> list[tuple[int, int]] | None:
        """Return the ids below `num_ids` of the part as ranges (first, end), ascending; None: more than `max_ranges`.

        `end` is exclusive.
        """


@dataclass(frozen=True)
class Changes:
    """The difference between two versions in one part of the rows.

    Attributes:
        removed: ids of the rows that only the older version has, uint64 [R], in any order. It may contain ids that
            neither version has.
        written: ids of the rows that are new or were replaced, uint64 [N], in any order. It may contain rows that did
            not change.
    """

    removed: Ids
    written: Ids
    _scan: "_Scan"
    _condition: str
    _part: RowPart

    def batches(self, columns: Sequence[str]) -> Iterator[tuple[Ids, pa.Table]]:
        """Yield the ids and `columns` of the written rows in batches."""
        if len(self.written) <= _MAX_IDS:
            ids = ", ".join(map(str, self.written.tolist()))
            yield from self._scan.batches(columns, f"_rowid IN ({ids or 'NULL'})")
        else:
            yield from _only(self._part, self._scan.batches(columns, self._condition))


@dataclass(frozen=True)
class _Scan:
    """A scan of some fragments of a dataset.

    Attributes:
        dataset: a version.
        fragments: the fragments; None: all.
    """

    path: str
    dataset: Any
    fragments: Sequence[Any] | None = None

    def batches(self, columns: Sequence[str], condition: str = "") -> Iterator[tuple[Ids, pa.Table]]:
        """Yield ids and columns of the rows that pass a condition in Lance's SQL ("": all)."""
        with one_line_errors(self.path):
            scanner = self.dataset.scanner(
                columns=["_rowid", *columns],
                filter=condition or None,
                fragments=self.fragments,
                batch_size=_ROWS_PER_BATCH,
                # One fragment ahead: the memory that this takes is what is read ahead.
                fragment_readahead=1,
                # Only the values of rows that pass are read.
                late_materialization=True if condition else None,
            )
            for batch in scanner.to_batches():
                yield batch["_rowid"].to_numpy(), pa.Table.from_batches([batch.select(list(columns))])

    def ids(self, part: RowPart, condition: str) -> Ids:
        """Return the ids of the rows of a part that pass a condition."""
        found = [ids[part.contains(ids)] for ids, _ in self.batches((), condition)]
        return np.concatenate([np.empty(0, np.uint64), *found])


def num_ids(archive: Archive) -> int:
    """Return the smallest number that is greater than all ids."""
    scan = _Scan(archive.path, open_dataset(archive.path, archive.version))
    return 1 + max((int(ids.max()) for ids, _ in scan.batches(()) if len(ids)), default=-1)


def part_batches(
    archive: Archive, columns: Sequence[str], part: RowPart, num_ids: int
) -> Iterator[tuple[Ids, pa.Table]]:
    """Yield the ids and `columns` of the rows of a part with ids below `num_ids`, in batches, in any order.

    Nothing else is read, unless the part consists of very many ranges of ids.
    """
    scan = _Scan(archive.path, open_dataset(archive.path, archive.version))
    ranges = part.ranges(num_ids, _MAX_RANGES)
    if ranges is None:
        return _only(part, scan.batches(columns))
    if not ranges:
        return iter(())
    if ranges == [(0, num_ids)]:
        return scan.batches(columns)
    return scan.batches(columns, " OR ".join(f"(_rowid >= {first} AND _rowid < {end})" for first, end in ranges))


def commit_id(archive: Archive) -> str:
    """Return a unique id of the commit that made this version; it tells an archive from another one in its place."""
    with one_line_errors(archive.path):
        dataset = open_dataset(archive.path, archive.version)
        if (transaction := _transaction(dataset, archive.version)) is not None:
            return str(transaction.uuid)
        # A compaction has written files with unique names.
        files = sorted(map(_files, dataset.get_fragments()))
        return hashlib.sha256(repr(files).encode()).hexdigest()


def changes_since(archive: Archive, version: int, part: RowPart) -> Changes:
    """Return what changed from an older version to that of `archive` in a part of the rows.

    Raises:
        CannotFollow: the older version was removed, or a commit since then replaced or restored all rows, or changed
            the columns.
    """
    newer = open_dataset(archive.path, archive.version)
    try:
        older = open_dataset(archive.path, version)
        with one_line_errors(archive.path):
            transactions = [_transaction(newer, later) for later in range(version + 1, archive.version + 1)]
            removed = newer.delta(compared_against=version).get_deleted_row_ids().read_all()["_rowid"].to_numpy()
    except InputError as error:
        raise CannotFollow(f"version {version} of {archive.path} is not there any more: {error}") from error
    # A row is of the version after the one that its commit has read, or of a later one if another commit came first.
    first, is_known = version, True
    for transaction in filter(None, transactions):
        operation, name = transaction.operation, type(transaction.operation).__name__
        if name not in _FOLLOWED:
            raise CannotFollow(f"{name} after version {version} of {archive.path}")
        if name in _WRITING:
            first = min(first, transaction.read_version)
        # Where columns were replaced in place, the versions of rows may not say which.
        is_known &= not getattr(operation, "fields_modified", None)
    known = {_files(fragment) for fragment in older.get_fragments()}
    fragments = [fragment for fragment in newer.get_fragments() if _files(fragment) not in known]
    condition = f"_row_last_updated_at_version > {first}" if is_known else ""
    scan = _Scan(archive.path, newer, fragments)
    written = scan.ids(part, condition) if fragments else np.empty(0, np.uint64)
    return Changes(removed[part.contains(removed)], written, scan, condition, part)


def _transaction(dataset: Any, version: int) -> Any | None:
    """Return the transaction that made a version; None for a compaction that Lance cannot describe."""
    try:
        return dataset.read_transaction(version)
    except TypeError as error:
        # pylance 14 cannot build the description of a compaction that has changed an index.
        if "RewrittenIndex" not in str(error):
            raise
        return None


def _only(part: RowPart, batches: Iterator[tuple[Ids, pa.Table]]) -> Iterator[tuple[Ids, pa.Table]]:
    """Yield the rows of a part."""
    for ids, table in batches:
        is_here = part.contains(ids)
        yield ids[is_here], table.filter(pa.array(is_here))


def _files(fragment: Any) -> tuple[Any, ...]:
    """Return what changes when rows of a fragment are written."""
    metadata = fragment.metadata
    return (metadata.id, tuple(file.path for file in metadata.files), repr(metadata.overlays))
