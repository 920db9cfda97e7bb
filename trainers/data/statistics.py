"""Mean and standard deviation of each band, over a sample of the training part."""

import dataclasses
import hashlib
import json
import math
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder, write_file
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.networks.reading import read_batches, read_prepared
from orbithash.encoders.sources.image_roots import ImageRoot, sources_of
from orbithash.trainers.datasets.hashes import verified

__all__ = ["Moments", "band_statistics"]

MAX_IMAGES = 512

# A band whose deviation is below this share of its mean is constant.
_CONSTANT = 1e-6


@dataclasses.dataclass(frozen=True)
class Moments:
    """Mean and standard deviation of each channel, in the unit of the values."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def band_statistics(
    paths: Sequence[str], hashes: Sequence[str], preprocessing: Preprocessing, root: ImageRoot
) -> Moments:
    """Return the moments of prepared images over at most `MAX_IMAGES` of them, which depend on their number only.

    Missing pixels are left out. A constant band has deviation 1, and a band without values mean 0. Moments have six
    digits, which do not depend on the machine, and are cached by the hashes of the images and the preprocessing.

    Raises:
        InputError: some of the images are refused; names all of them, but only the first image if that one is
            refused: often all images lack the same band or scale.
    """
    rows = np.sort(np.random.default_rng(0).permutation(len(paths))[:MAX_IMAGES]).tolist()
    kind = [preprocessing.to_json(), [hashes[row] for row in rows]]
    digest = hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:32]
    file = cache_folder() / "statistics" / f"{digest}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        fields = json.loads(file.read_bytes())
        return Moments(*(tuple(map(float, fields[name])) for name in ("mean", "std")))

    def verify(row: int, file: Path | bytes) -> Path | bytes:
        return verified(file, bytes.fromhex(hashes[rows[row]]))

    for name in [paths[row] for row in rows[:1]]:
        try:
            read_prepared(sources_of(root, [name])[0], preprocessing)
        except InputError as error:
            raise InputError(f"{root}: images that cannot be read, the first: {name}: {error}") from error
    total = _Total(preprocessing.channels)
    for batch in read_batches([paths[row] for row in rows], preprocessing, root=root, verify=verify):
        for image in batch:
            total.add(image)
    moments = total.moments()
    # A cache that cannot be written costs time only.
    with suppress(OSError):
        write_file(file, json.dumps(dataclasses.asdict(moments)), durable=False)
    return moments


class _Total:
    """Sums over images, merged as Chan et al. (1979) do, so that no digits are lost to large means."""

    def __init__(self, channels: int) -> None:
        self._counts, self._means, self._squares = (np.zeros(channels) for _ in range(3))

    def add(self, image: Pixels) -> None:
        """Add one image [H, W, C]."""
        values = image.reshape(-1, image.shape[2]).astype(np.float64)
        there = np.isfinite(values)
        counts = there.sum(axis=0)
        means = np.where(there, values, 0).sum(axis=0) / np.maximum(counts, 1)
        squares = (np.where(there, values - means, 0) ** 2).sum(axis=0)
        sums = self._counts + counts
        difference = np.where(counts > 0, means - self._means, 0)
        self._means += difference * counts / np.maximum(sums, 1)
        self._squares += squares + difference**2 * self._counts * counts / np.maximum(sums, 1)
        self._counts = sums

    def moments(self) -> Moments:
        """Return the moments of all images."""
        stds = np.sqrt(self._squares / np.maximum(self._counts, 1))
        constant = stds <= _CONSTANT * np.abs(self._means)
        mean, std = (
            tuple(float(f"{value:.6g}") for value in values) for values in (self._means, np.where(constant, 1, stds))
        )
        assert all(map(math.isfinite, (*mean, *std))), "squares of float32 values fit into float64"
        return Moments(mean, std)
