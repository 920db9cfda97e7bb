"""Ids of the rows of a segment, ascending, in few bytes a row."""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.search.index.answers import Ids

__all__ = ["RowNumbers", "SortedIds"]

RowNumbers = npt.NDArray[np.int64]


class SortedIds(NamedTuple):
    """Ascending unique ids: row r has the id base + offsets[r].

    Attributes:
        base: the first id; 0 without rows.
        num_rows: number of ids.
        offsets: uint32 [N], or uint64 [N] where the ids span 2^32 or more; None: the ids are consecutive.
    """

    base: int
    num_rows: int
    offsets: npt.NDArray[np.unsignedinteger] | None

    @classmethod
    def of(cls, ids: Ids) -> "SortedIds":
        """Return these ids uint64 [N], which must be ascending and unique."""
        if not len(ids):
            return cls(0, 0, None)
        base, span = int(ids[0]), int(ids[-1]) - int(ids[0])
        if span == len(ids) - 1:
            return cls(base, len(ids), None)
        return cls(base, len(ids), (ids - ids[0]).astype(np.uint32 if span < 2**32 else np.uint64))

    @property
    def last(self) -> int:
        """The last id; -1 without rows."""
        if self.offsets is None:
            return self.base + self.num_rows - 1
        return self.base + int(self.offsets[-1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the offsets."""
        return 0 if self.offsets is None else self.offsets.nbytes

    def of_rows(self, rows: npt.NDArray[np.integer]) -> Ids:
        """Return the ids of rows of the segment, in the shape of `rows`."""
        offsets = rows if self.offsets is None else self.offsets[rows]
        return offsets.astype(np.uint64) + np.uint64(self.base)

    def rows_of(self, ids: Ids) -> RowNumbers:
        """Return the row of each id, int64 [N]; -1 for ids that are not here."""
        if not self.num_rows:
            return np.full(len(ids), -1, np.int64)
        offsets = ids - np.uint64(self.base)
        # An id below the base wraps around to a large offset.
        is_between = offsets <= np.uint64(self.last - self.base)
        if self.offsets is None:
            return np.where(is_between, offsets.astype(np.int64), -1)
        offsets = np.where(is_between, offsets, np.uint64(0)).astype(self.offsets.dtype)
        rows = self.offsets.searchsorted(offsets)
        return np.where(is_between & (self.offsets[rows] == offsets), rows, -1)

    def num_up_to(self, id_: int) -> int:
        """Return the number of rows whose id is at most `id_`."""
        if id_ < self.base or not self.num_rows:
            return 0
        if id_ >= self.last:
            return self.num_rows
        if self.offsets is None:
            return id_ - self.base + 1
        return int(self.offsets.searchsorted(self.offsets.dtype.type(id_ - self.base), side="right"))
