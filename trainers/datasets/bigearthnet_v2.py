"""BigEarthNet, version 2 (reBEN, Clasen et al., IGARSS 2025): patches, with their labels in one table.

    metadata.parquet
    BigEarthNet-S2/<tile>/<patch_id>/<patch_id>_B02.tif ...
    BigEarthNet-S1/<scene>/<s1_name>/<s1_name>_VH.tif, ..._VV.tif

The columns patch_id, labels (of 19 classes), split (train, validation, test) and s1_name of the table are used. The
folder of a Sentinel-1 patch, the second source, may be absent for the whole dataset. Patches that are not in the table
are left out: their labels were found unreliable, or they show snow or clouds.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets.bigearthnet import BANDS
from orbithash.trainers.datasets.layouts import FoundImages, LabelledImage, by_path

__all__ = ["CLASSES", "find_bigearthnet_v2", "is_bigearthnet_v2"]

CLASSES = (
    "Urban fabric",
    "Industrial or commercial units",
    "Arable land",
    "Permanent crops",
    "Pastures",
    "Complex cultivation patterns",
    "Land principally occupied by agriculture, with significant areas of natural vegetation",
    "Agro-forestry areas",
    "Broad-leaved forest",
    "Coniferous forest",
    "Mixed forest",
    "Natural grassland and sparsely vegetated areas",
    "Moors, heathland and sclerophyllous vegetation",
    "Transitional woodland, shrub",
    "Beaches, dunes, sands",
    "Inland wetlands",
    "Coastal wetlands",
    "Inland waters",
    "Marine waters",
)

TABLE = "metadata.parquet"
FOLDERS = {"S2": "BigEarthNet-S2", "S1": "BigEarthNet-S1"}

SPLITS = ("train", "validation", "test")

# Parts of a name after that of its folder: column and row of a patch in a tile; tile, column and row in a scene.
_NUM_PARTS = {"S2": 2, "S1": 3}
_NAME = re.compile(r"\w+(?:-\w+)*", re.ASCII)


def is_bigearthnet_v2(root: Path) -> bool:
    """Return whether the folder has the table and the Sentinel-2 patches."""
    return (root / TABLE).is_file() and (root / FOLDERS["S2"]).is_dir()


def find_bigearthnet_v2(root: Path, captions: Path | None = None) -> FoundImages:
    """Find the Sentinel-2 patches of the table, each with the Sentinel-1 patch of its place.

    Raises:
        InputError: the table cannot be read, lacks columns, or has other types.
    """
    root = root.resolve()
    has_seconds = (root / FOLDERS["S1"]).is_dir()
    rows = _read_table(root / TABLE, has_seconds)
    problems = _value_problems(rows, has_seconds)
    if problems:
        return FoundImages([], (), problems)
    paths = {"S2": [_folder(root, "S2", row["patch_id"]) for row in rows]}
    if has_seconds:
        paths["S1"] = [_folder(root, "S1", row["s1_name"]) for row in rows]
    are_whole = {kind: [_is_whole(path, BANDS[kind]) for path in paths[kind]] for kind in paths}
    for kind, found in are_whole.items():
        if not all(found):
            first = paths[kind][found.index(False)]
            problems.append(
                f"{found.count(False)} of the {len(rows)} Sentinel-{kind[1]} patches that {TABLE} names are missing or "
                f"lack bands (first: {first.relative_to(root).as_posix()}); complete the download, or remove their rows"
            )
    images = []
    for number, row in enumerate(rows):
        if all(found[number] for found in are_whole.values()):
            second = paths["S1"][number] if has_seconds else None
            images.append(
                LabelledImage(
                    paths["S2"][number],
                    tuple(name for name in CLASSES if name in row["labels"]),
                    second=second,
                    split=row["split"],
                )
            )
    there = {name for row in images for name in row.classes}
    return FoundImages(by_path(images, root), tuple(name for name in CLASSES if name in there), problems)


def _folder(root: Path, kind: str, name: str) -> Path:
    return root / FOLDERS[kind] / "_".join(name.split("_")[: -_NUM_PARTS[kind]]) / name


def _is_whole(patch: Path, bands: tuple[str, ...]) -> bool:
    try:
        names = {path.name for path in patch.iterdir()}
    except OSError:
        return False
    return names >= {f"{patch.name}_{band}.tif" for band in bands}


def _read_table(path: Path, has_seconds: bool) -> list[dict[str, Any]]:
    """Return the rows of the table, as dicts of its columns."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    def is_text(kind: pa.DataType) -> bool:
        return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind))

    def is_texts(kind: pa.DataType) -> bool:
        return bool((pa.types.is_list(kind) or pa.types.is_large_list(kind)) and is_text(kind.value_type))

    columns = {"patch_id": is_text, "labels": is_texts, "split": is_text}
    if has_seconds:
        columns["s1_name"] = is_text
    try:
        schema = pq.read_schema(path)
        absent = [name for name in columns if name not in schema.names]
        if absent:
            raise InputError(
                f"{path}: no column {', '.join(absent)}; the table of BigEarthNet version 2 has {', '.join(columns)}"
            )
        wrong = [
            f"{name} ({schema.field(name).type})" for name, fits in columns.items() if not fits(schema.field(name).type)
        ]
        if wrong:
            raise InputError(f"{path}: column {', '.join(wrong)}: labels must be lists of text, the others text")
        rows: list[dict[str, Any]] = pq.read_table(path, columns=list(columns)).to_pylist()
    except (OSError, pa.ArrowException) as err:
        raise InputError(f"{path}: not a readable Parquet file ({' '.join(str(err).split())})") from err
    if not rows:
        raise InputError(f"{path}: it has no rows; give the table of the patches")
    return rows


def _value_problems(rows: list[dict[str, Any]], has_seconds: bool) -> list[str]:
    """Return one line for each kind of invalid value: their number and the first."""
    names = ["patch_id", "s1_name"] if has_seconds else ["patch_id"]
    problems = []
    for name in names:
        kind = "S1" if name == "s1_name" else "S2"
        bad = [row[name] for row in rows if not _is_name(row[name], kind)]
        if bad:
            problems.append(f"{len(bad)} values of {name} are not names of patches (first: {bad[0]!r})")
        repeated = [value for value, count in Counter(row[name] for row in rows).items() if count > 1]
        if repeated:
            problems.append(f"{len(repeated)} values of {name} are repeated (first: {repeated[0]!r})")
    bad = [row["split"] for row in rows if row["split"] not in SPLITS]
    if bad:
        problems.append(f"{len(bad)} values of split are not {', '.join(SPLITS)} (first: {bad[0]!r})")
    without = [row["patch_id"] for row in rows if not row["labels"]]
    if without:
        problems.append(f"{len(without)} patches have no labels (first: {without[0]})")
    unknown = sorted({str(label) for row in rows for label in row["labels"] or () if label not in CLASSES})
    if unknown:
        problems.append(f"{len(unknown)} labels are not of the 19 classes (first: {unknown[0]!r})")
    return [f"{TABLE}: {problem}" for problem in problems]


def _is_name(value: str | None, kind: str) -> bool:
    """Return whether a value can be the name of a patch; it becomes part of a path."""
    return value is not None and _NAME.fullmatch(value) is not None and len(value.split("_")) > _NUM_PARTS[kind]
