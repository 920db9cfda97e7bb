"""Compilation of kernels before the first request needs them."""

from functools import cache

import numpy as np
import pyarrow as pa

from orbithash.encoders.codes import num_bytes
from orbithash.search.index.rankings import ByTime, LinearOrder, Order, PlaceOrder, RandomOrder
from orbithash.search.segments.files import build_segment
from orbithash.search.segments.files import warm_up as warm_up_segments
from orbithash.search.segments.rankings.counting import count_distances
from orbithash.search.segments.rankings.ranking import rank
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.shard_version import LiveSegment, ShardVersion

__all__ = ["warm_up", "warm_up_rankings"]

_ORDERS: tuple[Order, ...] = (LinearOrder((1,)), PlaceOrder(0.0, 0.0), RandomOrder(0), ByTime())


@cache
def warm_up(bits: int, index: str) -> None:
    """Compile, or load, the kernels of searches and orders once in a process."""
    if index == "exact":
        warm_up_segments(bits)
    warm_up_rankings(bits)


def warm_up_rankings(bits: int) -> None:
    """Compile, or load, the kernels of orders and counts over segments of codes of `bits` bits."""
    zeros = pa.array(np.zeros(num_bytes(bits), np.uint8))
    table = pa.table(
        {
            "code": pa.FixedSizeListArray.from_arrays(zeros, num_bytes(bits)),
            "lon": [0.0],
            "lat": [0.0],
            "datetime": pa.array([0], pa.timestamp("us", "UTC")),
            "vector": pa.FixedSizeListArray.from_arrays(pa.array([1], pa.int8()), 1),
        }
    )
    segment = build_segment([(np.zeros(1, np.uint64), table)], bits)
    shard = ShardVersion.of(0, "", bits, [LiveSegment.of(segment)])
    for order in _ORDERS:
        rank(shard, None, order, 1, None, None, Stop())
    count_distances(shard, None, np.zeros(num_bytes(bits), np.uint8), Stop())
