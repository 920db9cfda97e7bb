"""STAC item collections: which asset of an item is its image, when and where it was taken."""

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import Place, place_of
from orbithash.encoders.imagery.rasters import image_formats, one_of, reads_jpeg_2000
from orbithash.encoders.sources.listings import Item, image_suffixes, locate, located, parse_time, read_json
from orbithash.encoders.sources.stac.bands import stated_bands

__all__ = ["list_stac"]

# Media types without their parameters; the last two are of STAC before 1.0.
_TIFF_TYPES = {"image/tiff", "image/tif", "image/x-tiff", "image/geotiff", "image/vnd.stac.geotiff", "image/x.geotiff"}
_JPEG_2000_TYPES = {"image/jp2"}
_OTHER_TYPES = {"image/jpeg", "image/jpg", "image/pjpeg", "image/png", "image/x-png"}
# Types that say nothing, so that the ending of the file name decides.
_UNSPECIFIC_TYPES = {"", "application/octet-stream", "binary/octet-stream"}

# Keys of assets as catalogues use them; a resolution may follow, as in TCI_10m.
_VISUAL = re.compile(r"(visual|true[-_]?colou?r|tci|rgb)([-_].*)?", re.IGNORECASE)
_OVERVIEW = re.compile(r"(overview|rendered[-_]preview)([-_].*)?", re.IGNORECASE)
_THUMBNAIL = re.compile(
    r"(thumb(nail)?|preview|quick[-_]?look|browse|reduced_resolution_browse)([-_].*)?", re.IGNORECASE
)
_BAND = re.compile(
    r"(b\d{1,2}a?|[hv]{2}|red|green|blue|nir|swir|coastal|rededge|cirrus|pan|lwir|tir)\d*([-_].*)?", re.IGNORECASE
)
_AUXILIARY = re.compile(r"(aot|wvp|scl|cld|snw|qa|udm\d?|cloud|snow|.*mask|.*angle)([-_].*)?", re.IGNORECASE)
_AUXILIARY_ROLES = {
    *("metadata", "cloud", "cloud-shadow", "shadow", "snow-ice", "water", "land-water", "water-mask", "data-mask"),
    *("saturation", "incidence-angle", "azimuth", "sun-azimuth", "sun-elevation", "view-azimuth", "date", "mask"),
}

# From the best image of an item to the worst.
_RANKS = ("visual", "rgb", "overview", "data", "other", "band", "auxiliary", "thumbnail")


def list_stac(path: Path, asset: str | None = None) -> Iterator[Item]:
    """Yield the images of a STAC item collection, or of one item: one asset of each item.

    Without `asset` the image is the first in this order: an asset with role or key `visual` (or `rgb`, `tci`); one
    whose bands (`bands` or `eo:bands`) hold red, green and blue; role `overview`; role `data`; other images; a single
    band; auxiliary data (masks, aerosol); a thumbnail. Assets that cannot be read (other formats, http) are passed
    over. An item with several single bands and nothing better has a problem, because any choice would be arbitrary.

    The key is the item's id, or COLLECTION/ID for an id that occurs in several collections of the file. An item that
    cannot be used has a problem, and the others are read.

    Args:
        path: the JSON file.
        asset: the key of the asset to read in every item.

    Raises:
        InputError: not a STAC item collection, or no item of it can be used.
    """
    data = read_json(path)
    features = data.get("features") if isinstance(data, dict) and data.get("type") == "FeatureCollection" else [data]
    if not isinstance(features, list) or (features and not any(map(_is_item, features))):
        raise InputError(f"{path} is not a STAC item collection: a FeatureCollection with features of type Feature")
    keys = _keys(features)
    return located((_read(key, feature, asset, path.parent) for key, feature in keys), path)


def _is_item(feature: Any) -> bool:
    return isinstance(feature, dict) and feature.get("type") == "Feature"


def _id(feature: Any) -> str:
    """The id of an item, or "" without one."""
    name = feature.get("id") if _is_item(feature) else None
    return name if isinstance(name, str) else ""


def _keys(features: list[Any]) -> list[tuple[Item, Any]]:
    """Each distinct item with its key, and with a problem if it cannot have its own."""
    counts = Counter(map(_id, features))
    found: dict[str, Any] = {}
    keyed = []
    for number, feature in enumerate(features):
        name = key = _id(feature)
        if counts[name] > 1 and name and isinstance(collection := feature.get("collection"), str) and collection:
            key = f"{collection}/{name}"
        problem = None
        if not _is_item(feature):
            problem = "it is not an object of type Feature"
        elif not name:
            problem = "it has no id"
        elif key in found:
            if found[key] == feature:
                continue
            problem = f"the id {name} occurs more than once; an id is unique in its collection"
        if problem:
            key = f"item {number}" + (f": {name}" if name else "")
        found[key] = feature
        keyed.append((Item(key, "", problem=problem), feature))
    return keyed


