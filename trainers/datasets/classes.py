"""Images in one folder per class (UCMD, AID, NWPU-RESISC45, EuroSAT, any other), or in one folder without classes."""

from collections import Counter
from pathlib import Path

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.folders import (
    NoClassFolders,
    class_paths,
    find_class_folders,
    natural,
    patch_error,
    walk_folder,
)
from orbithash.encoders.sources.object_folders import RemoteFolder
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.datasets.layouts import FoundImages, LabelledImage, by_path

__all__ = [
    "class_folders",
    "find_class_list",
    "find_classes",
    "find_eurosat",
    "find_eurosat_ms",
    "find_objects",
    "find_unlabelled",
    "num_bands",
    "with_class_list",
]

NUM_EUROSAT_BANDS = 13

# Names in the data folder of datasets whose images are not all in folders of classes.
_LAYOUTS = (("scenes.json",), ("metadata.parquet",), ("first", "second"), ("multispectral", "panchromatic"))


def class_folders(root: Path) -> dict[str, list[Path]]:
    """Return the absolute paths of the images of each class in natural order; classes sorted by name.

    Class folders are found as for `encode` (`orbithash.encoders.sources.folders`). Images that all lie in one folder,
    side by side, have no class; they are returned under the class "".

    Raises:
        InputError: no such folder, no images, or images in several folders that are not class folders.
    """
    root = root.resolve()
    try:
        return dict(sorted(find_class_folders(root).items()))
    except NoClassFolders:
        files = dict(walk_folder(root))
        if len(files) > 1:
            raise
        return {"": [Path(root, *folder, name) for folder, names in files.items() for name in names]}


def find_classes(root: Path, captions: Path | None = None) -> FoundImages:
    """Find the images of a folder with one folder per class, or of one folder without classes."""
    folders = class_folders(root)
    rows = [LabelledImage(path, (name,) if name else ()) for name, paths in folders.items() for path in paths]
    return FoundImages(rows, tuple(name for name in folders if name), [])


def find_unlabelled(root: Path) -> FoundImages:
    """Find all images of a folder and its subfolders, without classes."""
    root, rows = root.resolve(), []
    for folder, names in walk_folder(root):
        if problem := patch_error(root, folder, names):
            raise problem
        rows += [LabelledImage(Path(root, *folder, name)) for name in names]
    return FoundImages(by_path(rows, root), (), [])


def find_objects(root: RemoteFolder, has_classes: bool = True) -> FoundImages:
    """Find the images of a folder in an object store, with one folder per class, or without classes; relative paths.

    Raises:
        InputError: as `class_folders`; also for the layout of a dataset that has more than folders of classes.
    """
    objects = root.objects()
    top = {name.partition("/")[0] for name in objects}
    if marks := [mark for mark in _LAYOUTS if set(mark) <= top]:
        raise InputError(
            f"{root} has {' and '.join(marks[0])}, the layout of a dataset that only a local folder can have; pack it "
            "there with `orbithash pack`, and give the packed data set"
        )
    files = root.image_names(objects)
    for folder, names in files.items():
        if problem := patch_error(str(root), folder, names):
            raise problem
    every = ["/".join((*folder, name)) for folder, names in files.items() for name in names]
    if not has_classes:
        return FoundImages([LabelledImage(Path(path)) for path in sorted(every, key=natural)], (), [])
    try:
        classes = dict(sorted(class_paths(str(root), files, Counter()).items()))
    except NoClassFolders:
        if len(files) > 1:
            raise
        classes = {"": every}
    rows = [LabelledImage(Path(path), (name,) if name else ()) for name, paths in classes.items() for path in paths]
    return FoundImages(rows, tuple(name for name in classes if name), [])


def find_class_list(name: str, root: Path) -> FoundImages:
    """Find the images of a dataset that is recognised by its classes."""
    return with_class_list(name, find_classes(root))


def with_class_list(name: str, found: FoundImages) -> FoundImages:
    """Return images, with a problem if their classes are not those of a dataset."""
    known = CLASS_LISTS[name]
    if list(found.classes) != known:
        wrong = [
            f"{what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
            for what, names in [
                ("absent", [one for one in known if one not in found.classes]),
                ("unknown", [one for one in found.classes if one not in known]),
            ]
            if names
        ]
        found.problems.append(
            f"these are not the {len(known)} classes of {name} ({'; '.join(wrong)}); omit --dataset or give folder"
        )
    return found


def find_eurosat(root: Path, captions: Path | None = None) -> FoundImages:
    """Find EuroSAT's RGB images."""
    found = find_class_list("eurosat", root)
    if any(num_bands(path) == NUM_EUROSAT_BANDS for path in _firsts(found)):
        found.problems.append("its images have 13 bands; that set is eurosat-ms")
    return found


def find_eurosat_ms(root: Path, captions: Path | None = None) -> FoundImages:
    """Find EuroSAT's GeoTIFFs of 13 bands; the first image of each class is opened."""
    found = find_class_list("eurosat", root)
    for path in _firsts(found):
        if (count := num_bands(path)) != NUM_EUROSAT_BANDS:
            what = f"has {count} band{'s' * (count != 1)}" if count else "is not a readable TIFF"
            found.problems.append(f"{path.relative_to(root).as_posix()} {what}; eurosat-ms has TIFFs of 13 bands")
    return found


def num_bands(path: Path) -> int:
    """Return the number of bands of a TIFF; 0 for other files and unreadable ones."""
    import rasterio

    if path.suffix.lower() not in (".tif", ".tiff"):
        return 0
    try:
        with rasterio.open(path, driver="GTiff") as image:
            return int(image.count)
    except rasterio.errors.RasterioError:
        return 0


def _firsts(found: FoundImages) -> list[Path]:
    """Return the first image of each class."""
    firsts: dict[tuple[str, ...], Path] = {}
    for row in found.rows:
        firsts.setdefault(row.classes, row.path)
    return list(firsts.values())
