"""Keys of rows in an order, from the columns of a segment."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.search.index.answers import Ids
from orbithash.search.index.rankings import ByTime, LinearOrder, Order, PlaceOrder, RandomOrder
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.segments.chunks import ROWS_PER_CHUNK
from orbithash.search.segments.segment import Segment

__all__ = ["KeyedRows", "keyed_rows"]

_EARTH_RADIUS_MM = 6_371_008.8e3

_GOLDEN, _FIRST, _SECOND = (np.uint64(value) for value in (0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB))


class KeyedRows(NamedTuple):
    """Rows of a segment with their keys.

    Attributes:
        first: number of the first row; the others follow it.
        keys: int64 [n].
        are_known: which rows have a key, bool [n].
    """

    first: int
    keys: npt.NDArray[np.int64]
    are_known: npt.NDArray[np.bool_]


def keyed_rows(order: Order, segment: Segment) -> Iterator[KeyedRows]:
    """Yield all rows of a segment with their keys. Raises `InvalidQuery` for weights that do not fit the vectors."""
    match order:
        case LinearOrder():
            chunks = _linear_keys(order, segment)
        case PlaceOrder():
            chunks = _place_keys(order, segment)
        case RandomOrder():
            chunks = _random_keys(order, segment)
        case ByTime():
            chunks = _time_keys(order, segment)
    first = 0
    for keys, are_known in chunks:
        yield KeyedRows(first, keys, are_known)
        first += len(keys)


_Keys = Iterator[tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]]


def _linear_keys(order: LinearOrder, segment: Segment) -> _Keys:
    if "vector" not in segment.columns.names:
        raise InvalidQuery(("linear", "the archive has no stored vectors; encode it with a model that makes some"))
    weights = np.array(order.weights, np.int32)
    for chunk in segment.columns.chunks("vector"):
        vectors, are_known = fixed_size_rows(pa.chunked_array([chunk]))
        if vectors.shape[1] != len(weights):
            raise InvalidQuery(
                ("linear.weights", f"got {len(weights)} weights; stored vectors have {vectors.shape[1]} dimensions")
            )
        products = (vectors.astype(np.int32) * weights).sum(axis=1, dtype=np.int64)
        yield -products if order.pivot is None else abs(products - order.pivot), are_known


def _place_keys(order: PlaceOrder, segment: Segment) -> _Keys:
    if not {"lon", "lat"} <= {*segment.columns.names}:
        return
    for lon_chunk, lat_chunk in zip(segment.columns.chunks("lon"), segment.columns.chunks("lat"), strict=True):
        lon, lat = (np.asarray(chunk.fill_null(np.nan)) for chunk in (lon_chunk, lat_chunk))
        are_known = np.isfinite(lon) & np.isfinite(lat)
        lon, lat = np.where(are_known, lon, 0.0), np.where(are_known, lat, 0.0)
        half_lat, half_lon = np.radians(lat - order.lat) / 2, np.radians(lon - order.lon) / 2
        squares = np.sin(half_lat) ** 2
        squares += np.cos(np.radians(lat)) * np.cos(np.radians(order.lat)) * np.sin(half_lon) ** 2
        distances = 2 * _EARTH_RADIUS_MM * np.arcsin(np.sqrt(np.minimum(squares, 1.0)))
        yield np.rint(distances).astype(np.int64), are_known


def _random_keys(order: RandomOrder, segment: Segment) -> _Keys:
    [seed] = _mixed(np.array([order.seed % 2**64], np.uint64))
    for start in range(0, segment.num_rows, ROWS_PER_CHUNK):
        ids = segment.ids_of(np.arange(start, min(start + ROWS_PER_CHUNK, segment.num_rows)))
        yield (_mixed(ids ^ seed) >> np.uint64(1)).astype(np.int64), np.ones(len(ids), np.bool_)


def _mixed(numbers: Ids) -> Ids:
    """Return the numbers that splitmix64 generates from these states, uint64 [N]."""
    mixed = numbers + _GOLDEN
    mixed = (mixed ^ (mixed >> np.uint64(30))) * _FIRST
    mixed = (mixed ^ (mixed >> np.uint64(27))) * _SECOND
    return mixed ^ (mixed >> np.uint64(31))


def _time_keys(order: ByTime, segment: Segment) -> _Keys:
    for chunk in _chunks(segment, "datetime"):
        microseconds, are_known = integers(chunk)
        yield -microseconds if order.newest_first else microseconds, are_known


def _chunks(segment: Segment, name: str) -> Any:
    return segment.columns.chunks(name) if name in segment.columns.names else ()


def integers(chunk: pa.Array) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Return a column of numbers or times as int64 [N], 0 where null, and which values are not null, bool [N]."""
    are_known = np.asarray(chunk.is_valid())
    return np.asarray(chunk.cast(pa.int64()).fill_null(0)), are_known
