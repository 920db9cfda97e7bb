"""Sentences about images, in a Karpathy-style JSON file: UCM-captions, RSICD, or any folder.

    {"images": [{"filename": ..., "imgid": 0, "sentids": [0, 1, 2, 3, 4],
                 "sentences": [{"raw": ..., "sentid": 0, "imgid": 0}, ...]}, ...]}

The numbers `imgid`, `sentids` and `sentid` are checked where the file has any of them; a file without any is allowed.
Tokens and the split of the file are not read: the text encoder has its own vocabulary, and the protocol draws the
split.
"""

import dataclasses
import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.folders import walk_folder
from orbithash.encoders.text_files import read_lines
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.datasets.classes import class_folders, find_class_list, find_classes, find_unlabelled
from orbithash.trainers.datasets.layouts import FoundImages, LabelledImage, by_path, first_problems, read_json

__all__ = ["NUM_UCM_IMAGES", "TEXT_CLASSES", "caption", "find_captioned_folder", "find_rsicd", "find_ucm_captions"]

# Sentences of each image of UCM-captions and RSICD.
NUM_SENTENCES = 5
UCM_IMAGES_PER_CLASS = 100
NUM_UCM_IMAGES = UCM_IMAGES_PER_CLASS * len(CLASS_LISTS["ucmd"])
# RSICD's folder of lists of image names, one per class.
TEXT_CLASSES = "txtclasses_rsicd"

_log = logging.getLogger(__name__)

Captions = dict[str, tuple[str, ...]]


def caption(
    found: FoundImages,
    captions: Path,
    named: dict[str, LabelledImage],
    key: Callable[[str], str] = str,
    *,
    num_sentences: int | None = None,
    partly: bool = False,
) -> FoundImages:
    """Add sentences to images.

    Args:
        found: the images.
        captions: the JSON file.
        named: the images by name, as `key` makes it from a name in the file.
        key: turns a name in the file into a name in `named`.
        num_sentences: required number of sentences per image; None: 1 or more.
        partly: whether images may lack captions and captions may lack images; these are left out, and a warning gives
            their number. A file with captions for fewer than half of the images is a problem nevertheless.
    """
    try:
        sentences, problems = _read_captions(captions, key, num_sentences)
    except ValueError as err:
        return dataclasses.replace(found, problems=[*found.problems, str(err)])
    texts = {named[name].path: text for name, text in sentences.items() if name in named}
    absent = [name for name in sentences if name not in named]
    bare = [name for name in named if name not in sentences]
    rows = [dataclasses.replace(row, captions=texts.get(row.path, ())) for row in found.rows]
    classes = found.classes
    if not partly:
        problems += first_problems([f"captions for {name}, which is missing" for name in absent])
        problems += first_problems([f"{name} has no captions" for name in bare])
    elif len(bare) > len(named) / 2:
        problems.append(
            f"only {len(texts)} of the {len(named)} images have captions in {captions.name} (not {bare[0]}); is it the "
            "file of these images?"
        )
    else:
        if absent:
            _log.warning("%s: left out the captions of %d images that are missing", captions, len(absent))
        if bare:
            _log.warning("%s: left out %d of %d images, which have no captions", captions, len(bare), len(named))
        rows = [row for row in rows if row.path in texts]
        there = {name for row in rows for name in row.classes}
        classes = tuple(name for name in classes if name in there)
    return FoundImages(rows, classes, [*found.problems, *problems])


def find_captioned_folder(root: Path, captions: Path | None = None, has_classes: bool = True) -> FoundImages:
    """Find images in one folder per class, or in any folders without classes.

    Names in a file of sentences are paths below `root` or unique file names.
    """
    found = find_classes(root) if has_classes else find_unlabelled(root)
    if captions is None:
        return found
    named = {row.path.relative_to(root).as_posix(): row for row in found.rows}
    count = Counter(row.path.name for row in found.rows)
    short = {row.path.name: path for path, row in zip(named, found.rows, strict=True) if count[row.path.name] == 1}
    return caption(found, captions, named, lambda name: short.get(name, name))


