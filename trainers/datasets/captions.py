"""Sentences about images, in a Karpathy-style JSON file: UCM-captions, RSICD, or a folder of one's own.

    {"images": [{"filename": ..., "imgid": 0, "sentids": [0, 1, 2, 3, 4],
                 "sentences": [{"raw": ..., "sentid": 0, "imgid": 0}, ...]}, ...]}

Tokens and the file's own split are not read: the text encoder has its own words, and the protocol draws the split.
"""

import dataclasses
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources import SUFFIXES, natural
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.datasets.classes import class_folders, find_class_list, find_classes
from orbithash.trainers.datasets.layouts import Found, Row, by_path, cut, read_json, read_lines

__all__ = ["NUM_SENTENCES", "TEXT_CLASSES", "caption", "find_captioned_folder", "find_rsicd", "find_ucm_captions"]

NUM_SENTENCES = 5
UCM_IMAGES_PER_CLASS = 100
# RSICD's folder of one list of image names a class.
TEXT_CLASSES = "txtclasses_rsicd"

Captions = dict[str, tuple[str, ...]]


def caption(found: Found, captions: Path, named: dict[str, Row], key: Callable[[str], str] = str) -> Found:
    """Adds sentences to rows.

    Args:
        found: the images.
        captions: the JSON file.
        named: the rows by what `key` gives for the name that the file knows them by.
        key: from a name in the file to a name in `named`.
    """
    try:
        sentences, problems = _read_captions(captions, key)
    except ValueError as err:
        return dataclasses.replace(found, problems=[*found.problems, str(err)])
    problems += cut([f"captions for {name}, which is not there" for name in sentences if name not in named])
    problems += cut([f"{name} has no captions" for name in named if name not in sentences])
    texts = {named[name].path: text for name, text in sentences.items() if name in named}
    rows = [dataclasses.replace(row, captions=texts.get(row.path, ())) for row in found.rows]
    return Found(rows, found.classes, [*found.problems, *problems])


def find_captioned_folder(root: Path, captions: Path | None = None) -> Found:
    """One folder a class; where sentences are given their file names are paths below `root`, or unique names."""
    found = find_classes(root)
    if captions is None:
        return found
    named = {row.path.relative_to(root).as_posix(): row for row in found.rows}
    count = Counter(row.path.name for row in found.rows)
    short = {row.path.name: path for path, row in zip(named, found.rows, strict=True) if count[row.path.name] == 1}
    return caption(found, captions, named, lambda name: short.get(name, name))


