"""The web application: routes inside, protection around them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from orbithash.search.web.assets import Assets, serve_asset
from orbithash.search.web.errors import answer_error
from orbithash.search.web.page.routes import routes as page_routes
from orbithash.search.web.security.access import Access
from orbithash.search.web.security.boundary import Boundary
from orbithash.search.web.security.clients import Clients
from orbithash.search.web.settings import WebSettings

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_IDLE_EVERY_S = 30.0


def create_app(settings: WebSettings) -> Starlette:
    """Return the application of a web service. Raises `InputError` for invalid settings."""
    settings.check()
    clients = Clients(settings)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        task = asyncio.create_task(_close_idle(clients))
        try:
            yield
        finally:
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
            await clients.close()

    app = Starlette(
        routes=[Route("/static/{version}/{path:path}", serve_asset, methods=["GET"]), *page_routes],
        middleware=[
            Middleware(Boundary, settings=settings),
            Middleware(Access, settings=settings, clients=clients),
        ],
        exception_handlers={404: _answer, 405: _answer},
        lifespan=lifespan,
    )
    app.state.settings = settings
    app.state.assets = Assets()
    app.state.clients = clients
    if app.state.assets.problem is not None:
        logger.warning("%s", app.state.assets.problem)
    return app


async def _answer(request: Request, error: Exception) -> Response:
    return answer_error(request, error)


async def _close_idle(clients: Clients) -> None:
    while True:
        await asyncio.sleep(_IDLE_EVERY_S)
        await clients.close_idle()
