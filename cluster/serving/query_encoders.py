"""Encoders of queries: the network in this process, or in a pool of actors.

Items of queries that arrive at the same time are encoded in one pass of the network.
"""

import asyncio
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import islice, pairwise
from typing import Any

import numpy as np

from orbithash.cluster.serving.encoder_pool import EncoderPool, Inputs, Network
from orbithash.encoders.codes import Encoded, Kind
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.sources.listings import Item
from orbithash.search.engine.batching import Batcher
from orbithash.search.engine.protocols import Covered, Picture
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.image_roots import ImageRoots
from orbithash.search.observer import Observer

__all__ = ["LocalEncoder", "PooledEncoder", "covered"]

# Maximum number of items in one pass of the network: those that arrive together, or while a pass runs.
_MAX_BATCH = 64
# Maximum number of rows of one upsert in a pass. The upsert waits for each pass before it requests the next one, so
# that queries get their turn soon.
_MAX_ROWS = 16
# Maximum number of items that wait for a pass, and size of the decoded images that wait, in bytes. Further images wait
# until they are decoded.
_MAX_WAITING, _MAX_DECODED_BYTES = 1024, 512 * 2**20


class _Encoder(ABC):
    """An encoder that decodes untrusted images in separate processes and passes only pixels to the network."""

    def __init__(
        self,
        decoder: Decoder,
        preprocessing: Preprocessing,
        inputs: Inputs,
        observer: Observer,
        max_passes: int,
        roots: ImageRoots | None,
    ) -> None:
        """Create an encoder.

        Args:
            decoder: decodes images.
            preprocessing: of the model.
            inputs: what the model takes.
            observer: receives the time of each stage.
            max_passes: maximum number of passes of networks that are requested at the same time.
            roots: where images of rows may be read; None: nowhere.
        """
        self._batcher: Batcher[Any, Encoded] = Batcher(self._encode_batch, max_passes, _MAX_WAITING, _MAX_BATCH)
        self._observer = observer
        self._decoder = decoder
        self._preprocessing = preprocessing
        # Decoded images for which there is room. Callers take what they need one after the other.
        self._room = asyncio.Semaphore(max(_MAX_BATCH, _MAX_DECODED_BYTES // preprocessing.num_bytes))
        self._taking_room = asyncio.Lock()
        self._roots = roots or ImageRoots()
        self.has_text, self.num_features, self.embedding = inputs
        self.has_views = bool(self._roots)

    async def encode(self, kind: Kind, items: list[Any], with_outputs: bool = False) -> Encoded:
        """See `QueryEncoder.encode`."""
        encoded = []
        for part in _parts(items, _MAX_BATCH):
            if kind != "image":
                encoded.append(await self._encode(kind, part, with_outputs))
                continue
            async with self._room_for(len(part)):
                with self._observer.stage("decode"):
                    pixels = list(await self._decoder.prepare(part, self._preprocessing))
                encoded.append(await self._encode(kind, pixels, with_outputs))
        return Encoded.joined(encoded)

    async def encode_rows(self, images: list[bytes]) -> tuple[Encoded, list[bytes]]:
        """See `QueryEncoder.encode_rows`."""
        encoded: list[Encoded] = []
        thumbnails: list[bytes] = []
        for part in _parts(images, _MAX_ROWS):
            async with self._room_for(len(part)):
                with self._observer.stage("decode"):
                    pixels, some = await self._decoder.prepare_rows(part, self._preprocessing)
                thumbnails += some
                encoded.append(await self._encode("image", list(pixels), with_outputs=False))
        return Encoded.joined(encoded), thumbnails

    async def view(self, source: bytes | str, max_side: int) -> Picture | None:
        """See `QueryEncoder.view`."""
        found = self._found(source)
        if found is None:
            return None
        with self._observer.stage("decode"):
            return await self._decoder.picture(found, self._preprocessing.rendering, max_side)

    async def cover(self, source: bytes | str, cells: int) -> Covered | None:
        """See `QueryEncoder.cover`."""
        found = self._found(source)
        if found is None:
            return None
        async with self._room_for(_MAX_ROWS):
            with self._observer.stage("decode"):
                pixels, width, height = await self._decoder.prepare_one(found, self._preprocessing)
            encoded = [await self._encode("image", [pixels], with_outputs=True)]
            # A few at a time, so that queries get their turn.
            images = covered(pixels, cells)
            while part := list(islice(images, _MAX_ROWS)):
                encoded.append(await self._encode("image", part, with_outputs=True))
        outputs = Encoded.joined(encoded).outputs
        assert outputs is not None, "outputs were requested"
        side = self._preprocessing.crop / self._preprocessing.resize * min(width, height)
        left, top = (width - side) / 2 / width, (height - side) / 2 / height
        return Covered(outputs, (left, top, 1 - left, 1 - top))

    def _found(self, source: bytes | str) -> bytes | Item | None:
        return source if isinstance(source, bytes) else self._roots.find(source)

    @asynccontextmanager
    async def _room_for(self, num_images: int) -> AsyncIterator[None]:
        """Wait until there is memory for decoded images, and take it for the block."""
        num_taken = 0
        try:
            async with self._taking_room:
                while num_taken < num_images:
                    await self._room.acquire()
                    num_taken += 1
            yield
        finally:
            for _ in range(num_taken):
                self._room.release()

    async def _encode(self, kind: Kind, items: list[Any], with_outputs: bool) -> Encoded:
        """Return the codes of items of one part."""
        with self._observer.stage("encode"):
            submitted = (self._batcher.submit(item, 1, (kind, with_outputs), math.inf) for item in items)
            return Encoded.joined(await asyncio.gather(*submitted))

    async def _encode_batch(
        self, items: list[Any], sizes: list[int], group: tuple[Kind, bool], timeout_s: float
    ) -> list[Encoded]:
        kind, with_outputs = group
        encoded = await self._run_network(kind, items if kind == "text" else np.stack(items), with_outputs)
        return encoded.split()

    @abstractmethod
    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        """Return what `HashModel.encode_items` returns for prepared items."""


def covered(pixels: Pixels, cells: int) -> Iterator[Pixels]:
    """Yield a prepared image [H, W, C] with one of `cells` x `cells` parts in its mean colour, row by row."""
    with warnings.catch_warnings():
        # A band without a valid pixel stays without one.
        warnings.simplefilter("ignore", RuntimeWarning)
        mean = np.nanmean(pixels, axis=(0, 1))
    rows, columns = (np.linspace(0, side, cells + 1).round().astype(int).tolist() for side in pixels.shape[:2])
    for top, bottom in pairwise(rows):
        for left, right in pairwise(columns):
            image = pixels.copy()
            image[top:bottom, left:right] = mean.astype(pixels.dtype)
            yield image


def _parts(items: list[Any], size: int) -> list[list[Any]]:
    return [items[start : start + size] for start in range(0, len(items), size)]


class LocalEncoder(_Encoder):
    """The network in this process."""

    def __init__(
        self,
        decoder: Decoder,
        preprocessing: Preprocessing,
        network: Network,
        observer: Observer,
        roots: ImageRoots | None = None,
    ) -> None:
        # One pass at a time, because each uses all threads.
        super().__init__(decoder, preprocessing, network.inputs(), observer, 1, roots)
        self._network = network

    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        return await asyncio.to_thread(self._network.encode, kind, items, with_outputs)


class PooledEncoder(_Encoder):
    """The network in actors."""

    def __init__(
        self,
        decoder: Decoder,
        preprocessing: Preprocessing,
        pool: EncoderPool,
        observer: Observer,
        roots: ImageRoots | None = None,
    ) -> None:
        super().__init__(decoder, preprocessing, pool.inputs, observer, pool.max_calls, roots)
        self._pool = pool

    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        return await self._pool.encode(kind, items, with_outputs)
