"""Exports: the rows of an answer as GeoJSON, CSV and GeoParquet, sent while they are read."""

import asyncio
from collections.abc import AsyncIterator, Iterable

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from orbithash.encoders.places.writers import FORMATS, MEDIA_TYPES, PlaceRow, open_writer
from orbithash.search.protocol.queries import Column, Hit
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.answers import Answers, Order, Shown
from orbithash.search.web.page.archive import describe
from orbithash.search.web.page.sentences import coverage_sentence
from orbithash.search.web.page.state import parse_state

__all__ = ["MAX_ROWS", "routes"]

# Of one export.
MAX_ROWS = 1_000_000
# Tiles that a grid shows before it is scrolled.
_FIRST_TILES = 60
_COLUMNS: tuple[Column, ...] = ("uri", "caption", "footprint")


class _Sink:
    """A file that keeps what is written until it is taken."""

    closed = False

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._position = 0

    def write(self, data: bytes) -> int:
        self._parts.append(bytes(data))
        self._position += len(data)
        return len(data)

    def tell(self) -> int:
        return self._position

    def flush(self) -> None:
        """Nothing is buffered."""

    def take(self) -> bytes:
        taken = b"".join(self._parts)
        self._parts.clear()
        return taken


async def export(request: Request) -> Response:
    """Answer GET /export.FORMAT?STATE&scope=: the first `rows` tiles (`shown`), or the whole answer (`all`)."""
    name, query = request.path_params["format"], request.query_params
    if name not in FORMATS:
        raise WebError(404, f"Exports are {', '.join(FORMATS)}.")
    parsed = parse_state(query.multi_items())
    if parsed.problems:
        raise WebError(400, " ".join(parsed.problems.values()))
    limit = None
    if query.get("scope", "shown") != "all":
        given = query.get("rows", "")
        limit = min(int(given), MAX_ROWS) if given.isdecimal() and 0 < len(given) < 10 else _FIRST_TILES
    answers = Answers(request.state.client, parsed.state, await describe(request))
    parts = answers.pages(_COLUMNS, limit)
    # Errors of the first part can still be said; later ones break the connection, so that no export looks complete.
    first = await anext(parts)
    _check(first, limit)
    headers = {"Content-Disposition": f'attachment; filename="tiles.{name}"'}
    return StreamingResponse(_written(name, first, parts), media_type=MEDIA_TYPES[name], headers=headers)


def _check(first: Shown, limit: int | None) -> None:
    """Raise `WebError` for a part that is not complete, and for an answer that is too large."""
    if missing := coverage_sentence(first.coverage):
        raise WebError(503, f"{missing} Export again when the archive is complete.")
    pool = first.matching_rows if first.matching_rows is not None else first.coverage.total_rows
    num_rows = pool if first.within_rows is None else first.within_rows
    if limit is None and first.after and num_rows > MAX_ROWS:
        raise WebError(
            400,
            f"An export has at most {MAX_ROWS:,} tiles; this one would have {num_rows:,}. Use a cut-off or filters.",
        )


async def _written(name: str, first: Shown, parts: AsyncIterator[Shown]) -> AsyncIterator[bytes]:
    sink = _Sink()
    writer = open_writer(name, sink)  # type: ignore[arg-type]
    # Beside the event loop: outlines are parsed and columns are compressed.
    await asyncio.to_thread(writer.write, _rows(first.hits, first.order))
    yield sink.take()
    async for shown in parts:
        if missing := coverage_sentence(shown.coverage):
            raise WebError(503, missing)
        await asyncio.to_thread(writer.write, _rows(shown.hits, shown.order))
        yield sink.take()
    writer.close()
    yield sink.take()


def _rows(hits: Iterable[Hit], order: Order) -> list[PlaceRow]:
    return [
        {
            "id": hit.id,
            "key": hit.key,
            "label": hit.label,
            "datetime": hit.datetime,
            "lon": hit.lon,
            "lat": hit.lat,
            "uri": hit.extra.get("uri"),
            "caption": hit.extra.get("caption"),
            "distance": hit.distance if order == "distance" else None,
            "score": hit.score if order == "score" else None,
            "footprint": hit.extra.get("footprint"),
        }
        for hit in hits
    ]


routes = [Route("/export.{format}", export)]