def _read(item: Item, feature: Any, asset: str | None, folder: Path) -> tuple[str, Item]:
    """The address of an item's image, and the item with its time and place, or with a problem."""
    if item.problem:
        return "", item
    try:
        href, described = _image(feature.get("assets"), asset, folder)
        properties = feature.get("properties")
        properties = properties if isinstance(properties, dict) else {}
        item = replace(item, bands=stated_bands(described, properties))
        text = properties.get("datetime") or properties.get("start_datetime")
        taken = None if text is None else parse_time(text)
        place = _place(feature.get("geometry"))
    except ValueError as error:
        return "", replace(item, problem=str(error))
    if place is None:
        return href, replace(item, datetime=taken)
    return href, replace(item, datetime=taken, lon=place.lon, lat=place.lat, footprint=place.footprint)


def _image(assets: Any, name: str | None, folder: Path) -> tuple[str, dict[str, Any]]:
    """The address of the image of an item and its asset; `ValueError` without one."""
    assets = assets if isinstance(assets, dict) else {}
    there = ", ".join(assets) or "none"
    if name is not None and name not in assets:
        raise ValueError(f"it has no asset {name}; its assets are: {there}")
    images: list[tuple[int, int, int, str, str]] = []
    problems: list[str] = []
    for key in assets if name is None else [name]:
        asset = assets[key]
        href = asset.get("href") if isinstance(asset, dict) else None
        if not isinstance(href, str) or not _is_image(asset, href):
            continue
        try:
            locate(href, folder)
        except InputError as error:
            problems.append(str(error))
        else:
            images.append((_RANKS.index(_rank(key, asset)), _preference(asset, href), len(images), key, href))
    if not images:
        raise ValueError(
            problems[0] if problems else f"it has no {one_of(image_formats())} asset; its assets are: {there}"
        )
    best, *_, chosen, href = min(images)
    bands = [key for rank, *_, key, _ in images if rank == best]
    if name is None and _RANKS[best] == "band" and len(bands) > 1:
        raise ValueError(f"its images are single bands ({', '.join(bands)}); choose one by its name (--asset)")
    return href, assets[chosen]


def _is_image(asset: dict[str, Any], href: str) -> bool:
    kind = _media_type(asset)
    types = _TIFF_TYPES | _OTHER_TYPES | (_JPEG_2000_TYPES if reads_jpeg_2000() else set())
    return kind in types or (kind in _UNSPECIFIC_TYPES and _path(href).endswith(image_suffixes()))


def _preference(asset: dict[str, Any], href: str) -> int:
    """Return the place of an image's format among formats of one image: 0 for TIFF, 1 for JPEG 2000, 2 for others."""
    kind, path = _media_type(asset), _path(href)
    if kind in _TIFF_TYPES or path.endswith((".tif", ".tiff")):
        return 0
    return 1 if kind in _JPEG_2000_TYPES or path.endswith((".jp2", ".j2k")) else 2


def _path(href: str) -> str:
    """Return an address in lower case without its query."""
    return href.partition("?")[0].lower()


def _media_type(asset: dict[str, Any]) -> str:
    kind = asset.get("type")
    return kind.partition(";")[0].strip().lower() if isinstance(kind, str) else ""


def _rank(key: str, asset: dict[str, Any]) -> str:
    """What an image asset shows, one of `_RANKS`."""
    roles = {role.lower() for role in _list(asset, "roles") if isinstance(role, str)}
    bands = _list(asset, "bands") or _list(asset, "eo:bands")
    colours = {
        band.get(name) for band in bands if isinstance(band, dict) for name in ("common_name", "eo:common_name", "name")
    }
    if "thumbnail" in roles or (not roles and _THUMBNAIL.fullmatch(key)):
        return "thumbnail"
    if "visual" in roles or (_VISUAL.fullmatch(key) and not roles & _AUXILIARY_ROLES):
        return "visual"
    if {"red", "green", "blue"} <= colours:
        return "rgb"
    if "overview" in roles or _OVERVIEW.fullmatch(key):
        return "overview"
    if roles & _AUXILIARY_ROLES or _AUXILIARY.fullmatch(key):
        return "auxiliary"
    if len(bands) == 1 or (not bands and _BAND.fullmatch(key)):
        return "band"
    return "data" if "data" in roles else "other"


def _list(asset: dict[str, Any], name: str) -> list[Any]:
    value = asset.get(name)
    return value if isinstance(value, list) else []


def _place(geometry: Any) -> Place | None:
    """Centre and outline of a GeoJSON geometry; `ValueError` if it is none."""
    import shapely
    from shapely.geometry import shape

    if geometry is None:
        return None
    try:
        outline = shape(geometry)
    except (shapely.errors.ShapelyError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError("its geometry is not GeoJSON") from error
    try:
        return place_of(outline)
    except ValueError as error:
        raise ValueError(f"its geometry is not in degrees of WGS 84: {error}") from error
