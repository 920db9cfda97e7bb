"""Which asset of a STAC item is its image, and where it is read."""

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.rasters import image_formats, one_of, reads_jpeg_2000
from orbithash.encoders.sources.listings import image_suffixes, locate
from orbithash.encoders.sources.remote import is_remote
from orbithash.encoders.sources.tiles import split_tile_key

__all__ = ["choose_image"]

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


def choose_image(assets: Any, name: str | None, folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the path or the URI of the image of an item, and its asset.

    Without `name` the image is the first in this order: an asset with role or key `visual` (or `rgb`, `tci`); one
    whose bands (`bands` or `eo:bands`) hold red, green and blue; role `overview`; role `data`; other images; a single
    band; auxiliary data (masks, aerosol); a thumbnail. Assets that cannot be read (other formats, http) are passed
    over. Where an asset has several addresses (extension `alternate`), a file of this machine is read before an object
    of an object store.

    Args:
        assets: the assets of an item by key.
        name: key of the asset to take.
        folder: the folder that relative addresses start from.

    Raises:
        ValueError: no such asset, none that can be read, or several single bands and nothing better, so that any choice
            would be arbitrary.
    """
    assets = assets if isinstance(assets, dict) else {}
    there = ", ".join(name for name, asset in assets.items() if asset is not None) or "none"
    if name is not None and assets.get(name) is None:
        raise ValueError(f"it has no asset {name}; its assets are: {there}")
    images: list[tuple[int, int, int, str, str]] = []
    problems: list[str] = []
    for key in assets if name is None else [name]:
        asset = assets[key]
        hrefs = [] if not isinstance(asset, dict) else [href for href, kind in _hrefs(asset) if _is_image(kind, href)]
        if not hrefs:
            continue
        try:
            path = _nearest(hrefs, folder)
        except InputError as error:
            problems.append(str(error))
        else:
            images.append((_RANKS.index(_rank(key, asset)), _preference(asset, path), len(images), key, path))
    if not images:
        raise ValueError(
            problems[0] if problems else f"it has no {one_of(image_formats())} asset; its assets are: {there}"
        )
    best, *_, chosen, path = min(images)
    bands = [key for rank, *_, key, _ in images if rank == best]
    if name is None and _RANKS[best] == "band" and len(bands) > 1:
        raise ValueError(f"its images are single bands ({', '.join(bands)}); choose one by its name (--asset)")
    return path, assets[chosen]


def _hrefs(asset: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the addresses of an asset with their media types: its own, then those of the extension `alternate`."""
    alternates = asset.get("alternate")
    others = alternates.values() if isinstance(alternates, dict) else []
    for place in (asset, *(other for other in others if isinstance(other, dict))):
        if isinstance(href := place.get("href"), str):
            yield href, _media_type(place if isinstance(place.get("type"), str) else asset)


def _nearest(hrefs: list[str], folder: Path) -> str:
    """Return the address that is read: an existing file, else an object, else a file that does not exist.

    Raises:
        InputError: none can be read; the message is that of the first.
    """
    found: list[tuple[int, int, str]] = []
    problem: InputError | None = None
    for number, href in enumerate(hrefs):
        try:
            path = locate(href, folder)
        except InputError as error:
            problem = problem or error
            continue
        is_there = len(hrefs) > 1 and not is_remote(path) and os.path.lexists(split_tile_key(path)[0])
        found.append((0 if is_there else 1 if is_remote(path) else 2, number, path))
    if not found:
        assert problem is not None, "there is an address"
        raise problem
    return min(found)[-1]


def _is_image(kind: str, href: str) -> bool:
    """Return whether an address of a media type is that of an image."""
    types = _TIFF_TYPES | _OTHER_TYPES | (_JPEG_2000_TYPES if reads_jpeg_2000() else set())
    return kind in types or (kind in _UNSPECIFIC_TYPES and _path(href).endswith(image_suffixes()))


def _preference(asset: dict[str, Any], href: str) -> int:
    """Return the place of an image's format among formats of one image: 0 for TIFF, 1 for JPEG 2000, 2 for others."""
    kind, path = _media_type(asset), _path(href)
    if kind in _TIFF_TYPES or path.endswith((".tif", ".tiff")):
        return 0
    return 1 if kind in _JPEG_2000_TYPES or path.endswith((".jp2", ".j2k")) else 2


def _path(href: str) -> str:
    """Return an address in lower case without its query and without the window of a tile."""
    return split_tile_key(href)[0].partition("?")[0].lower()


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
