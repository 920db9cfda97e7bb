"""Read image files and prepare them for a network, several at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from orbithash.encoders.errors import ImageError, InputError, listed
from orbithash.encoders.imagery.images import Image, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.sources.image_roots import ImageRoot, read_together, sources_of

__all__ = ["READ_BATCH_SIZE", "Normaliser", "num_decoding_threads", "read_batches", "read_prepared"]

# Images that are decoded together.
READ_BATCH_SIZE = 64

# More threads wait for each other: between two calls of Pillow each holds Python's lock.
MAX_THREADS = 8

# Changes a rendered image before it is prepared: (row, image) to an image.
Change = Callable[[int, Image], Image]

# Returns what an image is read from in place of its source, (row, source); `ImageError` if it is not to be read.
Verify = Callable[[int, Path | bytes], Path | bytes]


class Normaliser:
    """Turns prepared images into the network's input."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device) -> None:
        """`InputError` if the preprocessing has no mean and standard deviation."""
        if not preprocessing.mean:
            raise InputError(
                f"values={preprocessing.rendering.values} needs the mean and the standard deviation of each of the "
                f"{preprocessing.channels} bands; training computes them"
            )
        unit = 255 if preprocessing.rendering.is_picture else 1
        moments = preprocessing.mean, preprocessing.std
        self._mean, self._std = (unit * torch.tensor(m, device=device).view(1, -1, 1, 1) for m in moments)
        self._may_lack_pixels = not preprocessing.rendering.is_picture

    def __call__(self, images: Pixels | Tensor) -> Tensor:
        """Return prepared images [N, S, S, C] as float32 [N, C, S, S] in channels_last memory format.

        A tensor must be contiguous. Missing pixels of numbers become 0, the mean of their band.
        """
        given = images if isinstance(images, Tensor) else torch.from_numpy(np.array(images, order="C"))
        pixels = given.to(self._mean.device).permute(0, 3, 1, 2)
        normalised = (pixels.float() - self._mean) / self._std
        return torch.where(normalised.isfinite(), normalised, 0.0) if self._may_lack_pixels else normalised


def read_prepared(source: Path | bytes, preprocessing: Preprocessing) -> Pixels:
    """Return one prepared image [crop, crop, C] of a file or its bytes; `ImageError` if it is refused."""
    return preprocessing.prepare(read_image(source, preprocessing.rendering))


def read_batches(
    paths: Sequence[Path | str],
    preprocessing: Preprocessing,
    *,
    root: ImageRoot | None = None,
    change: Change | None = None,
    verify: Verify | None = None,
    batch_size: int = READ_BATCH_SIZE,
) -> Iterator[Pixels]:
    """Yield the prepared images in batches [n, crop, crop, C], in the order of `paths`.

    Threads decode the next batch while the caller uses the last one.

    Args:
        paths: image files, or patch folders; below `root`, if it is given.
        preprocessing: which bands are read, and to which size.
        root: where the images are; None: `paths` are files of this machine.
        change: applied to each rendered image [H, W, C] before it is prepared.
        verify: looks at the file of each image before it is read.
        batch_size: images per batch; the last batch may be smaller.

    Raises:
        ImageError: some images are refused; raised after the last path, naming all of them.
        InputError: `root` cannot be read, such as a store that gives no answer; raised at once.
    """
    place = Path() if root is None else root

    def read(rows: range) -> list[Pixels | str]:
        try:
            sources = sources_of(place, [paths[row] for row in rows])
        except ImageError as err:
            # The others are read again, so that all that are refused are named.
            return [str(err)] if len(rows) == 1 else [outcome for row in rows for outcome in read(range(row, row + 1))]
        return [prepare(row, source) for row, source in zip(rows, sources, strict=True)]

    def prepare(row: int, source: Path | bytes) -> Pixels | str:
        try:
            image = read_image(source if verify is None else verify(row, source), preprocessing.rendering)
            return preprocessing.prepare(image if change is None else change(row, image))
        except ImageError as err:
            return f"{paths[row]}: {err}"

    def begin(rows: range) -> Iterator[list[Pixels | str]]:
        size = read_together(place)
        return pool.map(read, [rows[start : start + size] for start in range(0, len(rows), size)])

    problems: list[str] = []
    with ThreadPoolExecutor(num_decoding_threads()) as pool:
        starts = range(0, len(paths), batch_size)
        begun = (begin(range(len(paths))[start : start + batch_size]) for start in starts)
        try:
            following = next(begun, None)
            while following is not None:
                current, following = following, next(begun, None)
                outcomes = [outcome for block in current for outcome in block]
                problems += [outcome for outcome in outcomes if isinstance(outcome, str)]
                if not problems:
                    yield np.stack(outcomes)  # type: ignore[arg-type] # no outcome is a problem
        finally:
            # After an error, images that nobody waits for are not read.
            pool.shutdown(cancel_futures=True)
    if problems:
        where = "images that cannot be read" if root is None else f"{root}: images that cannot be read"
        raise listed(problems, where, ImageError)


def num_decoding_threads() -> int:
    """Return the number of threads of this process for decoding; Ray sets torch's to a worker's share of the CPUs."""
    return min(torch.get_num_threads(), MAX_THREADS)