def find_ucm_captions(root: Path, captions: Path | None) -> FoundImages:
    """Find the images of UCM-captions: image N of the file is number (N - 1) % 100 of class (N - 1) // 100.

    The images are in UCMD's folders, or in one folder as N.tif.
    """
    assert captions is not None, "the registry requires them"
    names = CLASS_LISTS["ucmd"]
    try:
        folders = class_folders(root)
    except InputError:
        folders = {}
    if len(folders) > 1:
        found = find_class_list("ucmd", root)
        numbers = {
            f"{names[i // UCM_IMAGES_PER_CLASS]}{i % UCM_IMAGES_PER_CLASS:02d}": str(i + 1)
            for i in range(NUM_UCM_IMAGES)
        }
        named, strange = _named(found.rows, lambda path: numbers.get(path.stem))
    else:
        found = FoundImages([LabelledImage(path) for path in _images(root)], tuple(names), [])
        numbers = {str(i + 1): names[i // UCM_IMAGES_PER_CLASS] for i in range(NUM_UCM_IMAGES)}
        named, strange = _named(found.rows, lambda path: path.stem if path.stem in numbers else None)
        named = {number: dataclasses.replace(row, classes=(numbers[number],)) for number, row in named.items()}
        # In the order of the classes, so that duplicates are treated alike in both layouts.
        found = FoundImages(sorted(named.values(), key=lambda row: int(row.path.stem)), found.classes, [])
    found.problems.extend(first_problems(strange))
    return caption(found, captions, named, lambda name: PurePosixPath(name).stem, num_sentences=NUM_SENTENCES)


def find_rsicd(root: Path, captions: Path | None) -> FoundImages:
    """Find the images of RSICD: its own or those of AID, which are matched by name.

    Its own are in any folders below `root`; their classes are in the lists `txtclasses_rsicd/*.txt`, in `root` or
    beside the captions. Images in no list have no class. Images of AID, also some of them, are in one folder per class.
    RSICD has more images than AID: captions of missing images are left out, with a warning.
    """
    assert captions is not None, "the registry requires them"
    root = root.resolve()
    images = _images(root)
    lists = [base / TEXT_CLASSES for base in (root, captions.parent) if (base / TEXT_CLASSES).is_dir()]
    if sorted({path.parent.name for path in images}) == CLASS_LISTS["aid"]:
        found, partly = (
            FoundImages([LabelledImage(path, (path.parent.name,)) for path in images], tuple(CLASS_LISTS["aid"]), []),
            True,
        )
    elif lists:
        found, partly = _listed(images, lists[0]), False
    else:
        found = find_classes(root)
        partly = bool(found.classes)
    named, strange = _named(found.rows, lambda path: path.name)
    found.problems.extend(first_problems(strange))
    return caption(found, captions, named, num_sentences=NUM_SENTENCES, partly=partly)


def _listed(images: Sequence[Path], lists: Path) -> FoundImages:
    """Return the images with the classes that RSICD's lists give for their names."""
    members: dict[str, list[str]] = {}
    problems = []
    for path in sorted(lists.glob("*.txt")):
        try:
            members[path.stem] = [line.strip() for line in read_lines(path)]
        except ValueError as err:
            problems.append(f"{path.name} {err}")
    if not members:
        problems.append(f"{TEXT_CLASSES} has no lists")
    there = {path.name for path in images}
    classes: dict[str, list[str]] = {}
    absent = []
    for label, names in members.items():
        for name in dict.fromkeys(names):
            classes.setdefault(name, []).append(label)
            if name not in there:
                absent.append(f"{label}.txt lists {name}, which is missing")
    rows = [LabelledImage(path, tuple(classes.get(path.name, ()))) for path in images]
    return FoundImages(rows, tuple(members), [*problems, *first_problems(absent)])


def _images(root: Path) -> list[Path]:
    """Return all images in a folder, in natural order of their paths."""
    return [
        row.path
        for row in by_path(
            [LabelledImage(Path(root, *folder, n)) for folder, names in walk_folder(root) for n in names], root
        )
    ]


def _named(
    rows: Sequence[LabelledImage], name: Callable[[Path], str | None]
) -> tuple[dict[str, LabelledImage], list[str]]:
    """Return the images by a name that is made from their path, and the problems of these names."""
    named: dict[str, LabelledImage] = {}
    problems = []
    for row in rows:
        one = name(row.path)
        if one is None:
            problems.append(f"{row.path.name} is not the name of an image of this dataset")
        elif one in named:
            problems.append(f"{row.path.name} occurs twice, as {named[one].path} and {row.path}")
        else:
            named[one] = row
    return named, problems


def _read_captions(path: Path, key: Callable[[str], str], num_sentences: int | None) -> tuple[Captions, list[str]]:
    """Return the sentences by the `key` of the image's name, and their problems; `ValueError` for a damaged file."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(f'{path.name} has no list "images"; it is not a file of captions')
    if not images:
        raise ValueError(f"{path.name} has no captions")
    texts: Captions = {}
    has_ids = _has_ids(images)
    wrong, names, image_ids, sentence_ids = [], [], [], []
    for number, image in enumerate(images):
        name = image.get("filename") if isinstance(image, dict) else None
        if not isinstance(name, str):
            wrong.append(f"{path.name}: image {number} has no filename")
            continue
        sentences = image.get("sentences")
        if not isinstance(sentences, list) or not all(isinstance(sentence, dict) for sentence in sentences):
            wrong.append(f"{name}: has no list of sentences")
            sentences = []
        elif not sentences:
            wrong.append(f"{name}: has no sentence")
        if has_ids:
            wrong += [f"{name}: {problem}" for problem in _problems_of_ids(image, sentences)]
        raws = [sentence.get("raw") for sentence in sentences]
        if sentences and num_sentences not in (None, len(raws)):
            wrong.append(f"{name}: has {len(raws)} sentence{'s' * (len(raws) != 1)}, not {num_sentences}")
        if not all(isinstance(raw, str) and raw.strip() for raw in raws):
            wrong.append(f"{name}: has an empty sentence")
        names.append(key(name))
        image_ids.append(image.get("imgid"))
        sentence_ids += [sentence.get("sentid") for sentence in sentences]
        texts[key(name)] = tuple(str(raw) for raw in raws)
    twice = [
        f"{path.name}: {what} {one} occurs {count} times"
        for what, ids in [("filename", names), ("imgid", image_ids), ("sentid", sentence_ids)]
        for one, count in _repeated(ids)
    ]
    return texts, [*first_problems(wrong), *first_problems(twice)]


def _has_ids(images: list[Any]) -> bool:
    """Return whether any image or sentence of a file has a number."""
    given = [image for image in images if isinstance(image, dict)]
    sentences = [one for image in given if isinstance(image.get("sentences"), list) for one in image["sentences"]]
    given += [one for one in sentences if isinstance(one, dict)]
    return any(one.keys() & {"imgid", "sentids", "sentid"} for one in given)


def _problems_of_ids(image: dict[str, Any], sentences: list[dict[str, Any]]) -> list[str]:
    """Return the problems of the numbers of an image and of its sentences."""
    problems = []
    if not _is_number(image.get("imgid")):
        problems.append(f"its imgid is {image.get('imgid')!r}, not a number")
    own = [sentence.get("sentid") for sentence in sentences]
    if not all(_is_number(one) for one in own):
        problems.append("has a sentence whose sentid is not a number")
    if sentences and image.get("sentids", own) != own:
        problems.append("its sentids are not those of its sentences")
    if any(sentence.get("imgid", image.get("imgid")) != image.get("imgid") for sentence in sentences):
        problems.append("has a sentence of another imgid")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    """Return the values that occur more than once, and how often; invalid ones are reported elsewhere."""
    counts = Counter(value for value in values if isinstance(value, Hashable) and value is not None)
    return [(value, count) for value, count in counts.items() if count > 1]
