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
from orbithash.search.web.door.routes import routes as door_routes
from orbithash.search.web.errors import WebError, answer_error
from orbithash.search.web.page.detector import routes as detector_routes
from orbithash.search.web.page.routes import routes as page_routes
from orbithash.search.web.security.access import Access
from orbithash.search.web.security.bodies import Bodies
from orbithash.search.web.security.boundary import Boundary
from orbithash.search.web.security.clients import Clients
from orbithash.search.web.security.login import routes as login_routes
from orbithash.search.web.security.origins import Origins
from orbithash.search.web.security.rates import Rates
from orbithash.search.web.settings import WebSettings

__all__ = ["create_app"]

logger = logging.getLogger(__name__)

_IDLE_EVERY_S = 30.0


def create_app(settings: WebSettings) -> Starlette:
    """Return the application of a web service. Raises `InputError` for invalid settings."""
    settings.check()
    clients, assets = Clients(settings), Assets()

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
        routes=[
            Route("/static/{version}/{path:path}", serve_asset, methods=["GET"]),
            *login_routes,
            *door_routes,
            *([] if assets.problem is None else [Route("/", _no_page, methods=["GET"])]),
            *page_routes,
            *detector_routes,
        ],
        middleware=[
            Middleware(Boundary, settings=settings),
            Middleware(Origins, settings=settings),
            Middleware(Rates, settings=settings, clients=clients),
            Middleware(Bodies, settings=settings),
            Middleware(Access, settings=settings, clients=clients),
        ],
        exception_handlers={404: _answer, 405: _answer},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.settings = settings
    app.state.assets = assets
    app.state.clients = clients
    if assets.problem is not None:
        logger.warning("%s", assets.problem)
    return app


async def _no_page(request: Request) -> Response:
    raise WebError(503, request.app.state.assets.problem)


async def _answer(request: Request, error: Exception) -> Response:
    return answer_error(request, error)


async def _close_idle(clients: Clients) -> None:
    while True:
        await asyncio.sleep(_IDLE_EVERY_S)
        await clients.close_idle()
