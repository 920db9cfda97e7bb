"""Make a manifest from a folder of images."""

import json
import logging
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.sources.embeddings.tables import is_embedding_table
from orbithash.encoders.sources.folders import NoClassFolders, natural
from orbithash.encoders.sources.image_roots import ImageRoot
from orbithash.encoders.sources.object_folders import RemoteFolder
from orbithash.encoders.sources.packed import PackedImages
from orbithash.trainers.datasets.captions import find_captioned_folder
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.datasets.classes import find_objects, with_class_list
from orbithash.trainers.datasets.embeddings import EMBEDDINGS, find_vectors
from orbithash.trainers.datasets.hashes import hash_files
from orbithash.trainers.datasets.images import OPTIONAL, SCHEMA, Images
from orbithash.trainers.datasets.layouts import FoundImages, first_problems
from orbithash.trainers.datasets.manifest import Manifest
from orbithash.trainers.datasets.protocols import PROTOCOLS, Protocol, split_images
from orbithash.trainers.datasets.registry import DATASETS, recognise

__all__ = ["MAX_VALIDATION", "find_images", "hashed_images", "make_manifest", "resplit"]

_log = logging.getLogger(__name__)

MAX_VALIDATION = 0.5

_UNLABELLED = "%s: the images are used without labels (%s)"


def make_manifest(
    root: ImageRoot,
    dataset: str | None = None,
    protocol: str | None = None,
    seed: int = 0,
    validation: float = 0.1,
    captions: Path | None = None,
    table: Sequence[str] = (),
    max_rows: int | None = None,
    needs_classes: bool = True,
) -> Manifest:
    """Find the images under `root`, or the vectors of a table of embeddings, and split them.

    Args:
        root: the data folder, also in an object store, or a packed data set; a Parquet file or a folder of them is a
            table of embeddings.
        dataset: "embeddings", or a name of `DATASETS`; None: recognised by the folder. With captions, "ucmd" means
            "ucm-captions" and "aid" means "rsicd".
        protocol: one of `PROTOCOLS`; None: the default of the dataset.
        seed: seed of the split, 0 or more.
        validation: share of the training images held out for validation, 0 (none) to 0.5.
        captions: a Karpathy-style JSON file of sentences.
        table: columns and layout of a table of embeddings, see `TableOptions`.
        max_rows: maximum number of rows of such a table; None: all.
        needs_classes: whether images without classes, in several folders, are refused. Otherwise they have no label,
            and so have all images if their folders are not classes that can be split.

    Raises:
        InputError: with all problems of the folder at once.
    """
    if dataset is not None and dataset not in (*DATASETS, EMBEDDINGS):
        raise InputError(f"unknown dataset {dataset!r}; there are {', '.join((*DATASETS, EMBEDDINGS))}")
    _check_settings(protocol, seed, validation)
    if isinstance(root, PackedImages):
        return _packed_manifest(root, dataset, captions, protocol, seed, validation, needs_classes)
    root = root.resolve() if isinstance(root, Path) else root
    if isinstance(root, Path) and (dataset == EMBEDDINGS or (dataset is None and is_embedding_table(root))):
        if captions is not None:
            raise InputError(f"{root} is a table of embeddings; its sentences are a column, so omit --captions")
        return _embedding_manifest(root, table, max_rows, protocol or "random", seed, validation)
    dataset, found = find_images(root, dataset, captions, needs_classes)
    rule = PROTOCOLS[DATASETS[dataset].protocol if protocol is None else protocol]
    problems = _problems([row.classes for row in found.rows], found.classes, rule)
    if problems and not needs_classes and dataset == "folder" and found.classes:
        found = _find_unlabelled(root, captions, problems[0])
        problems = _problems([row.classes for row in found.rows], found.classes, rule)
    if problems := [*problems, *found.problems]:
        raise listed(problems, str(root))
    return _split(dataset, rule, seed, validation, found.classes, hashed_images(found, root), where=str(root))


