"""What is to be encoded: folders, lists, tables, STAC items and object stores become images, one after another."""

import logging
import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.listings import (
    SUFFIXES,
    Item,
    list_paths,
    local_path,
    read_json,
    report,
)
from orbithash.encoders.imagery.remote import is_remote, walk_objects
from orbithash.encoders.imagery.stac import list_stac
from orbithash.encoders.imagery.tables import list_table
from orbithash.encoders.imagery.tiles import check_tile, plan_tiles, tile_key

__all__ = [
    "SUFFIXES",
    "EmptySource",
    "Item",
    "count_source",
    "cut",
    "find_class_folders",
    "iter_source",
    "list_source",
    "natural",
]

_SCENE_SUFFIXES = (".tif", ".tiff")

_log = logging.getLogger(__name__)


class EmptySource(InputError):
    """A source without an image, of which there may be some later."""


def list_source(source: str | Path, tile_px: int | None = None, asset: str | None = None) -> list[Item]:
    """Every image of `source`, sorted by key in natural order (`a2` before `a10`).

    For lists that fit into the memory; arguments and errors are those of `iter_source`.

    Raises:
        InputError: also where a key is there twice.
    """
    items = list(iter_source(source, tile_px, asset))
    _check_once((item.key for item in items), source)
    return sorted(items, key=lambda item: natural(item.key))


def count_source(source: str | Path, tile_px: int | None = None, asset: str | None = None) -> int:
    """How many images `iter_source` yields. What it would raise in the end is raised here, before anything is done.

    Keeps 8 bytes an image.

    Raises:
        InputError: as `list_source`.
    """
    hashes = array("q", (hash(item.key) for item in iter_source(source, tile_px, asset)))
    values = np.sort(np.frombuffer(hashes, np.int64))
    if twice := set(values[1:][values[1:] == values[:-1]].tolist()):
        # Mostly keys that are there twice, and hardly ever two keys of one hash.
        _check_once((item.key for item in iter_source(source, tile_px, asset) if hash(item.key) in twice), source)
    return len(hashes)


def iter_source(source: str | Path, tile_px: int | None = None, asset: str | None = None) -> Iterator[Item]:
    """The images of `source` one after another: one folder of it is in memory at a time, a list as a whole.

    Files are taken by their name's ending and not opened: a broken one is listed like any other and refused when it
    is read. So is, with `tile_px`, a scene that cannot be cut.

    Args:
        source: a folder (with all folders in it), one image, a `.txt` list of paths, a `.parquet` table, or a `.json`
            STAC item collection; or a folder of an object store (`orbithash.encoders.imagery.remote`).
        tile_px: side of the tiles that GeoTIFF scenes are cut into; None for whole images. Other formats are then
            left out.
        asset: key of the asset to read in each STAC item; None chooses one (`orbithash.encoders.imagery.stac`).

    Raises:
        InputError: no such source, of an unknown kind, remote, or without images (`EmptySource`); maybe at the end.
    """
    items: Iterable[Item]
    if is_remote(str(source)):
        if tile_px is not None:
            raise InputError(f"{source} is remote; only scenes in folders of this machine are cut: copy it first")
        where, items = str(source), _iter_objects(str(source))
        _check_has_assets(where, asset)
    else:
        where = str(local_path(str(source), Path.cwd()))
        items = _iter_local(Path(where), asset)
    if tile_px is not None:
        items = cut(items, check_tile(tile_px))
    empty = True
    for item in items:
        empty = False
        yield item
    if empty:
        raise EmptySource(f"{where} lists no image ({', '.join(SUFFIXES)})")


def _check_has_assets(where: str | Path, asset: str | None) -> None:
    if asset is not None:
        raise InputError(f"--asset {asset} names an asset of STAC items, and {where} is not a STAC .json")


def _iter_local(path: Path, asset: str | None) -> Iterable[Item]:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_file() and path.suffix.lower() in (".json", ".geojson"):
        return list_stac(path, asset)
    _check_has_assets(path, asset)
    if path.is_dir():
        return _iter_folder(path.resolve())
    suffix = path.suffix.lower()
    if suffix in SUFFIXES:
        return [Item(path.name, str(path))]
    if suffix == ".txt":
        return list_paths(path)
    if suffix == ".parquet":
        return list_table(path)
    raise InputError(f"{path} is neither a folder nor an image, a .txt list, a .parquet table or a STAC .json")


def _iter_objects(uri: str) -> Iterator[Item]:
    """The images of a folder of an object store; those in CLASS/, images/CLASS/ or Images/CLASS/ have a label."""
    for key, address in walk_objects(uri):
        if key.lower().endswith(SUFFIXES):
            within = key.split("/")[:-1]
            within = within[1:] if within[:1] in (["images"], ["Images"]) else within
            yield Item(key, address, within[0] if len(within) == 1 else None)


def find_class_folders(root: Path) -> dict[str, list[Path]]:
    """The images of each class, for images in ROOT/<class>/, ROOT/images/<class>/ or ROOT/Images/<class>/.

    Returns:
        Label to absolute paths; both in natural order.

    Raises:
        InputError: no such folder, no images, or images but no class folders.
    """
    root = root.resolve()
    if not root.is_dir():
        raise InputError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
    files = _find_images(root)
    classes = _classes(root, files)
    if not classes:
        raise InputError(
            f"{root} holds {len(files)} images but no class folders; lay them out as {root.name}/<class>/*.tif "
            f"or {root.name}/images/<class>/*.tif"
        )
    return classes


