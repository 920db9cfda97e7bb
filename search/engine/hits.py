"""What hits hold of their rows (key, label, lon, lat, datetime): in memory where they fit, else read from the archive.

In memory is a table of one version, in few bytes a row, which the versions after it share: of theirs it knows all rows
but those that changes touched. Beside it are the rows that hits held lately, ready to be given out.
"""

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.search.index.shard import Ids

__all__ = ["HitRows", "Known"]

_COLUMNS = ["key", "label", "lon", "lat", "datetime"]

# Rows of a table: some 80 bytes each.
_MAX_TABLE = 2**24
# Rows that are ready: some 400 bytes each.
_MAX_READY = 2**16

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_NO_TIME = np.iinfo(np.int64).min

# Id to the values of `_COLUMNS`.
Known = dict[int, tuple[Any, ...]]


class RowReader(Protocol):
    """What is read of an archive."""

    def take(self, ids: Ids, columns: list[str]) -> Any:
        """A `pyarrow.Table` of the rows with these ids, in their order."""

    @property
    def num_rows(self) -> int:
        """Rows of the archive."""

    def scan(self, columns: list[str]) -> tuple[Ids, Any]:
        """The ids of all rows, and a `pyarrow.Table` of them in the same order."""


class _Table:
    """The rows of one version. Never changes."""

    def __init__(self, ids: Ids, table: pa.Table) -> None:
        order = np.argsort(ids)
        self.ids = ids[order]

        def column(name: str, type_: pa.DataType) -> pa.Array:
            return table.column(name).cast(type_).combine_chunks().take(pa.array(order))

        # Large, for the texts of all rows can pass the 2^31 bytes of Arrow's usual ones.
        self._keys = column("key", pa.large_string())
        labels = column("label", pa.large_string()).dictionary_encode()
        # The last one is for rows without a label.
        self._names = [*labels.dictionary.to_pylist(), None]
        self._labels = pc.fill_null(labels.indices, len(self._names) - 1).to_numpy()
        self._lon, self._lat = (pc.fill_null(column(name, pa.float64()), np.nan).to_numpy() for name in ("lon", "lat"))
        self._times = pc.fill_null(column("datetime", pa.int64()), _NO_TIME).to_numpy()

    def places(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Where the rows with these ids are, -1 for those that are not here."""
        if not len(self.ids):
            return np.full(len(ids), -1)
        places = np.minimum(self.ids.searchsorted(ids), len(self.ids) - 1)
        return np.where(self.ids[places] == ids, places, -1)

    def rows(self, places: npt.NDArray[np.int64]) -> list[tuple[Any, ...]]:
        """The values of the rows at these places of `ids`."""
        return [
            (key, self._names[label], _number(lon), _number(lat), _time(time))
            for key, label, lon, lat, time in zip(
                self._keys.take(pa.array(places)).to_pylist(),
                *(column[places].tolist() for column in (self._labels, self._lon, self._lat, self._times)),
                strict=True,
            )
        ]


def _number(value: float) -> float | None:
    return None if value != value else value


def _time(microseconds: int) -> datetime | None:
    return None if microseconds == _NO_TIME else _EPOCH + timedelta(microseconds=microseconds)


class HitRows:
    """The rows of one version of an archive. Safe for concurrent calls."""

    def __init__(self, archive: RowReader) -> None:
        self._archive = archive
        self._ready: Known = {}
        self._table: _Table | None = None
        # Of the table's rows, those that are other ones or gone in this version.
        self._is_touched = np.empty(0, np.bool_)
        self._num_touched = 0

    def warm(self) -> None:
        """Reads all rows, where they are few enough to be kept."""
        if self._archive.num_rows <= _MAX_TABLE:
            table = _Table(*self._archive.scan(_COLUMNS))
            self._is_touched, self._num_touched = np.zeros(len(table.ids), np.bool_), 0
            self._table = table

    def after(self, archive: RowReader, touched: Ids) -> "HitRows":
        """Those of the next version, in which the rows `touched` are gone, new or other ones."""
        new = HitRows(archive)
        new._ready = self._ready.copy()
        for id_ in touched.tolist():
            new._ready.pop(id_, None)
        if self._table is not None:
            new._table, new._is_touched = self._table, self._is_touched.copy()
            places = self._table.places(touched)
            new._is_touched[places[places >= 0]] = True
            new._num_touched = int(new._is_touched.sum())
        return new

    @property
    def num_known(self) -> int:
        """Rows that need not be read."""
        return len(self._is_touched) - self._num_touched

    def known(self, ids: Sequence[int]) -> Known | None:
        """The values of key, label, lon, lat and datetime, where none of these rows must be read."""
        known, lacking = self._in_memory(ids)
        return None if lacking else known

    def read(self, ids: Sequence[int]) -> Known:
        """The same values, of rows that are in memory or in the archive."""
        known, lacking = self._in_memory(ids)
        if lacking:
            table = self._archive.take(np.array(lacking, np.uint64), _COLUMNS)
            columns = [table.column(name).to_pylist() for name in _COLUMNS]
            known |= self._kept(dict(zip(lacking, zip(*columns, strict=True), strict=True)))
        return known

    def extras(self, ids: Sequence[int], columns: Sequence[str]) -> dict[int, dict[str, Any]]:
        """Further columns by id, then by name; codes as bytes."""
        if not columns:
            return {}
        rows = sorted(set(ids))
        table = self._archive.take(np.array(rows, np.uint64), list(columns))
        values = {name: table.column(name).to_pylist() for name in columns}
        if "code" in values:
            values["code"] = [bytes(code) for code in values["code"]]
        return {id_: {name: values[name][place] for name in columns} for place, id_ in enumerate(rows)}

    def _in_memory(self, ids: Sequence[int]) -> tuple[Known, list[int]]:
        """The rows that are there, and the ids of those that are not."""
        ready = self._ready
        known = {id_: ready[id_] for id_ in ids if id_ in ready}
        lacking = [id_ for id_ in dict.fromkeys(ids) if id_ not in known]
        if not lacking or self._table is None:
            return known, lacking
        places = self._table.places(np.array(lacking, np.uint64))
        is_there = places >= 0
        is_there[is_there] = ~self._is_touched[places[is_there]]
        found = [id_ for id_, there in zip(lacking, is_there.tolist(), strict=True) if there]
        known |= self._kept(dict(zip(found, self._table.rows(places[is_there]), strict=True)))
        return known, [id_ for id_ in lacking if id_ not in known]

    def _kept(self, rows: Known) -> Known:
        """The same, ready from now on."""
        if len(self._ready) + len(rows) > _MAX_READY:
            # Another dict, for others may be reading this one.
            self._ready = dict(rows)
        else:
            self._ready.update(rows)
        return rows
