"""Where a request comes from: the name in its address, and the site whose page made it."""

import ipaddress
import socket

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from orbithash.search.web.errors import WebError
from orbithash.search.web.settings import WebSettings

__all__ = ["Origins", "is_door"]

_SAFE_METHODS = ("GET", "HEAD", "OPTIONS")


def is_door(path: str) -> bool:
    """Return whether a path belongs to the JSON door, which programs call."""
    return path == "/api" or path.startswith("/api/")


class Origins:
    """Refuses requests under unknown names, and those that pages of other sites make.

    Unknown names: a page of another site could otherwise point its own name to this machine (DNS rebinding), and the
    browser would take both for one site. An IP address in the request's address cannot be used for that.

    Other sites: browsers say in Sec-Fetch-Site or in Origin which site made a request. Requests that change something
    must come from this site; others may be links from anywhere, but may not be embedded. Programs send neither header
    and no cookie, and may call the JSON door.
    """

    def __init__(self, app: ASGIApp, settings: WebSettings) -> None:
        self._app = app
        self._names = {"localhost", *(name.lower() for name in settings.hosts)}
        if not settings.is_local:
            self._names.add(socket.gethostname().lower())

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            self._check_host(headers)
            if scope["method"] in _SAFE_METHODS:
                _check_embedding(headers)
            else:
                _check_origin(headers, scope["path"])
        await self._app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        names = headers.getlist("host")
        name = _host(names[0]) if len(names) == 1 else ""
        if name not in self._names and not _is_ip(name):
            raise WebError(
                421, "This service does not answer under this name. Its operator can add the name with --web-host."
            )


def _host(netloc: str) -> str:
    """Return the name or the IP address of HOST or HOST:PORT."""
    if netloc.startswith("["):
        return netloc[1:].partition("]")[0]
    return netloc.partition(":")[0].lower().rstrip(".")


def _is_ip(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _check_embedding(headers: Headers) -> None:
    if headers.get("sec-fetch-site") not in ("cross-site", "same-site"):
        return
    if headers.get("sec-fetch-mode") != "navigate" or headers.get("sec-fetch-dest") != "document":
        raise WebError(403, "Pages of other sites may link to this service, but not load its content.")


def _check_origin(headers: Headers, path: str) -> None:
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is None and origin is None:
        is_allowed = is_door(path) and "cookie" not in headers
    else:
        # A proxy may end the encryption, so the scheme of the origin is not compared.
        is_own = origin is not None and origin.partition("://")[2].lower() == headers["host"].lower()
        is_allowed = (site == "same-origin" or site is None) and (is_own or origin is None)
    if not is_allowed:
        raise WebError(403, "The request does not come from a page of this service. Open the page and try again.")
