"""What is served: the description of the archive, kept for a few seconds."""

import time
from dataclasses import dataclass, field

from starlette.requests import Request

from orbithash.search.protocol.description import Description
from orbithash.search.protocol.rankings import Place

__all__ = ["describe", "has_places"]

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


async def has_places(request: Request, description: Description) -> bool:
    """Return whether any row of the archive has a place, so that there is something to show on a map."""
    archive = (description.model_id, description.archive_version)
    known: tuple[object, bool] | None = getattr(request.app.state, "places", None)
    if known is None or known[0] != archive:
        found = await request.state.client.rank(Place(0.0, 0.0), k=1)
        if not found.rows_within and found.coverage.fraction < 1:
            return True
        known = (archive, found.rows_within > 0)
        request.app.state.places = known
    return known[1]
