"""Routes of the page."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orbithash.search.web.rendering import render

__all__ = ["routes"]


async def home(request: Request) -> Response:
    """Answer GET /: the whole page."""
    description = await request.state.client.describe()
    return render(request, "index.html", description=description)


routes = [Route("/", home, methods=["GET"])]
