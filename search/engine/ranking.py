"""Rows in another order than that of search, and numbers of rows by distance and by group."""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from orbithash.search.engine.engine import SHARD_TIMEOUT_S
from orbithash.search.engine.fan_out import SHARDS_SHARE, ask_all
from orbithash.search.engine.owners import read_hits, read_values
from orbithash.search.engine.query_codes import encode_query
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.rankings import (
    ByTime,
    LinearOrder,
    Order,
    PlaceOrder,
    RandomOrder,
    Ranked,
    merge_ranked,
)
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound, Unavailable
from orbithash.search.protocol.hits import RowHits
from orbithash.search.protocol.queries import Coverage, Query
from orbithash.search.protocol.rankings import (
    MAX_GROUPS,
    By,
    DistanceCounts,
    GroupBy,
    Groups,
    Linear,
    Place,
    RankAnswer,
    RankCursor,
    Ranking,
    Shuffle,
    TimeOrder,
)
from orbithash.search.segments.filters.expressions import parse_filter
from orbithash.search.shards.interface import ShardClient
from orbithash.v1 import search_pb2

__all__ = ["count_distances", "count_groups", "rank_rows"]

# On the sphere of `PlaceOrder`.
_METRES_PER_DEGREE = math.pi * 6_371_008.8 / 180
# Dot products lie between these.
_MAX_DOT = 2**31

Result = TypeVar("Result")


class _Sorting(NamedTuple):
    """What shards are asked for."""

    order: Order
    max_key: int | None
    filter: str


async def rank_rows(snapshot: Snapshot, timeout_s: float, ranking: Ranking, observer: Observer) -> RankAnswer:
    """Return the first rows in the order of a ranking that passes `Ranking.check`.

    Raises:
        InvalidQuery: the archive has no stored vectors, or of another size, or an invalid filter.
        KeyNotFound: no row has the key of `TimeOrder.same_place_as`.
        Unavailable: no shard answered, a shard with rows of hits failed, or the coverage is too low.
    """
    started = time.perf_counter()
    sorting = await _sorting(snapshot, ranking)
    after = None if ranking.after is None else (ranking.after.key, ranking.after.id)
    k, filter_text = ranking.k, sorting.filter

    def rank(shard: ShardClient, limit_s: float) -> Awaitable[Ranked]:
        return shard.rank(sorting.order, k, sorting.max_key, after, filter_text, limit_s)

    parts, coverage = await _ask(snapshot, rank, timeout_s, filter_text, ranking.min_coverage, observer)
    ranked = merge_ranked(parts, k)
    left_s = timeout_s - (time.perf_counter() - started)
    rows = await read_hits(snapshot, ranked.ids, ranking.include, min(SHARD_TIMEOUT_S, max(left_s, 0.0)))
    keys = ranked.keys.tolist()
    return RankAnswer(
        RowHits([0] * len(rows), rows, await _scores(snapshot, ranking.by, ranked, left_s)),
        coverage,
        1e3 * (time.perf_counter() - started),
        snapshot.archive.model_id,
        snapshot.archive.version,
        RankCursor(keys[-1], int(ranked.ids[-1])) if len(keys) == k else None,
        ranked.num_matching if ranking.filter else None,
        ranked.num_ranked,
        ranked.num_within,
    )


async def count_distances(snapshot: Snapshot, timeout_s: float, query: Query, observer: Observer) -> DistanceCounts:
    """Return the number of rows at each distance of a query; raises as a search by it."""
    started = time.perf_counter()
    encoded = await encode_query(query, snapshot)

    def count(shard: ShardClient, limit_s: float) -> Awaitable[tuple[npt.NDArray[np.int64], int | None]]:
        return shard.distances(encoded.codes[0], query.filter, limit_s)

    parts, coverage = await _ask(snapshot, count, timeout_s, query.filter, query.min_coverage, observer)
    return DistanceCounts(
        tuple(np.sum([counts for counts, _ in parts], axis=0).tolist()),
        coverage,
        1e3 * (time.perf_counter() - started),
        snapshot.archive.model_id,
        snapshot.archive.version,
        sum(matching or 0 for _, matching in parts) if query.filter else None,
    )


async def count_groups(
    snapshot: Snapshot, timeout_s: float, by: GroupBy, filter_text: str, min_coverage: float, observer: Observer
) -> Groups:
    """Return the number of rows of each class, month or year. Raises `InvalidQuery` and `Unavailable`."""

    def count(shard: ShardClient, limit_s: float) -> Awaitable[tuple[dict[str, int], int]]:
        return shard.count_by(by, filter_text, limit_s)

    parts, coverage = await _ask(snapshot, count, timeout_s, filter_text, min_coverage, observer)
    counts: Counter[str] = Counter()
    for groups, _ in parts:
        counts.update(groups)
    ordered = sorted(counts.items(), key=lambda group: (-group[1], group[0]) if by == "label" else (0, group[0]))
    others = sum(rows for _, rows in ordered[MAX_GROUPS:])
    without = sum(number for _, number in parts)
    return Groups(dict(ordered[:MAX_GROUPS]), without, others, coverage, snapshot.archive.version)


