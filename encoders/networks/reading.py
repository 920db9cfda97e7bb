"""Read image files and prepare them for a network, several at a time."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.images import Image, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing

__all__ = ["READ_BATCH_SIZE", "num_decoding_threads", "read_batches", "read_prepared"]

# Images that are decoded together.
READ_BATCH_SIZE = 64

# More threads wait for each other: between two calls of Pillow each holds Python's lock.
MAX_THREADS = 8

# Changes a rendered image before it is prepared: (row, image) to an image.
Change = Callable[[int, Image], Image]


def read_prepared(path: Path, preprocessing: Preprocessing) -> npt.NDArray[np.uint8]:
    """Return one image as the network's input, uint8 [crop, crop, C]; `ImageError` if it is refused."""
    return preprocessing.prepare(read_image(path, preprocessing.rendering))


def read_batches(
    paths: Sequence[Path],
    preprocessing: Preprocessing,
    *,
    root: Path | None = None,
    change: Change | None = None,
    batch_size: int = READ_BATCH_SIZE,
) -> Iterator[npt.NDArray[np.uint8]]:
    """Yield the images as batches of the network's input, uint8 [n, crop, crop, C], in the order of `paths`.

    Threads decode the next batch while the caller uses the last one.

    Args:
        paths: image files, or patch folders.
        preprocessing: which bands are read, and to which size.
        root: error messages name paths relative to this folder.
        change: applied to each rendered image uint8 [H, W, C] before it is prepared.
        batch_size: images per batch; the last batch may be smaller.

    Raises:
        InputError: some images are refused; raised after the last path, naming all of them.
    """

    def read(row: int) -> npt.NDArray[np.uint8] | str:
        try:
            image = read_image(paths[row], preprocessing.rendering)
            return preprocessing.prepare(image if change is None else change(row, image))
        except InputError as err:
            return f"{paths[row] if root is None else paths[row].relative_to(root)}: {err}"

    problems: list[str] = []
    with ThreadPoolExecutor(num_decoding_threads()) as pool:
        starts = range(0, len(paths), batch_size)
        begun = (pool.map(read, range(len(paths))[start : start + batch_size]) for start in starts)
        following = next(begun, None)
        while following is not None:
            current, following = following, next(begun, None)
            outcomes = list(current)
            problems += [outcome for outcome in outcomes if isinstance(outcome, str)]
            if not problems:
                yield np.stack(outcomes)  # type: ignore[arg-type] # no outcome is a problem
    if problems:
        raise listed(problems, "images that cannot be read" if root is None else f"{root}: images that cannot be read")


def num_decoding_threads() -> int:
    """Return the number of threads of this process for decoding; Ray sets torch's to a worker's share of the CPUs."""
    return min(torch.get_num_threads(), MAX_THREADS)
