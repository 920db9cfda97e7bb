"""Images named one by one: in a list of paths, a Parquet table or a STAC item collection."""

import datetime as dt
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.rendering import Window
from orbithash.encoders.text_files import read_lines

__all__ = ["SUFFIXES", "Item", "list_paths", "list_stac", "list_table", "local_path", "read_json", "report"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".tif", ".tiff")
_TYPES = ("image/jpeg", "image/png", "image/tiff")
_ROLES = ("data", "visual", "overview")
# Of very many problems so many are told.
_TOLD = 10


@dataclass(frozen=True)
class Item:
    """One image to read.

    What is None is unknown here; place and time of a GeoTIFF are read later, together with its pixels
    (`orbithash.encoders.imagery.georeference`).

    Attributes:
        key: unique in its source: a path relative to it, with `#col,row,width,height` for a tile, or a STAC item id.
        path: absolute path of the file, or the URI of an object.
        label: class.
        caption: a sentence about the image.
        datetime: acquisition, UTC.
        lon: degrees east of the centre, WGS 84.
        lat: degrees north of the centre, WGS 84.
        footprint: outline as WKB, WGS 84.
        window: the tile's place in its scene; None for a whole image.
    """

    key: str
    path: str
    label: str | None = None
    caption: str | None = None
    datetime: dt.datetime | None = None
    lon: float | None = None
    lat: float | None = None
    footprint: bytes | None = None
    window: Window | None = None


def list_paths(path: Path) -> Iterator[Item]:
    """The images of a text file: one path a line, relative to the file's folder; `#` begins a comment line.

    Raises:
        InputError: not UTF-8 text, or, at the end, remote paths.
    """

    def named() -> Iterator[tuple[str, Item]]:
        try:
            for line in read_lines(path):
                text = line.strip(" \t")
                if not text.startswith("#"):
                    yield text, Item(_key(text), "")
        except ValueError as error:
            raise InputError(f"{path} {error}") from error

    return _located(named(), path)


def list_table(path: Path) -> Iterator[Item]:
    """The images of a Parquet file, some thousand of whose rows are in memory at a time.

    Its column `path` (or `uri`) is relative to the file's folder; `key` (else the path), `label`, `caption`,
    `datetime` (UTC unless it says otherwise), `lon` and `lat` may be there.

    Raises:
        InputError: not a Parquet file, columns of unusable types, or values that are none.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    wanted = {name: pa.string() for name in ("path", "uri", "key", "label", "caption")}
    wanted |= {"datetime": pa.timestamp("us", "UTC"), "lon": pa.float64(), "lat": pa.float64()}
    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    present = [name for name in wanted if name in file.schema_arrow.names]
    place = next((name for name in ("path", "uri") if name in present), None)
    if place is None:
        raise InputError(f"{path} has no column path or uri; it has {', '.join(file.schema_arrow.names)}")

    def named() -> Iterator[tuple[str, Item]]:
        number = 0
        try:
            for batch in file.iter_batches(columns=present):
                yield from _rows(batch, wanted, place, number, path)
                number += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error

    return _located(named(), path)


def _rows(batch: Any, wanted: Mapping[str, Any], place: str, first: int, path: Path) -> Iterator[tuple[str, Item]]:
    """The rows of a batch of a table, the first of which has the number `first`."""
    import pyarrow as pa

    problems, columns = [], {}
    for name in batch.schema.names:
        try:
            # Unsafe drops nanoseconds; what is no number or time at all still fails.
            columns[name] = batch[name].cast(wanted[name], safe=False).to_pylist()
        except pa.ArrowException as error:
            problems.append(f"column {name} of type {batch[name].type}: {str(error).splitlines()[0]}")
    if problems:
        raise report(problems, path)
    empty = [None] * len(batch)
    rows = zip(*(columns.get(name, empty) for name in (place, "key", *list(wanted)[3:])), strict=True)
    for number, (where, key, label, caption, taken, lon, lat) in enumerate(rows, first):
        if not where:
            problems.append(f"row {number} has no {place}")
        elif not _on_earth(lon, lat):
            problems.append(f"row {number} has lon {lon} and lat {lat}; degrees from -180 to 180 and -90 to 90")
        else:
            lon, lat = (None if number is None or number != number else number for number in (lon, lat))
            yield where, Item(key or _key(where), "", label, caption, taken, lon, lat)
    if problems:
        raise report(problems, path)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}")


def list_stac(path: Path) -> Iterator[Item]:
    """The images of a STAC item collection (or one item): for each item, its first local image asset.

    An asset whose roles hold `data`, else `visual`, else `overview`, goes first. The key is the item's id.

    Raises:
        InputError: not a STAC item collection, an item without id, image or usable values, remote images.
    """
    data = read_json(path)
    features = data.get("features") if isinstance(data, dict) and data.get("type") == "FeatureCollection" else [data]
    if not isinstance(features, list) or not all(isinstance(f, dict) and f.get("type") == "Feature" for f in features):
        raise InputError(f"{path} is not a STAC item collection: a FeatureCollection with features of type Feature")
    problems, named = [], []
    for number, feature in enumerate(features):
        name = feature.get("id")
        if not isinstance(name, str) or not name:
            problems.append(f"item {number} has no id")
            continue
        href = _image_href(feature.get("assets"))
        if href is None:
            problems.append(f"item {name} has no JPEG, PNG or TIFF asset")
            continue
        try:
            taken = _stac_datetime(feature.get("properties"))
            lon, lat, footprint = _stac_place(feature.get("geometry"))
        except ValueError as error:
            problems.append(f"item {name}: {error}")
            continue
        named.append((href, Item(name, "", datetime=taken, lon=lon, lat=lat, footprint=footprint)))
    if problems:
        raise report(problems, path)
    return _located(named, path)


def local_path(text: str, folder: Path) -> Path:
    """Absolute path of `text`, relative to `folder`; `InputError` for what is not on this machine."""
    scheme = re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text)
    if scheme and scheme[0].lower() != "file://":
        raise InputError(f"{text} is remote; only local files are read for now: copy it to a folder first")
    path = folder / (text[len("file://") :] if scheme else text)
    return path.parent.resolve() / path.name


def read_json(path: Path) -> Any:
    """A JSON file, or `InputError`."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from error


