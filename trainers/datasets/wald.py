"""Pairs of sources made of RGB images by Wald's protocol: coarse colour beside fine grey of the same ground."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import ImageError, InputError, listed
from orbithash.encoders.files import new_folder
from orbithash.encoders.imagery.images import Image, Limits, read_image
from orbithash.trainers.datasets.classes import class_folders
from orbithash.trainers.datasets.layouts import cut

__all__ = ["MAX_FACTOR", "WaldPairs", "count_images", "write_wald_pairs"]

MAX_FACTOR = 64


@dataclass(frozen=True)
class WaldPairs:
    """How many pairs were written, and why which images were left out."""

    count: int
    refused: list[str]


def count_images(source: Path) -> int:
    """How many images `write_wald_pairs` will read."""
    return sum(len(paths) for paths in class_folders(source).values())


def write_wald_pairs(
    source: Path, out: Path, factor: int = 4, on_progress: Callable[[int], None] | None = None
) -> WaldPairs:
    """Writes OUT/first/<class>/<name>.png and OUT/second/<class>/<name>.png for each image SOURCE/<class>/<name>.

    Of images side by side in SOURCE, without classes, OUT/first/<name>.png and OUT/second/<name>.png.

    The first is the image at 1/factor of its resolution: the mean of factor x factor pixels, which is low-pass filter
    and reduction in one. The second is at full resolution the mean of the three bands, as a panchromatic sensor sees
    them all. Both are of the same ground: up to factor - 1 pixels are cut off at the right and at the bottom.

    An image that cannot be read, or has too few pixels to be reduced, is left out. OUT appears when all is
    written, or not at all.

    Args:
        source: RGB images, one folder a class or all in one.
        out: a folder that does not exist yet or is empty, not inside `source`.
        factor: how much coarser the first source is, 2 to 64.
        on_progress: told after each image how many are done.

    Raises:
        InputError: a wrong argument, two images of one name in a class, or no image that can be read.
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
            raise listed(cut(refused), str(source))
    return WaldPairs(len(targets) - len(refused), refused)


def _check_names(source: Path, targets: dict[Path, Path]) -> None:
    """Refuses two images that would be written to one file, as a.tif and a.jpg."""
    first: dict[str, Path] = {}
    # Some file systems do not tell case.
    twice = [
        f"{path.relative_to(source).as_posix()} and {first[key].relative_to(source).as_posix()} differ only in case or "
        "ending"
        for path, key in ((path, target.as_posix().lower()) for path, target in targets.items())
        if first.setdefault(key, path) != path
    ]
    if twice:
        raise listed(cut(twice), str(source))


def _pair(image: Image, factor: int) -> tuple[Image, Image]:
    """uint8 [H // factor, W // factor, 3] and uint8 [H // factor * factor, W // factor * factor] of uint8 [H, W, 3]."""
    height, width = (side // factor * factor for side in image.shape[:2])
    if min(height, width) < (least := Limits().min_side * factor):
        # What is read later has to be an image, too.
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
