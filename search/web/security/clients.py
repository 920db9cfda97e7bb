"""Clients of the gateway: one for each token that the gateway accepts."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from orbithash.search.client.async_client import AsyncClient
from orbithash.search.protocol.errors import GatewayUnreachable, Overloaded, Unauthenticated
from orbithash.search.web.settings import WebSettings

__all__ = ["Clients", "open_client"]


def open_client(settings: WebSettings, token: str | None) -> AsyncClient:
    """Return a client of the gateway, which has not been contacted yet."""
    name = settings.gateway_name
    options = () if name is None else (("grpc.ssl_target_name_override", name),)
    return AsyncClient(settings.gateway, token=token, tls=settings.gateway_tls, options=options)


class _Entry:
    """A client, the number of requests that use it, and when it was last used, by the clock of the event loop."""

    __slots__ = ("client", "is_accepted", "num_users", "used")

    def __init__(self, client: AsyncClient, now: float) -> None:
        self.client = client
        self.num_users = 0
        self.used = now
        self.is_accepted = False


class Clients:
    """Clients by token, at most `max_clients` of them. A client that is not used for some time is closed."""

    def __init__(self, settings: WebSettings) -> None:
        self._settings = settings
        self._entries: dict[str | None, _Entry] = {}

    def is_accepted(self, token: str | None) -> bool:
        """Return whether the gateway has accepted this token; None: calls without a token."""
        entry = self._entries.get(token)
        return entry is not None and entry.is_accepted

    @asynccontextmanager
    async def lease(self, token: str | None) -> AsyncIterator[AsyncClient]:
        """Yield the client of a token.

        A token that is new is sent to the gateway first, so that unknown tokens take no room. Raises `Unauthenticated`
        for a token that the gateway does not accept, and `Overloaded` if too many are in use.
        """
        loop = asyncio.get_running_loop()
        if token not in self._entries:
            await self._make_room()
        # Looked up after the wait: another request may have opened it meanwhile.
        entry = self._entries.get(token)
        if entry is None:
            entry = self._entries[token] = _Entry(self._open(token), loop.time())
        entry.num_users += 1
        try:
            if not entry.is_accepted and token is not None:
                await entry.client.describe()
            entry.is_accepted = True
            yield entry.client
        except (Unauthenticated, GatewayUnreachable):
            # Revoked, or the gateway has another certificate now: the next request begins anew.
            entry.is_accepted = False
            raise
        finally:
            entry.num_users -= 1
            entry.used = loop.time()
            if not entry.is_accepted and entry.num_users == 0 and self._entries.get(token) is entry:
                await self._close(token)

    async def close_idle(self) -> None:
        """Close the clients that are not used for some time."""
        latest = asyncio.get_running_loop().time() - self._settings.limits.idle_client_s
        for token in [token for token, entry in self._entries.items() if not entry.num_users and entry.used <= latest]:
            await self._close(token)

    async def close(self) -> None:
        """Close all clients."""
        for token in list(self._entries):
            await self._close(token)

    async def _make_room(self) -> None:
        if len(self._entries) < self._settings.limits.max_clients:
            return
        idle = [(entry.used, token) for token, entry in self._entries.items() if not entry.num_users]
        if not idle:
            raise Overloaded("too many tokens are in use", 1.0)
        await self._close(min(idle, key=lambda each: each[0])[1])

    def _open(self, token: str | None) -> AsyncClient:
        return open_client(self._settings, token)

    async def _close(self, token: str | None) -> None:
        entry = self._entries.pop(token, None)
        if entry is not None:
            await entry.client.close()
