"""The values of rows that decide an order, as kernels read them from the memory of a column."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.compiled import Kernel, read_only
from orbithash.search.index.ranking_kernels import offer_hashes, offer_numbers, offer_places, offer_products
from orbithash.search.index.rankings import ByTime, LinearOrder, Order, PlaceOrder, RandomOrder
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments.bits import Bits, both
from orbithash.search.segments.chunks import ROWS_PER_CHUNK
from orbithash.search.segments.segment import Segment

__all__ = ["ALL_ROWS", "OrderedChunk", "check_order", "ordered_chunks", "validity", "values_of"]

# The set of all rows, as kernels take it.
ALL_ROWS: Bits = read_only(np.empty(0, np.uint8))

# Sums of products with int8 fit into int32, and the difference of such a sum from a pivot into int64.
_MAX_WEIGHTS, _MAX_PIVOT = 2**24 - 1, 2**62
_INT16 = np.iinfo(np.int16)


class OrderedChunk(NamedTuple):
    """Consecutive rows of a segment, and the kernel that offers them by their keys.

    Attributes:
        offer: the kernel; see `offer_products`.
        values: its first arguments.
        num_rows: number of rows.
        first: number of the first row in the segment.
        known: bits of the rows that have a value; empty: all.
    """

    offer: Kernel
    values: tuple[Any, ...]
    num_rows: int
    first: int
    known: Bits


def check_order(order: Order) -> None:
    """Raise `InvalidQuery` for an order whose keys could be wrong: weights or a pivot that are too large."""
    if not isinstance(order, LinearOrder):
        return
    if order.weights and not _INT16.min <= min(order.weights) <= max(order.weights) <= _INT16.max:
        raise InvalidQuery(("linear.weights", f"a weight is outside of {_INT16.min} to {_INT16.max}"))
    if (total := sum(map(abs, order.weights))) > _MAX_WEIGHTS:
        raise InvalidQuery(
            ("linear.weights", f"the sum of their magnitudes is {total:,}; at most {_MAX_WEIGHTS:,} is allowed")
        )
    if order.pivot is not None and abs(order.pivot) > _MAX_PIVOT:
        raise InvalidQuery(("linear", f"the pivot is {order.pivot}; its magnitude may be at most {_MAX_PIVOT}"))


def ordered_chunks(order: Order, segment: Segment) -> Iterator[OrderedChunk]:
    """Yield all rows of a segment that may have a key.

    Raises `InvalidQuery` if there are no stored vectors, or vectors of another number of dimensions.
    """
    match order:
        case LinearOrder():
            return _by_vector(order, segment)
        case PlaceOrder():
            return _by_place(order, segment)
        case RandomOrder():
            return _by_hash(order, segment)
        case ByTime():
            return _by_time(order, segment)


def _by_vector(order: LinearOrder, segment: Segment) -> Iterator[OrderedChunk]:
    if "vector" not in segment.columns.names:
        raise InvalidQuery(("linear", "the archive has no stored vectors; encode it with a model that stores vectors"))
    weights = read_only(np.array(order.weights, np.int16))
    pivot, has_pivot = (0, False) if order.pivot is None else (order.pivot, True)
    for first, chunk in _chunks(segment, "vector"):
        dims = chunk.type.list_size
        if dims != len(weights):
            raise InvalidQuery(("linear.weights", f"got {len(weights)} weights; stored vectors have {dims} dimensions"))
        if chunk.null_count < len(chunk):
            values = (values_of(chunk, np.int8, len(chunk) * dims), weights, pivot, has_pivot)
            yield OrderedChunk(offer_products, values, len(chunk), first, validity(chunk))


def _by_place(order: PlaceOrder, segment: Segment) -> Iterator[OrderedChunk]:
    # Ends with the shorter one if one of the columns is not there.
    for (first, lon), (_, lat) in zip(_chunks(segment, "lon"), _chunks(segment, "lat"), strict=False):
        if lon.null_count < len(lon) and lat.null_count < len(lat):
            places = (values_of(lon, np.float64, len(lon)), values_of(lat, np.float64, len(lat)))
            known = both(*(validity(each) if each.null_count else None for each in (lon, lat)))
            values = (*places, float(order.lon), float(order.lat))
            yield OrderedChunk(offer_places, values, len(lon), first, ALL_ROWS if known is None else read_only(known))


def _by_hash(order: RandomOrder, segment: Segment) -> Iterator[OrderedChunk]:
    seed = np.uint64(order.seed % 2**64)
    for first in range(0, segment.num_rows, ROWS_PER_CHUNK):
        ids = segment.ids_of(np.arange(first, min(first + ROWS_PER_CHUNK, segment.num_rows)))
        yield OrderedChunk(offer_hashes, (read_only(ids), seed), len(ids), first, ALL_ROWS)


def _by_time(order: ByTime, segment: Segment) -> Iterator[OrderedChunk]:
    chunks = [*_chunks(segment, "datetime")]
    # Rows are often in the order of their times. Fewer of them enter the heap if the best ones come first.
    for first, chunk in reversed(chunks) if order.newest_first else chunks:
        if chunk.null_count < len(chunk):
            values = (values_of(chunk, np.int64, len(chunk)), -1 if order.newest_first else 1)
            yield OrderedChunk(offer_numbers, values, len(chunk), first, validity(chunk))


def _chunks(segment: Segment, name: str) -> Iterator[tuple[int, pa.Array]]:
    """Yield the chunks of a column, each with the number of its first row; none for a column that is not there."""
    first = 0
    for chunk in segment.columns.chunks(name) if name in segment.columns.names else ():
        yield first, chunk
        first += len(chunk)


def values_of(chunk: pa.Array, dtype: npt.DTypeLike, count: int) -> npt.NDArray[Any]:
    """Return the values of a chunk without a copy; those of rows without a value are arbitrary."""
    assert not chunk.offset, "chunks begin with their buffers"
    return read_only(np.frombuffer(chunk.buffers()[-1], dtype, count))


def validity(chunk: pa.Array) -> Bits:
    """Return the bits of the rows that have a value; empty: all."""
    return read_only(np.frombuffer(chunk.buffers()[0], np.uint8, -(-len(chunk) // 8))) if chunk.null_count else ALL_ROWS
