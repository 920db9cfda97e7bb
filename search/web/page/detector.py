"""Detectors of the page: fitted to the marks of a state, or read from its address; their file."""

import asyncio
import base64
import binascii
import zlib
from collections import OrderedDict
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbithash.search.client import AsyncClient, Row, Shuffle
from orbithash.search.detectors import Detector
from orbithash.search.detectors.detector import MAX_JSON_CHARS
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_LARGE_ROWS
from orbithash.search.web.page.archive import describe
from orbithash.search.web.page.state import State, parse_state

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

__all__ = ["read_detector", "routes", "to_text"]

# Fitted detectors that are kept; one is a few kB.
_MAX_KEPT = 100
_kept: OrderedDict[tuple[object, ...], Detector] = OrderedDict()


async def read_detector(client: AsyncClient, state: State, description: Description) -> Detector:
    """Return the detector in the address of a state, or one that is fitted to its marks.

    Raises:
        InvalidQuery: a damaged detector, one of another model, or marks that do not suffice; the field is "detector" or
            "marks".
    """
    if state.detector:
        detector = _of_text(state.detector)
        detector.check(description)
        return detector
    marks = (frozenset(state.good), frozenset(state.bad))
    # A row that is written anew keeps its id and may have another vector.
    kept_as = (description.model_id, description.archive_version, *marks)
    if (kept := _kept.get(kept_as)) is not None:
        # The caller must be allowed to read the archive, as another was that filled the cache.
        _kept.move_to_end(kept_as)
        return kept
    detector = await _fitted(client, state, description)
    _kept[kept_as] = detector
    while len(_kept) > _MAX_KEPT:
        _kept.popitem(last=False)
    return detector


def to_text(detector: Detector) -> str:
    """Return a detector as a parameter of an address: compressed JSON in base64url."""
    return base64.urlsafe_b64encode(zlib.compress(detector.to_json().encode(), 9)).decode().rstrip("=")


def _of_text(text: str) -> Detector:
    try:
        packed = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
        unpacking = zlib.decompressobj()
        content = unpacking.decompress(packed, MAX_JSON_CHARS + 1)
    except (binascii.Error, ValueError, zlib.error):
        raise InvalidQuery(("detector", "the address holds a damaged detector; open its file again")) from None
    return Detector.from_json(content)


async def _fitted(client: AsyncClient, state: State, description: Description) -> Detector:
    from orbithash.encoders.vectors import VectorSpec
    from orbithash.search.detectors.fitting import MAX_BACKGROUND, fit_detector

    if not description.vector_dims:
        raise InvalidQuery(("detector", "this archive stores no vectors, so a detector cannot run on it"))
    marked = (*state.good, *state.bad)
    rows, answer = await asyncio.gather(
        client.get(ids=marked, include=("vector",)),
        client.rank(Shuffle(0), k=min(MAX_BACKGROUND, MAX_LARGE_ROWS), include=("vector",)),
    )
    by_id: dict[int, Row] = {row.id: row for row in rows.values() if row.id is not None}
    background = [hit.extra["vector"] for hit in answer.hits if hit.id not in by_id and hit.extra.get("vector")]
    good, bad = (
        [by_id[row].stored_vector for row in ids if row in by_id and by_id[row].stored_vector]
        for ids in (state.good, state.bad)
    )
    if not good:
        raise InvalidQuery(("marks", "none of the tiles marked as good has a stored vector; mark another one"))
    spec = VectorSpec(description.vector_dims, description.vector_scale)
    return await asyncio.to_thread(
        fit_detector,
        _matrix(good, spec.dims),
        _matrix(bad, spec.dims),
        description.model_id,
        spec,
        _matrix(background, spec.dims),
    )


def _matrix(vectors: "list[bytes] | list[bytes | None]", dims: int) -> "npt.NDArray[np.int8]":
    import numpy as np

    content = b"".join(vector for vector in vectors if vector is not None)
    return np.frombuffer(content, np.int8).reshape(-1, dims)


async def post_detector(request: Request) -> Response:
    """Answer POST /detector, the file of a detector: the parameter of the address that has it."""
    content = await request.body()
    detector = Detector.from_json(content)
    detector.check(await describe(request))
    return JSONResponse({"detector": to_text(detector)})


async def get_detector(request: Request) -> Response:
    """Answer GET /detector.json: the file of the detector of a state."""
    state = parse_state(request.query_params.multi_items()).state
    detector = await read_detector(request.state.client, state, await describe(request))
    return Response(
        detector.to_json(),
        media_type="application/json",
        headers={"Content-Disposition": 'attachment; filename="detector.json"'},
    )


routes = [
    Route("/detector", post_detector, methods=["POST"]),
    Route("/detector.json", get_detector, methods=["GET"]),
]
