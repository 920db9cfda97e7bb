"""BigEarthNet, version 1: Sentinel-2 patches, each a folder of one TIFF a band and a JSON file with its labels.

    .../<patch>/<patch>_B02.tif ... <patch>_labels_metadata.json

Sentinel-1 patches name the Sentinel-2 patch of the same place in their JSON file and become its second source; a
dataset may lack them. A patch has several classes.
"""

from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets.layouts import FoundImages, LabelledImage, by_path, first_problems, read_json

__all__ = ["find_bigearthnet", "has_patches"]

BANDS = {
    "S2": ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12"),
    "S1": ("VH", "VV"),
}

_METADATA = "_labels_metadata.json"
_PATTERNS = ("*/*" + _METADATA, "*/*/*" + _METADATA, "*/*/*/*" + _METADATA)


def has_patches(root: Path) -> bool:
    """Return whether a patch is in the folder or up to two folders below."""
    return any(any(root.glob(pattern)) for pattern in _PATTERNS)


def find_bigearthnet(root: Path, captions: Path | None = None) -> FoundImages:
    """Find the Sentinel-2 patches, each with the Sentinel-1 patch of its place."""
    root = root.resolve()
    patches: dict[str, dict[str, tuple[Path, dict[str, Any]]]] = {"S1": {}, "S2": {}}
    bad: list[str] = []
    for file in sorted(path for pattern in _PATTERNS for path in root.glob(pattern)):
        folder = file.parent
        kind = "S1" if folder.name.startswith("S1") else "S2"
        try:
            described = _described(file)
        except ValueError as err:
            bad.append(str(err))
            continue
        if folder.name in patches[kind]:
            bad.append(f"{folder.name} occurs twice")
        absent = [band for band in BANDS[kind] if not (folder / f"{folder.name}_{band}.tif").is_file()]
        if absent:
            bad.append(f"{folder.name} has no band {', '.join(absent)}")
        patches[kind][folder.name] = folder, described
    if not patches["S2"] and not bad:
        raise InputError(f"{root} holds no Sentinel-2 patch of BigEarthNet, a folder with *{_METADATA}")
    seconds, wrong = _match(patches["S1"], patches["S2"])
    rows = [
        LabelledImage(folder, tuple(d["labels"]), second=seconds.get(name))
        for name, (folder, d) in patches["S2"].items()
    ]
    classes = tuple(sorted({label for row in rows for label in row.classes}))
    return FoundImages(by_path(rows, root), classes, [*first_problems(bad), *wrong])


def _match(
    ones: dict[str, tuple[Path, dict[str, Any]]], twos: dict[str, tuple[Path, dict[str, Any]]]
) -> tuple[dict[str, Path], list[str]]:
    """Return the folder of the Sentinel-1 patch of each Sentinel-2 patch, and the problems between them."""
    seconds: dict[str, Path] = {}
    lost, twice, differ = [], [], []
    for name, (folder, described) in ones.items():
        place = described.get("corresponding_s2_patch")
        if place not in twos:
            lost.append(f"{name} names the Sentinel-2 patch {place}, which is missing")
        elif place in seconds:
            twice.append(f"{place} has two second sources, {seconds[place].name} and {name}")
        else:
            seconds[place] = folder
            if set(described["labels"]) != set(twos[place][1]["labels"]):
                differ.append(f"{place} and its second source {name} have different labels")
    # A dataset without Sentinel-1 patches has one source.
    alone = [f"{name} has no second source" for name in twos if ones and name not in seconds]
    return seconds, [*first_problems(lost), *first_problems(twice), *first_problems(differ), *first_problems(alone)]


def _described(path: Path) -> dict[str, Any]:
    content = read_json(path)
    labels = content.get("labels") if isinstance(content, dict) else None
    if not isinstance(labels, list) or not labels or not all(isinstance(label, str) for label in labels):
        raise ValueError(f"{path.name} has no labels")
    if path.name != path.parent.name + _METADATA:
        raise ValueError(f"{path.name} lies in the folder of another patch, {path.parent.name}")
    return {**content, "labels": list(dict.fromkeys(labels))}
