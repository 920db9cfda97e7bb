"""Encoders of queries: the network in this process, or in a pool of actors.

Items of queries that arrive at the same time are encoded in one pass of the network.
"""

import asyncio
import math
from abc import ABC, abstractmethod
from typing import Any

import numpy as np

from orbithash.cluster.serving.encoder_pool import EncoderPool, Inputs, Network
from orbithash.encoders.codes import Encoded, Kind
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.search.engine.batching import Batcher
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.observer import Observer

__all__ = ["LocalEncoder", "PooledEncoder"]

# Maximum number of items in one pass of the network. A caller with more, such as an upsert, waits for
# each pass before it requests the next one, so that queries of other callers get their turn.
_MAX_BATCH = 16
# Maximum number of items that wait for a pass.
_MAX_WAITING = 1024


class _Encoder(ABC):
    """An encoder that decodes untrusted images in separate processes and passes only pixels to the network."""

    def __init__(
        self,
        decoder: Decoder,
        preprocessing: Preprocessing,
        inputs: Inputs,
        observer: Observer,
        max_passes: int,
    ) -> None:
        """`max_passes`: maximum number of passes of networks that are requested at the same time."""
        self._batcher: Batcher[Any, Encoded] = Batcher(self._encode_batch, max_passes, _MAX_WAITING, _MAX_BATCH)
        self._observer = observer
        self._decoder = decoder
        self._preprocessing = preprocessing
        self.has_text, self.num_features, self.embedding = inputs

    async def encode(self, kind: Kind, items: list[Any], with_outputs: bool = False) -> Encoded:
        """See `QueryEncoder.encode`."""
        if kind == "image":
            with self._observer.stage("decode"):
                items = list(await self._decoder.prepare(items, self._preprocessing))
        return await self._encode(kind, items, with_outputs)

    async def encode_rows(self, images: list[bytes]) -> tuple[Encoded, list[bytes]]:
        """See `QueryEncoder.encode_rows`."""
        with self._observer.stage("decode"):
            pixels, thumbnails = await self._decoder.prepare_rows(images, self._preprocessing)
        return await self._encode("image", list(pixels), with_outputs=False), thumbnails

    async def _encode(self, kind: Kind, items: list[Any], with_outputs: bool) -> Encoded:
        encoded: list[Encoded] = []
        with self._observer.stage("encode"):
            for start in range(0, len(items), _MAX_BATCH):
                part = items[start : start + _MAX_BATCH]
                submitted = (self._batcher.submit(item, 1, (kind, with_outputs), math.inf) for item in part)
                encoded += await asyncio.gather(*submitted)
        return Encoded.joined(encoded)

    async def _encode_batch(
        self, items: list[Any], sizes: list[int], group: tuple[Kind, bool], timeout_s: float
    ) -> list[Encoded]:
        kind, with_outputs = group
        encoded = await self._run_network(kind, items if kind == "text" else np.stack(items), with_outputs)
        return encoded.split()

    @abstractmethod
    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        """Return what `HashModel.encode_items` returns for prepared items."""


class LocalEncoder(_Encoder):
    """The network in this process."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, network: Network, observer: Observer) -> None:
        # One pass at a time, because each uses all threads.
        super().__init__(decoder, preprocessing, network.inputs(), observer, max_passes=1)
        self._network = network

    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        return await asyncio.to_thread(self._network.encode, kind, items, with_outputs)


class PooledEncoder(_Encoder):
    """The network in actors."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, pool: EncoderPool, observer: Observer) -> None:
        super().__init__(decoder, preprocessing, pool.inputs, observer, pool.max_calls)
        self._pool = pool

    async def _run_network(self, kind: Kind, items: Any, with_outputs: bool) -> Encoded:
        return await self._pool.encode(kind, items, with_outputs)
