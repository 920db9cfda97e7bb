"""Folders of images: which files in them are images, and which of their folders are classes.

There is one finder of class folders. `encode` and `upsert` take labels from it, training takes classes from it.

    ROOT/<class>/*.tif, ROOT/images/<class>/*.tif, ROOT/Images/<class>/*.tif

Folders that hold nothing but another folder may lie between, as in EuroSAT/2750/<class>/. Images deeper in the folder
of a class belong to that class.
"""

import logging
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit, urlunsplit

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.listings import image_suffixes, report
from orbithash.encoders.sources.remote import is_remote

__all__ = [
    "ClassLayout",
    "EmptySource",
    "Folder",
    "NoClassFolders",
    "class_paths",
    "find_class_folders",
    "find_layout",
    "is_image_name",
    "is_shown",
    "log_left_out",
    "natural",
    "patch_error",
    "walk_folder",
]

# A folder within a source: the names of the folders that lead to it.
Folder = tuple[str, ...]

# Image formats that are not read, JPEG 2000 only without a driver of GDAL. Files of other endings are no images and are
# not counted.
_UNREAD = (
    *(".avif", ".bmp", ".gif", ".heic", ".heif", ".jfif", ".jpe", ".jxl", ".psd", ".svg", ".tga", ".webp"),
    *(".j2k", ".jp2", ".jpf", ".jpx", ".pbm", ".pgm", ".pnm", ".ppm", ".exr", ".vrt", ".img", ".ecw", ".sid"),
    *(".bil", ".bip", ".bsq", ".h5", ".hdf", ".hdf5", ".nc", ".ntf", ".nitf", ".mat", ".npy", ".npz", ".zarr"),
    *(".arw", ".cr2", ".dng", ".nef", ".raw"),
)

# Made by archivers, network drives and Windows beside or inside of every folder. Some hold files with names of images.
_SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found")

_IMAGE_FOLDERS = ("images", "Images")

# Names of the parts of a split, in groups of one meaning.
_SPLIT_WORDS = (
    ("train", "training", "trainval"),
    ("test", "testing"),
    ("val", "valid", "validation", "dev", "eval", "evaluation", "holdout"),
    ("query", "queries", "gallery", "database"),
)
_SPLIT_NAME = re.compile(r"([a-z]+?)[-_ .]*(?:set|sets|data|split|part|images|imgs|img|\d+)?[-_ .]*\d*", re.IGNORECASE)

# One band of a patch: <name of its folder>_B02.tif, ..._VV.tif.
_BAND = re.compile(r"_(B\d{1,2}A?|VV|VH|HH|HV)\.tiff?", re.IGNORECASE)

_log = logging.getLogger(__name__)


class EmptySource(InputError):
    """A source without images. Images may arrive later."""


class NoClassFolders(InputError):
    """A folder of images without class folders."""


@dataclass(frozen=True)
class ClassLayout:
    """Which folders of a source are classes.

    Attributes:
        base: the folder whose folders are the classes.
        classes: their names in natural order; empty when the images have no classes.
        split: names of folders in `base` that are parts of a split; each may hold folders of classes.
        num_outside: images of the source that have no class although others have one.
    """

    base: Folder
    classes: tuple[str, ...] = ()
    split: tuple[str, ...] = ()
    num_outside: int = 0

    def label(self, folder: Folder) -> str | None:
        """Return the class of the images in a folder; None without one."""
        depth = len(self.base)
        if folder[:depth] != self.base or len(folder) <= depth:
            return None
        if folder[depth] in self.split:
            return folder[depth + 1] if len(folder) > depth + 1 else None
        return folder[depth] if folder[depth] in self.classes else None


