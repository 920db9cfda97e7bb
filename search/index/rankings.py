"""Orders of rows other than by the distance of codes, and answers in such an order.

Every order gives a row an integer key; the smallest key is the best, and rows of equal key are ordered by id. So the
answers of segments and shards are merged alike, and are the same however the rows are divided.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.search.index.answers import Ids

__all__ = ["ByTime", "GroupName", "LinearOrder", "Order", "PlaceOrder", "RandomOrder", "Ranked", "merge_ranked"]

GroupName = Literal["label", "month", "year"]


@dataclass(frozen=True)
class LinearOrder:
    """By the dot product of int16 weights and the stored vector: the largest first, or the nearest to `pivot`.

    The key is minus the dot product, or its distance from the pivot. The sum of the magnitudes of the weights is below
    2^24, so that sums of int32 are exact in every order of summation.
    """

    weights: tuple[int, ...]
    pivot: int | None = None


@dataclass(frozen=True)
class PlaceOrder:
    """By the great-circle distance of the centre from a place in degrees; the key is in millimetres, rounded."""

    lon: float
    lat: float


@dataclass(frozen=True)
class RandomOrder:
    """At random; the key is a hash of the seed and the id."""

    seed: int


@dataclass(frozen=True)
class ByTime:
    """By time of acquisition; the key is in microseconds since 1970, negated for the newest first."""

    newest_first: bool = False


Order = LinearOrder | PlaceOrder | RandomOrder | ByTime


class Ranked(NamedTuple):
    """Rows in an order.

    Attributes:
        keys: int64 [m], ascending.
        ids: uint64 [m].
        num_ranked: rows that pass the filter and have the value that the key is computed from.
        num_within: those of them that pass the cut-off.
        num_matching: rows that pass the filter; None without a filter.
        num_rows: rows that were considered.
    """

    keys: npt.NDArray[np.int64]
    ids: Ids
    num_ranked: int
    num_within: int
    num_matching: int | None
    num_rows: int


def merge_ranked(parts: Sequence[Ranked], k: int) -> Ranked:
    """Return the k first rows of several answers, which have no row in common; the numbers of rows are added."""
    keys = np.concatenate([part.keys for part in parts] or [np.empty(0, np.int64)])
    ids = np.concatenate([part.ids for part in parts] or [np.empty(0, np.uint64)])
    best = np.lexsort((ids, keys))[:k]
    matching = [part.num_matching for part in parts if part.num_matching is not None]
    return Ranked(
        keys[best],
        ids[best],
        sum(part.num_ranked for part in parts),
        sum(part.num_within for part in parts),
        sum(matching) if matching else None,
        sum(part.num_rows for part in parts),
    )
