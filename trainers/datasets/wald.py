"""Two sources made of RGB images by Wald's protocol: coarse colour and fine grey images of the same places."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import ImageError, InputError, listed
from orbithash.encoders.files import new_folder
from orbithash.encoders.imagery.images import Image, Limits, read_image
from orbithash.trainers.datasets.classes import class_folders
from orbithash.trainers.datasets.layouts import first_problems

__all__ = ["MAX_FACTOR", "WaldPairs", "count_images", "write_wald_pairs"]

MAX_FACTOR = 64


@dataclass(frozen=True)
class WaldPairs:
    """The number of pairs that were written, and the images that were left out, with reasons."""

    count: int
    refused: list[str]


def count_images(source: Path) -> int:
    """Return the number of images that `write_wald_pairs` will read."""
    return sum(len(paths) for paths in class_folders(source).values())


def write_wald_pairs(
    source: Path, out: Path, factor: int = 4, on_progress: Callable[[int], None] | None = None
) -> WaldPairs:
    """Write OUT/first/<class>/<name>.png and OUT/second/<class>/<name>.png for each image SOURCE/<class>/<name>.

    Images without classes, SOURCE/<name>, become OUT/first/<name>.png and OUT/second/<name>.png.

    The first image has 1/factor of the resolution: means of factor x factor pixels, a low-pass filter and a reduction
    in one. The second image has the full resolution: the mean of the three bands, like a panchromatic sensor. Both show
    the same ground: up to factor - 1 pixels are cut off at the right and at the bottom.

    An image that cannot be read, or has too few pixels to be reduced, is left out. OUT appears only when everything is
    written.

    Args:
        source: RGB images, in one folder per class or all in one folder.
        out: a folder that does not exist or is empty, outside of `source`.
        factor: ratio of the two resolutions, 2 to 64.
        on_progress: called after each image with the number of images done.

    Raises:
        InputError: an invalid argument, two images with one name in a class, or no readable image.
    """
    source, out = source.resolve(), out.absolute()
    if not 2 <= factor <= MAX_FACTOR:
        raise InputError(f"the factor is {factor}; it must lie between 2 and {MAX_FACTOR}")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is not an empty folder; name one that does not exist yet or is empty")
    if out.resolve().is_relative_to(source):
        raise InputError(f"{out} lies inside {source}; name a folder elsewhere")
    folders = class_folders(source)
    targets = {path: Path(name, f"{path.stem}.png") for name, paths in folders.items() for path in paths}
    _check_names(source, targets)
    refused = []
    with new_folder(out, durable=False) as part:
        for done, (path, target) in enumerate(targets.items(), 1):
            try:
                first, second = _pair(read_image(path), factor)
            except ImageError as err:
                refused.append(f"{path.relative_to(source).as_posix()}: {err}")
            else:
                _write(first, part / "first" / target)
                _write(second, part / "second" / target)
            if on_progress:
                on_progress(done)
        if len(refused) == len(targets):
            raise listed(first_problems(refused), str(source))
    return WaldPairs(len(targets) - len(refused), refused)


def _check_names(source: Path, targets: dict[Path, Path]) -> None:
    """Raise `InputError` for images that would be written to one file, such as a.tif and a.jpg."""
    first: dict[str, Path] = {}
    # Some file systems ignore case.
    twice = [
        f"{path.relative_to(source).as_posix()} and {first[key].relative_to(source).as_posix()} differ only in case or "
        "ending"
        for path, key in ((path, target.as_posix().lower()) for path, target in targets.items())
        if first.setdefault(key, path) != path
    ]
    if twice:
        raise listed(first_problems(twice), str(source))


def _pair(image: Image, factor: int) -> tuple[Image, Image]:
    """Return uint8 [H // factor, W // factor, 3] and uint8 [H // factor * factor, W // factor * factor].

    `image` is uint8 [H, W, 3].
    """
    height, width = (side // factor * factor for side in image.shape[:2])
    if min(height, width) < (least := Limits().min_side * factor):
        # The reduced image must be large enough to be read later.
        raise ImageError(
            f"{image.shape[1]} x {image.shape[0]} pixels; at least {least} x {least} for a factor of {factor}"
        )
    image = image[:height, :width]
    # [rows, row of a block, columns, column of a block, band]
    blocks = image.reshape(height // factor, factor, width // factor, factor, 3)
    first = np.rint(blocks.mean(axis=(1, 3), dtype=np.float32)).astype(np.uint8)
    second = np.rint(image.mean(axis=2, dtype=np.float32)).astype(np.uint8)
    return first, second


def _write(pixels: Image, path: Path) -> None:
    from PIL import Image as Pillow

    path.parent.mkdir(parents=True, exist_ok=True)
    Pillow.fromarray(pixels).save(path)
