"""How often clients may ask: requests of each kind by token or address, and requests in progress."""

import asyncio
import ipaddress
import math
from collections import OrderedDict

from starlette.datastructures import Headers
from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from orbithash.search.web.errors import WebError
from orbithash.search.web.security.access import token_of
from orbithash.search.web.security.clients import Clients
from orbithash.search.web.security.origins import is_door
from orbithash.search.web.settings import Rate, WebSettings

__all__ = ["Buckets", "Rates", "kind_of"]

# Clients whose requests are counted; the one that has not asked for the longest time is forgotten.
_MAX_CLIENTS = 10_000
# A larger body in a call of the JSON door is an image or a list of queries.
_SMALL_BODY_BYTES = 64 * 2**10


class Buckets:
    """Token buckets, one for each client and kind of request."""

    def __init__(self, rates: dict[str, Rate]) -> None:
        self._rates = rates
        # The level of each bucket, and when that was.
        self._levels: OrderedDict[tuple[str, str], tuple[float, float]] = OrderedDict()

    def take(self, kind: str, client: str, now: float) -> float:
        """Take one request. Return 0, or the seconds until the next request is allowed."""
        rate = self._rates[kind]
        level, then = self._levels.pop((kind, client), (float(rate.burst), now))
        level = min(float(rate.burst), level + (now - then) * rate.per_s)
        is_allowed = level >= 1.0
        self._levels[kind, client] = (level - is_allowed, now)
        if len(self._levels) > _MAX_CLIENTS:
            self._levels.popitem(last=False)
        return 0.0 if is_allowed else (1.0 - level) / rate.per_s


def kind_of(method: str, path: str, headers: Headers) -> str | None:
    """Return the kind of a request, a key of `WebLimits.rates`; None: it asks the gateway for nothing."""
    if path.startswith("/static/") or path == "/api/openapi.json":
        return None
    if path == "/login":
        return "logins" if method == "POST" else None
    if path.startswith("/export"):
        return "exports"
    if path == "/image" or path.startswith("/heat/"):
        return "uploads"
    if is_door(path) and method == "POST":
        length = headers.get("content-length", "")
        is_small = length.isascii() and length.isdigit() and int(length) <= _SMALL_BODY_BYTES
        return "searches" if is_small else "uploads"
    return "searches"


class Rates:
    """Refuses requests of clients that ask too often, and requests beyond the number that may be in progress."""

    def __init__(self, app: ASGIApp, settings: WebSettings, clients: Clients) -> None:
        self._app = app
        self._settings = settings
        self._clients = clients
        self._buckets = Buckets(dict(settings.limits.rates))
        self._num_requests = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        request = Request(scope)
        kind = kind_of(request.method, request.url.path, request.headers)
        if kind is not None:
            self._take(kind, request)
        if self._num_requests >= self._settings.limits.max_requests:
            raise WebError(503, "The service has too much to do. Try again in a few seconds.", {"Retry-After": "2"})
        self._num_requests += 1
        try:
            await self._app(scope, receive, send)
        finally:
            self._num_requests -= 1

    def _take(self, kind: str, request: Request) -> None:
        token = token_of(request, self._settings)
        address = _network(request.client.host if request.client else "")
        is_known = token is not None and self._clients.is_accepted(token)
        # A token that the gateway has not seen yet may be a guess.
        kinds = [kind] if is_known or token is None or kind == "logins" else ["logins", kind]
        for each in kinds:
            # Tokens and addresses cannot be confused: the latter have a prefix with a space.
            client = token if is_known and token is not None else f"at {address}"
            wait_s = self._buckets.take(each, client, asyncio.get_running_loop().time())
            if wait_s:
                seconds = max(1, math.ceil(wait_s))
                raise WebError(
                    429,
                    f"Too many {each} in a short time. Try again in {seconds} s.",
                    {"Retry-After": str(seconds)},
                )


def _network(host: str) -> str:
    """Return the address of a client; of IPv6 the network, because one client has many addresses there."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host
    if address.version == 4:
        return host
    return str(ipaddress.ip_network((address, 64), strict=False))
