"""Rows of features that stay on the disk until a batch needs them."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["FeatureRows", "FeatureTable", "selected"]

Features = npt.NDArray[np.float32]


class FeatureTable:
    """A table float32 [N, D] or [N, C, D] over mapped files; its rows are read when it is indexed.

    All processes of a machine that map the same files share one copy in memory, the operating system's.
    """

    def __init__(self, parts: Sequence[Features], rows: npt.NDArray[np.int64], use: object = None) -> None:
        """`parts` have rows float32 [n, D]; `rows` int64 [N] or [N, C] numbers the rows of all parts in turn.

        `use` lives as long as the table and those made of it, such as a lock on the files.
        """
        self._parts = parts
        self._rows = rows
        self._use = use
        self._starts = np.cumsum([0, *map(len, parts)])

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array with all rows; D is 0 for a table without parts."""
        return (*self._rows.shape, self._parts[0].shape[1] if self._parts else 0)

    @property
    def dtype(self) -> np.dtype[np.float32]:
        """Type of the features."""
        return np.dtype(np.float32)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Features:
        """Return the features of some rows, a new array; an index as for the dimensions of an array except the last."""
        chosen = np.asarray(self._rows[index])
        rows = chosen.ravel()
        found = np.empty((len(rows), self.shape[-1]), np.float32)
        part_of = np.searchsorted(self._starts, rows, "right") - 1
        # The rows of each part together: a table of everything has hundreds of parts.
        order = np.argsort(part_of, kind="stable")
        end = 0
        for number, count in zip(
            *(of_part.tolist() for of_part in np.unique(part_of, return_counts=True)), strict=True
        ):
            places = order[end : (end := end + count)]
            found[places] = self._parts[number][rows[places] - self._starts[number]]
        return found.reshape(*chosen.shape, self.shape[-1])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return self[:].astype(dtype or np.float32, copy=False)

    def reshape(self, *shape: int) -> "FeatureTable":
        """Return the table with its rows in another shape, such as [N, C] for C rows of each of N images."""
        return FeatureTable(self._parts, self._rows.reshape(shape), self._use)

    def select(self, index: Any) -> "FeatureTable":
        """Return the table of some rows, none of which is read; an index as for `table[index]`."""
        return FeatureTable(self._parts, self._rows[index], self._use)


# Features float32 [N, ...], in memory or on the disk.
FeatureRows = Features | FeatureTable


def selected(table: FeatureRows, index: slice | npt.NDArray[np.int64]) -> FeatureRows:
    """Return some rows of a table, none of which is read; row numbers copy rows of an array, a slice does not."""
    return table.select(index) if isinstance(table, FeatureTable) else table[index]