def find_images(
    root: Path | RemoteFolder, dataset: str | None = None, captions: Path | None = None, needs_classes: bool = True
) -> tuple[str, FoundImages]:
    """Return the name of the dataset in an absolute folder or a bucket, and its images.

    The arguments are those of `make_manifest`.

    Raises:
        InputError: no such folder or file of captions, or a folder in no known layout.
    """
    if isinstance(root, RemoteFolder):
        return _find_objects(root, dataset, captions, needs_classes)
    if not root.is_dir():
        raise InputError(f"{root} {'is not a folder' if root.exists() else 'does not exist'}")
    if captions is not None:
        captions = captions.resolve()
        if not captions.is_file():
            raise InputError(f"{captions}: no such file of captions")
    if dataset is None:
        try:
            dataset = recognise(root, captions)
        except InputError as err:
            if needs_classes:
                raise
            return "folder", _find_unlabelled(root, captions, str(err))
    elif captions is not None:
        dataset = {"ucmd": "ucm-captions", "aid": "rsicd"}.get(dataset, dataset)
    known = DATASETS[dataset]
    if captions is None and known.captions == "always":
        raise InputError(f"dataset {dataset} needs its sentences; give their JSON file as --captions")
    if captions is not None and known.captions == "never":
        raise InputError(f"dataset {dataset} takes no file of captions; omit --captions, or give --dataset folder")
    return dataset, known.find(root, captions)


def _find_objects(
    root: RemoteFolder, dataset: str | None, captions: Path | None, needs_classes: bool
) -> tuple[str, FoundImages]:
    """Do what `find_images` does for a folder in an object store."""
    if captions is not None:
        raise InputError(f"{root} is in an object store, where captions are not read; pack the images with them")
    if dataset not in (None, "folder", *CLASS_LISTS):
        raise InputError(f"dataset {dataset} is read from a local folder only; pack it there, and give the packed set")
    try:
        found = find_objects(root)
    except NoClassFolders as err:
        if needs_classes:
            raise
        return "folder", _find_unlabelled(root, None, str(err))
    if dataset not in (None, "folder"):
        return dataset, with_class_list(dataset, found)
    classes = list(found.classes)
    name = "folder" if dataset else next((name for name in CLASS_LISTS if CLASS_LISTS[name] == classes), "folder")
    if name == "eurosat" and found.rows[0].path.suffix.lower() in (".tif", ".tiff"):
        raise InputError(f"{root} has TIFFs of EuroSAT, whose bands are counted in a local folder only; pack it there")
    return name, found


def _find_unlabelled(root: Path | RemoteFolder, captions: Path | None, reason: str) -> FoundImages:
    """Return the images without labels, and warn of the reason; a folder without images is an error only."""
    if isinstance(root, RemoteFolder):
        found = find_objects(root, has_classes=False)
    else:
        found = find_captioned_folder(root, captions, has_classes=False)
    _log.warning(_UNLABELLED, root, reason.replace("\n", " "))
    return found


def _packed_manifest(
    root: PackedImages,
    dataset: str | None,
    captions: Path | None,
    protocol: str | None,
    seed: int,
    validation: float,
    needs_classes: bool,
) -> Manifest:
    packed, images, classes = _read_packed(root)
    if captions is not None:
        raise InputError(f"{root} is packed; its sentences are packed with it, so omit --captions")
    if dataset not in (None, packed):
        raise InputError(f"{root} is packed as {packed}; omit --dataset, or pack the images as {dataset}")
    rule = PROTOCOLS[DATASETS[packed].protocol if protocol is None else protocol]
    problems = _problems(_class_names(images, classes), classes, rule)
    if problems and not needs_classes and packed == "folder" and classes:
        _log.warning(_UNLABELLED, root, problems[0])
        images, classes = _unlabelled(images), ()
        problems = _problems(_class_names(images, classes), classes, rule)
    if problems:
        raise listed(problems, str(root))
    return _split(packed, rule, seed, validation, classes, images, where=str(root))


