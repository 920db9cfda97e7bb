"""How the rows of a step are dealt to micro-batches and ranks."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Dealing", "deal"]


@dataclass(frozen=True)
class Dealing:
    """Rank r has `counts[m][r]` consecutive rows of micro-batch m; ranks and micro-batches follow one another.

    A rank's share of the step is its rows of all micro-batches.
    """

    counts: tuple[tuple[int, ...], ...]

    @property
    def num_rows(self) -> int:
        """The number of rows of all ranks."""
        return sum(map(sum, self.counts))

    @property
    def of_ranks(self) -> tuple[int, ...]:
        """The number of rows of each rank."""
        return tuple(map(sum, zip(*self.counts, strict=True)))

    def positions(self, rank: int) -> npt.NDArray[np.int64]:
        """Return which rows of the step a rank has, int64 [B]."""
        parts, start = [], 0
        for counts in self.counts:
            first = start + sum(counts[:rank])
            parts.append(np.arange(first, first + counts[rank]))
            start += sum(counts)
        return np.concatenate(parts)

    def micro_batches(self) -> Iterator["Dealing"]:
        """Yield the dealing of each micro-batch alone."""
        for counts in self.counts:
            yield Dealing((counts,))


def deal(num_rows: int, group_size: int, num_micro_batches: int, num_ranks: int) -> Dealing:
    """Deal groups of `group_size` rows, which divides `num_rows`, to micro-batches, and those of each to the ranks.

    Numbers of groups differ by one at most; the first micro-batches and the first ranks have more.
    """
    assert num_rows % group_size == 0, "groups are whole"
    micro_batches = _evenly(num_rows // group_size, num_micro_batches)
    return Dealing(tuple(tuple(group_size * own for own in _evenly(groups, num_ranks)) for groups in micro_batches))


def _evenly(count: int, num_parts: int) -> list[int]:
    return [count // num_parts + (part < count % num_parts) for part in range(num_parts)]
