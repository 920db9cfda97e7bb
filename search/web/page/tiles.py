"""Rows as tiles: what the page shows of one row, as text that templates escape."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime

from orbithash.search.client import Hit, Row
from orbithash.search.protocol.queries import Column
from orbithash.search.web.page.answers import Order
from orbithash.search.web.page.rings import ring_of
from orbithash.search.web.page.state import State

__all__ = ["TILE_COLUMNS", "Tile", "day_of", "marked_tile", "metres", "picture_of", "short_name", "tiles_of"]

# Columns that a tile needs.
TILE_COLUMNS: tuple[Column, ...] = ("thumbnail", "footprint", "caption")

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"


@dataclass(frozen=True)
class Tile:
    """One row on the page.

    Attributes:
        id, key: of the row.
        name: the last part of the key, shortened.
        label, caption: of the row, "" if unknown.
        day: date of acquisition such as 2024-05-01, "" if unknown.
        lon, lat: centre in degrees, None if unknown.
        ring: vertices of the outline, `lon,lat lon,lat ...`; "" if unknown.
        picture: the thumbnail as a data: URI, "" without one.
        mark: "good", "bad" or "".
        distance: in bits; None if the order is not by distance.
        value: the value that decides the order, as text: `3 bits`, `+1.25`, `4.2 km`; "" for other orders.
        share: length of the bar that shows the value, from 0 to 100.
    """

    id: int
    key: str
    name: str
    label: str
    caption: str
    day: str
    lon: float | None
    lat: float | None
    ring: str
    picture: str
    mark: str
    distance: int | None
    value: str
    share: int

    @property
    def title(self) -> str:
        """The tile in words, for screen readers."""
        return ", ".join(part for part in (self.label or self.caption or self.name, self.value, self.day) if part)


def tiles_of(hits: Iterable[Hit], state: State, order: Order, bits: int) -> list[Tile]:
    """Return the tiles of hits that include `TILE_COLUMNS`."""
    marks = dict.fromkeys(state.bad, "bad") | dict.fromkeys(state.good, "good")
    return [_tile(hit, marks.get(hit.id, ""), order, bits) for hit in hits]


def _tile(hit: Hit, mark: str, order: Order, bits: int) -> Tile:
    value, share = _value(hit, order, bits)
    ring = ring_of(hit.extra.get("footprint"))
    return Tile(
        id=hit.id,
        key=hit.key,
        name=short_name(hit.key),
        label=hit.label or "",
        caption=hit.extra.get("caption") or "",
        day=day_of(hit.datetime),
        lon=hit.lon,
        lat=hit.lat,
        ring=" ".join(f"{lon:.10g},{lat:.10g}" for lon, lat in ring),
        picture=picture_of(hit.extra.get("thumbnail")),
        mark=mark,
        distance=hit.distance if order == "distance" else None,
        value=value,
        share=share,
    )


def _value(hit: Hit, order: Order, bits: int) -> tuple[str, int]:
    """Return the value that decides the order as text, and the length of its bar."""
    if order == "distance":
        # Codes that have nothing to do with each other differ in half of their bits.
        return (
            "1 bit" if hit.distance == 1 else f"{hit.distance} bits",
            min(100, round(200 * hit.distance / max(bits, 1))),
        )
    if order == "score" and hit.score is not None:
        # 0 is in the middle.
        return f"{hit.score:+.2f}".replace("-", "\N{MINUS SIGN}"), round(50 + 50 * hit.score / (1 + abs(hit.score)))
    if order == "place" and hit.score is not None:
        return metres(hit.score), 0
    return "", 0


def metres(distance: float) -> str:
    """Return a distance in metres as text, such as 312 m and 4.2 km."""
    return f"{distance:,.0f} m" if distance < 1000 else f"{distance / 1000:,.1f} km"


def short_name(key: str) -> str:
    """Return the last part of a key, of a tile of a scene its window; the middle of a long name is left out."""
    name = key.rstrip("/").rsplit("/", 1)[-1].rsplit("#", 1)[-1] or key
    return name if len(name) <= 18 else f"{name[:6]}…{name[-11:]}"


def day_of(time: datetime | None) -> str:
    """Return the date of a time, "" for None."""
    return "" if time is None else f"{time:%Y-%m-%d}"


def picture_of(thumbnail: bytes | None) -> str:
    """Return a thumbnail as a data: URI; "" for anything but a JPEG or a PNG."""
    if not thumbnail:
        return ""
    kind = "jpeg" if thumbnail.startswith(_JPEG) else "png" if thumbnail.startswith(_PNG) else ""
    return f"data:image/{kind};base64,{base64.b64encode(thumbnail).decode()}" if kind else ""


def marked_tile(row: Row, mark: str) -> Tile:
    """Return the tile of a row that is marked, hence without a value."""
    hit = Hit(0, 0, row.id or 0, row.key, row.label, row.lon, row.lat, row.datetime, {"thumbnail": row.thumbnail})
    return _tile(hit, mark, "random", 0)
