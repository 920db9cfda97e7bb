"""Deal the rows of an archive to shards, by blocks of ids.

Rows that were written together have consecutive ids, so a shard reads blocks of the archive and skips the others.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.search.index.answers import Ids

__all__ = ["Deal", "ShardPart"]

# Each shard has at least this many blocks, so that shards differ by less than a tenth in their number of rows.
_MIN_BLOCKS = 16
# A block has at most 2^20 ids.
_MAX_SHIFT = 20


@dataclass(frozen=True)
class Deal:
    """Which shard has which rows: shard `(id >> shift) % num_shards` has row `id`.

    Attributes:
        num_shards: number of shards.
        shift: binary logarithm of the number of ids of a block.
    """

    num_shards: int
    shift: int = 0

    @classmethod
    def of(cls, num_ids: int, num_shards: int) -> "Deal":
        """Return the deal with the largest blocks of which each shard has at least 16, for ids below `num_ids`.

        Blocks have from 1 to 2^20 ids; with fewer than 16 ids a shard, rows are dealt one by one.
        """
        num_ids_per_block = num_ids // (_MIN_BLOCKS * num_shards)
        return cls(num_shards, min(max(num_ids_per_block.bit_length() - 1, 0), _MAX_SHIFT))

    def owner(self, ids: Ids) -> npt.NDArray[np.int64]:
        """Return the number of the shard of each row, int64 [N]."""
        return ((ids >> np.uint64(self.shift)) % np.uint64(self.num_shards)).astype(np.int64)

    def part(self, ids: Ids, number: int) -> npt.NDArray[np.bool_]:
        """Return which rows belong to shard `number`, bool [N]."""
        if self.num_shards == 1:
            return np.ones(len(ids), np.bool_)
        return np.asarray(self.owner(ids) == number)

    def ranges(self, number: int, num_ids: int) -> list[tuple[int, int]]:
        """Return the ids below `num_ids` of shard `number` as ranges (first, end), `end` exclusive, ascending."""
        if self.num_shards == 1:
            return [(0, num_ids)] if num_ids else []
        size = 1 << self.shift
        firsts = range(number * size, num_ids, self.num_shards * size)
        return [(first, min(first + size, num_ids)) for first in firsts]


@dataclass(frozen=True)
class ShardPart:
    """The rows of one shard, or some of them (see `orbithash.encoders.archive.changes.RowPart`).

    Attributes:
        deal: which shard has which rows.
        number: number of the shard.
        first, end: only rows with ids from `first` and, unless `end` is None, below `end`.
    """

    deal: Deal
    number: int
    first: int = 0
    end: int | None = None

    def contains(self, ids: Ids) -> npt.NDArray[np.bool_]:
        """Return which rows belong to the part, bool [N]."""
        is_here = self.deal.part(ids, self.number)
        if self.first:
            is_here &= ids >= np.uint64(self.first)
        if self.end is not None:
            is_here &= ids < np.uint64(self.end)
        return is_here

    def ranges(self, num_ids: int, max_ranges: int) -> list[tuple[int, int]] | None:
        """Return the ids below `num_ids` of the part as ranges (first, end); None if there are more than allowed."""
        if num_ids >> self.deal.shift > max_ranges * self.deal.num_shards and self.deal.num_shards > 1:
            return None
        num_ids = num_ids if self.end is None else min(num_ids, self.end)
        ranges = [(max(first, self.first), end) for first, end in self.deal.ranges(self.number, num_ids)]
        return [(first, end) for first, end in ranges if first < end]
