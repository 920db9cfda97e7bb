"""Items of STAC, from JSON files and from stac-geoparquet: keys, images, places, times."""

import datetime as dt
import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

from orbithash.encoders.imagery.outlines import Place
from orbithash.encoders.sources.listings import Item, located, parse_time
from orbithash.encoders.sources.stac.assets import choose_image
from orbithash.encoders.sources.stac.bands import stated_bands
from orbithash.encoders.sources.stac.documents import Documents, Feature, id_of, is_item
from orbithash.encoders.sources.stac.item_tables import ItemTable, PlacedFeature
from orbithash.encoders.sources.stac.places import place_of_item

__all__ = ["list_stac", "list_stac_table"]


class _Features(Protocol):
    def ids(self) -> Iterator[str]:
        """Yield the ids of all features; "" for one without an id."""

    def features(self) -> Iterator[Feature]:
        """Yield all features, in the same order each time."""


def list_stac(
    paths: Sequence[Path],
    asset: str | None = None,
    left_out: Counter[str] | None = None,
    groups: Counter[str] | None = None,
) -> Iterator[Item]:
    """Yield the images of STAC items in JSON files: one asset of each item (see `choose_image`).

    The key is the item's id, or COLLECTION/ID for an id that occurs in several collections. An item that is there twice
    is read once. An item that cannot be used has a problem, and the others are read. The files are read twice.

    Args:
        paths: item collections, items, and static catalogs or collections, whose links are followed.
        asset: the key of the asset to read in every item.
        left_out: counts by kind the links that are not followed.
        groups: counts the items by catalog or collection.

    Raises:
        InputError: a file that is not STAC, or no item can be used.
    """
    documents = Documents(paths)
    source = paths[0]
    yield from located(_rows(documents, asset), source)
    if left_out is not None:
        left_out.update(documents.left_out)
    if groups is not None:
        groups.update(documents.groups)


def list_stac_table(path: Path, asset: str | None = None) -> Iterator[Item]:
    """Yield the images of a Parquet file in the layout of stac-geoparquet, as `list_stac` does; it is read twice."""
    return located(_rows(ItemTable(path), asset), path)


def _rows(source: _Features, asset: str | None) -> Iterator[tuple[str, Item]]:
    for item, feature in _keyed(source):
        yield _read(item, feature, asset)


def _keyed(source: _Features) -> Iterator[tuple[Item, Feature]]:
    """Yield each distinct item with its key, and with a problem if it cannot have its own."""
    # 8 bytes of each id and of each item's content.
    counts = Counter(map(hash, source.ids()))
    found: dict[int, bytes] = {}
    for number, feature in enumerate(source.features()):
        content = feature.content
        name = key = id_of(content)
        if counts[hash(name)] > 1 and name and isinstance(group := content.get("collection"), str) and group:
            key = f"{group}/{name}"
        digest = _digest(content) if counts[hash(name)] > 1 else b""
        problem = None
        if not is_item(content):
            problem = "it is not an object of type Feature"
        elif not name:
            problem = "it has no id"
        elif hash(key) in found:
            if found[hash(key)] == digest:
                continue
            problem = f"the id {name} occurs more than once; an id is unique in its collection"
        if problem:
            key = f"item {number}" + (f": {name}" if name else "")
        found[hash(key)] = digest
        yield Item(key, str(feature.file) if problem else "", problem=problem), feature


def _digest(content: Any) -> bytes:
    return hashlib.blake2b(json.dumps(content, sort_keys=True, default=str).encode(), digest_size=8).digest()


def _read(item: Item, feature: Feature, asset: str | None) -> tuple[str, Item]:
    """Return the path or URI of an item's image, and the item with its time and place, or with a problem."""
    if item.problem:
        return "", item
    content, file = feature.content, feature.file
    try:
        path, described = choose_image(content.get("assets"), asset, file.parent)
        properties = content.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        text = properties.get("datetime") or properties.get("start_datetime")
        taken = _time(text)
        place = _place(feature, described)
    except ValueError as error:
        return "", replace(item, path=str(file), problem=str(error))
    item = replace(
        item,
        datetime=taken,
        bands=stated_bands(described, properties),
        label=_text(properties.get("label")),
        caption=_text(properties.get("caption")),
    )
    if place is None:
        return path, item
    return path, replace(item, lon=place.lon, lat=place.lat, footprint=place.footprint)


def _place(feature: Feature, asset: dict[str, Any]) -> Place | None:
    """Return the place of an item; `ValueError` for an invalid one."""
    if isinstance(feature, PlacedFeature) and feature.place is not None:
        if isinstance(feature.place, ValueError):
            raise feature.place
        return feature.place
    return place_of_item(feature.content, asset)


def _time(value: Any) -> dt.datetime | None:
    """Return a time of JSON, or one that a table has read; `ValueError` for an invalid one."""
    if isinstance(value, ValueError):
        raise value
    return value if value is None or isinstance(value, dt.datetime) else parse_time(value)


def _text(value: Any) -> str | None:
    """Return a text that is not empty; None for anything else."""
    return value if isinstance(value, str) and value else None
