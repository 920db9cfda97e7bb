"""Cache of a column of lists of one size (codes, stored vectors), for one version of an archive.

The first read loads the column of all rows, if it is small enough. Later versions share it; the rows that changed since
are read from the archive.
"""

import threading
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.search.engine.protocols import ArchiveReader
from orbithash.search.index.shard import Ids

__all__ = ["MAX_BYTES", "ColumnCache", "Values"]

# Maximum size of a column that is loaded.
MAX_BYTES = 2**30

Mask = npt.NDArray[np.bool_]


class Values(NamedTuple):
    """Values of a column: `rows` [N, size], zeros where unknown, and `is_known` bool [N]."""

    rows: npt.NDArray[Any]
    is_known: Mask


@dataclass(frozen=True)
class _Loaded:
    """The column of all rows of one version, by ascending id, and which rows have changed or were removed since."""

    ids: Ids
    values: Values
    is_touched: Mask

    def positions(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the positions of the rows with these ids, int64 [N]; -1 for absent ids."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        positions = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
        return np.where(self.ids[positions] == ids, positions, -1)

    def touch(self, ids: Ids) -> "_Loaded":
        """Return this column with these rows marked as changed."""
        is_touched, positions = self.is_touched.copy(), self.positions(ids)
        is_touched[positions[positions >= 0]] = True
        return _Loaded(self.ids, self.values, is_touched)


class ColumnCache:
    """The cache of `column` in one version. Safe for concurrent calls."""

    def __init__(self, archive: ArchiveReader, column: str) -> None:
        self._archive = archive
        self._column = column
        self._loaded: _Loaded | None = None
        self._loading = threading.Lock()

    def after(self, archive: ArchiveReader, touched: Ids) -> "ColumnCache":
        """Return the cache of the next version, in which the rows `touched` are removed, new or changed."""
        new = ColumnCache(archive, self._column)
        if self._loaded is not None:
            new._loaded = self._loaded.touch(touched)
        return new

    def read(self, ids: Ids) -> Values:
        """Return the values of the rows with these ids, in their order. Blocks: the archive may be read."""
        loaded = self._load()
        if loaded is None:
            return self._take(ids)
        positions = loaded.positions(ids)
        is_missing = positions < 0
        is_missing[~is_missing] = loaded.is_touched[positions[~is_missing]]
        if not is_missing.any():
            return Values(loaded.values.rows[positions], loaded.values.is_known[positions])
        read = self._take(ids[is_missing])
        rows = np.empty((len(ids), read.rows.shape[1]), read.rows.dtype)
        is_known = np.empty(len(ids), np.bool_)
        rows[is_missing], is_known[is_missing] = read
        there = positions[~is_missing]
        rows[~is_missing], is_known[~is_missing] = loaded.values.rows[there], loaded.values.is_known[there]
        return Values(rows, is_known)

    def _take(self, ids: Ids) -> Values:
        return Values(*fixed_size_rows(self._archive.take(ids, [self._column])[self._column]))

    def _load(self) -> _Loaded | None:
        """Return the column of all rows; None if it is too large, or while another thread is loading it."""
        if self._loaded is not None or not self._archive.num_rows:
            return self._loaded
        if not self._loading.acquire(blocking=False):
            return None
        try:
            if self._loaded is None and self._is_small():
                parts = [
                    (ids, *fixed_size_rows(table[self._column]))
                    for ids, table in self._archive.scan_batches([self._column])
                ]
                ids, rows, is_known = (np.concatenate(column) for column in zip(*parts, strict=True))
                order = np.argsort(ids)
                values = Values(rows[order], is_known[order])
                self._loaded = _Loaded(ids[order], values, np.zeros(len(ids), np.bool_))
            return self._loaded
        finally:
            self._loading.release()

    def _is_small(self) -> bool:
        spec = self._archive.vector
        size = self._archive.bits // 8 if self._column == "code" or spec is None else spec.dims
        return self._archive.num_rows * size <= MAX_BYTES
