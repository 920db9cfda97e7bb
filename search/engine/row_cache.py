"""Cache of the columns that hits show (key, label, lon, lat, datetime), for one version of an archive.

It has two levels: a compact table of all rows of one version, which later versions share except for the rows that
changed, and the rows that hits showed recently, as Python objects. Rows in neither are read from the archive.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.search.engine.protocols import ArchiveReader
from orbithash.search.index.shard import Ids

__all__ = ["MAX_READY", "MAX_TABLE", "RowCache", "RowValues"]

_COLUMNS = ["key", "label", "lon", "lat", "datetime"]

# Maximum rows of a table; about 80 bytes each.
MAX_TABLE = 2**24
# Maximum rows as Python objects; about 400 bytes each.
MAX_READY = 2**16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_TIME = np.iinfo(np.int64).min

# Row id to the values of `_COLUMNS`.
RowValues = dict[int, tuple[Any, ...]]


class _Table:
    """The columns of all rows of one version. Immutable."""

    def __init__(self, ids: Ids, table: pa.Table) -> None:
        order = np.argsort(ids)
        self.ids = ids[order]

        def column(name: str, type_: pa.DataType) -> pa.Array:
            return table.column(name).cast(type_).combine_chunks().take(pa.array(order))

        # large_string, because the keys of all rows can exceed the 2^31 bytes of a string array.
        self._keys = column("key", pa.large_string())
        labels = column("label", pa.large_string()).dictionary_encode()
        # The last entry stands for a missing label.
        self._names = [*labels.dictionary.to_pylist(), None]
        self._labels = pc.fill_null(labels.indices, len(self._names) - 1).to_numpy()
        self._lon, self._lat = (pc.fill_null(column(name, pa.float64()), np.nan).to_numpy() for name in ("lon", "lat"))
        self._times = pc.fill_null(column("datetime", pa.int64()), _NO_TIME).to_numpy()

    def positions(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the positions of the rows with these ids, int64 [N]; -1 for absent ids."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        positions = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
        return np.where(self.ids[positions] == ids, positions, -1)

    def rows(self, positions: npt.NDArray[np.int64]) -> list[tuple[Any, ...]]:
        """Return the values of the rows at these positions."""
        return [
            (key, self._names[label], _number(lon), _number(lat), _time(time))
            for key, label, lon, lat, time in zip(
                self._keys.take(pa.array(positions)).to_pylist(),
                *(column[positions].tolist() for column in (self._labels, self._lon, self._lat, self._times)),
                strict=True,
            )
        ]


def _number(value: float) -> float | None:
    return None if value != value else value


def _time(microseconds: int) -> datetime | None:
    return None if microseconds == _NO_TIME else _EPOCH + timedelta(microseconds=microseconds)


class RowCache:
    """The cache of one version. Safe for concurrent calls."""

    def __init__(self, archive: ArchiveReader) -> None:
        self._archive = archive
        self._ready: RowValues = {}
        self._table: _Table | None = None
        # Which rows of the table have changed or were removed since its version.
        self._is_touched = np.empty(0, np.bool_)
        self._num_touched = 0

    def warm(self) -> None:
        """Read the columns of all rows, unless there are too many."""
        if self._archive.num_rows <= MAX_TABLE:
            table = _Table(*self._archive.scan(_COLUMNS))
            self._is_touched, self._num_touched = np.zeros(len(table.ids), np.bool_), 0
            self._table = table

    def after(self, archive: ArchiveReader, touched: Ids) -> "RowCache":
        """Return the cache of the next version, in which the rows `touched` are removed, new or changed."""
        new = RowCache(archive)
        new._ready = self._ready.copy()
        for id_ in touched.tolist():
            new._ready.pop(id_, None)
        if self._table is not None:
            new._table, new._is_touched = self._table, self._is_touched.copy()
            positions = self._table.positions(touched)
            new._is_touched[positions[positions >= 0]] = True
            new._num_touched = int(new._is_touched.sum())
        return new

    @property
    def num_cached(self) -> int:
        """Number of rows in the table that are valid in this version."""
        return len(self._is_touched) - self._num_touched

    def cached(self, ids: Sequence[int]) -> RowValues | None:
        """Return key, label, lon, lat and datetime of these rows, or None if one of them is not cached."""
        values, missing = self._lookup(ids)
        return None if missing else values

    def read(self, ids: Sequence[int]) -> RowValues:
        """Return the same values; rows that are not cached are read from the archive."""
        values, missing = self._lookup(ids)
        if missing:
            table = self._archive.take(np.array(missing, np.uint64), _COLUMNS)
            columns = [table.column(name).to_pylist() for name in _COLUMNS]
            values |= self._keep(dict(zip(missing, zip(*columns, strict=True), strict=True)))
        return values

    def extras(self, ids: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Return further columns by id, then by name; codes as bytes. They are read from the archive."""
        if not columns:
            return {}
        rows = sorted(set(ids))
        table = self._archive.take(np.array(rows, np.uint64), list(columns))
        values = {name: table.column(name).to_pylist() for name in columns}
        if "code" in values:
            values["code"] = [bytes(code) for code in values["code"]]
        return {id_: {name: values[name][place] for name in columns} for place, id_ in enumerate(rows)}

    def _lookup(self, ids: Sequence[int]) -> tuple[RowValues, list[int]]:
        """Return the values of the cached rows, and the ids of the other rows."""
        ready = self._ready
        values = {id_: ready[id_] for id_ in ids if id_ in ready}
        missing = [id_ for id_ in dict.fromkeys(ids) if id_ not in values]
        if not missing or self._table is None:
            return values, missing
        positions = self._table.positions(np.array(missing, np.uint64))
        is_valid = positions >= 0
        is_valid[is_valid] = ~self._is_touched[positions[is_valid]]
        found = [id_ for id_, valid in zip(missing, is_valid.tolist(), strict=True) if valid]
        values |= self._keep(dict(zip(found, self._table.rows(positions[is_valid]), strict=True)))
        return values, [id_ for id_ in missing if id_ not in values]

    def _keep(self, rows: RowValues) -> RowValues:
        """Keep the rows as Python objects, and return them."""
        if len(self._ready) + len(rows) > MAX_READY:
            # A new dict, because other threads may be reading the old one.
            self._ready = dict(rows)
        else:
            self._ready.update(rows)
        return rows
