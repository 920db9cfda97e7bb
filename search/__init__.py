"""Search archives of codes: indexes, the engine, the service, the gateway and its clients.

`Client`, `AsyncClient` and `LocalIndex` are imported when they are first used: a client needs neither numpy nor faiss.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from orbithash.search.client.async_client import AsyncClient
    from orbithash.search.client.client import Client
    from orbithash.search.engine.local_index import LocalIndex

__all__ = ["AsyncClient", "Client", "LocalIndex"]


def __getattr__(name: str) -> Any:
    """Import a name of `__all__`."""
    if name == "AsyncClient":
        from orbithash.search.client.async_client import AsyncClient

        return AsyncClient
    if name == "Client":
        from orbithash.search.client.client import Client

        return Client
    if name == "LocalIndex":
        from orbithash.search.engine.local_index import LocalIndex

        return LocalIndex
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """List the names that can be imported."""
    return sorted({*globals(), *__all__})
