"""Two sources of the same places: a folder of pairs, generated scenes, DSRSID."""

from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.listings import image_suffixes
from orbithash.encoders.text_files import read_lines
from orbithash.trainers.datasets.captions import caption
from orbithash.trainers.datasets.class_lists import DSRSID_CLASSES
from orbithash.trainers.datasets.classes import class_folders
from orbithash.trainers.datasets.layouts import FoundImages, LabelledImage, by_path, first_problems

__all__ = ["DSRSID_FOLDERS", "DSRSID_LISTS", "find_dsrsid", "find_pairs", "find_scenes", "has_pairs"]

PAIRS_FOLDERS = ("first", "second")
DSRSID_FOLDERS = ("multispectral", "panchromatic")
DSRSID_LISTS = ("train.txt", "test.txt", "database.txt")


def has_pairs(root: Path) -> bool:
    """Return whether the folders `first` and `second` are two sources, and not two classes with these names."""
    folders = [root / name for name in PAIRS_FOLDERS]
    if all(any(folder.glob("*/")) for folder in folders):
        return True
    if {path.name for path in root.glob("*/") if not path.name.startswith(".")} != set(PAIRS_FOLDERS):
        return False
    # Without classes: a place has the same name in both.
    suffixes = image_suffixes()
    first, second = ({p.stem for p in folder.glob("*") if p.name.lower().endswith(suffixes)} for folder in folders)
    return bool(first & second)


def find_pairs(root: Path, captions: Path | None = None) -> FoundImages:
    """Find pairs: ROOT/first/<class>/NAME and ROOT/second/<class>/NAME, with any endings, are the images of a place.

    Images without a class are ROOT/first/NAME and ROOT/second/NAME.
    """
    return _find_pairs(root.resolve(), *PAIRS_FOLDERS)


def find_scenes(root: Path, captions: Path | None = None) -> FoundImages:
    """Find what `orbithash scenes` wrote: ROOT/images/<class>/, ROOT/second/<class>/, ROOT/captions.json."""
    root = root.resolve()
    if not (root / "scenes.json").is_file():
        raise InputError(f"{root}: it has no scenes.json; the scenes are not complete, or are not scenes")
    found = _find_pairs(root, "images", "second")
    named = {row.path.relative_to(root).as_posix(): row for row in found.rows}
    return caption(found, root / "captions.json", named)


def _find_pairs(root: Path, first: str, second: str) -> FoundImages:
    (ones, twice), (others, more) = _members(root / first), _members(root / second)
    alone = {name: path for name, path in others.items() if name not in ones}
    by_name: dict[str, str] = {}
    for label, name in alone:
        by_name.setdefault(name, label)
    rows, absent, moved = [], [], []
    for (label, name), path in ones.items():
        rows.append(LabelledImage(path, (label,) if label else (), second=others.get((label, name))))
        if (label, name) in others:
            continue
        shown = Path(label, path.name).as_posix()
        if name in by_name:
            where = by_name.pop(name)
            moved.append(f"{first}/{shown}: its second source has {f'the class {where}' if where else 'no class'}")
            alone.pop((where, name))
        else:
            absent.append(f"{first}/{shown} has no second source {second}/{shown}, nor one of another ending")
    lone = [
        f"{second}/{Path(label, path.name).as_posix()} is not the second source of an image"
        for (label, _), path in alone.items()
    ]
    classes = tuple(dict.fromkeys(label for label, _ in ones if label))
    return FoundImages(
        rows,
        classes,
        [
            *first_problems(twice),
            *first_problems(more),
            *first_problems(absent),
            *first_problems(moved),
            *first_problems(lone),
        ],
    )


def _members(root: Path) -> tuple[dict[tuple[str, str], Path], list[str]]:
    """Return the path by (class, name without its ending), and the names that occur with two endings."""
    members: dict[tuple[str, str], Path] = {}
    twice = []
    inside = root.resolve()
    for label, paths in class_folders(root).items():
        for path in paths:
            # Below `root` as it was given, which may be a link.
            other = members.setdefault((label, path.stem), root / path.relative_to(inside))
            if other.name != path.name:
                names = (Path(root.name, label, name).as_posix() for name in (other.name, path.name))
                twice.append(f"{' and '.join(names)} differ only in their ending; a pair has one of them")
    return members, twice


def find_dsrsid(root: Path, captions: Path | None = None) -> FoundImages:
    """Find the images of DSRSID by its lists.

    ROOT/multispectral/NAME and ROOT/panchromatic/NAME are the two images of a place. Each line of ROOT/train.txt,
    test.txt and database.txt, as far as they exist, is the path of a multispectral image and eight numbers; the
    position of the 1 is its class. The list that an image is in has no effect: the protocol draws a split of the same
    sizes, as for every dataset, and each seed draws another one.
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
                bad.append(f"{path.name}, line {number}: not a path and eight numbers with a single 1")
                continue
            # Lists from elsewhere also name the folders above.
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
            absent.append(f"{name} is listed and missing")
        elif not pair.is_file():
            alone.append(f"{name} has no second source {pair.relative_to(root).as_posix()}")
        rows.append(LabelledImage(image, (label,), second=pair))
    problems += [*first_problems(bad), *first_problems(absent), *first_problems(alone), *first_problems(other)]
    there = set(labels.values())
    return FoundImages(by_path(rows, root), tuple(name for name in DSRSID_CLASSES if name in there), problems)
