"""Sources of items: folders, lists, tables, STAC items and object stores become images, one after another."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.mosaics import MOSAIC_SUFFIXES
from orbithash.encoders.keys import key_problem
from orbithash.encoders.sources.embeddings.parquet import PARQUET_SUFFIXES
from orbithash.encoders.sources.folders import (
    EmptySource,
    Folder,
    find_layout,
    is_image_name,
    is_shown,
    log_left_out,
    natural,
    patch_error,
    walk_folder,
)
from orbithash.encoders.sources.listings import (
    Item,
    image_suffixes,
    list_paths,
    listed_names,
    local_path,
    locate,
    read_json,
    report,
    scene_suffixes,
)
from orbithash.encoders.sources.remote import is_remote, walk_objects
from orbithash.encoders.sources.stac.documents import STAC_SUFFIXES
from orbithash.encoders.sources.stac.item_tables import is_item_table
from orbithash.encoders.sources.stac.items import list_stac, list_stac_table
from orbithash.encoders.sources.tables import list_table
from orbithash.encoders.sources.tiles import check_tile, plan_tiles, tile_key

__all__ = ["EmptySource", "Item", "ItemFinder", "count_source", "cut_scenes", "iter_source", "list_source"]

# Returns the items of a folder in the layout of a known dataset, given a file of captions; None for any other folder.
ItemFinder = Callable[[Path, Path | None], list[Item] | None]


def list_source(source: str | Path, tile_px: int | None = None, asset: str | None = None, **options: Any) -> list[Item]:
    """Return every item of `source`, sorted by key in natural order (`a2` before `a10`).

    For sources that fit into memory; arguments and errors are those of `iter_source`.

    Raises:
        InputError: also for a key that occurs twice.
    """
    items = list(iter_source(source, tile_px, asset, **options))
    _check_unique((item.key for item in items), source)
    return sorted(items, key=lambda item: natural(item.key))


def count_source(source: str | Path, tile_px: int | None = None, asset: str | None = None, **options: Any) -> int:
    """Return the number of items of `source`. Errors that `iter_source` raises at its end are raised here.

    Needs 8 bytes of memory per item; arguments and errors are those of `iter_source`.

    Raises:
        InputError: also for a key that occurs twice.
    """
    hashes = array("q", (hash(item.key) for item in iter_source(source, tile_px, asset, **options)))
    values = np.sort(np.frombuffer(hashes, np.int64))
    if repeated := set(values[1:][values[1:] == values[:-1]].tolist()):
        # Usually keys that occur twice; rarely two keys with one hash.
        again = iter_source(source, tile_px, asset, **{**options, "left_out": Counter(), "groups": None})
        _check_unique((item.key for item in again if hash(item.key) in repeated), source)
    return len(hashes)


def iter_source(
    source: str | Path,
    tile_px: int | None = None,
    asset: str | None = None,
    *,
    prefix: str = "",
    captions: Path | None = None,
    find_items: ItemFinder | None = None,
    left_out: Counter[str] | None = None,
    groups: Counter[str] | None = None,
) -> Iterator[Item]:
    """Yield the items of `source`. One folder of it is in memory at a time, or one JSON file of STAC.

    Files are chosen by their names and not opened: a damaged image is listed like any other and refused when it is
    read. So is, with `tile_px`, a scene that cannot be cut, and an item whose name cannot be a key.

    Args:
        source: a folder (with all folders in it), one image or mosaic, a `.txt` list of paths, a `.parquet` table of
            images or STAC items, a `.json` STAC item collection, item or static catalog, or a `.txt` list of such
            `.json` files; or a folder of an object store (`orbithash.encoders.sources.remote`).
        tile_px: side of the tiles that scenes (GeoTIFF, JPEG 2000) are cut into; None for whole images. Images of other
            formats are then left out.
        asset: key of the asset to read in each STAC item; None chooses one (`orbithash.encoders.sources.stac.items`).
        prefix: put before all keys, as PREFIX/KEY, so that sources with equal names fit into one archive.
        captions: Karpathy-style JSON file of sentences about the images of a folder. Default: its captions.json.
        find_items: finder of datasets whose labels are not the names of folders.
        left_out: counts by kind what is in a folder or linked to and is not listed. Default: logged as warnings.
        groups: counts the STAC items by the catalog, collection or file that they are in.

    Raises:
        InputError: no such source, of an unknown kind, remote, or without images (`EmptySource`); possibly at the end.
    """
    items: Iterable[Item]
    counts: Counter[str] = Counter()
    if is_remote(str(source)):
        if tile_px is not None:
            raise InputError(f"{source} is remote; only scenes in folders of this machine are cut: copy it first")
        where, items = str(source), _iter_objects(str(source), counts)
        _check_has_assets(where, asset)
    else:
        where = str(local_path(str(source), Path.cwd()))
        items = _iter_local(Path(where), asset, captions, find_items, counts, groups)
    if tile_px is not None:
        items = cut_scenes(items, check_tile(tile_px), counts)
    start = f"{prefix.rstrip('/')}/" if prefix else ""
    empty = True
    for item in items:
        empty = False
        key = start + item.key
        # A job notes the problem and goes on.
        yield _in_utf8(replace(item, key=key, problem=item.problem or key_problem(key)))
    if empty:
        raise EmptySource(f"{where} lists no image ({', '.join(image_suffixes())})")
    if left_out is None:
        log_left_out(where, counts)
    else:
        left_out += counts


def _in_utf8(item: Item) -> Item:
    """Return an item whose texts an archive can hold. JSON can hold halves of surrogate pairs, which UTF-8 cannot."""
    texts = (item.key, item.path, item.label, item.caption, item.problem)
    try:
        "".join(text for text in texts if text).encode()
    except UnicodeEncodeError:
        problem = item.problem or "its address, label or caption has half of a surrogate pair, which is not text"
        return replace(
            item, key=_escaped(item.key), path=_escaped(item.path), label=None, caption=None, problem=_escaped(problem)
        )
    return item


def _escaped(text: str) -> str:
    return text.encode(errors="backslashreplace").decode()


def _check_has_assets(where: str | Path, asset: str | None) -> None:
    if asset is not None:
        raise InputError(
            f"--asset {asset} names an asset of STAC items, and {where} is not a STAC .json or Parquet file"
        )


def _iter_local(
    path: Path,
    asset: str | None,
    captions: Path | None,
    find_items: ItemFinder | None,
    left_out: Counter[str],
    groups: Counter[str] | None,
) -> Iterable[Item]:
    if not path.exists():
        raise InputError(f"{path} does not exist")
    is_table = path.is_file() and path.suffix.lower() in PARQUET_SUFFIXES
    is_item_rows = is_table and is_item_table(path)
    documents = _stac_files(path)
    if not (documents or is_item_rows):
        _check_has_assets(path, asset)
    if path.is_dir():
        root = path.resolve()
        items = find_items(root, captions or _captions_file(root)) if find_items else None
        return _iter_folder(root, captions, left_out) if items is None else items
    if captions is not None:
        raise InputError(f"{path} is not a folder; --captions belongs to a folder of images")
    suffix = path.suffix.lower()
    if suffix in (*image_suffixes(), *MOSAIC_SUFFIXES):
        return [Item(path.name, str(path))]
    if documents:
        return list_stac(documents, asset, left_out, groups)
    if suffix == ".txt":
        return list_paths(path)
    if is_table:
        return list_stac_table(path, asset) if is_item_rows else list_table(path)
    raise InputError(f"{path} is neither a folder nor an image, a .txt list, a .parquet table or a STAC .json")


def _stac_files(path: Path) -> list[Path]:
    """Return the JSON files of STAC that a source names: itself, or those in a list that begins with one; else none."""
    if path.is_dir() or path.suffix.lower() not in (".txt", *STAC_SUFFIXES):
        return []
    if path.suffix.lower() != ".txt":
        return [path]
    names = listed_names(path)
    if not next(names, "").lower().endswith(STAC_SUFFIXES):
        return []
    files = []
    for name in listed_names(path):
        if not name.lower().endswith(STAC_SUFFIXES):
            raise InputError(f"{path}: {name} is not a STAC .json; a list holds either images or STAC files")
        files.append(Path(locate(name, path.parent)))
    return files


def _iter_objects(uri: str, left_out: Counter[str]) -> Iterator[Item]:
    """Yield the images of a folder of an object store, with labels by the rules for local folders."""
    folders: Counter[Folder] = Counter()
    # Objects are listed folder by folder.
    for folder, objects in groupby(_image_objects(uri, Counter()), lambda one: tuple(one[0].split("/")[:-1])):
        names = [key.rpartition("/")[2] for key, _, _ in objects]
        if problem := patch_error(uri, folder, names):
            raise problem
        folders[folder] += len(names)
    layout = find_layout(folders)
    for key, address, version in _image_objects(uri, left_out):
        yield Item(key, address, layout.label(tuple(key.split("/")[:-1])), version=version)


def _image_objects(uri: str, left_out: Counter[str]) -> Iterator[tuple[str, str, str]]:
    for key, address, version in walk_objects(uri):
        *folders, name = key.split("/")
        if all(map(is_shown, folders)) and is_image_name(name, left_out):
            yield key, address, version


def _iter_folder(root: Path, captions: Path | None, left_out: Counter[str]) -> Iterator[Item]:
    # Generated scenes have a second image of each place beside the first.
    is_scenes = (root / "scenes.json").is_file()
    sizes = {}
    for folder, names in walk_folder(root, Counter()):
        if problem := patch_error(root, folder, names):
            raise problem
        if not is_scenes or folder[:1] == ("images",):
            sizes[folder] = len(names)
    layout = find_layout(sizes)
    base = "".join(f"{name}/" for name in layout.base)
    file = captions or _captions_file(root) or _captions_file(Path(root, base))
    sentences = _first_sentences(file) if file else {}
    unique = _unique_names(root, {name for name in sentences if "/" not in name})
    for folder, names in walk_folder(root, left_out):
        if folder not in sizes:
            continue
        within, label = "".join(f"{name}/" for name in folder), layout.label(folder)
        for name in names:
            path = within + name
            caption = sentences.get(path) or sentences.get(path.removeprefix(base))
            yield Item(path, f"{root}/{path}", label, caption or (sentences[name] if name in unique else None))


def _captions_file(folder: Path) -> Path | None:
    return file if (file := folder / "captions.json").is_file() else None


def _unique_names(root: Path, names: set[str]) -> set[str]:
    """Return those of `names` that only one image in a folder has."""
    counts: Counter[str] = Counter()
    if names:
        for _, found in walk_folder(root, Counter()):
            counts.update(names.intersection(found))
    return {name for name, count in counts.items() if count == 1}


def _first_sentences(path: Path) -> dict[str, str]:
    """Return the first sentence of each image by the name that a Karpathy-style JSON file gives it."""
    data: Any = read_json(path)
    try:
        return {image["filename"]: image["sentences"][0]["raw"] for image in data["images"] if image["sentences"]}
    except (KeyError, TypeError, IndexError) as error:
        raise InputError(
            f'{path} is not a list of captions: {{"images": [{{"filename": ..., "sentences": [{{"raw": ...}}]}}]}}'
        ) from error


def cut_scenes(items: Iterable[Item], tile_px: int, left_out: Counter[str] | None = None) -> Iterator[Item]:
    """Yield the tiles of all scenes among the items; `left_out` counts the other items."""
    suffixes = (*scene_suffixes(), *MOSAIC_SUFFIXES)
    for item in items:
        if item.problem is not None or item.window is not None:
            yield item
            continue
        if not item.path.lower().endswith(suffixes):
            if left_out is not None:
                left_out[f"images that are not scenes ({', '.join(suffixes)})"] += 1
            continue
        try:
            windows = plan_tiles(Path(item.path), tile_px)
        except ImageError:
            # Listed nevertheless: reading this tile raises the same error, and the job records it.
            windows = [(0, 0, tile_px, tile_px)]
        # Place and outline belong to the scene and not to a tile.
        scene = replace(item, lon=None, lat=None, footprint=None)
        for window in windows:
            yield replace(scene, key=tile_key(item.key, window), window=window)


def _check_unique(keys: Iterable[str], source: str | Path) -> None:
    repeated = sorted((key for key, count in Counter(keys).items() if count > 1), key=natural)
    if repeated:
        raise report([f"the key {key!r} is there more than once" for key in repeated], Path(source))