def find_ucm_captions(root: Path, captions: Path | None) -> Found:
    """UCM-captions: image N of the file is number (N - 1) % 100 of class (N - 1) // 100.

    The images lie in UCMD's folders, or as N.tif in one folder.
    """
    assert captions is not None, "the table of datasets asks for them"
    names = CLASS_LISTS["ucmd"]
    try:
        folders = class_folders(root)
    except InputError:
        folders = {}
    if len(folders) > 1:
        found = find_class_list("ucmd", root)
        numbers = {
            f"{names[i // UCM_IMAGES_PER_CLASS]}{i % UCM_IMAGES_PER_CLASS:02d}": str(i + 1)
            for i in range(len(names) * UCM_IMAGES_PER_CLASS)
        }
        named, strange = _named(found.rows, lambda path: numbers.get(path.stem))
    else:
        found = Found([Row(path) for path in _images(root)], tuple(names), [])
        numbers = {str(i + 1): names[i // UCM_IMAGES_PER_CLASS] for i in range(len(names) * UCM_IMAGES_PER_CLASS)}
        named, strange = _named(found.rows, lambda path: path.stem if path.stem in numbers else None)
        named = {number: dataclasses.replace(row, classes=(numbers[number],)) for number, row in named.items()}
        # In the order of the classes, so that copies are told alike in both layouts.
        found = Found(sorted(named.values(), key=lambda row: int(row.path.stem)), found.classes, [])
    found.problems.extend(cut(strange))
    return caption(found, captions, named, lambda name: PurePosixPath(name).stem)


def find_rsicd(root: Path, captions: Path | None) -> Found:
    """RSICD: images in any folders under `root`, known by name; classes from the lists `txtclasses_rsicd/*.txt`.

    The lists lie in `root` or beside the captions. Without them, as with AID's own folders, a folder is a class.
    Images in no list have no class.
    """
    assert captions is not None, "the table of datasets asks for them"
    root = root.resolve()
    folders = [base / TEXT_CLASSES for base in (root, captions.parent) if (base / TEXT_CLASSES).is_dir()]
    if not folders:
        found, members = find_classes(root), None
    else:
        found, members = Found([Row(path) for path in _images(root)], (), []), {}
        for path in sorted(folders[0].glob("*.txt")):
            try:
                members[path.stem] = read_lines(path)
            except ValueError as err:
                found.problems.append(str(err))
        if not members:
            found.problems.append(f"{TEXT_CLASSES} has no lists")
    named, strange = _named(found.rows, lambda path: path.name)
    found.problems.extend(cut(strange))
    if members is not None:
        found.problems.extend(
            cut(
                [
                    f"{name}.txt lists {one}, which is not there"
                    for name in members
                    for one in members[name]
                    if one not in named
                ]
            )
        )
        classes: dict[str, list[str]] = {}
        for name in members:
            for one in dict.fromkeys(members[name]):
                classes.setdefault(one, []).append(name)
        rows = [dataclasses.replace(row, classes=tuple(classes.get(row.path.name, ()))) for row in found.rows]
        found = Found(by_path(rows, root), tuple(members), found.problems)
    return caption(found, captions, named)


def _images(root: Path) -> list[Path]:
    """All images under a folder, in natural order."""
    paths = [path for path in root.rglob("*") if path.name.lower().endswith(SUFFIXES) and path.is_file()]
    if not paths:
        raise InputError(f"{root} holds no image ({', '.join(SUFFIXES)})")
    inside = {path: path.relative_to(root) for path in paths}
    shown = [path for path in paths if not any(name.startswith(".") for name in inside[path].parts)]
    return sorted(shown, key=lambda path: natural(inside[path].as_posix()))


def _named(rows: Sequence[Row], name: Callable[[Path], str | None]) -> tuple[dict[str, Row], list[str]]:
    """The rows by a name of their path, and what is wrong with it."""
    named: dict[str, Row] = {}
    problems = []
    for row in rows:
        one = name(row.path)
        if one is None:
            problems.append(f"{row.path.name} is the name of no image of this dataset")
        elif one in named:
            problems.append(f"{row.path.name} is there twice, as {named[one].path} and {row.path}")
        else:
            named[one] = row
    return named, problems


def _read_captions(path: Path, key: Callable[[str], str]) -> tuple[Captions, list[str]]:
    """Sentences by `key` of the image's name, and what is wrong with them; `ValueError` when the file is damaged."""
    content = read_json(path)
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise ValueError(f'{path.name} has no list "images"; it is no file of captions')
    if not images:
        raise ValueError(f"{path.name} has captions for no image")
    texts: Captions = {}
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
        wrong += [f"{name}: {problem}" for problem in _problems_of_ids(image, sentences)]
        raws = [sentence.get("raw") for sentence in sentences]
        if sentences and len(raws) != NUM_SENTENCES:
            wrong.append(f"{name}: has {len(raws)} sentence{'s' * (len(raws) != 1)}, not {NUM_SENTENCES}")
        if not all(isinstance(raw, str) and raw.strip() for raw in raws):
            wrong.append(f"{name}: has an empty sentence")
        names.append(key(name))
        image_ids.append(image.get("imgid"))
        sentence_ids += [sentence.get("sentid") for sentence in sentences]
        texts[key(name)] = tuple(str(raw) for raw in raws)
    twice = [
        f"{path.name}: {what} {one} is there {count} times"
        for what, ids in [("filename", names), ("imgid", image_ids), ("sentid", sentence_ids)]
        for one, count in _repeated(ids)
    ]
    return texts, [*cut(wrong), *cut(twice)]


def _problems_of_ids(image: dict[str, Any], sentences: list[dict[str, Any]]) -> list[str]:
    """What is wrong with the numbers of an image and of its sentences."""
    problems = []
    if not _is_number(image.get("imgid")):
        problems.append(f"its imgid is {image.get('imgid')!r}, no number")
    own = [sentence.get("sentid") for sentence in sentences]
    if not all(_is_number(one) for one in own):
        problems.append("has a sentence whose sentid is no number")
    if sentences and image.get("sentids", own) != own:
        problems.append("its sentids are not those of its sentences")
    if any(sentence.get("imgid", image.get("imgid")) != image.get("imgid") for sentence in sentences):
        problems.append("has a sentence of another imgid")
    return problems


def _is_number(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _repeated(values: Iterable[Any]) -> list[tuple[Any, int]]:
    """What is there more than once, and how often; what is no name or number was complained of already."""
    counts = Counter(value for value in values if isinstance(value, Hashable) and value is not None)
    return [(value, count) for value, count in counts.items() if count > 1]
