"""What is to be encoded: folders, lists, tables and STAC items become one sorted list of images."""

import logging
import os
import re
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.listings import SUFFIXES, Item, list_paths, list_stac, list_table, local_path, read_json, report
from orbithash.encoders.tiles import check_tile, plan_tiles, tile_key

__all__ = ["SUFFIXES", "Item", "find_class_folders", "list_source", "natural"]

_SCENE_SUFFIXES = (".tif", ".tiff")

_log = logging.getLogger(__name__)


def list_source(source: str | Path, tile_px: int | None = None) -> list[Item]:
    """Every image of `source`, sorted by key in natural order (`a2` before `a10`).

    Files are taken by their name's ending and not opened: a broken one is listed like any other and refused when it
    is read. So is, with `tile_px`, a scene that cannot be cut.

    Args:
        source: a folder (with all folders in it), one image, a `.txt` list of paths, a `.parquet` table, or a `.json`
            STAC item collection.
        tile_px: side of the tiles that GeoTIFF scenes are cut into; None for whole images. Other formats are then
            left out.

    Raises:
        InputError: no such source, of an unknown kind, without images, remote, or with a key twice.
    """
    path = local_path(str(source), Path.cwd())
    if not path.exists():
        raise InputError(f"{path} does not exist")
    if path.is_dir():
        items = _list_folder(path)
    elif path.suffix.lower() in SUFFIXES:
        items = [Item(path.name, str(path))]
    elif path.suffix.lower() == ".txt":
        items = list_paths(path)
    elif path.suffix.lower() == ".parquet":
        items = list_table(path)
    elif path.suffix.lower() in (".json", ".geojson"):
        items = list_stac(path)
    else:
        raise InputError(f"{path} is neither a folder nor an image, a .txt list, a .parquet table or a STAC .json")
    if tile_px is not None:
        items = _cut(items, check_tile(tile_px), path)
    if not items:
        raise InputError(f"{path} lists no image ({', '.join(SUFFIXES)})")
    twice = sorted((key for key, count in Counter(item.key for item in items).items() if count > 1), key=natural)
    if twice:
        raise report([f"the key {key!r} is there more than once" for key in twice], path)
    return sorted(items, key=lambda item: natural(item.key))


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


def _list_folder(root: Path) -> list[Item]:
    root = root.resolve()
    # Generated scenes keep a second image of each place beside the first.
    files = _find_images(root / "images" if (root / "scenes.json").is_file() else root)
    labels = {file: label for label, members in _classes(root, files).items() for file in members}
    captions = _captions(root / "captions.json")
    items = []
    for file in files:
        key = file.relative_to(root).as_posix()
        items.append(Item(key, str(file), labels.get(file), captions.get(key)))
    return items


def _find_images(root: Path) -> list[Path]:
    """Absolute paths of the images in a folder and the folders in it, in natural order.

    Hidden ones and links that lead out of the folder are left out.
    """

    def fail(error: OSError) -> None:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error

    root = root.resolve()
    found, num_links, undecodable = [], 0, []
    for folder, folders, names in os.walk(root, onerror=fail):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in [*folders, *names]:
            path = Path(folder, name)
            if name.startswith(".") or (path.is_symlink() and not path.resolve().is_relative_to(root)):
                num_links += not name.startswith(".")
            elif name.lower().endswith(SUFFIXES) and not path.is_dir():
                found.append(path)
                if not _is_text(str(path)):
                    undecodable.append(f"the name {str(path)!r} is not UTF-8; rename it")
    if undecodable:
        raise report(undecodable, root)
    if num_links:
        _log.warning("%s: left out %d links that lead out of the folder", root, num_links)
    if not found:
        links = f", and {num_links} links that lead out of it are not followed" if num_links else ""
        raise InputError(
            f"{root} holds no image ({', '.join(SUFFIXES)}){links}; folders of one TIFF a band are given as a .txt list"
        )
    return sorted(found, key=lambda path: natural(path.relative_to(root).as_posix()))


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


def _cut(items: list[Item], tile_px: int, source: Path) -> list[Item]:
    """The tiles of all scenes among the items."""
    tiles, num_others = [], 0
    for item in items:
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
        tiles += [replace(scene, key=tile_key(item.key, window), window=window) for window in windows]
    if num_others:
        _log.warning("%s: left out %d images that are not TIFF scenes", source, num_others)
    return tiles
