"""Log in by a token of the gateway, and out."""

import unicodedata
from urllib.parse import parse_qs, quote

from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route

from orbithash.search.protocol.errors import Unauthenticated
from orbithash.search.web.rendering import render
from orbithash.search.web.security.access import cookie_name, cookie_value
from orbithash.search.web.security.clients import Clients

__all__ = ["routes", "safe_path"]

# Browsers keep cookies of up to 4,096 bytes.
_MAX_TOKEN_CHARS = 2048


def safe_path(address: str) -> str:
    r"""Return a path of this site with its query, such as /?q=boats; "/" for every other address.

    Browsers take //host, /\host and addresses with tabs or line breaks for addresses of other sites.
    """
    is_clean = not any(char == "\\" or unicodedata.category(char)[0] == "C" for char in address)
    if not is_clean or not address.startswith("/") or address.startswith("//"):
        return "/"
    return "/" if address.partition("?")[0] in ("/login", "/logout") else address


async def show(request: Request) -> Response:
    """Answer GET /login. If the gateway requires no tokens, redirect to the page."""
    back = safe_path(request.query_params.get("next", "/"))
    clients: Clients = request.app.state.clients
    try:
        async with clients.lease(None) as client:
            await client.describe()
    except Unauthenticated:
        return render(request, "login.html", next=back, problem=None)
    return RedirectResponse(back, 303)


async def log_in(request: Request) -> Response:
    """Answer POST /login: check the token at the gateway and keep it in a cookie that scripts cannot read."""
    fields = parse_qs((await request.body()).decode(errors="replace"), max_num_fields=8)
    token = fields.get("token", [""])[0].strip()
    back = safe_path(fields.get("next", ["/"])[0])
    problem = _problem(token)
    if problem is None:
        clients: Clients = request.app.state.clients
        try:
            async with clients.lease(token) as client:
                await client.describe()
        except Unauthenticated:
            problem = "The service does not know this token. It may have been revoked, or a character is missing."
    if problem is not None:
        return render(request, "login.html", 401, next=back, problem=problem)
    settings = request.app.state.settings
    response = RedirectResponse(back, 303)
    response.set_cookie(
        cookie_name(settings),
        cookie_value(token),
        path="/",
        secure=settings.is_https,
        httponly=True,
        samesite="strict",
    )
    return response


def _problem(token: str) -> str | None:
    if not token:
        return "Enter a token."
    if not (token.isascii() and token.isprintable()) or " " in token:
        return "A token consists of letters, digits and signs, without spaces."
    if len(token) > _MAX_TOKEN_CHARS:
        return f"A token has at most {_MAX_TOKEN_CHARS:,} characters."
    return None


async def log_out(request: Request) -> Response:
    """Answer POST /logout."""
    settings = request.app.state.settings
    fields = parse_qs((await request.body()).decode(errors="replace"), max_num_fields=8)
    back = safe_path(fields.get("next", ["/"])[0])
    response = RedirectResponse(f"/login?next={quote(back, safe='')}", 303)
    response.delete_cookie(cookie_name(settings), path="/", secure=settings.is_https, httponly=True, samesite="strict")
    return response


routes = [
    Route("/login", show, methods=["GET"]),
    Route("/login", log_in, methods=["POST"]),
    Route("/logout", log_out, methods=["POST"]),
]
