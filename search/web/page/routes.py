"""The addresses of the page: the whole page, its parts, and pictures of rows."""

import base64
from typing import Any

from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from orbithash.encoders.errors import InputError
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import InvalidQuery, SearchError, Unauthenticated
from orbithash.search.web.errors import WebError, failure_of
from orbithash.search.web.page import sentences
from orbithash.search.web.page.answers import Answers
from orbithash.search.web.page.archive import describe, has_places
from orbithash.search.web.page.charts import distance_chart, group_chart, heat_chart
from orbithash.search.web.page.exports import routes as export_routes
from orbithash.search.web.page.filters import filter_text
from orbithash.search.web.page.places import routes as place_routes
from orbithash.search.web.page.rows import read_row_view
from orbithash.search.web.page.state import Parsed, Problems, State, format_state, parse_state
from orbithash.search.web.page.tiles import TILE_COLUMNS, marked_tile, tiles_of
from orbithash.search.web.rendering import render

__all__ = ["routes"]

# Tiles of one part: ten rows of six or twelve of five.
PAGE_SIZE = 60
# Classes with a checkbox; the others are reached by an expression.
MAX_CLASSES = 200
HEAT_CELLS = 7


async def home(request: Request) -> Response:
    """Answer GET /: the whole page, or for htmx the answer alone."""
    parsed = _parse(request)
    is_fragment = "hx-request" in request.headers
    if is_fragment and parsed.problems:
        return _problems(request, parsed.problems, 400)
    problems, status, are_placed = dict(parsed.problems), 200, True
    description: Description | None = None
    values: dict[str, Any] = {}
    try:
        description = await describe(request)
        if not is_fragment:
            are_placed = await has_places(request, description)
        values, problem = await _answer_values(request, parsed.state, description)
        if problem:
            problems.setdefault("marks", problem)
    except Unauthenticated:
        raise
    except (SearchError, InputError) as error:
        status = failure_of(error).status
        slot, sentence = sentences.problem_of(error, parsed.state)
        problems.setdefault(slot, sentence)
    if is_fragment and not values:
        return _problems(request, problems, status)
    return render(
        request,
        "_answer_parts.html" if is_fragment else "index.html",
        status,
        **{"shown": None, "state": parsed.state, "query": format_state(parsed.state)} | values,
        problems=problems,
        typed=parsed.typed,
        has_places=are_placed,
        description=description,
    )


async def more(request: Request) -> Response:
    """Answer GET /more: the next tiles."""
    state, description = _parse(request).state, await describe(request)
    start = request.query_params.get("start", "")
    first = int(start) if start.isdecimal() and len(start) < 10 else 0
    answers = Answers(request.state.client, state, description)
    shown = await answers.page(request.query_params.get("after", ""), PAGE_SIZE, TILE_COLUMNS)
    return render(request, "_tiles.html", **_tile_values(state, description, answers, shown, first))


async def _answer_values(request: Request, state: State, description: Description) -> tuple[dict[str, Any], str]:
    """Return what the template of an answer shows, and why the marks have no effect."""
    answers = Answers(request.state.client, state, description)
    shown = await answers.page("", PAGE_SIZE, TILE_COLUMNS)
    marked = answers.examples.rows
    values = _tile_values(state, description, answers, shown, 0) | {
        "like": marked_tile(marked[state.like], "") if state.like is not None and state.like in marked else None,
        "good": [marked_tile(marked[row], "good") for row in state.good if row in marked],
        "bad": [marked_tile(marked[row], "bad") for row in state.bad if row in marked],
        "detector": answers.detector,
        "notes": answers.notes,
        "summary": sentences.summary(shown, answers),
        "partial": sentences.coverage_sentence(shown.coverage),
        "advice": "" if shown.hits else sentences.empty_advice(state),
        "has_query": bool(answers.examples.query),
    }
    return values, answers.problem


def _tile_values(state: State, description: Description, answers: Answers, shown: Any, first: int) -> dict[str, Any]:
    return {
        "state": state,
        "query": format_state(state),
        "shown": shown,
        "first": first,
        "tiles": tiles_of(shown.hits, state, shown.order, description.bits),
    }


