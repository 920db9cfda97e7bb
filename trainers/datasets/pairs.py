"""Two sources of the same places: a folder of pairs, generated scenes, DSRSID."""

from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets.captions import caption
from orbithash.trainers.datasets.class_lists import DSRSID_CLASSES
from orbithash.trainers.datasets.classes import class_folders
from orbithash.trainers.datasets.layouts import Found, Row, by_path, cut, read_lines

__all__ = ["DSRSID_FOLDERS", "DSRSID_LISTS", "find_dsrsid", "find_pairs", "find_scenes"]

DSRSID_FOLDERS = ("multispectral", "panchromatic")
DSRSID_LISTS = ("train.txt", "test.txt", "database.txt")


def find_pairs(root: Path, captions: Path | None = None) -> Found:
    """ROOT/first/<class>/NAME and ROOT/second/<class>/NAME are the two images of a place."""
    return _find_pairs(root.resolve(), "first", "second")


def find_scenes(root: Path, captions: Path | None = None) -> Found:
    """What `orbithash scenes` wrote: ROOT/images/<class>/, ROOT/second/<class>/, ROOT/captions.json."""
    root = root.resolve()
    if not (root / "scenes.json").is_file():
        raise InputError(f"{root}: it has no scenes.json; the scenes are not complete, or are not scenes")
    found = _find_pairs(root, "images", "second")
    named = {row.path.relative_to(root).as_posix(): row for row in found.rows}
    return caption(found, root / "captions.json", named)


def _find_pairs(root: Path, first: str, second: str) -> Found:
    ones, others = _members(root / first), _members(root / second)
    alone = {name: path for name, path in others.items() if name not in ones}
    by_name: dict[str, str] = {}
    for label, name in alone:
        by_name.setdefault(name, label)
    rows, absent, moved = [], [], []
    for (label, name), path in ones.items():
        rows.append(Row(path, (label,), second=others.get((label, name))))
        if (label, name) in others:
            continue
        if name in by_name:
            moved.append(f"{first}/{label}/{name}: its second source is of class {by_name[name]}")
            alone.pop((by_name.pop(name), name))
        else:
            absent.append(f"{first}/{label}/{name} has no second source {second}/{label}/{name}")
    lone = [f"{second}/{label}/{name} is the second source of no image" for label, name in alone]
    classes = tuple(dict.fromkeys(label for label, _ in ones))
    return Found(rows, classes, [*cut(absent), *cut(moved), *cut(lone)])


def _members(root: Path) -> dict[tuple[str, str], Path]:
    """(class, file name) to path."""
    return {(label, path.name): path for label, paths in class_folders(root).items() for path in paths}


def find_dsrsid(root: Path, captions: Path | None = None) -> Found:
    """DSRSID as images and lists.

    ROOT/multispectral/NAME and ROOT/panchromatic/NAME are the two images of a place. Each line of ROOT/train.txt,
    test.txt and database.txt, of those that are there, is the path of a multispectral image and eight numbers, of
    which one is 1: its class. Which list an image is in does not matter: the protocol draws the split.
    """
    root = root.resolve()
    first, second = DSRSID_FOLDERS
    problems: list[str] = []
    labels: dict[str, str] = {}
    bad, absent, alone, other = [], [], [], []
    lists = [root / name for name in DSRSID_LISTS if (root / name).is_file()]
    if not lists:
        raise InputError(f"{root} has none of the lists {', '.join(DSRSID_LISTS)} of dsrsid")
    for path in lists:
        try:
            lines = read_lines(path)
        except ValueError as err:
            problems.append(str(err))
            continue
        for number, line in enumerate(lines, 1):
            # Names may hold spaces.
            name, *columns = line.rsplit(maxsplit=len(DSRSID_CLASSES))
            if len(columns) != len(DSRSID_CLASSES) or sorted(columns) != ["0"] * (len(columns) - 1) + ["1"]:
                bad.append(f"{path.name}, line {number}: not a path and eight numbers of which one is 1")
                continue
            # Lists made elsewhere name the folders above, too.
            name = name[name.rfind(f"{first}/") :] if f"{first}/" in name else f"{first}/{name}"
            label = DSRSID_CLASSES[columns.index("1")]
            if labels.setdefault(name, label) != label:
                other.append(f"{name} is listed as {labels[name]} and as {label}")
    rows = []
    for name, label in labels.items():
        image, pair = root / name, root / name.replace(first, second, 1)
        if not image.resolve().is_relative_to(root):
            bad.append(f"{name} leads out of the folder")
        elif not image.is_file():
            absent.append(f"{name} is listed and not there")
        elif not pair.is_file():
            alone.append(f"{name} has no second source {pair.relative_to(root).as_posix()}")
        rows.append(Row(image, (label,), second=pair))
    problems += [*cut(bad), *cut(absent), *cut(alone), *cut(other)]
    there = set(labels.values())
    return Found(by_path(rows, root), tuple(name for name in DSRSID_CLASSES if name in there), problems)
