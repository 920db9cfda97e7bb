"""Rows into and out of a running gateway's archive, from the command line."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from orbithash.cluster.output import track
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.text_files import read_lines, split_lines
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import MAX_IMAGE_BYTES
from orbithash.search.protocol.rows import Row

if TYPE_CHECKING:
    from orbithash.encoders.imagery.sources import Item

__all__ = ["Upserted", "delete_keys", "upsert_source"]

# Rows sent before the next are read.
PIECE = 64


@dataclass(frozen=True)
class Upserted:
    """What became of a source: rows written, and key and reason of images that were refused."""

    num_written: int
    refused: dict[str, str]


def upsert_source(client: Client, source: str, asset: str | None = None) -> Upserted:
    """Sends every image of `source` (see `list_source`), which the gateway encodes; refused ones do not stop it."""
    # Here: `delete` needs no library for images.
    from orbithash.encoders.imagery.georeference import check_projections
    from orbithash.encoders.imagery.sources import list_source
    from orbithash.trainers.datasets import find_items

    items = list_source(source, asset=asset, find_items=find_items)
    if any(item.path.lower().endswith((".tif", ".tiff")) for item in items):
        check_projections()
    refused: dict[str, str] = {}
    num_written = 0
    with track("writing", len(items), "images") as advance_to:
        for start in range(0, len(items), PIECE):
            piece = items[start : start + PIECE]
            rows = []
            for item in piece:
                try:
                    rows.append(_row(item))
                except InputError as err:
                    refused[item.key] = str(err)
            num_written += _send(client, rows, refused)
            advance_to(start + len(piece), f"{len(refused)} refused" if refused else "")
    return Upserted(num_written, refused)


def delete_keys(client: Client, keys: Sequence[str], file: Path | None) -> int:
    """Removes rows by key, and by the keys in a file, one a line ("-": standard input); how many there were."""
    if not keys and file is None:
        raise InputError("give keys, or --keys FILE with one key a line")
    lines: list[str] = []
    if file is not None:
        try:
            lines = list(split_lines(sys.stdin) if str(file) == "-" else read_lines(file))
        except ValueError as err:
            raise InputError(f"{file}: the keys cannot be read: it {err}") from err
    return client.delete([*keys, *lines])


def _row(item: "Item") -> Row:
    from orbithash.encoders.imagery.georeference import read_georeference
    from orbithash.encoders.imagery.remote import is_remote, read_object
    from orbithash.encoders.imagery.rendering import Limits

    if item.problem is not None:
        raise ImageError(item.problem)
    try:
        image = read_object(item.path, Limits()) if is_remote(item.path) else Path(item.path).read_bytes()
    except OSError as err:
        raise ImageError(f"cannot be read ({err.strerror})") from err
    if not 0 < len(image) <= MAX_IMAGE_BYTES:
        raise ImageError(f"has {len(image):,} bytes; 1 to {MAX_IMAGE_BYTES:,} can be sent, `encode` takes larger ones")
    place = read_georeference(image if is_remote(item.path) else Path(item.path))
    return Row(
        key=item.key,
        image=image,
        uri=item.path,
        label=item.label,
        caption=item.caption,
        datetime=item.datetime or place.datetime,
        lon=place.lon if item.lon is None else item.lon,
        lat=place.lat if item.lat is None else item.lat,
        footprint=item.footprint or place.footprint,
    )


def _send(client: Client, rows: Sequence[Row], refused: dict[str, str]) -> int:
    """Rows written of a piece; where one is refused, all are sent one by one."""
    try:
        return client.upsert(rows)
    except InvalidQuery as err:
        if len(rows) == 1:
            refused[rows[0].key] = str(err)
            return 0
    return sum(_send(client, [row], refused) for row in rows)