def find_layout(folders: Mapping[Folder, int]) -> ClassLayout:
    """Find the classes of a source, given the number of images in each folder that holds any."""
    base: Folder = ()
    while True:
        children = _children(folders, base)
        inner = next((name for name in _IMAGE_FOLDERS if _has_direct(folders, (*base, name))), None)
        if inner:
            base = (*base, inner)
            children = _children(folders, base)
            break
        if len(children) != 1 or (*base, *children) in folders:
            break
        base = (*base, *children)
    names = [name for name in sorted(children, key=natural) if name not in _IMAGE_FOLDERS or base[-1:] == (name,)]
    kinds = {name: kind for name in names if (kind := _split_kind(name)) is not None}
    if kinds and (len(set(kinds.values())) > 1 or len(kinds) == len(names)):
        return ClassLayout(base, split=tuple(kinds))
    num_all = sum(folders.values())
    num_inside = sum(num for folder, num in folders.items() if folder[: len(base)] == base and folder[len(base) :])
    num_beside = sum(folders.get(base[:depth], 0) for depth in range(len(base) + 1))
    # Where no folder has images of its own, the classes may lie at any depth. Where most images lie beside the folders,
    # the folders are not classes.
    if not any((*base, name) in folders for name in names) or num_beside >= num_inside:
        return ClassLayout(base)
    return ClassLayout(base, tuple(names), num_outside=num_all - num_inside)


def _children(folders: Iterable[Folder], base: Folder) -> set[str]:
    """Return the names of the folders in `base` that have images in them at any depth."""
    return {folder[len(base)] for folder in folders if len(folder) > len(base) and folder[: len(base)] == base}


def _has_direct(folders: Iterable[Folder], base: Folder) -> bool:
    """Return whether a folder in `base` holds images itself."""
    return any(len(folder) == len(base) + 1 and folder[: len(base)] == base for folder in folders)


def _split_kind(name: str) -> int | None:
    """Return the number of the group of `_SPLIT_WORDS` that a name belongs to."""
    match = _SPLIT_NAME.fullmatch(name)
    word = match[1].lower() if match else ""
    return next((kind for kind, words in enumerate(_SPLIT_WORDS) if word in words), None)


