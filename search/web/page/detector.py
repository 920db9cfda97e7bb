"""Detectors of the page: fitted to the marks of a state, or read from its address; their file."""

import asyncio
import base64
import binascii
import zlib
from collections import OrderedDict

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from orbithash.search.client import AsyncClient, Shuffle
from orbithash.search.detectors import Detector
from orbithash.search.detectors.detector import MAX_JSON_CHARS
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.web.page.archive import describe
from orbithash.search.web.page.state import State, parse_state

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
    if not description.vector_dims:
        raise InvalidQuery(("detector", "this archive stores no vectors, so a detector cannot run on it"))
    # Read each time: the caller must be allowed to read them, and a row that is written again has another vector.
    good, bad = await _marked_vectors(client, state)
    # Without the archive's version: the parts of one answer must have one detector, also beside a writer.
    kept_as = (description.model_id, state.good, state.bad, good, bad)
    if kept_as not in _kept:
        _kept[kept_as] = await _fitted(client, state, description, good, bad)
        while len(_kept) > _MAX_KEPT:
            _kept.popitem(last=False)
    _kept.move_to_end(kept_as)
    return _kept[kept_as]


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


async def _marked_vectors(client: AsyncClient, state: State) -> tuple[bytes, bytes]:
    """Return the stored vectors of the good and of the bad rows that have one, one after the other."""
    rows = await client.get(ids=(*state.good, *state.bad), include=("vector",))
    vectors = {row.id: row.stored_vector or b"" for row in rows.values()}
    good, bad = (b"".join(vectors.get(row, b"") for row in ids) for ids in (state.good, state.bad))
    if not good:
        raise InvalidQuery(("marks", "none of the tiles marked as good has a stored vector; mark another one"))
    return good, bad


async def _fitted(client: AsyncClient, state: State, description: Description, good: bytes, bad: bytes) -> Detector:
    import numpy as np

    from orbithash.encoders.vectors import VectorSpec
    from orbithash.search.detectors.fitting import MAX_BACKGROUND, fit_detector

    drawn = await client.rank(Shuffle(0), k=MAX_BACKGROUND, include=("vector",))
    marked = {*state.good, *state.bad}
    others = b"".join(hit.extra.get("vector") or b"" for hit in drawn.hits if hit.id not in marked)
    spec = VectorSpec(description.vector_dims, description.vector_scale)
    parts = [np.frombuffer(part, np.int8).reshape(-1, spec.dims) for part in (good, bad, others)]
    return await asyncio.to_thread(fit_detector, parts[0], parts[1], description.model_id, spec, parts[2])


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