async def classes(request: Request) -> Response:
    """Answer GET /classes: a checkbox for each class, with its rows under the other filters."""
    state = _parse(request).state
    groups = await request.state.client.count_by("label", filter=filter_text(state, without="label"))
    rows = dict(groups.rows)
    chosen = [(label, rows.pop(label, 0)) for label in state.label]
    listed = chosen + list(rows.items())[: max(0, MAX_CLASSES - len(chosen))]
    return render(
        request,
        "_classes.html",
        classes=listed,
        chosen=set(state.label),
        num_more=len(groups.rows) + sum(label not in groups.rows for label in state.label) - len(listed),
        without=groups.without,
    )


async def months(request: Request) -> Response:
    """Answer GET /months: the rows of each month or year under the filter without dates."""
    state = _parse(request).state
    groups = await request.state.client.count_by("month", filter=filter_text(state, without="dates"))
    return render(request, "_months.html", chart=group_chart(groups.rows), without=groups.without)


async def counts(request: Request) -> Response:
    """Answer GET /counts: the rows at each distance of the query, for the cut-off."""
    state, description = _parse(request).state, await describe(request)
    answers = Answers(request.state.client, state, description)
    await answers.prepare()
    if not answers.examples.query:
        return Response(status_code=204)
    found = await request.state.client.distances(**answers.examples.query, filter=filter_text(state))
    return render(request, "_counts.html", chart=distance_chart(found.rows), state=state)


async def row(request: Request) -> Response:
    """Answer GET /row/ID: what is known of one row."""
    state, description = _parse(request).state, await describe(request)
    view = await read_row_view(request.state.client, request.path_params["id"], state, description)
    return render(request, "_row.html", view=view, description=description, query=format_state(state), cells=HEAT_CELLS)


async def view(request: Request) -> Response:
    """Answer GET /view/ID: a picture of a row."""
    found = await _row_of(request)
    picture = await request.state.client.view(found.key, max_side=1024)
    if not picture.image:
        raise WebError(404, "This tile has no picture.")
    kind = "image/png" if picture.image.startswith(b"\x89PNG") else "image/jpeg"
    return Response(
        picture.image,
        media_type=kind,
        headers={"Cache-Control": "private, max-age=60", "X-Content-Type-Options": "nosniff"},
    )


async def heat(request: Request) -> Response:
    """Answer GET /heat/ID: which cells of a row's image make it near the query."""
    state, description = _parse(request).state, await describe(request)
    found = await _row_of(request)
    answers = Answers(request.state.client, state, description)
    await answers.prepare()
    if not answers.examples.query:
        raise WebError(400, "Search for something first: the map compares the tile with what is searched for.")
    heat_map = await request.state.client.heat_map(found.key, cells=HEAT_CELLS, **answers.examples.query)
    return render(request, "_heat.html", chart=heat_chart(heat_map.values, heat_map.box), heat=heat_map)


async def encode_image(request: Request) -> Response:
    """Answer POST /image: the code of the image in the body."""
    image = await request.body()
    if not image:
        raise WebError(400, "The file is empty. Choose a JPEG, a PNG or a GeoTIFF.")
    try:
        code = await request.state.client.encode(image=image)
    except InvalidQuery as error:
        name, problem = error.violations[0]
        raise WebError(
            400, f"This file cannot be searched for: {problem}" if name == "image" else str(error)
        ) from error
    return JSONResponse({"code": base64.urlsafe_b64encode(code).decode().rstrip("=")})


def _parse(request: Request) -> Parsed:
    return parse_state(request.query_params.multi_items())


async def _row_of(request: Request) -> Any:
    rows = await request.state.client.get(ids=[request.path_params["id"]])
    if not rows:
        raise WebError(404, "This tile is no longer in the archive.")
    return next(iter(rows.values()))


def _problems(request: Request, problems: Problems, status: int) -> HTMLResponse:
    """Return an answer that changes the problems on the page and nothing else.

    What the user can mend is no failure of a request, which browsers would report as an error: its status is 200.
    """
    response = render(request, "_problems.html", status if status >= 500 or status == 429 else 200, problems=problems)
    response.headers["HX-Reswap"] = "none"
    return response


routes = [
    Route("/", home),
    Route("/more", more),
    Route("/classes", classes),
    Route("/months", months),
    Route("/counts", counts),
    Route("/row/{id:int}", row),
    Route("/view/{id:int}", view),
    Route("/heat/{id:int}", heat),
    Route("/image", encode_image, methods=["POST"]),
    *place_routes,
    *export_routes,
]
