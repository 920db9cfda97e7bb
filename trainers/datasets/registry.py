"""The registry of datasets: their names, and the signs by which a folder is recognised as one of them."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.folders import natural
from orbithash.encoders.sources.listings import Item
from orbithash.trainers.datasets.bigearthnet import find_bigearthnet, has_patches
from orbithash.trainers.datasets.bigearthnet_v2 import find_bigearthnet_v2, is_bigearthnet_v2
from orbithash.trainers.datasets.captions import (
    NUM_UCM_IMAGES,
    TEXT_CLASSES,
    find_captioned_folder,
    find_rsicd,
    find_ucm_captions,
)
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.datasets.classes import (
    NUM_EUROSAT_BANDS,
    class_folders,
    find_class_list,
    find_eurosat,
    find_eurosat_ms,
    num_bands,
)
from orbithash.trainers.datasets.layouts import MAX_LISTED, FoundImages
from orbithash.trainers.datasets.pairs import (
    DSRSID_FOLDERS,
    DSRSID_LISTS,
    find_dsrsid,
    find_pairs,
    find_scenes,
    has_pairs,
)

__all__ = ["DATASETS", "Dataset", "find_items", "recognise"]

_log = logging.getLogger(__name__)

# Takes a data folder and the file of captions, or None.
Finder = Callable[[Path, Path | None], FoundImages]


@dataclass(frozen=True)
class Dataset:
    """A dataset: its default protocol, its finder, and whether it takes a file of captions."""

    name: str
    protocol: str
    find: Finder
    captions: str = "never"  # or "maybe", "always"


def _by_classes(name: str) -> Finder:
    return lambda root, captions: find_class_list(name, root)


DATASETS = {
    dataset.name: dataset
    for dataset in [
        Dataset("ucmd", "dhcl", _by_classes("ucmd")),
        Dataset("aid", "dhcl", _by_classes("aid")),
        Dataset("nwpu-resisc45", "cdne", _by_classes("nwpu-resisc45")),
        Dataset("eurosat", "cdne", find_eurosat),
        Dataset("eurosat-ms", "mrhash", find_eurosat_ms),
        Dataset("dsrsid", "mrhash", find_dsrsid),
        Dataset("bigearthnet", "random", find_bigearthnet),
        Dataset("bigearthnet-v2", "official", find_bigearthnet_v2),
        Dataset("ucm-captions", "duch", find_ucm_captions, captions="always"),
        Dataset("rsicd", "duch", find_rsicd, captions="always"),
        Dataset("scenes", "random", find_scenes),
        Dataset("pairs", "mrhash", find_pairs),
        Dataset("folder", "random", find_captioned_folder, captions="maybe"),
    ]
}


def recognise(root: Path, captions: Path | None) -> str:
    """Return the name of the dataset in a folder; `InputError` when it has no images, or is in no known layout."""
    return _recognise_files(root, captions) or _recognise_classes(class_folders(root), captions)


def find_items(root: Path, captions: Path | None) -> list[Item] | None:
    """Return the images of a dataset as items to encode, with the labels and captions that training finds.

    Images of a second source are items too, with the label of their place. Several classes of an image are one label,
    with "; " between them.

    Returns:
        None for a folder in which the names of folders are the labels: there, items are found without this.
    """
    root = root.resolve()
    name = _recognise_files(root, captions)
    if name is None and captions is not None:
        try:
            name = _recognise_classes(class_folders(root), captions)
        except InputError:
            # Without the layout of a dataset.
            return None
    if name is None or name == "scenes" or DATASETS[name].captions == "maybe":
        return None
    found = DATASETS[name].find(root, None if DATASETS[name].captions == "never" else captions)
    for problem in found.problems[:MAX_LISTED]:
        _log.warning("%s (dataset %s): %s", root, name, problem)
    items = []
    for row in found.rows:
        label = "; ".join(row.classes) or None
        items.append(Item(row.path.relative_to(root).as_posix(), str(row.path), label, next(iter(row.captions), None)))
        if row.second is not None:
            items.append(Item(row.second.relative_to(root).as_posix(), str(row.second), label))
    return sorted(items, key=lambda item: natural(item.key))


def _recognise_files(root: Path, captions: Path | None) -> str | None:
    """Return the dataset that a folder is by other signs than its class folders."""
    if (root / "scenes.json").is_file():
        return "scenes"
    if has_pairs(root):
        return "pairs"
    if (root / DSRSID_FOLDERS[0]).is_dir() and any((root / name).is_file() for name in DSRSID_LISTS):
        return "dsrsid"
    if is_bigearthnet_v2(root):
        return "bigearthnet-v2"
    if has_patches(root):
        return "bigearthnet"
    if captions is not None and any((base / TEXT_CLASSES).is_dir() for base in (root, captions.parent)):
        return "rsicd"
    return None


def _recognise_classes(folders: Mapping[str, Sequence[Path]], captions: Path | None) -> str:
    """Return the dataset whose classes these are; "folder" for unknown classes."""
    if captions is not None and len(folders) == 1:
        # Numbered images in one folder, whose name is not a class. Other datasets may number theirs from 1, too.
        (paths,) = folders.values()
        if {"1", str(NUM_UCM_IMAGES)} <= {path.stem for path in paths}:
            return "ucm-captions"
    name = next((name for name, classes in CLASS_LISTS.items() if list(folders) == classes), "folder")
    if name == "eurosat" and num_bands(next(iter(folders.values()))[0]) == NUM_EUROSAT_BANDS:
        name = "eurosat-ms"
    return {"ucmd": "ucm-captions", "aid": "rsicd"}.get(name, name) if captions is not None else name