def find_class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the absolute paths of the images of each class; names and paths in natural order.

    Raises:
        NoClassFolders: images without class folders.
        InputError: no such folder, no images, parts of a split in the place of classes, or patches of one file per
            band.
    """
    root = root.resolve()
    if not root.is_dir():
        raise InputError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
    left_out: Counter[str] = Counter()
    files = dict(walk_folder(root, left_out))
    classes = class_paths(root, files, left_out)
    return {label: [root / path for path in paths] for label, paths in classes.items()}


def class_paths(
    root: Path | str, files: Mapping[Folder, Sequence[str]], left_out: Counter[str]
) -> dict[str, list[str]]:
    """Return the paths below `root` of the images of each class; names and paths in natural order.

    Args:
        root: the path or the URI of the source.
        files: the names of the images in each folder.
        left_out: what else was found, for the log; images outside of the class folders are added.

    Raises:
        InputError: as `find_class_folders`.
    """
    layout = find_layout({folder: len(names) for folder, names in files.items()})
    place = _without_query(root)
    num_images, name = sum(map(len, files.values())), place.rpartition("/")[2]
    base = "/".join((place, *layout.base))
    if layout.split:
        raise InputError(
            f"{base} has the folders {', '.join(layout.split)}: these look like the parts of a "
            f"split and not like classes. The split is drawn here: put the images of all parts together, as "
            f"{name}/<class>/*.tif"
        )
    for folder, names in files.items():
        if problem := patch_error(root, folder, names):
            raise problem
    if not layout.classes:
        depths = sorted({len(folder) - len(layout.base) for folder in files})
        deeper = f", in folders {' and '.join(map(str, depths))} levels below {base}"
        raise NoClassFolders(
            f"{root} holds {num_images} images but no class folders{deeper if depths[-1] > 1 else ''}; lay them out as "
            f"{name}/<class>/*.tif or {name}/images/<class>/*.tif"
        )
    left_out["images outside of the class folders"] += layout.num_outside
    log_left_out(str(root), left_out)
    classes: dict[str, list[str]] = {label: [] for label in layout.classes}
    for folder, names in files.items():
        if label := layout.label(folder):
            classes[label] += ["/".join((*folder, one)) for one in names]
    return {label: sorted(paths, key=natural) for label, paths in classes.items()}


def _without_query(root: Path | str) -> str:
    """Return a path, or a URI without the address and the scheme of its store."""
    location = str(root)
    return urlunsplit(urlsplit(location)._replace(query="")).rstrip("/") if is_remote(location) else location


def patch_error(root: Path | str, folder: Folder, names: Iterable[str]) -> InputError | None:
    """Return the error for a folder that is a patch of one TIFF per band, as in BigEarthNet; None for any other.

    `root` is the path or the URI of the source.
    """
    name = folder[-1] if folder else Path(_without_query(root)).name
    bands = [one for one in names if one.startswith(name) and _BAND.fullmatch(one[len(name) :])]
    if len(bands) < 2:
        return None
    return InputError(
        f"{root} holds patches of one TIFF per band ({', '.join(bands[:2])}, ...); their bands are not images by "
        "themselves. BigEarthNet can be read: version 1, with a file *_labels_metadata.json in each patch, and version "
        "2: give the folder that holds metadata.parquet and BigEarthNet-S2. Of other patches, encode can read a .txt "
        "list of the folders"
    )


def walk_folder(root: Path, left_out: Counter[str] | None = None) -> Iterator[tuple[Folder, list[str]]]:
    """Yield each folder with images in it, and their names in natural order. One folder is in memory at a time.

    Hidden files, folders of the system and links that lead out of the root are skipped. `left_out` counts the links
    and the files of image formats that are not read; without it they are logged at the end.

    Raises:
        InputError: a folder that cannot be listed; at the end, names that are not UTF-8, or no images (`EmptySource`).
    """
    counts: Counter[str] = Counter()
    num_images, undecodable = 0, []
    waiting: list[tuple[str, Folder]] = [(str(root), ())]
    while waiting:
        path, folder = waiting.pop()
        folders, names = _scan(path, root, counts)
        waiting += [(f"{path}/{name}", (*folder, name)) for name in reversed(folders)]
        undecodable += [
            f"the name {f'{path}/{name}'!r} is not UTF-8; rename it" for name in names if not _is_text(name)
        ]
        if names and not undecodable:
            num_images += len(names)
            yield folder, names
    if undecodable:
        raise report(undecodable, root)
    if not num_images:
        others = "".join(f", but {num} {what}" for what, num in sorted(counts.items()))
        raise EmptySource(
            f"{root} holds no image ({', '.join(image_suffixes())}){others}; folders of one TIFF per band are given as "
            "a .txt list"
        )
    if left_out is None:
        log_left_out(str(root), counts)
    else:
        left_out += counts


def _scan(path: str, root: Path, counts: Counter[str]) -> tuple[list[str], list[str]]:
    """Return the names of the folders and of the images in a folder, in natural order."""
    folders, names = [], []
    try:
        with os.scandir(path) as entries:
            for entry in entries:
                if not is_shown(entry.name):
                    continue
                if entry.is_symlink() and not Path(entry.path).resolve().is_relative_to(root):
                    counts["links that lead out of the folder"] += 1
                elif entry.is_dir(follow_symlinks=False):
                    folders.append(entry.name)
                elif is_image_name(entry.name, counts) and not entry.is_dir():
                    names.append(entry.name)
    except OSError as error:
        raise InputError(f"{error.filename} cannot be listed: {error.strerror}") from error
    return sorted(folders, key=natural), sorted(names, key=natural)


def is_shown(name: str) -> bool:
    """Return whether a file or folder is neither hidden nor made by an operating system."""
    return not name.startswith(".") and name not in _SYSTEM_FOLDERS


def is_image_name(name: str, counts: Counter[str]) -> bool:
    """Return whether a file is an image by the ending of its name; count it where its format is not read."""
    ending = Path(name).suffix.lower()
    if ending in image_suffixes():
        return True
    if ending in _UNREAD:
        counts[f"files of a format that is not read ({ending})"] += 1
    return False


def log_left_out(source: str, left_out: Mapping[str, int]) -> None:
    """Log what of a source is not read, in one line for each kind."""
    for what, number in sorted(left_out.items()):
        if number:
            _log.warning("%s: left out %d %s", source, number, what)


def _is_text(name: str) -> bool:
    """Return False for a name that is not UTF-8: Python can handle it, but no table can store it."""
    return name.encode(errors="ignore").decode() == name


def natural(key: str) -> tuple[list[tuple[int, str]], str]:
    """Return a sort key by which numbers inside names are ordered by their value: `a2` before `a10`."""
    parts = re.split("([0-9]+)", key)
    # Text and digits alternate, so text is compared with text; a longer number is a larger one.
    return [(len(part.lstrip("0")), part.lstrip("0")) if i % 2 else (0, part) for i, part in enumerate(parts)], key
