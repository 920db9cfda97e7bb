"""Ranges of the Hilbert curve with about equal numbers of rows; free of Ray.

The order of rows is that of their positions along the curve, and of their ids among equal positions. The bounds of the
ranges come from a sample of the rows, which their ids decide: they depend on the rows only, not on the process that
reads them.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Ranges", "divide"]

Integers = npt.NDArray[np.uint64]

# Minimum number of rows of the sample, in all and for each range.
_SAMPLE, _SAMPLE_PER_RANGE = 65_536, 64
# Multiplication by this odd number permutes 64-bit integers (Fibonacci hashing).
_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Ranges:
    """Consecutive ranges of rows, by the first row of each but the first range.

    Attributes:
        positions: positions along the curve, uint64 [P - 1], ascending.
        ids: ids of the rows, uint64 [P - 1], ascending among equal positions.
    """

    positions: Integers
    ids: Integers

    def __len__(self) -> int:
        return len(self.positions) + 1

    def numbers(self, positions: Integers, ids: Integers) -> npt.NDArray[np.int64]:
        """Return the number of the range of each row, int64 [N]."""
        numbers = np.searchsorted(self.positions, positions, side="left")
        # Ids decide where a row has the position of a bound.
        for position in np.intersect1d(self.positions, positions):
            is_tied = positions == position
            bounds = self.ids[self.positions == position]
            numbers[is_tied] += np.searchsorted(bounds, ids[is_tied], side="right")
        return numbers.astype(np.int64)


def divide(
    rows: Iterable[tuple[Integers, Integers]], num_rows: int, row_bytes: float, range_bytes: int
) -> tuple[Ranges, int]:
    """Return ranges of about `range_bytes` bytes, and the number of rows.

    Args:
        rows: positions and ids of all rows, in portions.
        num_rows: an upper bound of their number.
        row_bytes: mean size of a row.
        range_bytes: size of a range.
    """
    size = max(_SAMPLE, _SAMPLE_PER_RANGE * math.ceil(num_rows * row_bytes / range_bytes))
    # The rows with the smallest hashes of their ids.
    sample = np.empty((3, 0), np.uint64)
    count = 0
    for positions, ids in rows:
        count += len(ids)
        sample = np.concatenate([sample, np.stack([ids * _GOLDEN, positions, ids])], axis=1)
        if sample.shape[1] > 2 * size:
            sample = sample[:, np.argpartition(sample[0], size)[:size]]
    sample = sample[:, np.argsort(sample[0], kind="stable")[:size]]
    num_ranges = max(1, math.ceil(count * row_bytes / range_bytes))
    order = np.lexsort((sample[2], sample[1]))
    first = np.unique(np.arange(1, num_ranges) * len(order) // num_ranges)
    bounds = order[first[first > 0]]
    return Ranges(sample[1][bounds], sample[2][bounds]), count
