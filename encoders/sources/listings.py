"""Images named one by one: what an item of a source is, lists of paths, and addresses of files in lists."""

import datetime as dt
import json
import os
import time
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import unquote

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.rasters import reads_jpeg_2000
from orbithash.encoders.imagery.rendering import Window
from orbithash.encoders.sources.remote import check_uri, is_remote, path_of
from orbithash.encoders.sources.tiles import split_tile_key
from orbithash.encoders.text_files import read_lines

__all__ = [
    "Item",
    "file_key",
    "image_suffixes",
    "list_paths",
    "listed_names",
    "local_path",
    "locate",
    "located",
    "parse_time",
    "read_json",
    "report",
    "scene_suffixes",
]

# Problems that one error message lists.
_MAX_REPORTED = 10
# File systems record the times of changes at steps of up to this length.
_SETTLED_NS = 2 * 10**9


@dataclass(frozen=True)
class Item:
    """One image of a source.

    A field is None if the source does not know it; place and time in a file are read later, together with its pixels
    (`orbithash.encoders.imagery.georeference`).

    Attributes:
        key: unique in its source: a path relative to it, with `#col,row,width,height` for a tile, or a STAC item id.
        path: absolute path of the file, or the URI of an object; if there is a problem, the list that names the item.
        label: class.
        caption: a sentence about the image.
        datetime: acquisition, UTC.
        lon: degrees east of the centre, WGS 84.
        lat: degrees north of the centre, WGS 84.
        footprint: outline as WKB, WGS 84.
        window: the tile's place in its scene; None for a whole image.
        problem: the reason why the item cannot be read, where the source shows it; reading refuses the item with it.
        version: of an object in an object store, made of its size and time (`orbithash.encoders.archive.stamps`).
        bands: what the source states about the bands; empty: nothing.
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
    problem: str | None = None
    version: str | None = None
    bands: tuple[BandInfo, ...] = ()


def image_suffixes() -> tuple[str, ...]:
    """Return the endings, in lower case, of the names of images that are read."""
    return (".jpg", ".jpeg", ".png", *scene_suffixes())


def scene_suffixes() -> tuple[str, ...]:
    """Return the endings of images that can be cut into tiles and can hold a georeference."""
    return (".tif", ".tiff", *([".jp2", ".j2k"] if reads_jpeg_2000() else []))


def list_paths(path: Path) -> Iterator[Item]:
    """Yield the images of a text file: one path or URI per line, relative to the file's folder; `#` begins a comment.

    A line that cannot be an image (such as an address on the web) is an item with a problem.

    Raises:
        InputError: not UTF-8 text, or no line that can be an image.
    """
    return located(((name, Item(file_key(name), "")) for name in listed_names(path)), path)


def listed_names(path: Path) -> Iterator[str]:
    """Yield the lines of a list without comments; `InputError` if it is not UTF-8 text."""
    try:
        for line in read_lines(path):
            text = line.strip(" \t")
            if not text.startswith("#"):
                yield text
    except ValueError as error:
        raise InputError(f"{path} {error}") from error


def located(rows: Iterable[tuple[str, Item]], source: Path) -> Iterator[Item]:
    """Yield the items with their paths filled in, from addresses relative to the folder of the list `source`.

    The address of a tile is that of its scene with `#col,row,width,height`. An address that cannot be read gives its
    item a problem.

    Raises:
        InputError: at the end, if every item has a problem.
    """
    num_good, num_problems = 0, 0
    problems: list[str] = []
    for address, item in rows:
        if item.problem is None:
            try:
                item = _placed(item, locate(address, source.parent))
            except InputError as error:
                item = replace(item, problem=str(error))
        if item.problem is None:
            num_good += 1
        else:
            item = replace(item, path=item.path or str(source.absolute()))
            num_problems += 1
            if len(problems) <= _MAX_REPORTED:
                problems.append(f"{item.key}: {item.problem}")
        yield item
    if num_problems and not num_good:
        raise report(problems, source, num_problems)


def _placed(item: Item, path: str) -> Item:
    """Return an item with its path, and with the window of its tile where the path is that of a tile."""
    scene, window = split_tile_key(path)
    if window is None or is_remote(path) or os.path.lexists(path):
        return replace(item, path=path)
    return replace(item, path=scene, window=window)


def locate(address: str, folder: Path) -> str:
    """Return the absolute path of a file, or the URI of an object, that a list in `folder` names.

    A name that does not exist is looked up in other Unicode forms (file systems differ in how they store accents), and
    percent-decoded as in the links of STAC.

    Raises:
        InputError: an address on the web, or a URI with a secret in it.
    """
    if is_remote(address):
        check_uri(address)
        return address
    path = _in_other_form(local_path(address, folder))
    if "%" in address and not os.path.lexists(path):
        decoded = _in_other_form(local_path(unquote(address), folder))
        if os.path.lexists(decoded):
            return str(decoded)
    return str(path)


def local_path(text: str, folder: Path) -> Path:
    """Return the absolute path of `text`, a path relative to `folder` or a file:// URI."""
    path = folder / path_of(text)
    return path.parent.resolve() / path.name


def _in_other_form(path: Path) -> Path:
    """The path, or the one that exists and differs from it only in its Unicode form."""
    if str(path).isascii() or os.path.lexists(path):
        return path
    found = Path(path.anchor)
    for part in path.parts[1:]:
        name = part
        if not part.isascii() and not os.path.lexists(found / part):
            try:
                # A folder that has just changed may change again without a later time, so that its list is not kept.
                changed_ns, now_ns = found.stat().st_mtime_ns, time.time_ns()
                names = _names(found, changed_ns if now_ns - changed_ns > _SETTLED_NS else now_ns)
                name = names.get(unicodedata.normalize("NFC", part), part)
            except (OSError, ValueError):
                return path
        found /= name
    return found


@lru_cache(maxsize=8)
def _names(folder: Path, changed_ns: int) -> dict[str, str]:
    """Composed form (NFC) to name of the files in a folder, which changed at `changed_ns`."""
    return {unicodedata.normalize("NFC", path.name): path.name for path in folder.iterdir()}


def parse_time(text: Any) -> dt.datetime:
    """Return an ISO 8601 time or date as UTC; without a zone it is UTC. `ValueError` for anything else."""
    try:
        taken = dt.datetime.fromisoformat(text.strip().upper())
        return taken.replace(tzinfo=dt.UTC) if taken.tzinfo is None else taken.astimezone(dt.UTC)
    except (AttributeError, TypeError, ValueError, OverflowError) as error:
        raise ValueError(f"datetime is {text!r}; a time such as 2015-05-02T01:31:00Z is needed") from error


def read_json(path: Path) -> Any:
    """Return the content of a JSON file, or raise `InputError`."""
    try:
        return json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not readable as JSON: {error}") from error


def report(problems: Sequence[str], path: Path, num_problems: int | None = None) -> InputError:
    """Return one error for the first problems of a source, of which there are `num_problems` in all."""
    num_more = (num_problems or len(problems)) - _MAX_REPORTED
    more = [f"and {num_more} more"] if num_more > 0 else []
    return listed([*problems[:_MAX_REPORTED], *more], str(path))


def file_key(text: str) -> str:
    """Return the key of a file in a list: `./a//b.tif` and `a/b.tif` are one file and get one key."""
    return str(PurePosixPath(text)) if "://" not in text else text
