"""Training images, in memory or decoded when needed, and the random views of each step.

Images that do not fit into memory are decoded each time, in the threads that make the views. The order of rows is known
in advance, so the images of the next step are read during the current one. Decoders release Python's lock. Threads
need no CPUs beyond the worker's, and no pixels are copied between processes.

Every random choice depends on (seed, epoch, row) only. A resumed run therefore sees the same batches as an
uninterrupted one, and two ranks see those of one process.
"""

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.reading import num_decoding_threads, read_batches, read_prepared
from orbithash.encoders.sources.image_roots import ImageRoot, read_together, sources_of
from orbithash.trainers.data.augmentation import Augmentation, augment
from orbithash.trainers.data.feature_table import FeatureRows
from orbithash.trainers.data.memory_use import available_memory_mb
from orbithash.trainers.datasets import Images
from orbithash.trainers.metrics.retrieval import Labels

__all__ = [
    "LOADINGS",
    "LoadedImages",
    "Part",
    "StreamedImages",
    "fits_in_memory",
    "load_images",
    "originals_of_steps",
    "views_of_steps",
]

# auto: memory if the decoded images fit.
LOADINGS = ("auto", "memory", "stream")

# Share of the free memory that the images of all ranks of a machine may use.
MEMORY_SHARE = 0.5

Rows = npt.NDArray[np.int64]


class StreamedImages:
    """The images of `load_images`, [N, crop, crop, C], decoded at each access by a row number or a slice.

    `InputError` if an image is refused.
    """

    def __init__(self, root: ImageRoot, images: Images, preprocessing: Preprocessing) -> None:
        self._root, self._images, self._preprocessing = root, images, preprocessing

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Shape of the array that `load_images` would return."""
        side = self._preprocessing.crop
        return len(self._images), side, side, self._preprocessing.channels

    @property
    def dtype(self) -> np.dtype[np.uint8 | np.float32]:
        """Type of the pixels, see `Preprocessing.dtype`."""
        return np.dtype(self._preprocessing.dtype)

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: int | slice) -> Pixels:
        if isinstance(rows, slice):
            return load_images(self._root, self._images[rows], self._preprocessing)
        return next(self.each(np.array([rows])))

    def each(self, rows: Rows) -> Iterator[Pixels]:
        """Yield the image of each row number, int64 [M]; several of them are read at once where that saves time."""
        paths, size = self._images[rows].paths, read_together(self._root)
        for start in range(0, len(paths), size):
            some = paths[start : start + size]
            for path, source in zip(some, sources_of(self._root, some), strict=True):
                try:
                    yield read_prepared(source, self._preprocessing)
                except InputError as err:
                    raise InputError(f"{self._root}: images that cannot be read: {path}: {err}") from err


LoadedImages = Pixels | StreamedImages


@dataclass(frozen=True)
class Part:
    """One part of a data set, with N images.

    Attributes:
        images: prepared images [N, S, S, C]; None for a method that trains on features.
        labels: integers [N], -1 for an unknown class, or bool [N, classes] for several classes (see `retrieval`).
        ids: names of the images.
        features: tables float32 [N, ...] by name.
        drawn_captions: int64 [N], the index of the caption that stands for each image in validation, as in evaluation.
    """

    images: LoadedImages | None
    labels: Labels
    ids: list[str]
    features: dict[str, FeatureRows] = field(default_factory=dict)
    drawn_captions: Rows = field(default_factory=lambda: np.empty(0, np.int64))


def load_images(root: ImageRoot, images: Images, preprocessing: Preprocessing) -> Pixels:
    """Return prepared images [N, crop, crop, C]; `InputError` names all images that are refused."""
    side = preprocessing.crop
    pixels, start = np.empty((len(images), side, side, preprocessing.channels), preprocessing.dtype), 0
    for batch in read_batches(images.paths, preprocessing, root=root):
        pixels[start : start + len(batch)] = batch
        start += len(batch)
    return pixels


def fits_in_memory(num_images: int, preprocessing: Preprocessing) -> bool:
    """Return whether `num_images` prepared images per rank of this machine fit into `MEMORY_SHARE` of its memory."""
    num_bytes = num_images * preprocessing.num_bytes
    # Set by torchrun and by Ray Train.
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return num_bytes * num_ranks <= MEMORY_SHARE * available_memory_mb() * 2**20


def views_of_steps(
    images: LoadedImages, steps: Rows, side: int, augmentation: Augmentation, seed: int, epoch: int
) -> Iterator[Pixels]:
    """Yield views [b, side, side, C] of the rows of each step; `steps` int64 [steps, b] is this rank's share.

    The views of the next step are made while the caller uses the current ones, on all CPUs but one.
    """

    def view(image: Pixels, row: int) -> Pixels:
        return augment(image, side, np.random.default_rng([seed, epoch, row]), augmentation)

    return _made_ahead(images, steps, side, view)


def originals_of_steps(images: LoadedImages, steps: Rows) -> Iterator[Pixels]:
    """Yield images [b, S, S, C] as they are, read ahead as by `views_of_steps`; the views are made elsewhere."""
    return _made_ahead(images, steps, images.shape[1], lambda image, row: image)


def _made_ahead(
    images: LoadedImages, steps: Rows, side: int, make: Callable[[Pixels, int], Pixels]
) -> Iterator[Pixels]:
    """Yield what `make` returns, [side, side, C], for the image and the number of each row, by threads a step ahead."""

    def begin(rows: Rows) -> tuple[Pixels, Iterator[None]]:
        """Return the pixels and an iterator that ends when they are complete."""
        pixels = np.empty((len(rows), side, side, images.shape[3]), images.dtype)

        def fill(places: Rows) -> None:
            own = rows[places]
            read = images.each(own) if isinstance(images, StreamedImages) else (images[row] for row in own)
            for place, row, image in zip(places.tolist(), own.tolist(), read, strict=True):
                pixels[place] = make(image, row)

        return pixels, pool.map(fill, np.array_split(np.arange(len(rows)), num_threads))

    num_threads = max(1, num_decoding_threads() - 1)
    with ThreadPoolExecutor(num_threads) as pool:
        begun = map(begin, steps)
        following = next(begun, None)
        while following is not None:
            (pixels, made), following = following, next(begun, None)
            list(made)
            yield pixels
