"""The datasets by name, and how a folder is recognised as one of them."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from orbithash.trainers.datasets.bigearthnet import find_bigearthnet, has_patches
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
from orbithash.trainers.datasets.layouts import Found
from orbithash.trainers.datasets.pairs import (
    DSRSID_FOLDERS,
    DSRSID_LISTS,
    find_dsrsid,
    find_pairs,
    find_scenes,
    has_pairs,
)

__all__ = ["DATASETS", "Dataset", "recognise"]

# A data folder, and the file of captions that was given.
Finder = Callable[[Path, Path | None], Found]


@dataclass(frozen=True)
class Dataset:
    """A layout: its default protocol, its finder, and whether a file of captions goes with it."""

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
        Dataset("ucm-captions", "duch", find_ucm_captions, captions="always"),
        Dataset("rsicd", "duch", find_rsicd, captions="always"),
        Dataset("scenes", "random", find_scenes),
        Dataset("pairs", "mrhash", find_pairs),
        Dataset("folder", "random", find_captioned_folder, captions="maybe"),
    ]
}


def recognise(root: Path, captions: Path | None) -> str:
    """The name of the dataset in a folder. `InputError` when there are no images in it, or in no known layout."""
    if (root / "scenes.json").is_file():
        return "scenes"
    if has_pairs(root):
        return "pairs"
    if (root / DSRSID_FOLDERS[0]).is_dir() and any((root / name).is_file() for name in DSRSID_LISTS):
        return "dsrsid"
    if has_patches(root):
        return "bigearthnet"
    if captions is not None and any((base / TEXT_CLASSES).is_dir() for base in (root, captions.parent)):
        return "rsicd"
    folders = class_folders(root)
    if captions is not None and len(folders) == 1:
        # Numbered images in one folder, whose name is no class; others may number theirs from 1, too.
        (paths,) = folders.values()
        if {"1", str(NUM_UCM_IMAGES)} <= {path.stem for path in paths}:
            return "ucm-captions"
    name = next((name for name, classes in CLASS_LISTS.items() if list(folders) == classes), "folder")
    if name == "eurosat" and num_bands(next(iter(folders.values()))[0]) == NUM_EUROSAT_BANDS:
        name = "eurosat-ms"
    return {"ucmd": "ucm-captions", "aid": "rsicd"}.get(name, name) if captions is not None else name
