"""Conversion of `rankings` from and to protobuf."""

from typing import Any

from orbithash.search.protocol.convert import coverage_from_pb, coverage_to_pb, include_from_pb, include_to_pb
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.hits import RowHits, hit_from_pb, hit_to_pb
from orbithash.search.protocol.rankings import (
    By,
    DistanceCounts,
    GroupBy,
    Groups,
    HeatMap,
    Linear,
    Place,
    RankAnswer,
    RankCursor,
    Ranking,
    Shuffle,
    TimeOrder,
    View,
)
from orbithash.v1 import search_pb2

__all__ = [
    "distances_from_pb",
    "distances_to_pb",
    "group_by_from_pb",
    "group_by_to_pb",
    "groups_from_pb",
    "groups_to_pb",
    "heat_map_from_pb",
    "heat_map_to_pb",
    "rank_answer_from_pb",
    "rank_answer_to_bytes",
    "ranking_from_pb",
    "ranking_to_pb",
    "view_from_pb",
    "view_to_pb",
]

# Weights of more components than any stored vector has are not converted.
_MAX_WEIGHTS = 2**16

_GROUPS: dict[GroupBy, search_pb2.GroupBy.ValueType] = {
    "label": search_pb2.GROUP_BY_LABEL,
    "month": search_pb2.GROUP_BY_MONTH,
    "year": search_pb2.GROUP_BY_YEAR,
}
_GROUP_NAMES: dict[int, GroupBy] = {int(number): name for name, number in _GROUPS.items()}


def ranking_to_pb(ranking: Ranking) -> search_pb2.RankRequest:
    """Return the request for a ranking that passes `Ranking.check`."""
    request = search_pb2.RankRequest(
        k=ranking.k,
        filter=ranking.filter,
        min_score=ranking.min_score,
        include=include_to_pb(ranking.include),
        min_coverage=ranking.min_coverage,
    )
    if ranking.after is not None:
        request.after.key, request.after.id = ranking.after
    match ranking.by:
        case Linear() as by:
            linear = search_pb2.Linear(
                weights=by.weights, scale=by.scale, offset=by.offset, least_certain=by.least_certain
            )
            request.linear.CopyFrom(linear)
        case Place() as by:
            request.place.CopyFrom(search_pb2.Place(lon=by.lon, lat=by.lat, max_distance_m=by.max_distance_m))
        case Shuffle() as by:
            request.shuffle.CopyFrom(search_pb2.Shuffle(seed=by.seed))
        case TimeOrder() as by:
            time = search_pb2.TimeOrder(newest_first=by.newest_first, same_place_as=by.same_place_as)
            request.time.CopyFrom(time)
    return request


def ranking_from_pb(request: search_pb2.RankRequest) -> Ranking:
    """Return the ranking of a request, unchecked. Raises `InvalidQuery` for a request without an order."""
    return Ranking(
        by=_by_from_pb(request),
        k=request.k,
        filter=request.filter,
        min_score=request.min_score if request.HasField("min_score") else None,
        after=RankCursor(request.after.key, request.after.id) if request.HasField("after") else None,
        include=include_from_pb(request.include),
        min_coverage=request.min_coverage,
    )


def _by_from_pb(request: search_pb2.RankRequest) -> By:
    kind = request.WhichOneof("by")
    if kind == "linear":
        linear = request.linear
        if len(linear.weights) > _MAX_WEIGHTS:
            raise InvalidQuery(("weights", f"at most {_MAX_WEIGHTS:,}, got {len(linear.weights):,}"))
        return Linear(tuple(linear.weights), linear.scale, linear.offset, linear.least_certain)
    if kind == "place":
        place = request.place
        return Place(place.lon, place.lat, place.max_distance_m if place.HasField("max_distance_m") else None)
    if kind == "shuffle":
        return Shuffle(request.shuffle.seed)
    if kind == "time":
        return TimeOrder(request.time.newest_first, request.time.same_place_as)
    raise InvalidQuery(("by", "no order; give one of linear, place, shuffle and time"))


