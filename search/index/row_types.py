"""What a search for rows of a segment is given and what it returns."""

from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import NO_HIT, Counts, Distances
from orbithash.search.index.code_rows import Bits, FewRows, RowNumbers

__all__ = ["ALL_ROWS", "RowAnswer", "RowIndex", "RowMask"]


class RowMask(NamedTuple):
    """The rows of a segment that a search covers; None: all.

    Attributes:
        alive: the rows that exist.
        passing: the rows that pass a filter.
        few: the same rows as `passing` with their codes, if they are few: only these are compared.
    """

    alive: Bits | None = None
    passing: Bits | None = None
    few: FewRows | None = None


ALL_ROWS = RowMask()


class RowAnswer(NamedTuple):
    """Nearest rows of Q queries, at most m per query.

    Attributes:
        distances: int32 [Q, m], ascending per query; `NO_HIT` after the last hit.
        rows: uint32 [Q, m], row numbers, ascending among equal distances; 0 after the last hit.
        ties: int64 [Q], number of searched rows at the distance of the last hit, including the hits and excluding
            rows of earlier pages; 0 without hits.
    """

    distances: Distances
    rows: RowNumbers
    ties: Counts

    @classmethod
    def empty(cls, num_queries: int, width: int) -> "RowAnswer":
        """Return the answer without hits."""
        return cls(
            np.full((num_queries, width), NO_HIT, np.int32),
            np.zeros((num_queries, width), np.uint32),
            np.zeros(num_queries, np.int64),
        )


class RowIndex(Protocol):
    """Index over the rows of a segment. Safe for concurrent searches; a search uses only the calling thread."""

    is_exact: bool

    def search(
        self, queries: Codes, k: int, radius: int | None, after: tuple[int, int] | None, mask: RowMask
    ) -> RowAnswer:
        """Return the k nearest rows of each query that the mask lets pass, ordered by (distance, row number).

        Args:
            queries: uint8 [Q, ceil(bits/8)].
            k: maximum number of hits per query; answers have min(k, number of rows) columns.
            radius: maximum distance in bits, inclusive; None: no limit.
            after: return only rows after this (distance, row number), which need not be that of a row; None: from
                the first.
            mask: the rows that are searched.
        """

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """Return the arrays that a file keeps, so that the index need not be built again; empty: it must be."""

    @property
    def num_bytes(self) -> int:
        """Bytes of memory beside the arrays of `CodeRows`."""
