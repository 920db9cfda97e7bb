"""One row in the dialog: its columns, its place in the answer, and why it is near the query."""

from dataclasses import dataclass

from orbithash.search.client import AsyncClient
from orbithash.search.protocol.description import Description
from orbithash.search.web.errors import WebError
from orbithash.search.web.page.bits import differing_bits, query_code
from orbithash.search.web.page.examples import read_examples
from orbithash.search.web.page.state import State
from orbithash.search.web.page.tiles import Tile, marked_tile

__all__ = ["RowView", "read_row_view"]


@dataclass(frozen=True)
class RowView:
    """What the dialog shows of one row.

    Attributes:
        tile: the row as a tile.
        uri: path or URI of its image.
        time: time of acquisition in UTC, "" if unknown.
        differing: numbers of the bits in which its code differs from the query's; None without a query.
        has_query: whether something is searched for, so that a heat map is possible.
    """

    tile: Tile
    uri: str
    caption: str
    time: str
    differing: tuple[int, ...] | None
    has_query: bool


async def read_row_view(client: AsyncClient, number: int, state: State, description: Description) -> RowView:
    """Return the row with the id `number`. Raises `SearchError`, and `WebError` if it does not exist."""
    rows = await client.get(ids=[number], include=("uri", "caption", "thumbnail", "code", "footprint"))
    if not rows:
        raise WebError(404, "This tile is no longer in the archive.")
    (row,) = rows.values()
    examples = await read_examples(client, state, description)
    code = await query_code(client, state, examples, description) if examples.query else None
    differing = None
    if code is not None and row.code is not None and len(code) == len(row.code):
        differing = tuple(differing_bits(code, row.code))
    mark = "good" if number in state.good else "bad" if number in state.bad else ""
    return RowView(
        tile=marked_tile(row, mark),
        uri=row.uri or row.key,
        caption=row.caption or "",
        time="" if row.datetime is None else f"{row.datetime:%Y-%m-%d %H:%M} UTC",
        differing=differing,
        has_query=bool(examples.query),
    )
