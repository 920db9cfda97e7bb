"""What hits hold of their rows: read from the archive, and kept for the next queries that find them."""

from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import numpy as np

from orbithash.search.shard import Ids

__all__ = ["HitRows", "Known"]

_COLUMNS = ["key", "label", "lon", "lat", "datetime"]

# Some 400 bytes each.
_MAX_KNOWN = 2**18

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


class HitRows:
    """The rows of one version of an archive. Safe for concurrent calls."""

    def __init__(self, archive: RowReader, known: Known | None = None) -> None:
        self._archive = archive
        self._known = known or {}

    def warm(self) -> None:
        """Reads all rows, where they are few enough to be kept."""
        if self._archive.num_rows > _MAX_KNOWN:
            return
        ids, table = self._archive.scan(_COLUMNS)
        columns = [table.column(name).to_pylist() for name in _COLUMNS]
        self._known = dict(zip(ids.tolist(), zip(*columns, strict=True), strict=True))

    @property
    def num_known(self) -> int:
        """Rows that need not be read."""
        return len(self._known)

    def known(self, ids: Iterable[int]) -> Known | None:
        """The values of key, label, lon, lat and datetime, where all these rows are known."""
        known = self._known
        try:
            return {id_: known[id_] for id_ in ids}
        except KeyError:
            return None

    def read(self, ids: Iterable[int]) -> Known:
        """The same values, of rows that are known or in the archive."""
        known = self._known
        lacking = sorted({id_ for id_ in ids if id_ not in known})
        read: Known = {}
        if lacking:
            table = self._archive.take(np.array(lacking, np.uint64), _COLUMNS)
            columns = [table.column(name).to_pylist() for name in _COLUMNS]
            read = dict(zip(lacking, zip(*columns, strict=True), strict=True))
        values = {id_: read[id_] if id_ in read else known[id_] for id_ in ids}
        if len(known) + len(read) > _MAX_KNOWN:
            # Another dict, for others may be reading this one.
            self._known = read
        else:
            known.update(read)
        return values

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

    def known_but(self, touched: Ids) -> Known:
        """What is known and still true in a version in which these rows are gone, new or other ones."""
        known = self._known.copy()
        for id_ in touched.tolist():
            known.pop(id_, None)
        return known
