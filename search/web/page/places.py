"""Places: the row nearest to a place on the map, and the rows that show the place of a row at other times."""

import math

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbithash.search.protocol.rankings import Place, TimeOrder
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.filters import filter_text
from orbithash.search.web.page.sentences import coverage_sentence
from orbithash.search.web.page.state import State, parse_state
from orbithash.search.web.page.tiles import metres, picture_of, short_name, tiles_of
from orbithash.search.web.rendering import render

__all__ = ["MAX_TIMES", "routes"]

# Rows of one place that are listed.
MAX_TIMES = 200


async def at(request: Request) -> Response:
    """Answer GET /at?lon=&lat=: the row whose centre is nearest, of those that pass the filters of the address."""
    lon, lat = _degrees(request, "lon", 360), _degrees(request, "lat", 90)
    parsed = parse_state(request.query_params.multi_items())
    if parsed.problems:
        raise WebError(400, " ".join(parsed.problems.values()))
    state = parsed.state
    answer = await request.state.client.rank(Place(lon, lat), k=1, include=("thumbnail",), filter=filter_text(state))
    if not answer.hits:
        which = "that passes the filters " if state.is_filtered else ""
        raise WebError(404, f"No tile {which}has a place on the map.")
    (hit,) = answer.hits
    # 64-bit numbers are texts, because numbers of JavaScript have 53 bits.
    fields = {
        "id": str(hit.id),
        "key": hit.key,
        "name": hit.label or short_name(hit.key),
        "distance_m": hit.score,
        "distance": metres(hit.score or 0.0),
        "picture": picture_of(hit.extra.get("thumbnail")),
    }
    return JSONResponse(fields)


async def times(request: Request) -> Response:
    """Answer GET /times/ID: the rows that show the place of a row, the oldest first."""
    number = request.path_params["id"]
    rows = await request.state.client.get(ids=[number])
    if not rows:
        raise WebError(404, "This tile is no longer in the archive.")
    (row,) = rows.values()
    order = TimeOrder(same_place_as=row.key)
    answer = await request.state.client.rank(order, k=MAX_TIMES, include=("thumbnail",))
    return render(
        request,
        "_times_list.html",
        id=number,
        title=row.label or short_name(row.key),
        tiles=tiles_of(answer.hits, State(), "time", 0),
        num_times=answer.rows_within,
        partial=coverage_sentence(answer.coverage),
    )


def _degrees(request: Request, name: str, most: int) -> float:
    text = request.query_params.get(name, "")
    try:
        degrees = float(text)
    except ValueError:
        degrees = math.nan
    if not abs(degrees) <= most:
        raise WebError(400, f"{name} is a number of degrees from -{most} to {most}.")
    return degrees


routes = [Route("/at", at), Route("/times/{id:int}", times)]
