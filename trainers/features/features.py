"""Features of images by a frozen backbone and of sentences by a frozen text encoder, computed once and cached.

A cache file holds the rows of one kind (network and its weights, preprocessing, augmentation) by the hash of the image
or sentence. All splits of the same files share it, and a changed file is another row.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import cache_folder, write_file
from orbithash.encoders.imagery.images import Image as RenderedImage
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.reading import read_batches
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.captions import TRANSLATORS
from orbithash.trainers.datasets import Image
from orbithash.trainers.datasets.layouts import first_problems
from orbithash.trainers.distributed import from_first_rank, gather_objects, gather_rows, on_every_rank, rank, world_size

__all__ = ["FeatureExtractor", "Table", "caption_features"]

Features = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Table:
    """The features that a method trains on.

    Attributes:
        source: images, their second source, or their captions.
        augmentation: for images one of `views.VIEWS`, for captions one of `captions.KINDS`; None: unchanged.
        draw: number of the random draw of the augmentation; tables of one augmentation differ by it.
        training_only: whether validation does without this table.
        optional: whether a table of captions is left out where an image has none.
        preprocessing: of images; None: the method's.
        backbone: of images; None: the method's, with its weights.
        weights: of `backbone`; None: random.
        translators: of captions, see `augment_captions`.
        glove: of captions, see `augment_captions`.
    """

    source: Literal["image", "second", "caption"]
    augmentation: str | None = None
    draw: int = 0
    training_only: bool = False
    optional: bool = False
    preprocessing: Preprocessing | None = None
    backbone: str | None = None
    weights: str | None = None
    translators: str = TRANSLATORS
    glove: str | None = None


class FeatureExtractor:
    """Compute pooled features with the backbone of a network and its current weights, in evaluation mode."""

    def __init__(
        self,
        network: HashNetwork,
        preprocessing: Preprocessing,
        device: str | torch.device = "cpu",
        precision: str = "float32",
    ) -> None:
        card = ModelCard(
            method="features",
            network=network.spec,
            thresholds=(0.0,) * network.spec.bits,
            label_code="none",
            label_weight=1,
            preprocessing=preprocessing,
            classes=(),
            dataset={},
            metrics={},
            precision=precision,
        )
        self._model = HashModel(card, network, device=device)
        self._preprocessing = preprocessing
        digest = hashlib.sha256()
        for name, tensor in network.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        spec = network.backbone.spec
        self._kind = {
            "backbone": [spec.source, spec.name, spec.config, spec.norm, spec.pooling, digest.hexdigest(), precision],
            "preprocessing": preprocessing.to_json(),
        }

    def __call__(
        self,
        root: Path,
        images: Sequence[Image],
        source: Literal["image", "second"] = "image",
        augmentation: str | None = None,
        seed: int = 0,
    ) -> Features:
        """Return features float32 [N, D] of N images; `InputError` names all images that are refused.

        With an augmentation, the features are of one view per image; `seed` and the hash of the image draw it.
        """
        from orbithash.trainers.data.views import view

        if augmentation is not None and not self._preprocessing.rendering.is_picture:
            raise InputError(
                f"the view {augmentation!r} changes pictures, and values is {self._preprocessing.rendering.values}; "
                "set values=picture, or choose a method without views"
            )
        if augmentation is not None and self._preprocessing.channels != 3:
            raise InputError(
                f"the view {augmentation!r} needs images of three bands, and bands has "
                f"{self._preprocessing.channels}; choose three bands or another view"
            )
        kind = {**self._kind, "view": None if augmentation is None else [augmentation, seed]}
        if source == "image":
            paths, hashes = [root / image.path for image in images], [image.sha256 for image in images]
        else:
            paths = [root / (image.second or "") for image in images]
            if absent := [f"{path.relative_to(root)}: no such file" for path in paths if not path.exists()]:
                raise listed(first_problems(absent), f"{root}: images that cannot be read")
            hashes = [image.second_sha256 or "" for image in images]

        def compute(missing: list[int]) -> Features:
            def change(row: int, image: RenderedImage) -> RenderedImage:
                assert augmentation is not None, "used only with an augmentation"
                return view(augmentation, image, np.random.default_rng([seed, *bytes.fromhex(hashes[missing[row]])]))

            batches = read_batches(
                [paths[i] for i in missing],
                self._preprocessing,
                root=root,
                change=None if augmentation is None else change,
            )
            rows = [self._model.features(batch) for batch in batches]
            return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

        return _cached(kind, hashes, compute)

    def cached(self, images: Sequence[Image]) -> tuple[list[int], Features]:
        """Return the positions of the images whose features are cached, and these features float32 [M, D]."""
        known, rows = _read(_cache_file({**self._kind, "view": None}))
        positions = [position for position, image in enumerate(images) if image.sha256 in known]
        return positions, rows[[known[images[position].sha256] for position in positions]]


def _cache_file(kind: dict[str, Any]) -> Path:
    return cache_folder() / "features" / f"{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:32]}.safetensors"


def caption_features(encoder: TextEncoder, captions: Sequence[Sequence[str]]) -> Features:
    """Return features float32 [N, C, D] of the captions of N images, each of which has at least one.

    C is the maximum number of captions of an image; the captions of an image with fewer are repeated.
    """
    num_captions = max((len(of_image) for of_image in captions), default=1)
    sentences = [of_image[i % len(of_image)] for of_image in captions for i in range(num_captions)]
    hashes = [hashlib.sha256(sentence.encode()).hexdigest() for sentence in sentences]
    features = _cached(
        {"text_encoder": encoder.sha256}, hashes, lambda missing: encoder.encode([sentences[i] for i in missing])
    )
    return features.reshape(len(captions), num_captions, -1)


def _cached(kind: dict[str, Any], hashes: list[str], compute: Callable[[list[int]], Features]) -> Features:
    """Return one row per hash: cached rows, and missing rows, which the ranks compute together and add to the cache.

    `compute` returns the rows of the given positions in `hashes`. Ranks on different machines may have different
    caches: what one of them lacks is computed, and each cache that lacks rows is completed.
    """
    path = _cache_file(kind)
    known, rows = _read(path)
    first = {hash: position for position, hash in reversed(list(enumerate(hashes)))}
    lacking = set().union(*gather_objects(set(first) - known.keys()))
    if lacking:
        missing = sorted(first[hash] for hash in lacking)
        computed = _gather_floats(on_every_rank(lambda: compute(missing[rank() :: world_size()])))
        rows = np.concatenate([rows, computed]) if len(rows) else computed
        # A row that only another rank lacked is in `rows` twice: use the later one, the same on every rank.
        known |= {hashes[position]: len(rows) - len(missing) + i for i, position in enumerate(missing)}

        def complete() -> None:
            if not known.keys() <= _read_hashes(path):
                _write(path, known, rows)

        # The first rank writes first: in a cache that ranks share, the others find its rows.
        from_first_rank(complete)
        on_every_rank(complete)
    return rows[[known[hash] for hash in hashes]] if hashes else np.empty((0, 0), np.float32)


def _gather_floats(rows: Features) -> Features:
    """Merge rows that were dealt to the ranks round robin."""
    if world_size() == 1:
        return rows
    # A rank without rows does not know their width.
    width = max(gather_objects(rows.shape[1]))
    return gather_rows(rows if len(rows) else np.empty((0, width), np.float32))


def _read(path: Path) -> tuple[dict[str, int], Features]:
    """Return the row number of each hash, and the rows; nothing for a cache that is missing or damaged."""
    try:
        tensors = load_file(path)
        hashes, rows = tensors["hashes"], tensors["features"]
        if len(hashes) != len(rows):
            raise ValueError("not one hash per row")
    except (OSError, SafetensorError, KeyError, ValueError):
        # The rows are computed again.
        return {}, np.empty((0, 0), np.float32)
    return {bytes(hash).hex(): row for row, hash in enumerate(hashes)}, rows


def _read_hashes(path: Path) -> set[str]:
    """Return the hashes of a cache, none for a cache that is missing or damaged."""
    try:
        with safe_open(path, "np") as tensors:
            hashes = tensors.get_tensor("hashes")
            if len(hashes) != tensors.get_slice("features").get_shape()[0]:
                return set()
            return {bytes(hash).hex() for hash in hashes}
    except (OSError, SafetensorError, KeyError, ValueError):
        return set()


def _write(path: Path, known: dict[str, int], rows: Features) -> None:
    """Replace the cache file. If two runs write it at once, the later one wins and lost rows are computed again."""
    hashes = np.array([list(bytes.fromhex(hash)) for hash in known], np.uint8)
    content = save({"hashes": hashes, "features": np.ascontiguousarray(rows[list(known.values())])})
    try:
        write_file(path, content)
    except OSError as err:
        raise InputError(
            f"{path.parent}: features cannot be written there ({err.strerror}); set ORBITHASH_CACHE to a folder on a "
            "disk with free space"
        ) from err
