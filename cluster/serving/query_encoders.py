"""Encoders of queries: the network in this process, or in a pool of actors.

Images and sentences of queries that arrive at the same time are encoded in one pass of the network.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from typing import Any, Literal

import numpy as np

from orbithash.cluster.serving.encoder_pool import EncoderPool, Network
from orbithash.encoders.codes import Codes
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.search.engine.batching import Batcher
from orbithash.search.gateway.decoding import Decoder, Pixels
from orbithash.search.observer import Observer

__all__ = ["LocalEncoder", "PooledEncoder"]

# Maximum number of images or sentences in one pass of the network. A caller with more, such as an upsert, waits for
# each pass before it requests the next one, so that queries of other callers get their turn.
_MAX_BATCH = 16
# Maximum number of images and sentences that wait for a pass.
_MAX_WAITING = 1024


class _Encoder(ABC):
    """An encoder that decodes untrusted images in separate processes and passes only pixels to the network."""

    def __init__(
        self, decoder: Decoder, preprocessing: Preprocessing, has_text: bool, observer: Observer, max_passes: int
    ) -> None:
        """`max_passes`: maximum number of passes of networks that are requested at the same time."""
        self._batcher: Batcher[Any, Codes] = Batcher(self._encode_batch, max_passes, _MAX_WAITING, _MAX_BATCH)
        self._observer = observer
        self._decoder = decoder
        self._preprocessing = preprocessing
        self.has_text = has_text

    async def encode_images(self, images: list[bytes]) -> Codes:
        with self._observer.stage("decode"):
            pixels = await self._decoder.prepare(images, self._preprocessing)
        with self._observer.stage("encode"):
            return await self._encode("image", pixels)

    async def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        with self._observer.stage("decode"):
            pixels, thumbnails = await self._decoder.prepare_rows(images, self._preprocessing)
        with self._observer.stage("encode"):
            return await self._encode("image", pixels), thumbnails

    async def encode_texts(self, texts: list[str]) -> Codes:
        with self._observer.stage("encode"):
            return await self._encode("text", texts)

    async def _encode(self, kind: Literal["image", "text"], items: Pixels | list[str]) -> Codes:
        if not len(items):
            return await self._encode_prepared(np.asarray(items))
        codes: list[Codes] = []
        for start in range(0, len(items), _MAX_BATCH):
            part = items[start : start + _MAX_BATCH]
            codes += await asyncio.gather(*(self._batcher.submit(item, 1, kind, math.inf) for item in part))
        return np.stack(codes)

    async def _encode_batch(self, items: list[Any], sizes: list[int], kind: str, timeout_s: float) -> list[Codes]:
        return list(await (self._encode_texts(items) if kind == "text" else self._encode_prepared(np.stack(items))))

    @abstractmethod
    async def _encode_texts(self, texts: list[str]) -> Codes:
        """Return the codes uint8 [N, B] of sentences."""

    @abstractmethod
    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        """Return the codes uint8 [N, B] of prepared images."""


class LocalEncoder(_Encoder):
    """The network in this process."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, network: Network, observer: Observer) -> None:
        # One pass at a time, because each uses all threads.
        super().__init__(decoder, preprocessing, network.has_text(), observer, max_passes=1)
        self._network = network

    async def _encode_texts(self, texts: list[str]) -> Codes:
        return await asyncio.to_thread(self._network.encode_texts, texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        return await asyncio.to_thread(self._network.encode_prepared, pixels)


class PooledEncoder(_Encoder):
    """The network in actors."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, pool: EncoderPool, observer: Observer) -> None:
        super().__init__(decoder, preprocessing, pool.has_text, observer, pool.max_calls)
        self._pool = pool

    async def _encode_texts(self, texts: list[str]) -> Codes:
        return await self._pool.call("encode_texts", texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        return await self._pool.call("encode_prepared", pixels)
