"""Labelled images on disk, and the manifests that split them.

A manifest fixes, once, which image is in which part. Everything that trains or evaluates reads the manifest and nothing
else, so no split is ever rebuilt in a second place.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.sources import find_class_folders

__all__ = ["DATASETS", "PROTOCOLS", "Image", "Manifest", "Protocol", "make_manifest"]

FORMAT_VERSION = 1

UCMD_CLASSES = [
    "agricultural",
    "airplane",
    "baseballdiamond",
    "beach",
    "buildings",
    "chaparral",
    "denseresidential",
    "forest",
    "freeway",
    "golfcourse",
    "harbor",
    "intersection",
    "mediumresidential",
    "mobilehomepark",
    "overpass",
    "parkinglot",
    "river",
    "runway",
    "sparseresidential",
    "storagetanks",
    "tenniscourt",
]

# Fewer than this cannot fill a training, a validation and a test part.
MIN_IMAGES_PER_CLASS = 5


@dataclasses.dataclass(frozen=True)
class Image:
    """One row of a manifest. `path` is relative to the data folder; `label` is the index of the class."""

    id: str
    path: str
    label: int
    split: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class Protocol:
    """How images are split and searched.

    `split(num_images, rng)` names the part of each image of one class, whose images come in natural order. Queries are
    the test part; `database` lists the parts they are searched in. `validation` is never searched in for selection.
    """

    name: str
    split: Callable[[int, np.random.Generator], list[str]]
    database: tuple[str, ...]
    seed: int = 0


def _hold_back(parts: list[str], num_held_back: int, rng: np.random.Generator) -> list[str]:
    """Turns that many of the training images into validation images."""
    train = [i for i, part in enumerate(parts) if part == "train"]
    for i in rng.choice(train, num_held_back, replace=False).tolist():
        parts[i] = "validation"
    return parts


def _by_number(num_images: int, rng: np.random.Generator) -> list[str]:
    num_train = round(0.8 * num_images)
    parts = ["train"] * num_train + ["test"] * (num_images - num_train)
    return _hold_back(parts, max(1, round(0.1 * num_train)), rng)


def _random(num_images: int, rng: np.random.Generator) -> list[str]:
    num_test, num_validation = max(1, round(0.2 * num_images)), max(1, round(0.1 * num_images))
    parts = ["test"] * num_test + ["validation"] * num_validation
    parts += ["train"] * (num_images - len(parts))
    return [str(part) for part in rng.permutation(parts)]


PROTOCOLS = {
    # Liu et al. 2022 split UCMD by file number, 00-79 and 80-99. A tenth of the training files is held back here.
    "dhcl": Protocol("dhcl", _by_number, database=("train", "validation")),
    "random": Protocol("random", _random, database=("train", "validation")),
}

# Name of the dataset -> its default protocol.
DATASETS = {"ucmd": "dhcl", "scenes": "random", "folder": "random"}


@dataclasses.dataclass(frozen=True)
class Manifest:
    """The images of a dataset, each in one part, and where they were found."""

    dataset: str
    protocol: str
    seed: int
    classes: tuple[str, ...]
    images: tuple[Image, ...]

    @property
    def sha256(self) -> str:
        """Hash of the manifest's text: equal hashes, equal splits of equal files."""
        return hashlib.sha256(self._text().encode()).hexdigest()

    def part(self, *splits: str) -> list[Image]:
        """The images of these parts, in the manifest's order."""
        return [image for image in self.images if image.split in splits]

    def _text(self) -> str:
        head: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "dataset": self.dataset,
            "protocol": self.protocol,
            "seed": self.seed,
            "classes": self.classes,
        }
        return "".join(json.dumps(row) + "\n" for row in [head, *(dataclasses.asdict(i) for i in self.images)])

    def write(self, path: Path) -> None:
        """Writes the manifest as JSON lines: a head, one line an image, the hash of all that."""
        part = path.with_name(f".{path.name}.part")
        part.write_text(self._text() + json.dumps({"sha256": self.sha256}) + "\n")
        part.replace(path)

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Reads what `write` wrote; `InputError` when it is absent or damaged."""
        try:
            head, *rows, tail = (json.loads(line) for line in path.read_text().splitlines())
            if head.pop("format_version") != FORMAT_VERSION:
                raise ValueError(f"not of format version {FORMAT_VERSION}")
            classes = tuple(head.pop("classes"))
            manifest = cls(**head, classes=classes, images=tuple(Image(**row) for row in rows))
            if manifest.sha256 != tail["sha256"]:
                raise ValueError("its content does not give the hash in its last line")
        except OSError as err:
            raise InputError(
                f"{path}: the manifest cannot be read ({err.strerror}); is this the folder of a run?"
            ) from err
        except (AttributeError, KeyError, TypeError, ValueError) as err:
            raise InputError(f"{path}: the manifest is damaged ({err})") from err
        return manifest

    def check_files(self, root: Path) -> None:
        """`InputError` that lists every image that is absent from `root` or is not the file the manifest means."""
        problems = []
        for image in self.images:
            path = root / image.path
            if not path.is_file():
                problems.append(f"{image.path}: absent")
            elif _sha256(path) != image.sha256:
                problems.append(f"{image.path}: another file than at the time of the split")
        if len(problems) > 10:
            problems = [*problems[:10], f"and {len(problems) - 10} more"]
        if problems:
            raise listed(problems, f"{root} is not the data of this run's manifest")


def make_manifest(root: Path, dataset: str | None = None, protocol: str | None = None) -> Manifest:
    """Finds the labelled images under `root` and splits them.

    `dataset` is a name of `DATASETS`, recognised from the folder where None; `protocol` one of `PROTOCOLS`, the
    dataset's own where None. All problems of the folder come in one `InputError`.
    """
    root = root.resolve()
    folders = find_class_folders(root)
    dataset = _recognise(root, folders.keys()) if dataset is None else dataset
    if dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}")
    protocol = DATASETS[dataset] if protocol is None else protocol
    if protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    _check_classes(root, dataset, folders)
    rule = PROTOCOLS[protocol]
    images = []
    for label, (name, paths) in enumerate(sorted(folders.items())):
        # A generator for each class: another class more or less does not move this one's split.
        parts = rule.split(len(paths), np.random.default_rng([rule.seed, *name.encode()]))
        for path, part in zip(paths, parts, strict=True):
            relative = path.relative_to(root).as_posix()
            images.append(Image(id=relative, path=relative, label=label, split=part, sha256=_sha256(path)))
    return Manifest(dataset, protocol, rule.seed, tuple(sorted(folders)), tuple(images))


def _recognise(root: Path, classes: Any) -> str:
    if (root / "scenes.json").is_file():
        return "scenes"
    return "ucmd" if sorted(classes) == UCMD_CLASSES else "folder"


def _check_classes(root: Path, dataset: str, folders: dict[str, list[Path]]) -> None:
    problems = [
        f"class {name!r} has {len(paths)} image{'s' * (len(paths) != 1)}; at least {MIN_IMAGES_PER_CLASS} are needed"
        for name, paths in sorted(folders.items())
        if len(paths) < MIN_IMAGES_PER_CLASS
    ]
    if len(folders) < 2:
        problems.append(f"only the class {next(iter(folders))!r}; at least 2 classes are needed")
    if dataset == "ucmd" and sorted(folders) != UCMD_CLASSES:
        problems.append("these are not the 21 classes of ucmd; leave --dataset away or give folder")
    if dataset == "scenes" and not (root / "scenes.json").is_file():
        problems.append("it has no scenes.json; the scenes are not complete, or are not scenes")
    names = Counter(name.lower() for name in folders)
    problems += [f"classes that differ only in case: {name!r}" for name, count in names.items() if count > 1]
    if problems:
        raise listed(problems, str(root))


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
