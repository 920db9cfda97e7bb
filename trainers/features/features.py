"""Features of images by a frozen backbone and of sentences by a frozen text encoder, computed once and kept.

A store holds the rows of one kind (network and its weights, preprocessing, augmentation) by the hash of the image or
sentence. All splits of the same files share it, and a changed file is another row.
"""

import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch

from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.imagery.images import Image as RenderedImage
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.card import ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.reading import read_batches
from orbithash.encoders.networks.text import TextEncoder
from orbithash.encoders.sources.image_roots import ImageRoot
from orbithash.trainers.captions import TRANSLATORS
from orbithash.trainers.data.feature_table import FeatureTable
from orbithash.trainers.datasets import Images
from orbithash.trainers.datasets.hashes import verified
from orbithash.trainers.datasets.layouts import first_problems
from orbithash.trainers.distributed import (
    from_first_rank,
    gather_flags,
    gather_objects,
    on_every_rank,
    rank,
    send_rows,
    world_size,
)
from orbithash.trainers.features.store import HASH, PART_ROWS, FeatureStore, Hashes

__all__ = ["FeatureExtractor", "Table", "Wanted", "caption_features"]

Features = npt.NDArray[np.float32]
Positions = npt.NDArray[np.int64]

# Between two looks at the work of another process: the first pause, which doubles, and the longest. A look sorts the
# hashes of all rows, 1.5 s for a million.
_PAUSE_S, _MAX_PAUSE_S = 0.5, 10.0

# As long as no needed row arrives from the process that is waited for: it may need others, or hang.
_PATIENCE_S = 600.0

