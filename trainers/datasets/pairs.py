"""Two sources of the same places: a folder of pairs, generated scenes, DSRSID."""

from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.sources import SUFFIXES
from orbithash.encoders.text_files import read_lines
from orbithash.trainers.datasets.captions import caption
from orbithash.trainers.datasets.class_lists import DSRSID_CLASSES
from orbithash.trainers.datasets.classes import class_folders
from orbithash.trainers.datasets.layouts import Found, Row, by_path, cut

__all__ = ["DSRSID_FOLDERS", "DSRSID_LISTS", "find_dsrsid", "find_pairs", "find_scenes", "has_pairs"]

PAIRS_FOLDERS = ("first", "second")
DSRSID_FOLDERS = ("multispectral", "panchromatic")
DSRSID_LISTS = ("train.txt", "test.txt", "database.txt")


def has_pairs(root: Path) -> bool:
    """Whether the folders `first` and `second` are two sources, and not two classes of these names."""
    folders = [root / name for name in PAIRS_FOLDERS]
    if all(any(folder.glob("*/")) for folder in folders):
        return True
    if {path.name for path in root.glob("*/") if not path.name.startswith(".")} != set(PAIRS_FOLDERS):
        return False
    # Side by side: a place has one name in both.
    first, second = ({p.stem for p in folder.glob("*") if p.name.lower().endswith(SUFFIXES)} for folder in folders)
    return bool(first & second)


def find_pairs(root: Path, captions: Path | None = None) -> Found:
    """ROOT/first/<class>/NAME and ROOT/second/<class>/NAME are the two images of a place, whatever their ending.

    Images of no class are ROOT/first/NAME and ROOT/second/NAME.
    """
    return _find_pairs(root.resolve(), *PAIRS_FOLDERS)


def find_scenes(root: Path, captions: Path | None = None) -> Found:
    """What `orbithash scenes` wrote: ROOT/images/<class>/, ROOT/second/<class>/, ROOT/captions.json."""
    root = root.resolve()
    if not (root / "scenes.json").is_file():
        raise InputError(f"{root}: it has no scenes.json; the scenes are not complete, or are not scenes")
    found = _find_pairs(root, "images", "second")
    named = {row.path.relative_to(root).as_posix(): row for row in found.rows}
    return caption(found, root / "captions.json", named)


def _find_pairs(root: Path, first: str, second: str) -> Found:
    (ones, twice), (others, more) = _members(root / first), _members(root / second)
    alone = {name: path for name, path in others.items() if name not in ones}
    by_name: dict[str, str] = {}
    for label, name in alone:
        by_name.setdefault(name, label)
    rows, absent, moved = [], [], []
    for (label, name), path in ones.items():
        rows.append(Row(path, (label,) if label else (), second=others.get((label, name))))
        if (label, name) in others:
            continue
        shown = Path(label, path.name).as_posix()
        if name in by_name:
            where = by_name.pop(name)
            moved.append(f"{first}/{shown}: its second source is of {f'class {where}' if where else 'no class'}")
            alone.pop((where, name))
        else:
            absent.append(f"{first}/{shown} has no second source {second}/{shown}, nor one of another ending")
    lone = [
        f"{second}/{Path(label, path.name).as_posix()} is the second source of no image"
        for (label, _), path in alone.items()
    ]
    classes = tuple(dict.fromkeys(label for label, _ in ones if label))
    return Found(rows, classes, [*cut(twice), *cut(more), *cut(absent), *cut(moved), *cut(lone)])


def _members(root: Path) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """(class, file name without its ending) to path, and what is there of one name with two endings."""
    members: dict[tuple[str, str], Path] = {}
    twice = []
    inside = root.resolve()
    for label, paths in class_folders(root).items():
        for path in paths:
            # By way of `root`, which may be a link.
            other = members.setdefault((label, path.stem), root / path.relative_to(inside))
            if other.name != path.name:
                names = (Path(root.name, label, name).as_posix() for name in (other.name, path.name))
                twice.append(f"{' and '.join(names)} differ only in their ending; which is of the pair?")
    return members, twice


def find_dsrsid(root: Path, captions: Path | None = None) -> Found:
    """DSRSID as images and lists.

    ROOT/multispectral/NAME and ROOT/panchromatic/NAME are the two images of a place. Each line of ROOT/train.txt,
    test.txt and database.txt, of those that are there, is the path of a multispectral image and eight numbers, of
    which one is 1: its class. Which list an image is in does not matter: the protocol draws a split of the
    same sizes, as for every dataset, so that each seed gives another one.
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
            lines = [line.strip() for line in read_lines(path)]
        except ValueError as err:
            problems.append(f"{path.name} {err}")
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