def _read_packed(root: PackedImages) -> tuple[str, Images, tuple[str, ...]]:
    """Return the name of the dataset, its images in the parts that it states, and its classes."""
    try:
        dataset, count, classes = (root.metadata[key] for key in ("dataset", "images", "classes"))
        table = root.columns([name for name in SCHEMA.names if name != "id"]).slice(0, int(count))
        table = table.add_column(0, SCHEMA.field("id"), pa.nulls(len(table), pa.large_string())).cast(SCHEMA)
        names = json.loads(classes)
        is_whole = len(table) == int(count) and all(table[name].null_count == 0 for name in {*SCHEMA.names} - OPTIONAL)
        is_sound = is_whole and isinstance(names, list) and _is_sound(Images(table), names)
    except (KeyError, TypeError, ValueError) as err:
        if isinstance(err, InputError):
            raise
        raise InputError(f"{root} is damaged ({err}); pack the images again") from err
    if dataset not in DATASETS or not is_sound:
        raise InputError(f"{root} is damaged: its rows are not those of a data set; pack the images again")
    return dataset, Images(table), tuple(names)


def _is_sound(images: Images, classes: Sequence[object]) -> bool:
    """Return whether packed rows may be a manifest: labels of classes, each path once, and none outside of a folder."""
    labels = images.labels.values
    paths = [*images.paths, *{second for second in images.seconds if second is not None}]
    return (
        all(isinstance(name, str) for name in classes)
        and bool(((labels >= 0) & (labels < len(classes))).all())
        and len(set(images.paths)) == len(images)
        and not any(path.startswith("/") or ".." in path.split("/") for path in paths)
    )


def _unlabelled(images: Images) -> Images:
    """Return images in natural order of their paths, without labels."""
    paths = images.paths
    table = images[np.array(sorted(range(len(paths)), key=lambda row: natural(paths[row])), np.int64)].table()
    field = SCHEMA.field("labels")
    return Images(table.set_column(SCHEMA.names.index("labels"), field, pa.array([[]] * len(table), field.type)))


def _embedding_manifest(
    root: Path, table: Sequence[str], max_rows: int | None, protocol: str, seed: int, validation: float
) -> Manifest:
    rule = PROTOCOLS[protocol]
    images, classes = find_vectors(root, table, max_rows, seed, rule.min_images)
    if problems := _too_few(_class_names(images, classes), rule):
        raise listed(problems, str(root))
    return _split(EMBEDDINGS, rule, seed, validation, classes, images, where=str(root))


def resplit(manifest: Manifest, protocol: str, seed: int | None = None, validation: float | None = None) -> Manifest:
    """Split the same images by another protocol; None keeps the seed or the validation share of the manifest."""
    seed = manifest.seed if seed is None else seed
    validation = manifest.validation if validation is None else validation
    _check_settings(protocol, seed, validation)
    rule, where = PROTOCOLS[protocol], f"the images of {manifest.dataset}"
    if rule.split is None and manifest.protocol != protocol:
        raise InputError(
            f"protocol {protocol} is the split that a dataset states, and these images were split by "
            f"{manifest.protocol}; train a run with --protocol {protocol}"
        )
    if problems := _too_few(_class_names(manifest.images, manifest.classes), rule):
        raise listed(problems, where)
    return _split(manifest.dataset, rule, seed, validation, manifest.classes, manifest.images, where)


def _check_settings(protocol: str | None, seed: int, validation: float) -> None:
    if protocol is not None and protocol not in PROTOCOLS:
        raise InputError(f"unknown protocol {protocol!r}; there are {', '.join(PROTOCOLS)}")
    if seed < 0:
        raise InputError(f"the seed of the split is {seed}; it must be 0 or more")
    if not 0 <= validation <= MAX_VALIDATION:
        raise InputError(f"the validation share is {validation:g}; it must lie between 0 (none) and {MAX_VALIDATION:g}")


def _problems(of_images: Sequence[tuple[str, ...]], classes: tuple[str, ...], rule: Protocol) -> list[str]:
    """Return the problems of the classes, given those of each image."""
    problems = _too_few(of_images, rule)
    if len(classes) == 1:
        problems.append(
            f"only the class {classes[0]!r}; at least 2 classes are needed, or none: all images in the "
            "data folder itself"
        )
    names = Counter(name.lower() for name in classes)
    return problems + [f"classes that differ only in case: {name!r}" for name, count in names.items() if count > 1]


