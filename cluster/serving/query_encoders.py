"""Encoders of queries: the network in this process, or in a pool of actors."""

import asyncio
from abc import ABC, abstractmethod

import numpy as np

from orbithash.cluster.serving.encoder_pool import EncoderPool, Network
from orbithash.encoders.codes import Codes
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.search.gateway.decoding import Decoder, Pixels
from orbithash.search.observer import Observer

__all__ = ["LocalEncoder", "PooledEncoder"]

# Maximum number of images of one caller in a row, before other callers get their turn.
_TURN_IMAGES = 16


class _Encoder(ABC):
    """An encoder that decodes untrusted images in separate processes and passes only pixels to the network."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, has_text: bool, observer: Observer) -> None:
        self._observer = observer
        self._decoder = decoder
        self._preprocessing = preprocessing
        self.has_text = has_text

    async def encode_images(self, images: list[bytes]) -> Codes:
        with self._observer.stage("decode"):
            pixels = await self._decoder.prepare(images, self._preprocessing)
        with self._observer.stage("encode"):
            return await self._encode_prepared(pixels)

    async def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        with self._observer.stage("decode"):
            pixels, thumbnails = await self._decoder.prepare_rows(images, self._preprocessing)
        with self._observer.stage("encode"):
            return await self._encode_prepared(pixels), thumbnails

    async def encode_texts(self, texts: list[str]) -> Codes:
        with self._observer.stage("encode"):
            return await self._encode_texts(texts)

    @abstractmethod
    async def _encode_texts(self, texts: list[str]) -> Codes:
        """Return the codes uint8 [N, B] of sentences."""

    @abstractmethod
    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        """Return the codes uint8 [N, B] of prepared images."""


class LocalEncoder(_Encoder):
    """The network in this process."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, network: Network, observer: Observer) -> None:
        super().__init__(decoder, preprocessing, network.has_text(), observer)
        self._network = network
        # One call at a time, because each call uses all threads.
        self._turn = asyncio.Semaphore(1)

    async def _encode_texts(self, texts: list[str]) -> Codes:
        async with self._turn:
            return await asyncio.to_thread(self._network.encode_texts, texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        codes = []
        # In small parts, so that a query does not wait for all the rows of an upsert.
        for start in range(0, max(1, len(pixels)), _TURN_IMAGES):
            async with self._turn:
                part = pixels[start : start + _TURN_IMAGES]
                codes.append(await asyncio.to_thread(self._network.encode_prepared, part))
        return np.concatenate(codes)


class PooledEncoder(_Encoder):
    """The network in actors."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, pool: EncoderPool, observer: Observer) -> None:
        super().__init__(decoder, preprocessing, pool.has_text, observer)
        self._pool = pool

    async def _encode_texts(self, texts: list[str]) -> Codes:
        return await self._pool.call("encode_texts", texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        parts = range(0, max(1, len(pixels)), _TURN_IMAGES)
        return np.concatenate(
            [await self._pool.call("encode_prepared", pixels[start : start + _TURN_IMAGES]) for start in parts]
        )