def rank_answer_to_bytes(answer: RankAnswer) -> bytes:
    """Return the serialised `RankResponse` that carries an answer."""
    head = search_pb2.RankResponse(
        coverage=coverage_to_pb(answer.coverage),
        took_ms=answer.took_ms,
        model_id=answer.model_id,
        archive_version=answer.archive_version,
        matching_rows=answer.matching_rows,
        ranked_rows=answer.ranked_rows,
        rows_within=answer.rows_within,
    )
    if answer.next is not None:
        head.next.key, head.next.id = answer.next
    if isinstance(answer.hits, RowHits):
        # Without an object for each hit. The field `hits` has the same number in `SearchResponse`.
        return answer.hits.serialised() + head.SerializeToString()
    head.hits.extend(map(hit_to_pb, answer.hits))
    return head.SerializeToString()


def rank_answer_from_pb(response: search_pb2.RankResponse) -> RankAnswer:
    """Return the answer of a response."""
    return RankAnswer(
        tuple(map(hit_from_pb, response.hits)),
        coverage_from_pb(response.coverage),
        response.took_ms,
        response.model_id,
        response.archive_version,
        RankCursor(response.next.key, response.next.id) if response.HasField("next") else None,
        response.matching_rows if response.HasField("matching_rows") else None,
        response.ranked_rows,
        response.rows_within,
    )


def distances_to_pb(counts: DistanceCounts) -> search_pb2.DistancesResponse:
    """Return the response that carries numbers of rows by distance."""
    return search_pb2.DistancesResponse(
        rows=counts.rows,
        coverage=coverage_to_pb(counts.coverage),
        took_ms=counts.took_ms,
        model_id=counts.model_id,
        archive_version=counts.archive_version,
        matching_rows=counts.matching_rows,
    )


def distances_from_pb(response: search_pb2.DistancesResponse) -> DistanceCounts:
    """Return the numbers of rows of a response."""
    return DistanceCounts(
        tuple(response.rows),
        coverage_from_pb(response.coverage),
        response.took_ms,
        response.model_id,
        response.archive_version,
        response.matching_rows if response.HasField("matching_rows") else None,
    )


def group_by_to_pb(by: GroupBy) -> search_pb2.GroupBy.ValueType:
    """Return the number of what rows are counted by."""
    return _GROUPS[by]


def group_by_from_pb(number: int) -> GroupBy:
    """Return what rows are counted by. Raises `InvalidQuery` for an unknown number."""
    if number not in _GROUP_NAMES:
        raise InvalidQuery(("by", f"nothing to count by has the number {number}; see GroupBy"))
    return _GROUP_NAMES[number]


def groups_to_pb(groups: Groups) -> search_pb2.CountByResponse:
    """Return the response that carries groups."""
    return search_pb2.CountByResponse(
        groups=[search_pb2.Group(value=value, rows=rows) for value, rows in groups.rows.items()],
        rows_without=groups.without,
        other_rows=groups.others,
        coverage=coverage_to_pb(groups.coverage),
        archive_version=groups.archive_version,
    )


def groups_from_pb(response: search_pb2.CountByResponse) -> Groups:
    """Return the groups of a response."""
    return Groups(
        {group.value: group.rows for group in response.groups},
        response.rows_without,
        response.other_rows,
        coverage_from_pb(response.coverage),
        response.archive_version,
    )


def view_to_pb(view: View) -> search_pb2.ViewResponse:
    """Return the response that carries a picture."""
    return search_pb2.ViewResponse(**view._asdict())


def view_from_pb(response: search_pb2.ViewResponse) -> View:
    """Return the picture of a response."""
    return View(response.image, response.width, response.height, response.is_thumbnail)


def heat_map_to_pb(heat: HeatMap) -> search_pb2.HeatMapResponse:
    """Return the response that carries a heat map."""
    return search_pb2.HeatMapResponse(
        cells=len(heat.values),
        values=[value for row in heat.values for value in row],
        passes=heat.num_passes,
        is_thumbnail=heat.is_thumbnail,
        model_id=heat.model_id,
        box=heat.box,
    )


def heat_map_from_pb(response: search_pb2.HeatMapResponse) -> HeatMap:
    """Return the heat map of a response."""
    cells, values = response.cells, list(response.values)
    left, top, right, bottom = response.box
    rows: Any = tuple(tuple(values[start : start + cells]) for start in range(0, cells * cells, cells))
    return HeatMap(rows, response.passes, response.is_thumbnail, response.model_id, (left, top, right, bottom))