def _class_names(images: Images, classes: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Return the names of the classes of each image."""
    counts, values = images.labels
    names = [classes[label] for label in values.tolist()]
    ends = zip(counts.tolist(), np.cumsum(counts).tolist(), strict=True)
    return [tuple(names[end - count : end]) for count, end in ends]


def _groups(names: Sequence[tuple[str, ...]]) -> list[str]:
    """Return the group of each image, which is split as a whole: its class; "" for all if an image has several."""
    several = any(len(one) > 1 for one in names)
    return ["" if several or not one else one[0] for one in names]


def _too_few(names: Sequence[tuple[str, ...]], rule: Protocol) -> list[str]:
    """Return the problems of classes with too few images for a protocol, given the classes of each image."""
    groups = _groups(names)
    if not rule.by_class or set(groups) == {""}:
        few = len(groups) < rule.min_images
        return [f"only {len(groups)} images; protocol {rule.name} needs at least {rule.min_images}"] if few else []
    counts = sorted(Counter(group for group in groups if group).items())
    return first_problems(
        [
            f"class {name!r} has {count} image{'s' * (count != 1)}; at least {rule.min_images} are needed"
            for name, count in counts
            if count < rule.min_images
        ]
    )


def hashed_images(found: FoundImages, root: Path | RemoteFolder) -> Images:
    """Return images with their hashes, each in the part that the dataset states; `InputError` if one is unreadable."""
    labels = {name: label for label, name in enumerate(found.classes)}
    # Paths of objects are relative already.
    base = root if isinstance(root, Path) else Path()
    paths = [row.path.relative_to(base).as_posix() for row in found.rows]
    seconds = [None if row.second is None else row.second.relative_to(base).as_posix() for row in found.rows]
    names = [*paths, *(second for second in seconds if second is not None)]
    hashes = hash_files(root, names)
    problems = [
        f"{name} cannot be read ({sha256.strerror})"
        for name, sha256 in zip(names, hashes, strict=True)
        if isinstance(sha256, OSError)
    ]
    if problems:
        raise listed(first_problems(problems), str(root))
    known = [sha256 for sha256 in hashes if isinstance(sha256, bytes)]
    of_seconds = iter(known[len(paths) :])
    return Images.of_columns(
        id=paths,
        path=paths,
        labels=[sorted(labels[name] for name in row.classes) for row in found.rows],
        split=[row.split for row in found.rows],
        sha256=known[: len(paths)],
        captions=[row.captions for row in found.rows],
        second=seconds,
        second_sha256=[None if second is None else next(of_seconds) for second in seconds],
    )


def _split(
    dataset: str,
    rule: Protocol,
    seed: int,
    validation: float,
    classes: tuple[str, ...],
    images: Images,
    where: str,
) -> Manifest:
    groups, stated = _groups(_class_names(images, classes)), images.splits
    if rule.split is None and (absent := {"train", "test"} - set(stated)):
        others = ", ".join(name for name, other in PROTOCOLS.items() if other.split is not None)
        raise InputError(
            f"{where}: the dataset {dataset} states no images for {' and '.join(sorted(absent))}, which protocol "
            f"{rule.name} needs; give another --protocol: {others}"
        )
    parts = split_images(rule, dataset, groups, images.sha256s.tolist(), seed, validation, stated)
    members: dict[str, set[str]] = {}
    for group, part in zip(groups if rule.by_class else [""] * len(parts), parts, strict=True):
        members.setdefault(group, set()).add("train" if part == "validation" else part)
    wanted = {"train", "test", *rule.database} - {"validation"}
    problems = [
        f"{f'class {group!r}' if group else 'it'} has too many duplicates: no image is left for "
        f"{', '.join(sorted(wanted - there))}"
        for group, there in sorted(members.items())
        # Few images without a class are all for training.
        if wanted - there and (group or len(members) == 1)
    ]
    if problems:
        raise listed(first_problems(problems), where)
    # 0 and 0.0 are the same share, and must be the same text in the manifest.
    return Manifest(dataset, rule.name, seed, float(validation), classes, images.with_splits(parts))
