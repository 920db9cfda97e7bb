"""Frozen features, computed once: of images by a backbone, of sentences by a text encoder.

A cache file holds the rows of one kind (network and its weights, preprocessing, augmentation), each under the hash of
its image or sentence. Splits of the same files therefore share it, and a changed file is another row.
"""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import write_file
from orbithash.encoders.imagery.images import Limits, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.captions import TRANSLATORS
from orbithash.trainers.datasets import Image
from orbithash.trainers.datasets.layouts import cut
from orbithash.trainers.distributed import gather_objects, gather_rows, rank, world_size

__all__ = ["FeatureExtractor", "Table", "cache_folder", "caption_features"]

Features = npt.NDArray[np.float32]

# Images decoded at a time.
CHUNK = 64


@dataclass(frozen=True)
class Table:
    """Which features a method trains on.

    `source`: the images, their second source, or their captions. A table of which validation knows nothing is
    `training_only`.

    Of images: `augmentation` names one of `views.VIEWS`; `preprocessing` and `backbone` are the method's own where they
    are None. A backbone that is not has its `weights`, random ones where they are None.

    Of captions: `augmentation` names one of `captions.KINDS`; `translators` and `glove` are what `augment_captions`
    makes it with.
    """

    source: Literal["image", "second", "caption"]
    augmentation: str | None = None
    training_only: bool = False
    preprocessing: Preprocessing | None = None
    backbone: str | None = None
    weights: str | None = None
    translators: str = TRANSLATORS
    glove: str | None = None


def cache_folder() -> Path:
    """Where features are kept: ORBITHASH_CACHE, or `orbithash` in the user's cache folder."""
    if given := os.environ.get("ORBITHASH_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "orbithash"


class FeatureExtractor:
    """Pooled features of a network's backbone with the weights it has now, in evaluation mode."""

    def __init__(self, network: HashNetwork, preprocessing: Preprocessing, device: str = "cpu") -> None:
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
        )
        self._model = HashModel(card, network, device=device)
        self._preprocessing = preprocessing
        digest = hashlib.sha256()
        for name, tensor in network.backbone.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().contiguous().numpy().tobytes())
        spec = network.spec
        self._kind = {
            "backbone": [spec.backbone, spec.norm, spec.pooling, digest.hexdigest()],
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
        """Features float32 [N, D]; `InputError` that lists all images that are refused.

        With an augmentation, the one view of each image that `seed` and the image's hash draw.
        """
        from orbithash.trainers.data.views import view

        if augmentation is not None and self._preprocessing.channels != 3:
            raise InputError(
                f"the view {augmentation!r} needs images of three bands, and bands has "
                f"{self._preprocessing.channels}; take three"
            )
        kind = {**self._kind, "view": None if augmentation is None else [augmentation, seed]}
        if source == "image":
            paths, hashes = [root / image.path for image in images], [image.sha256 for image in images]
        else:
            paths = [root / (image.second or "") for image in images]
            if absent := [f"{path.relative_to(root)}: absent" for path in paths if not path.exists()]:
                raise listed(cut(absent), f"{root}: images that cannot be trained on")
            hashes = [image.second_sha256 or "" for image in images]

        def compute(missing: list[int]) -> Features:
            rows, problems = [], []
            for start in range(0, len(missing), CHUNK):
                prepared = []
                for i in missing[start : start + CHUNK]:
                    try:
                        image = read_image(paths[i], self._preprocessing.rendering, Limits())
                    except InputError as err:
                        problems.append(f"{paths[i].relative_to(root)}: {err}")
                        continue
                    if augmentation is not None:
                        image = view(augmentation, image, np.random.default_rng([seed, *bytes.fromhex(hashes[i])]))
                    prepared.append(image)
                rows.append(self._model.features(self._model.prepare(prepared)))
            if problems:
                raise listed(problems, f"{root}: images that cannot be trained on")
            return np.concatenate(rows) if rows else np.empty((0, 0), np.float32)

        return _cached(kind, hashes, compute)


def caption_features(encoder: TextEncoder, captions: Sequence[Sequence[str]]) -> Features:
    """Features float32 [N, C, D] of the captions of N images.

    C is the most captions that one of them has; the captions of an image with fewer are repeated. Each image has one.
    """
    most = max((len(of_image) for of_image in captions), default=1)
    sentences = [of_image[i % len(of_image)] for of_image in captions for i in range(most)]
    hashes = [hashlib.sha256(sentence.encode()).hexdigest() for sentence in sentences]
    features = _cached(
        {"text_encoder": encoder.sha256}, hashes, lambda missing: encoder.encode([sentences[i] for i in missing])
    )
    return features.reshape(len(captions), most, -1)


def _cached(kind: dict[str, Any], hashes: list[str], compute: Callable[[list[int]], Features]) -> Features:
    """A row for each hash: from the cache, the missing ones computed, each rank its share, and added to it."""
    path = cache_folder() / "features" / f"{hashlib.sha256(json.dumps(kind).encode()).hexdigest()[:32]}.safetensors"
    known, rows = _read(path)
    first = {hash: position for position, hash in reversed(list(enumerate(hashes)))}
    # Ranks on other machines have caches of their own.
    lacking = set().union(*gather_objects(set(first) - known.keys()))
    if lacking:
        missing = sorted(first[hash] for hash in lacking)
        computed = _gather_floats(compute(missing[rank() :: world_size()]))
        rows = np.concatenate([rows, computed]) if len(rows) else computed
        # A row that only another rank lacked is here twice: the later one is taken.
        known |= {hashes[position]: len(rows) - len(missing) + i for i, position in enumerate(missing)}
        if rank() == 0:
            _write(path, known, rows)
    return rows[[known[hash] for hash in hashes]] if hashes else np.empty((0, 0), np.float32)


def _gather_floats(rows: Features) -> Features:
    """Rows of every rank, dealt round robin, back in order."""
    if world_size() == 1:
        return rows
    # A rank without a share does not know how wide a row is.
    width = max(gather_objects(rows.shape[1]))
    return gather_rows(rows if len(rows) else np.empty((0, width), np.float32))


def _read(path: Path) -> tuple[dict[str, int], Features]:
    try:
        tensors = load_file(path)
        hashes, rows = tensors["hashes"], tensors["features"]
        if len(hashes) != len(rows):
            raise ValueError("not a hash for each row")
    except FileNotFoundError:
        return {}, np.empty((0, 0), np.float32)
    except (OSError, SafetensorError, KeyError, ValueError):
        # A cache that cannot be read is only lost time.
        return {}, np.empty((0, 0), np.float32)
    return {bytes(hash).hex(): row for row, hash in enumerate(hashes)}, rows


def _write(path: Path, known: dict[str, int], rows: Features) -> None:
    """Replaces the file as a whole; of two writers the later wins, and what the other added is computed again."""
    hashes = np.array([list(bytes.fromhex(hash)) for hash in known], np.uint8)
    try:
        write_file(path, save({"hashes": hashes, "features": np.ascontiguousarray(rows[list(known.values())])}))
    except OSError as err:
        raise InputError(
            f"{path.parent}: features cannot be kept there ({err.strerror}); set ORBITHASH_CACHE to a folder with room"
        ) from err
