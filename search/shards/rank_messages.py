"""Conversion of rankings and of numbers of rows to messages of shards and back."""

from typing import Any

import numpy as np

from orbithash.search.index.answers import Counts
from orbithash.search.index.rankings import ByTime, LinearOrder, Order, PlaceOrder, RandomOrder, Ranked
from orbithash.search.shards.messages import BadMessage, ids_of
from orbithash.v1 import shards_pb2 as pb

__all__ = [
    "after_of",
    "counts_from_pb",
    "counts_to_pb",
    "groups_from_pb",
    "groups_to_pb",
    "order_of",
    "rank_request",
    "ranked_from_pb",
    "ranked_to_pb",
]

_INT64 = np.dtype("<i8")


def rank_request(
    version: int, order: Order, k: int, max_key: int | None, after: tuple[int, int] | None, filter_text: str
) -> pb.ShardRankRequest:
    """Return the request of the first rows in an order."""
    request = pb.ShardRankRequest(version=version, k=k, max_key=max_key, filter=filter_text)
    match order:
        case LinearOrder(weights, pivot):
            request.linear.CopyFrom(pb.ShardLinearOrder(weights=weights, pivot=pivot))
        case PlaceOrder(lon, lat):
            request.place.CopyFrom(pb.ShardPlaceOrder(lon=lon, lat=lat))
        case RandomOrder(seed):
            request.random.CopyFrom(pb.ShardRandomOrder(seed=seed))
        case ByTime(newest_first):
            request.time.CopyFrom(pb.ShardTimeOrder(newest_first=newest_first))
    if after is not None:
        request.after.key, request.after.id = after
    return request


def order_of(request: pb.ShardRankRequest) -> Order:
    """Return the order of a request; raise `BadMessage` if it has none."""
    match request.WhichOneof("order"):
        case "linear":
            linear = request.linear
            return LinearOrder(tuple(linear.weights), linear.pivot if linear.HasField("pivot") else None)
        case "place":
            return PlaceOrder(request.place.lon, request.place.lat)
        case "random":
            return RandomOrder(request.random.seed)
        case "time":
            return ByTime(request.time.newest_first)
    raise BadMessage("a request to rank rows without an order")


def after_of(request: pb.ShardRankRequest) -> tuple[int, int] | None:
    """Return the position (key, id) after which the rows begin; None: from the first."""
    return (request.after.key, request.after.id) if request.HasField("after") else None


def ranked_to_pb(ranked: Ranked) -> pb.ShardRankResponse:
    """Return the response with ranked rows."""
    return pb.ShardRankResponse(
        keys=ranked.keys.astype(_INT64, copy=False).tobytes(),
        ids=ranked.ids.astype("<u8", copy=False).tobytes(),
        num_ranked=ranked.num_ranked,
        num_within=ranked.num_within,
        num_matching=ranked.num_matching,
        num_rows=ranked.num_rows,
    )


def ranked_from_pb(response: pb.ShardRankResponse) -> Ranked:
    """Return the ranked rows in a response; raise `BadMessage` if its arrays do not fit together."""
    keys, ids = _integers(response.keys), ids_of(response.ids)
    if len(keys) != len(ids):
        raise BadMessage(f"{len(keys)} keys and {len(ids)} ids")
    num_matching = response.num_matching if response.HasField("num_matching") else None
    return Ranked(keys, ids, response.num_ranked, response.num_within, num_matching, response.num_rows)


def counts_to_pb(num_rows: Counts, num_matching: int | None) -> pb.ShardDistancesResponse:
    """Return the response with the number of rows at each distance, and of all that pass the filter."""
    return pb.ShardDistancesResponse(num_rows=num_rows.astype(_INT64, copy=False).tobytes(), num_matching=num_matching)


def counts_from_pb(response: pb.ShardDistancesResponse) -> tuple[Counts, int | None]:
    """Return the numbers that `counts_to_pb` was given."""
    return _integers(response.num_rows), response.num_matching if response.HasField("num_matching") else None


def groups_to_pb(num_rows: dict[str, int], num_without: int) -> pb.ShardCountByResponse:
    """Return the response with the number of rows of each group, and of the rows without a group."""
    counts = np.fromiter(num_rows.values(), _INT64, len(num_rows))
    return pb.ShardCountByResponse(groups=list(num_rows), num_rows=counts.tobytes(), num_without=num_without)


def groups_from_pb(response: pb.ShardCountByResponse) -> tuple[dict[str, int], int]:
    """Return the numbers that `groups_to_pb` was given."""
    counts = _integers(response.num_rows).tolist()
    if len(response.groups) != len(counts):
        raise BadMessage(f"{len(response.groups)} groups and {len(counts)} numbers of rows")
    return dict(zip(response.groups, counts, strict=True)), response.num_without


def _integers(data: bytes) -> Any:
    if len(data) % _INT64.itemsize:
        raise BadMessage(f"{len(data)} bytes of int64")
    return np.frombuffer(data, _INT64)