_log = logging.getLogger(__name__)


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
        root: ImageRoot,
        images: Images,
        source: Literal["image", "second"] = "image",
        augmentation: str | None = None,
        seed: int = 0,
        *,
        alone: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> FeatureTable:
        """Return features float32 [N, D] of N images; `InputError` names all images that are refused.

        The arguments are those of `wanted`. `on_progress` is called with the number of images that this rank need not
        compute, or has computed.
        """
        return self.wanted(root, images, source, augmentation, seed, alone=alone).table(on_progress)

    def wanted(
        self,
        root: ImageRoot,
        images: Images,
        source: Literal["image", "second"] = "image",
        augmentation: str | None = None,
        seed: int = 0,
        *,
        alone: bool = False,
    ) -> "Wanted":
        """Return the features of images as something to look up, to compute or to load; nothing is computed yet.

        Args:
            root: where the images are.
            images: any images; equal ones have one row.
            source: which file of an image.
            augmentation: the features are of one view per image; `seed` and the hash of the image draw it.
            seed: see `augmentation`.
            alone: compute each image in a pass of its own, as encoders do with an image near a threshold. A code that
                follows from such a row, alone, is that of the image, bit for bit.

        Raises:
            InputError: images of the second source are missing, or the view does not fit them.
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
        kind: dict[str, Any] = {**self._kind, "view": None if augmentation is None else [augmentation, seed]}
        hashes = (images.sha256s if source == "image" else images.second_sha256s).view(HASH)
        if source == "second" and isinstance(root, Path):
            on_every_rank(partial(_check_seconds, root, images))
        if alone:
            # Kernels of other devices, processors and versions round differently.
            kind["alone"] = _kernels(self._model.device)
        elif self._model.card.precision == "bfloat16":
            # Devices differ by more than encoding is checked for.
            kind["device"] = self._model.device.type

        def compute(missing: Positions) -> Iterator[Features]:
            # What is kept under a hash is of the file with this hash. Single items of S32 lose zeros at their end.
            sha256s = hashes[missing].view("V32").tolist()

            def change(row: int, image: RenderedImage) -> RenderedImage:
                assert augmentation is not None, "used only with an augmentation"
                return view(augmentation, image, np.random.default_rng([seed, *sha256s[row]]))

            read = images[missing]
            batches = read_batches(
                [name or "" for name in (read.paths if source == "image" else read.seconds)],
                self._preprocessing,
                root=root,
                change=None if augmentation is None else change,
                verify=lambda row, file: verified(file, sha256s[row]),
            )
            yield from (self._model.features(batch, batch_size=1 if alone else None) for batch in batches)

        return Wanted(kind, hashes, self._model.num_features, compute)


def _check_seconds(root: Path, images: Images) -> None:
    names = [name or "" for name in images.seconds]
    if absent := [f"{name}: no such file" for name in names if not (root / name).exists()]:
        raise listed(first_problems(absent), f"{root}: images that cannot be read")


def _kernels(device: torch.device) -> list[str]:
    """Return what decides how a pass of one image is rounded."""
    processor = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    return [device.type, processor, torch.__version__]


def caption_features(encoder: TextEncoder, captions: Sequence[Sequence[str]]) -> FeatureTable:
    """Return features float32 [N, C, D] of the captions of N images, each of which has at least one.

    C is the maximum number of captions of an image; the captions of an image with fewer are repeated.
    """
    num_captions = max((len(of_image) for of_image in captions), default=1)
    sentences = [of_image[i % len(of_image)] for of_image in captions for i in range(num_captions)]
    hashes = np.array([hashlib.sha256(sentence.encode()).digest() for sentence in sentences], HASH)
    wanted = Wanted(
        {"text_encoder": encoder.sha256},
        hashes,
        encoder.num_features,
        lambda missing: iter([encoder.encode([sentences[i] for i in missing])] if len(missing) else []),
    )
    return wanted.table().reshape(len(captions), num_captions)


class Wanted:
    """Rows of one kind that something needs, one for each distinct hash, and how those that are not kept are computed.

    `compute` yields the rows of the given positions in `hashes`, in their order, each with `num_features`.
    """

    def __init__(
        self,
        kind: dict[str, Any],
        hashes: Hashes,
        num_features: int,
        compute: Callable[[Positions], Iterator[Features]],
    ) -> None:
        self._hashes, self._num_features, self._compute = hashes, num_features, compute
        self._positions = np.sort(np.unique(hashes, return_index=True)[1])
        self._store = FeatureStore(kind)

    def __len__(self) -> int:
        return len(self._positions)

    def missing(self) -> Positions:
        """Return the positions, int64 ascending, of the rows that are not kept now; one for each hash.

        `InputError`: the store is a bucket that does not answer.
        """
        self._store.share()
        self._store.refresh()
        return self._positions[self._store.find(self._hashes[self._positions]) < 0]

    def upload(self) -> None:
        """Upload what is kept here only; from now on, an upload that fails is an `InputError` of this and of `keep`."""
        self._store.share(only_upload=True)

    def num_bytes(self, num_rows: int) -> int:
        """Return the size of rows in the store."""
        return num_rows * (HASH.itemsize + 4 * self._num_features)

    def make_room(self, num_bytes: int) -> None:
        """Prune other kinds until `num_bytes` more fit into the limit; `InputError` if they cannot."""
        self._store.make_room(num_bytes)

    def keep(self, positions: Positions) -> None:
        """Compute the rows of these positions and keep them, a part at a time; first `make_room` for all of them."""
        _keep(self._store, self._hashes[positions], self._compute(positions), 0, None)

    def table(self, on_progress: Callable[[int], None] | None = None) -> FeatureTable:
        """Return one row per hash: kept rows, and missing rows, which the ranks compute together and keep.

        While another process computes rows of this kind, it is waited for as long as needed rows arrive: what it keeps
        is not computed again. Each rank writes what it computes. Ranks whose stores are other folders, on other
        machines, then exchange the rows that a store lacks. `InputError` names all images that are refused.
        """
        store, hashes, positions = self._store, self._hashes, self._positions
        needed = hashes[positions]
        on_every_rank(store.share)
        with ExitStack() as turn:
            lacks = ~gather_flags(store.find(needed) >= 0).any(axis=0)
            if lacks.any():
                from_first_rank(lambda: _take_turn(store, needed[lacks], turn))
                store.refresh()
            missing = positions[~gather_flags(store.find(needed) >= 0).any(axis=0)]
            mine = missing[rank() :: world_size()]
            known = len(hashes) - len(mine)
            if on_progress is not None and known:
                on_progress(known)
            if len(missing):
                # Before hours of work, and before any rank has written: each store gets the rows of all ranks.
                on_every_rank(lambda: self.make_room(self.num_bytes(len(missing))))

                def keep_mine() -> None:
                    _keep(store, hashes[mine], self._compute(mine), known, on_progress)

                on_every_rank(keep_mine)
                store.refresh()
                on_every_rank(store.try_share)
            # Another process whose turn it is finds all rows in its store.
            _exchange(store, needed)
        rows = store.find(hashes)
        if (rows < 0).any():
            raise InputError(
                f"{store.folder}: rows that were written are not there; is something else changing the folder?"
            )
        return store.table(rows)


def _take_turn(store: FeatureStore, lacking: Hashes, turn: ExitStack) -> None:
    """Wait until no other process computes rows of this kind, or none lacks; in `turn`, other processes wait.

    If none of the rows arrives for `_PATIENCE_S`, go on without a turn: rows that two compute do no harm.
    """
    pause, last_arrival = 0.0, time.monotonic()
    while (release := store.claim()) is None:
        store.refresh()
        has = store.find(lacking) >= 0
        if has.all():
            return
        if has.any():
            lacking, last_arrival = lacking[~has], time.monotonic()
        if time.monotonic() - last_arrival > _PATIENCE_S:
            _log.warning("%s: none of them came in %g s; computing them here", store.folder, _PATIENCE_S)
            return
        if not pause:
            _log.warning(
                "%s: waiting for features of another run, until none has come for %g s", store.folder, _PATIENCE_S
            )
        pause = min(2 * pause or _PAUSE_S, _MAX_PAUSE_S)
        time.sleep(pause)
    turn.callback(release)


def _keep(
    store: FeatureStore,
    hashes: Hashes,
    blocks: Iterator[Features],
    known: int,
    on_progress: Callable[[int], None] | None,
) -> None:
    """Write the rows of the blocks, a part at a time, so that little is lost if the process ends."""
    waiting: list[Features] = []
    start = done = 0
    for block in blocks:
        waiting.append(block)
        done += len(block)
        if done - start >= PART_ROWS:
            store.add(hashes[start:done], np.concatenate(waiting))
            waiting, start = [], done
        if on_progress is not None:
            on_progress(known + done)
    if waiting:
        store.add(hashes[start:done], np.concatenate(waiting))


def _exchange(store: FeatureStore, needed: Hashes) -> None:
    """Give every rank the rows that its store lacks and that of another rank has."""
    has = gather_flags(store.find(needed) >= 0)
    if has.all():
        return
    widths = gather_objects(store.num_features)
    problem: InputError | None = None
    # The first rank that has a row sends it, a part at a time.
    owners = np.where(has.all(axis=0), -1, has.argmax(axis=0))
    for source in range(world_size()):
        sent = np.flatnonzero((owners == source) & has[source])
        for start in range(0, len(sent), PART_ROWS):
            some = sent[start : start + PART_ROWS]
            own = store.find(needed[some])
            rows = store.table(own)[:] if rank() == source else np.empty((len(some), widths[source]), np.float32)
            rows = send_rows(rows, source)
            if problem is None and (lacks := own < 0).any():
                try:
                    store.add(needed[some][lacks], rows[lacks])
                except InputError as err:
                    # All ranks must take part until the last row.
                    problem = err

    def check() -> None:
        if problem is not None:
            raise problem

    on_every_rank(check)
    store.refresh()
