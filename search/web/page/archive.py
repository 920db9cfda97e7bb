"""What is served: the description of the archive, kept for a few seconds."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from orbithash.search.protocol.description import Description

__all__ = ["describe"]

_MAX_AGE_S = 5.0


@dataclass
class _Kept:
    description: Description | None = None
    read_at: float = field(default_factory=time.monotonic)


async def describe(request: Request) -> Description:
    """Return the description of the served archive. Raises `SearchError`."""
    kept: _Kept = getattr(request.app.state, "described", _Kept())
    if kept.description is not None and time.monotonic() - kept.read_at < _MAX_AGE_S:
        return kept.description
    description: Description = await request.state.client.describe()
    request.app.state.described = _Kept(description)
    return description
