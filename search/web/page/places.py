"""Places: the row at a place of the map, and the rows that show one place."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbithash.search.protocol.rankings import Place, TimeOrder
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.state import State
from orbithash.search.web.page.tiles import metres, picture_of, short_name, tiles_of
from orbithash.search.web.rendering import render

__all__ = ["routes"]

# Rows of one place that are listed.
_MAX_TIMES = 200


async def at(request: Request) -> Response:
    """Answer GET /at?lon=&lat=: the row whose centre is nearest to a place, as JSON; `id` is null without one."""
    try:
        place = Place(*(float(request.query_params.get(name, "")) for name in ("lon", "lat")))
    except ValueError:
        raise WebError(400, "A place is a longitude and a latitude in degrees.") from None
    hits = (await request.state.client.rank(place, k=1, include=("thumbnail",))).hits
    if not hits:
        return JSONResponse({"id": None})
    hit = hits[0]
    return JSONResponse(
        {
            # Ids may be larger than the integers of JavaScript.
            "id": str(hit.id),
            "name": hit.label or short_name(hit.key),
            "distance": metres(hit.score or 0.0),
            "picture": picture_of(hit.extra.get("thumbnail")),
        }
    )


async def times(request: Request) -> Response:
    """Answer GET /times/ID: the rows that show the place of a row, the oldest first."""
    number = request.path_params["id"]
    client = request.state.client
    rows = await client.get(ids=[number])
    if not rows:
        raise WebError(404, "This tile is no longer in the archive.")
    (row,) = rows.values()
    found = await client.rank(TimeOrder(same_place_as=row.key), k=_MAX_TIMES, include=("thumbnail",))
    return render(
        request,
        "_times_list.html",
        id=number,
        name=row.label or short_name(row.key),
        tiles=tiles_of(found.hits, State(), "time", 0),
        num_times=found.rows_within,
    )


routes = [Route("/at", at), Route("/times/{id:int}", times)]
