"""Images in memory or decoded as they are needed, and the views drawn from them for each step.

What does not fit into memory is decoded anew each time, in the threads that make the views: the order of the rows is
known before, so the next step's images are read while the last one's are used. Decoders let go of Python's lock. So
nothing has to find a CPU that Ray gave to the workers, no pixels are copied from process to process, and a run sees the
same batches to the last bit.

Every random choice follows from (seed, epoch, row). A run that was killed and goes on therefore sees the very batches
it would have seen, and so do two ranks that share the batches of one process.
"""

import math
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageEnhance

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing, resample
from orbithash.encoders.networks.reading import num_decoding_threads, read_batches, read_prepared
from orbithash.trainers.data.memory_use import available_memory_mb
from orbithash.trainers.datasets import Image as ManifestImage
from orbithash.trainers.metrics.retrieval import Labels

__all__ = [
    "LOADINGS",
    "Augmentation",
    "Images",
    "Part",
    "StreamedImages",
    "augment",
    "fits_in_memory",
    "load_images",
    "views_of_steps",
]

# auto: memory where the decoded images fit.
LOADINGS = ("auto", "memory", "stream")

# Of the memory that is free, what the images of all ranks on a machine may take.
MEMORY_SHARE = 0.5

Pixels = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.int64]


class StreamedImages:
    """What `load_images` gives, uint8 [N, crop, crop, C], but decoded whenever rows are taken, and never kept.

    Takes a row, or a slice of them; `InputError` when one of these images is refused.
    """

    def __init__(self, root: Path, images: Sequence[ManifestImage], preprocessing: Preprocessing) -> None:
        self._root, self._images, self._preprocessing = root, images, preprocessing

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """That of the array it stands for."""
        side = self._preprocessing.crop
        return len(self._images), side, side, self._preprocessing.channels

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, rows: int | slice) -> Pixels:
        if isinstance(rows, slice):
            return load_images(self._root, self._images[rows], self._preprocessing)
        path = self._images[rows].path
        try:
            return read_prepared(self._root / path, self._preprocessing)
        except InputError as err:
            raise InputError(f"{self._root}: images that cannot be read: {path}: {err}") from err


Images = Pixels | StreamedImages


@dataclass(frozen=True)
class Part:
    """One part of a dataset.

    `images` uint8 [N, S, S, C], None for a method that trains on features; `labels` integers [N], -1 where unknown, or
    bool [N, classes] where images have several (see `retrieval`); `ids` their N names; `features` float32 [N, ...] by
    table.
    """

    images: Images | None
    labels: Labels
    ids: list[str]
    features: dict[str, npt.NDArray[np.float32]] = field(default_factory=dict)


@dataclass(frozen=True)
class Augmentation:
    """How far a training view may be from its image.

    `min_crop_area`: least share of the image's area that a crop keeps; objects of overhead images fill a small part of
    it, and harder crops lose them. `colour_jitter`: brightness, contrast and saturation change by up to this share, hue
    by a fifth of it. `grayscale`: share of the views without colour.
    """

    min_crop_area: float = 0.4
    colour_jitter: float = 0.0
    grayscale: float = 0.0


def load_images(root: Path, images: Sequence[ManifestImage], preprocessing: Preprocessing) -> Pixels:
    """Decodes and prepares these images: uint8 [N, crop, crop, C]; `InputError` that lists all that are refused."""
    side = preprocessing.crop
    pixels, start = np.empty((len(images), side, side, preprocessing.channels), np.uint8), 0
    for batch in read_batches([root / image.path for image in images], preprocessing, root=root):
        pixels[start : start + len(batch)] = batch
        start += len(batch)
    return pixels


def fits_in_memory(num_images: int, preprocessing: Preprocessing) -> bool:
    """Whether so many prepared images of every rank of this machine take no more than their share of its memory."""
    num_bytes = num_images * preprocessing.crop**2 * preprocessing.channels
    # What torchrun, and Ray Train, tell each rank.
    num_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return num_bytes * num_ranks <= MEMORY_SHARE * available_memory_mb() * 2**20


_DEFAULT = Augmentation()


def augment(image: Pixels, side: int, rng: np.random.Generator, augmentation: Augmentation = _DEFAULT) -> Pixels:
    """A random view uint8 [side, side, C] of uint8 [S, S, C]: a crop, one of the eight orientations, other colours.

    Only images of three bands have colours.
    Seen from above, no direction is up: all eight orientations of the square are as likely as the one on disk.
    """
    full = image.shape[0]
    area, aspect = rng.uniform(augmentation.min_crop_area, 1), math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
    width, height = (min(full, full * math.sqrt(area * a)) for a in (aspect, 1 / aspect))
    left, top = rng.uniform(0, full - width), rng.uniform(0, full - height)
    cut = resample(image, side, (left, top, left + width, top + height))
    orientation = int(rng.integers(8))
    if augmentation.colour_jitter or augmentation.grayscale:
        cut = np.asarray(_recolour(Image.fromarray(cut), rng, augmentation))
    view = np.rot90(cut, orientation % 4)
    return view[:, ::-1] if orientation >= 4 else view


def _recolour(image: Image.Image, rng: np.random.Generator, augmentation: Augmentation) -> Image.Image:
    strength = augmentation.colour_jitter
    for enhance in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        image = enhance(image).enhance(rng.uniform(1 - strength, 1 + strength))
    if strength:
        turn = round(rng.uniform(-strength, strength) / 5 * 255)
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point(lambda h: (h + turn) % 256)
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if rng.uniform() < augmentation.grayscale:
        image = image.convert("L").convert("RGB")
    return image


def views_of_steps(
    images: Images, steps: Rows, side: int, augmentation: Augmentation, seed: int, epoch: int
) -> Iterator[Pixels]:
    """Views uint8 [b, side, side, C] of the rows of each step, int64 [steps, b]: this rank's share.

    The next step's views are made while the last one's are used, on all cores but one.
    """

    def begin(rows: Rows) -> tuple[Pixels, Iterator[None]]:
        """The views, and what ends when they are made."""
        views = np.empty((len(rows), side, side, images.shape[3]), np.uint8)

        def make(places: Rows) -> None:
            for place in places.tolist():
                row = int(rows[place])
                views[place] = augment(images[row], side, np.random.default_rng([seed, epoch, row]), augmentation)

        return views, pool.map(make, np.array_split(np.arange(len(rows)), num_threads))

    num_threads = max(1, num_decoding_threads() - 1)
    with ThreadPoolExecutor(num_threads) as pool:
        begun = map(begin, steps)
        following = next(begun, None)
        while following is not None:
            (views, made), following = following, next(begun, None)
            list(made)
            yield views