def report(problems: Sequence[str], path: Path) -> InputError:
    """One error for the first of the problems of a source, and how many more there are."""
    more = [f"and {len(problems) - _TOLD} more"] if len(problems) > _TOLD else []
    return listed([*problems[:_TOLD], *more], str(path))


def _located(named: Iterable[tuple[str, Item]], path: Path) -> Iterator[Item]:
    """The items with their paths filled in."""
    problems = []
    for text, item in named:
        try:
            where = str(local_path(text, path.parent))
        except InputError as error:
            problems.append(str(error))
        else:
            yield replace(item, path=where)
    if problems:
        raise report(problems, path)


def _key(text: str) -> str:
    """`./a//b.tif` and `a/b.tif` are one file and get one key."""
    return str(PurePosixPath(text)) if "://" not in text else text


def _on_earth(lon: float | None, lat: float | None) -> bool:
    return (lon is None or lon != lon or -180 <= lon <= 180) and (lat is None or lat != lat or -90 <= lat <= 90)


def _image_href(assets: Any) -> str | None:
    images = []
    for asset in assets.values() if isinstance(assets, dict) else ():
        href = asset.get("href") if isinstance(asset, dict) else None
        if not isinstance(href, str):
            continue
        kind = asset.get("type")
        if kind.startswith(_TYPES) if isinstance(kind, str) else href.lower().endswith(SUFFIXES):
            images.append((asset.get("roles") or [], href))
    for role in _ROLES:
        for roles, href in images:
            if role in roles:
                return href
    return images[0][1] if images else None


def _stac_datetime(properties: Any) -> dt.datetime | None:
    found = properties if isinstance(properties, dict) else {}
    text = found.get("datetime") or found.get("start_datetime")
    if text is None:
        return None
    try:
        taken = dt.datetime.fromisoformat(text)
    except (TypeError, ValueError) as error:
        raise ValueError(f"datetime is {text!r}; a time such as 2015-05-02T01:31:00Z") from error
    return taken.replace(tzinfo=dt.UTC) if taken.tzinfo is None else taken.astimezone(dt.UTC)


def _stac_place(geometry: Any) -> tuple[float | None, float | None, bytes | None]:
    """Longitude and latitude of the centroid, and the outline as WKB."""
    import numpy as np
    import shapely
    from shapely.geometry import shape

    if geometry is None:
        return None, None, None
    try:
        outline = shape(geometry)
        west, south, east, north = outline.bounds
    except (shapely.errors.ShapelyError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError("its geometry is not GeoJSON") from error
    if not (_on_earth(west, south) and _on_earth(east, north)):
        raise ValueError(f"its geometry reaches from {west}, {south} to {east}, {north}; degrees of WGS 84")
    centred = outline
    if east - west > 180:
        # Two parts on both sides of 180 degrees: their mean would lie on the other side of the Earth.
        centred = shapely.transform(outline, lambda points: np.column_stack([points[:, 0] % 360, points[:, 1]]))
    centre = centred.centroid
    return (centre.x if centre.x <= 180 else centre.x - 360), centre.y, outline.wkb
