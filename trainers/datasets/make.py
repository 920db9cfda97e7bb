"""From a folder of images to a manifest."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from orbithash.encoders.errors import InputError, listed
from orbithash.trainers.datasets.hashes import FileHashes
from orbithash.trainers.datasets.layouts import Found, Row, cut
from orbithash.trainers.datasets.manifest import Image, Manifest
from orbithash.trainers.datasets.protocols import PROTOCOLS, Protocol, split_images
from orbithash.trainers.datasets.registry import DATASETS, recognise

__all__ = ["MAX_VALIDATION", "make_manifest", "resplit"]

MAX_VALIDATION = 0.5


def make_manifest(
    root: Path,
    dataset: str | None = None,
    protocol: str | None = None,
    seed: int = 0,
    validation: float = 0.1,
    captions: Path | None = None,
) -> Manifest:
    """Finds the images under `root` and splits them.

    Args:
        root: the data folder.
        dataset: a name of `DATASETS`; None: recognised from the folder. Captions make "ucm-captions" of "ucmd" and
            "rsicd" of "aid".
        protocol: one of `PROTOCOLS`; None: the dataset's own.
        seed: chooses the split, 0 or more.
        validation: share of the training images held back, 0 (none) to 0.5.
        captions: a Karpathy-style JSON file of sentences.

    Raises:
        InputError: with all problems of the folder at once.
    """
    root = root.resolve()
    if dataset is not None and dataset not in DATASETS:
        raise InputError(f"unknown dataset {dataset!r}; there are {', '.join(DATASETS)}")
    _check_settings(protocol, seed, validation)
    if not root.is_dir():
        raise InputError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
    if captions is not None:
        captions = captions.resolve()
        if not captions.is_file():
            raise InputError(f"{captions}: no such file of captions")
    if dataset is None:
        dataset = recognise(root, captions)
    elif captions is not None:
        dataset = {"ucmd": "ucm-captions", "aid": "rsicd"}.get(dataset, dataset)
    known = DATASETS[dataset]
    if captions is None and known.captions == "always":
        raise InputError(f"dataset {dataset} needs its sentences; give their JSON file as --captions")
    if captions is not None and known.captions == "never":
        raise InputError(
            f"dataset {dataset} takes no file of captions; leave --captions away, or give --dataset folder"
        )
    rule = PROTOCOLS[known.protocol if protocol is None else protocol]
    found = known.find(root, captions)
    if problems := [*_problems(found, rule), *found.problems]:
        raise listed(problems, str(root))
    images = _images(found, root)
    return _split(dataset, rule, seed, validation, found.classes, images, where=str(root))


def resplit(manifest: Manifest, protocol: str, seed: int | None = None, validation: float | None = None) -> Manifest:
    """The same images by another protocol; the seed and the validation share are the manifest's own where None."""
    seed = manifest.seed if seed is None else seed
    validation = manifest.validation if validation is None else validation
    _check_settings(protocol, seed, validation)
    rule, where = PROTOCOLS[protocol], f"the images of {manifest.dataset}"
    names = [tuple(manifest.classes[label] for label in image.labels) for image in manifest.images]
    if problems := _too_few(names, rule):
        raise listed(problems, where)
    return _split(manifest.dataset, rule, seed, validation, manifest.classes, manifest.images, where)


def _check_settings(protocol: str | None, seed: int, validation: float) -> None:
    if protocol is not None and protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if seed < 0:
        raise InputError(f"the seed of the split is {seed}; it must be 0 or more")
    if not 0 <= validation <= MAX_VALIDATION:
        raise InputError(f"the validation share is {validation:g}; it must lie between 0 (none) and {MAX_VALIDATION:g}")


def _problems(found: Found, rule: Protocol) -> list[str]:
    """What is wrong with the classes of what was found."""
    problems = _too_few([row.classes for row in found.rows], rule)
    if len(found.classes) == 1:
        problems.append(
            f"only the class {found.classes[0]!r}; at least 2 classes are needed, or none: images side by side in the "
            "data folder itself"
        )
    names = Counter(name.lower() for name in found.classes)
    return problems + [f"classes that differ only in case: {name!r}" for name, count in names.items() if count > 1]


def _groups(names: Sequence[tuple[str, ...]]) -> list[str]:
    """What images are split by: their class, or "" for all where images have several."""
    several = any(len(one) > 1 for one in names)
    return ["" if several or not one else one[0] for one in names]


def _too_few(names: Sequence[tuple[str, ...]], rule: Protocol) -> list[str]:
    """The classes that cannot fill the parts of a protocol, by the classes of each image."""
    groups = _groups(names)
    if not rule.by_class or set(groups) == {""}:
        few = len(groups) < rule.min_images
        return [f"only {len(groups)} images; protocol {rule.name} needs at least {rule.min_images}"] if few else []
    counts = sorted(Counter(group for group in groups if group).items())
    return cut(
        [
            f"class {name!r} has {count} image{'s' * (count != 1)}; at least {rule.min_images} are needed"
            for name, count in counts
            if count < rule.min_images
        ]
    )


def _images(found: Found, root: Path) -> list[Image]:
    """The rows of a manifest, in no part yet."""
    labels = {name: label for label, name in enumerate(found.classes)}
    problems, hashes = [], FileHashes(root)

    def hashed(path: Path) -> tuple[str, str]:
        """Path below the root, and hash."""
        name = path.relative_to(root).as_posix()
        try:
            return name, hashes.sha256(name)
        except OSError as err:
            problems.append(f"{name} cannot be read ({err.strerror})")
            return name, ""

    def image(row: Row) -> Image:
        path, sha256 = hashed(row.path)
        second, second_sha256 = (None, None) if row.second is None else hashed(row.second)
        return Image(
            id=path,
            path=path,
            labels=tuple(sorted(labels[name] for name in row.classes)),
            split="",
            sha256=sha256,
            captions=row.captions,
            second=second,
            second_sha256=second_sha256,
        )

    images = [image(row) for row in found.rows]
    hashes.save()
    if problems:
        raise listed(cut(problems), str(root))
    return images


def _split(
    dataset: str,
    rule: Protocol,
    seed: int,
    validation: float,
    classes: tuple[str, ...],
    images: Sequence[Image],
    where: str,
) -> Manifest:
    groups = _groups([tuple(classes[label] for label in image.labels) for image in images])
    parts = split_images(rule, dataset, groups, [image.sha256 for image in images], seed, validation)
    members: dict[str, set[str]] = {}
    for group, part in zip(groups if rule.by_class else [""] * len(parts), parts, strict=True):
        members.setdefault(group, set()).add("train" if part == "validation" else part)
    wanted = {"train", "test", *rule.database} - {"validation"}
    problems = [
        f"{f'class {group!r}' if group else 'it'} has so many equal images that none is left for "
        f"{', '.join(sorted(wanted - there))}"
        for group, there in sorted(members.items())
        # A few of no class are all for training.
        if wanted - there and (group or len(members) == 1)
    ]
    if problems:
        raise listed(cut(problems), where)
    split = tuple(dataclasses.replace(image, split=part) for image, part in zip(images, parts, strict=True))
    # 0 and 0.0 are the same share, in the manifest's text too.
    return Manifest(dataset, rule.name, seed, float(validation), classes, split)
