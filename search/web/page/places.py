"""Places: the row at a place of the map."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbithash.search.protocol.rankings import Place
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.tiles import metres, picture_of, short_name

__all__ = ["routes"]


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


routes = [Route("/at", at)]