async def _ask(
    snapshot: Snapshot,
    call: Callable[[ShardClient, float], Awaitable[Result]],
    timeout_s: float,
    filter_text: str,
    min_coverage: float,
    observer: Observer,
) -> tuple[list[Result], Coverage]:
    """Return the answers of the shards that answer, and the coverage; see `ask_all` for errors."""
    limit_s = SHARDS_SHARE * timeout_s
    if not filter_text:
        # As in a search: the first evaluation of a filter may take longer than a failure.
        limit_s = min(limit_s, SHARD_TIMEOUT_S)
    with observer.stage("fan_out"):
        answers = await ask_all([call(shard, limit_s) for shard in snapshot.shards], limit_s, observer)
    answered = [shard for shard, answer in zip(snapshot.shards, answers, strict=True) if answer is not None]
    num_rows = sum(shard.num_rows for shard in answered)
    coverage = Coverage(num_rows, snapshot.num_rows, len(answered), len(answers))
    if coverage.fraction < 1:
        if coverage.fraction < min_coverage:
            raise Unavailable(
                f"{coverage.fraction:.3f} of the archive could be read, min_coverage is {min_coverage:.3f}; "
                "try again later"
            )
        observer.count("partial_answers")
    return [answer for answer in answers if answer is not None], coverage


async def _sorting(snapshot: Snapshot, ranking: Ranking) -> _Sorting:
    """Return what to ask the shards for."""
    match ranking.by:
        case Linear() as by:
            _check_dims(snapshot, len(by.weights))
            if by.least_certain:
                # Limited before it is rounded: the quotient of two finite numbers may be infinite.
                pivot = round(max(-_MAX_DOT, min(_MAX_DOT, -by.offset / by.scale)))
                return _Sorting(LinearOrder(by.weights, pivot), None, ranking.filter)
            max_key = None if ranking.min_score is None else -_smallest_dot(by, ranking.min_score)
            return _Sorting(LinearOrder(by.weights), max_key, ranking.filter)
        case Place(lon, lat, max_distance_m):
            max_key = None if max_distance_m is None else _largest_millimetres(max_distance_m)
            return _Sorting(PlaceOrder(math.remainder(lon, 360), lat), max_key, ranking.filter)
        case Shuffle(seed):
            return _Sorting(RandomOrder(seed), None, ranking.filter)
        case TimeOrder(newest_first, key):
            text = ranking.filter
            if key:
                if text:
                    # By itself, before it is put in brackets: "a) OR (b" is no expression.
                    await asyncio.to_thread(parse_filter, text)
                same_place = await _same_place(snapshot, key)
                text = f"({text}) AND ({same_place})" if text else same_place
            return _Sorting(ByTime(newest_first), None, text)
    raise AssertionError("all orders are listed")


def _check_dims(snapshot: Snapshot, num_weights: int) -> None:
    vector = snapshot.archive.vector
    if vector is None:
        raise InvalidQuery(
            (
                "linear",
                "the archive has no stored vectors, so rows have no scores; encode it again with a model that stores "
                "vectors",
            )
        )
    if num_weights != vector.dims:
        raise InvalidQuery(
            ("weights", f"the archive's stored vectors have {vector.dims} components, got {num_weights} weights")
        )


def _largest_millimetres(metres: float) -> int:
    """Return the largest whole number of millimetres that is at most a number of metres, as scores express it."""
    key = math.floor(min(1e3 * metres, 2.0**53))
    # The product may have been rounded down.
    return key + 1 if (key + 1) / 1e3 <= metres else key


def _smallest_dot(by: Linear, min_score: float) -> int:
    """Return the smallest dot product, limited to the range of dot products, whose score is at least `min_score`."""
    low, high = -_MAX_DOT, _MAX_DOT
    # The score does not fall as the dot product rises, in floating point too.
    while low < high:
        middle = (low + high) // 2
        if by.score(middle) >= min_score:
            high = middle
        else:
            low = middle + 1
    return low


async def _same_place(snapshot: Snapshot, key: str) -> str:
    """Return the filter of rows that show the centre of the row with this key."""
    found = await asyncio.to_thread(snapshot.archive.find, [key])
    if key not in found:
        raise KeyNotFound(f"no row of the archive has the key {key!r}")
    (row,) = await read_hits(snapshot, np.array([found[key]], np.uint64), (), SHARD_TIMEOUT_S)
    hit = search_pb2.Hit.FromString(row)
    if not (hit.HasField("lon") and hit.HasField("lat")):
        raise InvalidQuery(("same_place_as", f"the row {key[:80]!r} has no place"))
    lon, lat = hit.lon, hit.lat
    lat_limit = 1 / _METRES_PER_DEGREE
    lon_limit = min(360.0, lat_limit / max(math.cos(math.radians(lat)), 1e-9))
    # The same interval on both sides of the date line.
    turns = [turn for turn in (-360, 0, 360) if lon + turn + lon_limit >= -180 and lon + turn - lon_limit <= 180]
    lons = " OR ".join(f"lon {_between(lon + turn, lon_limit)}" for turn in turns)
    near = f"({lons}) AND lat {_between(lat, lat_limit)}"
    return f"S_INTERSECTS(footprint, POINT({lon!r} {lat!r})) OR (footprint IS NULL AND {near})"


def _between(middle: float, limit: float) -> str:
    return f"BETWEEN {middle - limit!r} AND {middle + limit!r}"


async def _scores(snapshot: Snapshot, by: By, ranked: Ranked, timeout_s: float) -> Sequence[float | None] | None:
    """Return the score of each hit; None for an order without scores."""
    match by:
        case Place():
            return [key / 1e3 for key in ranked.keys.tolist()]
        case Linear(least_certain=False):
            return [by.score(-key) for key in ranked.keys.tolist()]
        case Linear():
            # The key does not tell on which side of the pivot a row lies.
            vectors, _ = await read_values(snapshot, ranked.ids, "vector", min(SHARD_TIMEOUT_S, max(timeout_s, 0.0)))
            weights = np.array(by.weights, np.int64)
            return [by.score(dot) for dot in (vectors.astype(np.int64) @ weights).tolist()] if len(vectors) else []
    return None