def natural(key: str) -> tuple[list[tuple[int, str]], str]:
    """Sorts numbers inside names by their value: `a2` before `a10`."""
    parts = re.split("([0-9]+)", key)
    # Text and digits take turns, so like is compared with like; a longer number is a larger one.
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts)], key


def _iter_folder(root: Path) -> Iterator[Item]:
    # Generated scenes keep a second image of each place beside the first.
    start = root / "images" if (root / "scenes.json").is_file() else root
    bases = (root / "images", root / "Images", root)
    base = next((base for base in bases[:2] if base.is_dir() and _has_classes(base, root)), root)
    captions = _captions(root / "captions.json")
    for folder, names in _walk(start):
        path = Path(folder)
        within = "" if path == root else f"{path.relative_to(root).as_posix()}/"
        label = path.name if path.parent == base and path not in bases else None
        for name in names:
            yield Item(within + name, f"{folder}/{name}", label, captions.get(within + name))


def _has_classes(base: Path, root: Path) -> bool:
    """Whether a folder in `base` has an image."""
    return any(_scan(folder, root)[1] for folder in _scan(str(base), root)[0])


def _find_images(root: Path) -> list[Path]:
    """Absolute paths of the images in a folder and the folders in it, in natural order."""
    found = [Path(folder, name) for folder, names in _walk(root) for name in names]
    return sorted(found, key=lambda path: natural(path.relative_to(root).as_posix()))


def _walk(root: Path) -> Iterator[tuple[str, list[str]]]:
    """Each folder with images in it, and their names in natural order.

    Hidden ones and links that lead out of the root are left out; of the links it is told at the end.
    """
    num_images, num_links, undecodable, waiting = 0, 0, [], [str(root)]
    while waiting:
        folder = waiting.pop()
        folders, names, links = _scan(folder, root)
        waiting += reversed(folders)
        num_links += links
        undecodable += [
            f"the name {f'{folder}/{name}'!r} is not UTF-8; rename it" for name in names if not _is_text(name)
        ]
        if names and not undecodable:
            num_images += len(names)
            yield folder, names
    if undecodable:
        raise report(undecodable, root)
    if num_links:
        _log.warning("%s: left out %d links that lead out of the folder", root, num_links)
    if not num_images:
        links_out = f", and {num_links} links that lead out of it are not followed" if num_links else ""
        raise EmptySource(
            f"{root} holds no image ({', '.join(SUFFIXES)}){links_out}; folders of one TIFF a band are given as a "
            ".txt list"
        )


def _scan(folder: str, root: Path) -> tuple[list[str], list[str], int]:
    """Paths of the folders in a folder and names of its images, in natural order; how many links lead out."""
    folders, names, num_links = [], [], 0
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith("."):
                    continue
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                    num_links += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.path)
                elif entry.name.lower().endswith(SUFFIXES) and not entry.is_dir():
                    names.append(entry.name)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error
    return sorted(folders, key=natural), sorted(names, key=natural), num_links


def _is_text(name: str) -> bool:
    """False for names of other bytes than UTF-8, which Python carries along but no table can hold."""
    return name.encode(errors="ignore").decode() == name


def _classes(root: Path, files: list[Path]) -> dict[str, list[Path]]:
    """Label to files; empty where the folder is not laid out by class."""
    for base in (root / "images", root / "Images", root):
        classes: dict[str, list[Path]] = {}
        for file in files:
            if file.parent.parent == base and file.parent not in (root / "images", root / "Images"):
                classes.setdefault(file.parent.name, []).append(file)
        if classes:
            return {label: classes[label] for label in sorted(classes, key=natural)}
    return {}


def _captions(path: Path) -> dict[str, str]:
    """First sentence by file name, from a Karpathy-style JSON file; empty without one."""
    if not path.is_file():
        return {}
    data: Any = read_json(path)
    try:
        return {image["filename"]: image["sentences"][0]["raw"] for image in data["images"] if image["sentences"]}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f'{path} is not a list of captions: {{"images": [{{"filename": ..., "sentences": [{{"raw": ...}}]}}]}}'
        ) from error


def cut(items: Iterable[Item], tile_px: int) -> Iterator[Item]:
    """The tiles of all scenes among the items."""
    num_others = 0
    for item in items:
        if item.problem is not None:
            yield item
            continue
        if not item.path.lower().endswith(_SCENE_SUFFIXES):
            num_others += 1
            continue
        try:
            windows = plan_tiles(Path(item.path), tile_px)
        except ImageError:
            # Listed all the same: reading this tile meets the same error, and the job notes it.
            windows = [(0, 0, tile_px, tile_px)]
        # Place and outline of the scene are not the tile's.
        scene = replace(item, lon=None, lat=None, footprint=None)
        for window in windows:
            yield replace(scene, key=tile_key(item.key, window), window=window)
    if num_others:
        _log.warning("left out %d images that are not TIFF scenes", num_others)


def _check_once(keys: Iterable[str], source: str | Path) -> None:
    twice = sorted((key for key, count in Counter(keys).items() if count > 1), key=natural)
    if twice:
        raise report([f"the key {key!r} is there more than once" for key in twice], Path(source))
