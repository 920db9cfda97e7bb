"""Exports: files of the rows that are shown, or of all that the cut-off lets in, sent while they are read."""

import asyncio
import io
import re
from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime
from typing import Any, BinaryIO, cast

from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from orbithash.encoders.places.columns import FOUND_COLUMNS
from orbithash.encoders.places.writers import MEDIA_TYPES, PlaceRow, PlacesWriter, open_writer
from orbithash.search.client import Hit
from orbithash.search.client.exporting import describe_codes
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.queries import Column, Coverage
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.answers import Answers, Order, Shown
from orbithash.search.web.page.archive import describe
from orbithash.search.web.page.state import State, parse_state

__all__ = ["MAX_SHOWN", "routes"]

# Rows of an export of what is shown.
MAX_SHOWN = 10_000
# Bytes of a row group of GeoParquet, which the service keeps in memory for each file.
_ROW_GROUP_BYTES = 8 * 2**20
_COLUMNS: tuple[Column, ...] = ("uri", "caption", "footprint", "code")
# STAC items are JSON.
_ENDINGS = {"items": "json"}


class IncompleteExport(Exception):
    """A part of the archive stopped answering while a file was being sent."""


async def export(request: Request) -> Response:
    """Answer GET /export.FORMAT?STATE&scope=shown|all&limit=N&partial=1: a file of rows, in the order of the answer.

    The status is that of the first rows. If a later part fails, the connection is closed without the end of the body,
    which every client reports as a failed download.
    """
    name = request.path_params["format"]
    if name not in MEDIA_TYPES:
        raise WebError(404, f"Files are exported as {', '.join(MEDIA_TYPES)}, not as {name[:20]}.")
    parsed = parse_state(request.query_params.multi_items())
    if parsed.problems:
        # A file of other rows than those that were asked for would be worse than none.
        raise WebError(400, " ".join(parsed.problems.values()))
    limit = _limit(request)
    allows_partial = request.query_params.get("partial") == "1"
    description = await describe(request)
    answers = Answers(request.state.client, parsed.state, description)
    parts = answers.pages(_COLUMNS, limit)
    first = await anext(parts)
    if limit is None and not allows_partial and (missing := _missing(first.coverage)):
        raise WebError(503, missing)
    headers = {"Content-Disposition": f'attachment; filename="{_file_name(parsed.state)}.{_ENDINGS.get(name, name)}"'}
    if request.method == "HEAD":
        return Response(media_type=MEDIA_TYPES[name], headers=headers)
    requires_all = limit is None and not allows_partial
    return StreamingResponse(
        _file(name, description, first, parts, limit, requires_all), media_type=MEDIA_TYPES[name], headers=headers
    )


async def _file(
    name: str,
    description: Description,
    first: Shown,
    parts: AsyncIterator[Shown],
    limit: int | None,
    requires_all: bool,
) -> AsyncIterator[bytes]:
    """Yield the bytes of a file. One part of the answer is in memory at a time."""
    sink = _Sink()
    writer = await asyncio.to_thread(_open, name, sink, description)
    shown: Shown | None = first
    num_rows = 0
    while shown is not None:
        if requires_all and (missing := _missing(shown.coverage)):
            raise IncompleteExport(missing)
        hits = shown.hits if limit is None else shown.hits[: limit - num_rows]
        num_rows += len(hits)
        # Geometries and compression take time, in which the service answers others.
        yield await asyncio.to_thread(_written, writer, sink, hits, shown.order)
        shown = await anext(parts, None)
    await asyncio.to_thread(writer.close)
    yield sink.taken()


def _open(name: str, sink: "_Sink", description: Description) -> PlacesWriter:
    return open_writer(
        name,
        cast(BinaryIO, sink),
        describe_codes(description),
        columns=(*FOUND_COLUMNS, "code"),
        row_group_bytes=_ROW_GROUP_BYTES,
    )


def _written(writer: PlacesWriter, sink: "_Sink", hits: Iterable[Hit], order: Order) -> bytes:
    writer.write([_row(hit, order) for hit in hits])
    return sink.taken()


def _row(hit: Hit, order: Order) -> PlaceRow:
    return {
        "id": hit.id,
        "key": hit.key,
        "label": hit.label,
        "datetime": hit.datetime,
        "lon": hit.lon,
        "lat": hit.lat,
        "uri": hit.extra.get("uri"),
        "caption": hit.extra.get("caption"),
        # Other orders have no distance of codes, and a distance in metres is not a score.
        "distance": hit.distance if order == "distance" else None,
        "score": hit.score if order == "score" else None,
        "footprint": hit.extra.get("footprint"),
        "code": hit.extra.get("code"),
    }


class _Sink(io.RawIOBase):
    """A file that is written at one end and taken away at the other."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []

    def writable(self) -> bool:
        return True

    def write(self, data: Any) -> int:
        part = bytes(data)
        self._parts.append(part)
        return len(part)

    def taken(self) -> bytes:
        """Return what was written since the last call."""
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _limit(request: Request) -> int | None:
    """Return the largest number of rows; None: all that the cut-off lets in."""
    scope = request.query_params.get("scope", "shown")
    if scope == "all":
        return None
    if scope != "shown":
        raise WebError(400, "scope is shown or all.")
    text = request.query_params.get("limit", "60")
    if not (text.isascii() and text.isdigit() and len(text) < 10 and 0 < int(text) <= MAX_SHOWN):
        raise WebError(400, f"limit is a whole number from 1 to {MAX_SHOWN:,}.")
    return int(text)


def _missing(coverage: Coverage) -> str:
    """Return why a file would lack rows; "" for a complete answer."""
    if coverage.fraction >= 1:
        return ""
    return (
        f"Only {int(coverage.fraction * 100)} % of the archive answers, so tiles would be missing from the file. Try "
        "again later, or export what was searched."
    )


def _file_name(state: State) -> str:
    """Return a name that every file system takes: ASCII letters, digits, - and _."""
    words = re.sub(r"[^a-z0-9]+", "-", state.q.lower().encode("ascii", "ignore").decode()).strip("-")[:40].strip("-")
    return "_".join(filter(None, ("orbithash", words, f"{datetime.now(UTC):%Y-%m-%d}")))


routes = [Route("/export.{format}", export)]
