"""Images in memory, and the batches and augmentation drawn from them.

Every random choice follows from (seed, epoch, place in the epoch). A run that was killed and goes on therefore sees the
very batches it would have seen, and so do two ranks that share the batches of one process.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.images import Limits, read_image
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.trainers.datasets import Image as ManifestImage

__all__ = ["Batch", "Part", "augment", "batches", "load_part"]

Pixels = npt.NDArray[np.uint8]

# Of the image's area; objects of overhead images fill a small part of it, and harder crops lose them.
MIN_CROP_AREA = 0.4


class Part(NamedTuple):
    """One part of a dataset in memory: `images` uint8 [N, S, S, 3], `labels` int64 [N], `ids` their N names."""

    images: Pixels
    labels: npt.NDArray[np.int64]
    ids: list[str]


class Batch(NamedTuple):
    """`images` uint8 [B, S, S, 3] and `labels` int64 [B]."""

    images: Pixels
    labels: npt.NDArray[np.int64]


def load_part(root: Path, images: list[ManifestImage], preprocessing: Preprocessing) -> Part:
    """Decodes and prepares these images; `InputError` that lists all that are refused."""
    side = preprocessing.crop
    pixels = np.empty((len(images), side, side, 3), np.uint8)
    problems = []
    for row, image in enumerate(images):
        try:
            pixels[row] = preprocessing.prepare(read_image(root / image.path, preprocessing.rendering, Limits()))
        except InputError as err:
            problems.append(f"{image.path}: {err}")
    if problems:
        raise listed(problems, f"{root}: images that cannot be trained on")
    return Part(pixels, np.array([image.label for image in images], np.int64), [image.id for image in images])


def augment(image: Pixels, side: int, rng: np.random.Generator) -> Pixels:
    """A random view uint8 [side, side, 3] of uint8 [S, S, 3]: a crop, one of the eight orientations.

    Seen from above, no direction is up: all eight orientations of the square are as likely as the one on disk.
    """
    full = image.shape[0]
    area, aspect = rng.uniform(MIN_CROP_AREA, 1), math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
    width, height = (min(full, full * math.sqrt(area * a)) for a in (aspect, 1 / aspect))
    left, top = rng.uniform(0, full - width), rng.uniform(0, full - height)
    view = np.asarray(
        Image.fromarray(image).resize(
            (side, side), Image.Resampling.BILINEAR, box=(left, top, left + width, top + height)
        )
    )
    orientation = int(rng.integers(8))
    view = np.rot90(view, orientation % 4)
    return view[:, ::-1] if orientation >= 4 else view


def batches(
    part: Part, side: int, batch_size: int, seed: int, epoch: int, rank: int = 0, world_size: int = 1
) -> Iterator[Batch]:
    """This rank's share of an epoch's batches of `batch_size` images over all ranks; the ragged last one is dropped.

    Rank r takes the r-th consecutive piece of every batch. The next batch is made while the last one is used.
    """
    order = np.random.default_rng([seed, epoch]).permutation(len(part.ids))
    share = batch_size // world_size

    def make(start: int) -> Batch:
        rows = order[start + rank * share : start + (rank + 1) * share]
        views = np.empty((share, side, side, 3), np.uint8)
        for i, row in enumerate(rows.tolist()):
            views[i] = augment(part.images[row], side, np.random.default_rng([seed, epoch, row]))
        return Batch(views, part.labels[rows])

    starts = range(0, len(order) - batch_size + 1, batch_size)
    with ThreadPoolExecutor(max_workers=1) as ahead:
        following = ahead.submit(make, starts[0])
        for start in starts[1:]:
            batch, following = following.result(), ahead.submit(make, start)
            yield batch
        yield following.result()
