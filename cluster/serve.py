"""Serving: shards and the query encoder as actors or in this process, the gateway in this process."""

import asyncio
import gc
import logging
import os
import signal
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
    suppress,
)
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.progress import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.shards import START_TIMEOUT_S, RayBackend
from orbithash.encoders.archive import Archive
from orbithash.encoders.card import ModelCard, read_model_folder
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.search.backend import Backend, LocalBackend
from orbithash.search.decoding import Decoder, Pixels
from orbithash.search.gateway import Gateway, start_gateway
from orbithash.search.logs import Format, is_json, log_to_stderr
from orbithash.search.metrics import Metrics, exposed
from orbithash.search.observer import Observer
from orbithash.search.protection import Protection
from orbithash.search.service import open_service

__all__ = ["serve", "serving"]

logger = logging.getLogger(__name__)

ENCODER_CPUS = 0.5
# Decoding is the smaller part of encoding an image.
NUM_DECODERS = min(2, os.cpu_count() or 1)
STOP_GRACE_S = 5.0

# Images of one caller that the network encodes before it is another's turn.
TURN_IMAGES = 16


class _Network:
    """The model, for images that are decoded and prepared."""

    def __init__(self, model: Path) -> None:
        from orbithash.encoders.model import HashModel

        self._model = HashModel.load(model)
        # The first pass of a network is slow; it is not to be a user's.
        self._model.encode([np.zeros((64, 64, self._model.preprocessing.channels), np.uint8)])

    def has_text(self) -> bool:
        return self._model.text_head is not None

    def encode_prepared(self, pixels: Pixels) -> Codes:
        return self._model.encode_prepared(pixels)

    def encode_texts(self, texts: list[str]) -> Codes:
        return self._model.encode_texts(texts)


class _Encoder(ABC):
    """Images are strangers' bytes: they are decoded in processes beside the gateway, and only pixels go further."""

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
        """Codes of sentences."""

    @abstractmethod
    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        """Codes of the network's input."""


