"""What a shard is asked for, and what it answers."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["NO_HIT", "Counts", "Distances", "Ids", "Scope", "ShardAnswer"]

Ids = npt.NDArray[np.uint64]
Distances = npt.NDArray[np.int32]
Counts = npt.NDArray[np.int64]

# Fills up the distances of a query that has fewer hits than others; greater than every distance.
NO_HIT = np.iinfo(np.int32).max


@dataclass(frozen=True)
class Scope:
    """The part of the archive that a search covers, and the columns of its hits.

    Searches with equal scopes can share a batch.

    Attributes:
        radius: largest distance of a hit in bits, inclusive; None: no limit.
        after: (distance, id) of the last hit of the page before; None: the first page.
        filter: only rows that pass this expression (CQL2 text); "": all rows.
        include: columns that hits carry beyond the usual ones.
        with_rows: whether the answer carries the columns of the hits.
    """

    radius: int | None = None
    after: tuple[int, int] | None = None
    filter: str = ""
    include: tuple[str, ...] = ()
    with_rows: bool = False


@dataclass(frozen=True)
class ShardAnswer:
    """Nearest rows of one shard, or of several merged ones, for Q queries, at most m per query.

    Attributes:
        distances: int32 [Q, m], ascending per query; `NO_HIT` after the last hit.
        ids: uint64 [Q, m], ascending among equal distances; 0 after the last hit.
        ties: int64 [Q], number of searched rows at the distance of the last hit, including the hits and excluding
            rows of earlier pages; 0 without hits.
        rows: with `Scope.with_rows`, one serialised `orbithash.v1.Hit` without rank, distance and score for each hit,
            query by query; else empty.
        num_matching: number of searched rows that pass the filter; None without a filter.
        num_rows: number of rows searched, whether they pass the filter or not; None: all of the shard.
        num_shards: number of shards that were searched.
    """

    distances: Distances
    ids: Ids
    ties: Counts
    rows: tuple[bytes, ...] = ()
    num_matching: int | None = None
    num_rows: int | None = None
    num_shards: int = 1
