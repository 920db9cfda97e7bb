"""The token of a request, from its header or its cookie, and the client of the gateway with this token."""

import base64
import binascii

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from orbithash.search.web.security.clients import Clients
from orbithash.search.web.settings import WebSettings

__all__ = ["Access", "cookie_name", "cookie_value", "token_of"]

# Requests that do not ask the gateway.
_OPEN = ("/static/", "/login", "/logout", "/api/openapi.json")


def cookie_name(settings: WebSettings) -> str:
    """Return the name of the cookie; the prefix makes browsers insist on HTTPS and on this host."""
    return "__Host-orbithash" if settings.is_https else "orbithash"


def cookie_value(token: str) -> str:
    """Return a token in the characters that a cookie may hold."""
    return base64.urlsafe_b64encode(token.encode()).decode().rstrip("=")


def token_of(request: Request, settings: WebSettings) -> str | None:
    """Return the token of a request: that of the header `Authorization: Bearer`, else that of the cookie."""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and token.strip():
        return _checked(token.strip())
    value = request.cookies.get(cookie_name(settings), "")
    try:
        return _checked(base64.urlsafe_b64decode(value + "=" * (-len(value) % 4)).decode())
    except (binascii.Error, ValueError):
        return None


def _checked(token: str) -> str | None:
    return token if token and token.isascii() and token.isprintable() else None


class Access:
    """Gives every request that asks the gateway `state.client`, with the visitor's token, and `state.token`."""

    def __init__(self, app: ASGIApp, settings: WebSettings, clients: Clients) -> None:
        self._app = app
        self._settings = settings
        self._clients = clients

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        token = scope["state"]["token"] = token_of(Request(scope), self._settings)
        if scope["path"].startswith(_OPEN):
            await self._app(scope, receive, send)
            return
        async with self._clients.lease(token) as client:
            scope["state"]["client"] = client
            await self._app(scope, receive, send)