class _LocalEncoder(_Encoder):
    """The network in this process."""

    def __init__(self, decoder: Decoder, preprocessing: Preprocessing, network: _Network, observer: Observer) -> None:
        super().__init__(decoder, preprocessing, network.has_text(), observer)
        self._network = network
        # One at a time: the network takes all the threads it has for each image.
        self._turn = asyncio.Semaphore(1)

    async def _encode_texts(self, texts: list[str]) -> Codes:
        async with self._turn:
            return await asyncio.to_thread(self._network.encode_texts, texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        codes = []
        # A few at a time: a query is not to wait for all the rows of somebody's upsert.
        for start in range(0, max(1, len(pixels)), TURN_IMAGES):
            async with self._turn:
                part = pixels[start : start + TURN_IMAGES]
                codes.append(await asyncio.to_thread(self._network.encode_prepared, part))
        return np.concatenate(codes)


class _RayEncoder(_Encoder):
    """The network in an actor."""

    def __init__(
        self, decoder: Decoder, preprocessing: Preprocessing, actor: Any, has_text: bool, observer: Observer
    ) -> None:
        super().__init__(decoder, preprocessing, has_text, observer)
        self._actor = actor

    async def _encode_texts(self, texts: list[str]) -> Codes:
        return await self._call(self._actor.encode_texts, texts)

    async def _encode_prepared(self, pixels: Pixels) -> Codes:
        parts = range(0, max(1, len(pixels)), TURN_IMAGES)
        return np.concatenate(
            [await self._call(self._actor.encode_prepared, pixels[start : start + TURN_IMAGES]) for start in parts]
        )

    @staticmethod
    async def _call(method: Any, values: Any) -> Codes:
        from ray.exceptions import RayTaskError

        try:
            # It changes nothing, so it is tried again when the actor was restarting.
            codes: Codes = await method.options(max_task_retries=1).remote(values)
            return codes
        except RayTaskError as err:
            raise err.cause from None


def serve(
    archive: Path,
    model: Path,
    num_shards: int,
    address: str,
    local: bool,
    num_replicas: int = 1,
    index: str = "flat",
    protection: Protection | None = None,
    metrics_address: str | None = None,
    log_format: Format = Format.TEXT,
) -> None:
    """Serves until SIGTERM or SIGINT; then refuses new queries, ends those in flight and leaves."""
    page = _page(metrics_address, protection is not None and protection.insecure_listen)
    gateway = partial(serving, archive, model, num_shards, address, local, num_replicas, index, protection)
    # Ray before the event loop's signal handlers: joining it installs its own.
    with log_to_stderr(log_format), nullcontext() if local else connected():
        asyncio.run(_until_signal(page, gateway))


@contextmanager
def _page(metrics_address: str | None, allow_remote: bool) -> Iterator[Metrics | None]:
    """Figures that can be read for as long as the block lasts; None where nobody asks for them."""
    if metrics_address is None:
        yield None
        return
    metrics = Metrics()
    with exposed(metrics, metrics_address, allow_remote) as address:
        _tell(f"metrics at http://{address}/metrics")
        yield metrics


def _tell(text: str) -> None:
    """One line for a person, or for the program that reads the log."""
    if is_json():
        logger.info("%s", text)
    else:
        say(text)


async def _until_signal(
    page: AbstractContextManager[Metrics | None], start: Callable[..., AbstractAsyncContextManager[Gateway]]
) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with page as metrics:
        async with start(metrics=metrics) as gateway:
            # What is there stays until the end. The collector looking at all of it again would stop every query.
            gc.collect()
            gc.freeze()
            _tell(f"ready at {gateway.address}; stop with Ctrl-C")
            await stop.wait()
            _tell("stopping: queries in flight are answered, new ones refused")


@asynccontextmanager
async def serving(
    archive: Path,
    model: Path,
    num_shards: int,
    address: str,
    local: bool = False,
    num_replicas: int = 1,
    index: str = "flat",
    protection: Protection | None = None,
    metrics: Metrics | None = None,
) -> AsyncIterator[Gateway]:
    """A running gateway over an archive, as long as the block lasts. `local`: all in this process, without Ray."""
    for number, name in ((num_shards, "shards"), (num_replicas, "copies of each shard")):
        if number < 1:
            raise InputError(f"{number} {name}; at least 1 is needed")
    if local and num_replicas > 1:
        raise InputError("--local keeps all shards in one process, where copies are of no use; leave --replicas away")

    decoder = Decoder(NUM_DECODERS)
    observer = metrics or Observer()

    async def open_backend(other_archive: str, other_model: str) -> Backend:
        folder = Path(other_model) if other_model else model
        _check_beside(other_archive, str(archive), 1)
        _check_beside(other_model, str(model), 2)
        # In a thread: searches go on while another archive is opened.
        opened, card = await asyncio.to_thread(_open, other_archive or archive, folder)
        _tell(f"loading {opened.num_rows} codes of {opened.bits} bits into {num_shards} shards")
        if local:
            network = await asyncio.to_thread(_Network, folder)
            local_encoder = _LocalEncoder(decoder, card.preprocessing, network, observer)
            return LocalBackend(opened, local_encoder, num_shards, index)
        actor, has_text = await _start_network(folder.absolute())
        encoder = _RayEncoder(decoder, card.preprocessing, actor, has_text, observer)
        return await RayBackend.start(opened, encoder, actor, num_shards, num_replicas, index, observer)

    service = await open_service(open_backend, observer, max_fan_outs=num_replicas)
    if metrics is not None:
        metrics.watch(service)
    try:
        if not local:
            # Or the first image would wait a second. In one process nothing starts before it is needed.
            await decoder.start()
        gateway = await start_gateway(service, address, protection=protection)
        follower = asyncio.create_task(service.follow())
        try:
            yield gateway
        finally:
            follower.cancel()
            with suppress(asyncio.CancelledError):
                await follower
            await gateway.stop(STOP_GRACE_S)
    finally:
        await service.close()
        await decoder.close()


def _check_beside(asked: str, served: str, levels: int) -> None:
    """`InputError` for what does not lie below the folder so many levels above what is served.

    Whoever may write into an archive may not make the server read whatever it can reach.
    """
    if not asked:
        return
    allowed = Path(served).absolute().parents[levels - 1]
    if "\0" in asked or "://" in asked or not Path(asked).resolve().is_relative_to(allowed.resolve()):
        raise InputError("a gateway moves only to what lies beside what it serves; start another one for anything else")


def _open(archive: Path | str, model: Path) -> tuple[Archive, ModelCard]:
    """An archive and what is known of its model; `InputError` where they do not belong together."""
    opened = Archive.open(archive)
    card, model_id, _ = read_model_folder(model)
    if (card.bits, model_id) != (opened.bits, opened.model_id):
        raise InputError(
            f"{opened.path} holds {opened.bits}-bit codes of model {opened.model_id}, and {model} is the "
            f"{card.bits}-bit model {model_id}; give the model that made the archive"
        )
    return opened, card


async def _start_network(model: Path) -> tuple[Any, bool]:
    """An actor that is ready, and whether it encodes sentences."""
    import ray
    from ray.exceptions import RayTaskError

    network_class = ray.remote(num_cpus=ENCODER_CPUS, max_restarts=-1)(_Network)
    actor = network_class.remote(model)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            return actor, bool(await actor.has_text.remote())
    except TimeoutError as err:
        raise InputError(f"the model was not ready after {START_TIMEOUT_S:.0f} s; has the cluster room?") from err
    except RayTaskError as err:
        raise err.cause from err
