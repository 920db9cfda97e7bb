"""Rows of an archive in portions, with their positions along the Hilbert curve; free of Ray."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.storage import open_dataset
from orbithash.encoders.lance_errors import one_line_errors
from orbithash.encoders.places.columns import ALWAYS
from orbithash.encoders.places.geometry import hilbert_positions

__all__ = ["POSITION", "Portion", "RowReader"]

# Name of the column of positions.
POSITION = "position"

# Bytes of the columns of a portion, and the largest number of its rows.
_PORTION_BYTES, _PORTION_ROWS = 16 * 2**20, 65_536
# Number of fragments, and of rows of each, that the mean size of a row is estimated from.
_SAMPLED_FRAGMENTS, _SAMPLED_ROWS = 8, 64
# With fewer rows of a portion that pass, they are read one by one.
_SPARSE = 1 / 8


class Portion(NamedTuple):
    """Consecutive rows of a fragment."""

    fragment: int
    offset: int
    rows: int


@dataclass(frozen=True)
class RowReader:
    """Reads the rows of one version of an archive that pass a filter.

    Attributes:
        archive: folder or URI.
        version: number of the version.
        columns: columns to read; `id` is the id of a row.
        filter: CQL2 text that rows have to pass; "": none.
    """

    archive: str
    version: int
    columns: tuple[str, ...]
    filter: str = ""

    @cached_property
    def _names(self) -> list[str]:
        return [name for name in dict.fromkeys((*ALWAYS, *self.columns)) if name != "id"]

    def row_bytes(self) -> float:
        """Return the mean size of a row in memory, by a sample; at least 1."""
        with one_line_errors(self.archive):
            fragments = self._dataset().get_fragments()
            step = max(1, len(fragments) // _SAMPLED_FRAGMENTS)
            tables = [one.to_table(columns=self._names, limit=_SAMPLED_ROWS) for one in fragments[::step]]
        rows = sum(map(len, tables))
        return max(1.0, sum(table.nbytes for table in tables) / rows if rows else 1.0)

    def portions(self, row_bytes: float) -> Iterator[Portion]:
        """Yield portions of all rows, in the order of the archive."""
        most = max(1, min(_PORTION_ROWS, int(_PORTION_BYTES / row_bytes)))
        with one_line_errors(self.archive):
            for fragment in self._dataset().get_fragments():
                rows = fragment.count_rows()
                for offset in range(0, rows, most):
                    yield Portion(fragment.fragment_id, offset, min(most, rows - offset))

    def positions(self) -> Iterator[tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint64]]]:
        """Yield the positions and the ids, uint64 [N], of the rows that pass, in portions of the archive's order."""
        expression = self._expression()
        names = list(dict.fromkeys(["lon", "lat", *(expression.columns if expression else ())]))
        with one_line_errors(self.archive):
            for batch in self._dataset().to_batches(columns=names, with_row_id=True, fragment_readahead=1):
                table = pa.Table.from_batches([batch])
                if expression is not None:
                    table = table.filter(pa.array(expression.mask(table)))
                yield _positions(table), table["_rowid"].to_numpy()

    def read(self, portion: Portion) -> pa.Table:
        """Return the rows of a portion that pass: the columns of `ALWAYS`, `id`, `columns`, and `POSITION`."""
        expression = self._expression()
        with one_line_errors(self.archive):
            if expression is None:
                return self._with_positions(self._table(portion, self._names))
            tested = self._table(portion, list(expression.columns) or ["key"])
            passes = expression.mask(tested)
            if passes.sum() <= _SPARSE * len(tested):
                ids = tested["_rowid"].to_numpy()[passes]
                rows = Archive.open(self.archive, self.version).take(ids, self._names)
                return self._with_positions(rows.append_column("_rowid", pa.array(ids, pa.uint64())))
            return self._with_positions(self._table(portion, self._names).filter(pa.array(passes)))

    def version_time(self) -> datetime:
        """Return the time at which the version was written, UTC."""
        with one_line_errors(self.archive):
            times = [each["timestamp"] for each in self._dataset().versions() if each["version"] == self.version]
        return times[0].astimezone(UTC) if times else datetime.fromtimestamp(0, UTC)

    def _dataset(self) -> Any:
        return open_dataset(self.archive, self.version)

    def _expression(self) -> Any:
        from orbithash.search.segments.filters.expressions import parse_filter

        return parse_filter(self.filter) if self.filter else None

    def _table(self, portion: Portion, names: Sequence[str]) -> pa.Table:
        fragment = self._dataset().get_fragment(portion.fragment)
        return fragment.to_table(columns=list(names), offset=portion.offset, limit=portion.rows, with_row_id=True)

    def _with_positions(self, table: pa.Table) -> pa.Table:
        ids = table["_rowid"]
        table = table.select(self._names).append_column("id", ids.cast(pa.uint64()))
        return table.append_column(POSITION, pa.array(_positions(table)))


def _positions(table: pa.Table) -> npt.NDArray[np.uint64]:
    return hilbert_positions(table["lon"].to_numpy(), table["lat"].to_numpy())
