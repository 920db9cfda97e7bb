"""Serving: shards and the query encoder as actors or in this process, the gateway in this process."""

import asyncio
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.progress import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.shards import START_TIMEOUT_S, RayBackend
from orbithash.encoders.archive import Archive
from orbithash.encoders.card import read_model_folder
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.search.backend import Backend, LocalBackend
from orbithash.search.gateway import Gateway, start_gateway
from orbithash.search.service import open_service

__all__ = ["serve", "serving"]

ENCODER_CPUS = 0.5
STOP_GRACE_S = 5.0


class _Encoder:
    """The model: images are strangers' bytes."""

    def __init__(self, model: Path) -> None:
        from orbithash.encoders.model import HashModel

        self._model = HashModel.load(model)
        self._rendering = self._model.preprocessing.rendering
        # The first pass of a network is slow; it is not to be a user's.
        self._model.encode([np.zeros((64, 64, self._rendering.channels), np.uint8)])

    def has_text(self) -> bool:
        return self._model.text_head is not None

    def encode_images(self, images: list[bytes]) -> Codes:
        from orbithash.encoders.images import read_image

        return self._model.encode([read_image(image, self._rendering) for image in images])

    def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        from orbithash.encoders.images import read_image
        from orbithash.encoders.records import make_thumbnail

        pixels = [read_image(image, self._rendering) for image in images]
        return self._model.encode(pixels), [make_thumbnail(self._rendering.picture(image)) for image in pixels]

    def encode_texts(self, texts: list[str]) -> Codes:
        return self._model.encode_texts(texts)


class _LocalEncoder:
    """The model in this process."""

    def __init__(self, model: Path) -> None:
        self._encoder = _Encoder(model)
        self.has_text = self._encoder.has_text()
        # One at a time: the network takes all the threads it has for each image.
        self._turn = asyncio.Semaphore(1)

    async def encode_images(self, images: list[bytes]) -> Codes:
        async with self._turn:
            return await asyncio.to_thread(self._encoder.encode_images, images)

    async def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        async with self._turn:
            return await asyncio.to_thread(self._encoder.encode_rows, images)

    async def encode_texts(self, texts: list[str]) -> Codes:
        async with self._turn:
            return await asyncio.to_thread(self._encoder.encode_texts, texts)


class _RayEncoder:
    """The model in an actor."""

    def __init__(self, actor: Any, has_text: bool) -> None:
        self._actor = actor
        self.has_text = has_text

    async def encode_images(self, images: list[bytes]) -> Codes:
        codes: Codes = await self._call(self._actor.encode_images, images)
        return codes

    async def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        rows: tuple[Codes, list[bytes]] = await self._call(self._actor.encode_rows, images)
        return rows

    async def encode_texts(self, texts: list[str]) -> Codes:
        codes: Codes = await self._call(self._actor.encode_texts, texts)
        return codes

    @staticmethod
    async def _call(method: Any, values: list[Any]) -> Any:
        from ray.exceptions import RayTaskError

        try:
            # It changes nothing, so it is tried again when the actor was restarting.
            return await method.options(max_task_retries=1).remote(values)
        except RayTaskError as err:
            raise err.cause from None


def serve(
    archive: Path, model: Path, num_shards: int, address: str, local: bool, num_replicas: int = 1, index: str = "flat"
) -> None:
    """Serves until SIGTERM or SIGINT; then refuses new queries, ends those in flight and leaves."""
    options = (archive, model, num_shards, address, local, num_replicas, index)
    if local:
        asyncio.run(_until_signal(*options))
        return
    # Before the event loop's signal handlers: joining Ray installs its own.
    with connected():
        asyncio.run(_until_signal(*options))


async def _until_signal(*options: Any) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(*options) as gateway:
        say(f"ready at {gateway.address}; stop with Ctrl-C")
        await stop.wait()
        say("stopping: queries in flight are answered, new ones refused")


@asynccontextmanager
async def serving(
    archive: Path,
    model: Path,
    num_shards: int,
    address: str,
    local: bool = False,
    num_replicas: int = 1,
    index: str = "flat",
) -> AsyncIterator[Gateway]:
    """A running gateway over an archive, as long as the block lasts. `local`: all in this process, without Ray."""
    if num_shards < 1 or num_replicas < 1:
        raise InputError(f"{num_shards} shards in {num_replicas} copies; at least 1 of each is needed")
    if local and num_replicas > 1:
        raise InputError("--local keeps all shards in one process, where copies are of no use; leave --replicas away")

    async def open_backend(other_archive: str, other_model: str) -> Backend:
        folder = Path(other_model) if other_model else model
        opened = Archive.open(other_archive or archive)
        card, model_id, _ = read_model_folder(folder)
        if (card.bits, model_id) != (opened.bits, opened.model_id):
            raise InputError(
                f"{opened.path} holds {opened.bits}-bit codes of model {opened.model_id}, and {folder} is the "
                f"{card.bits}-bit model {model_id}; give the model that made the archive"
            )
        say(f"loading {opened.num_rows} codes of {opened.bits} bits into {num_shards} shards")
        if local:
            encoder = await asyncio.to_thread(_LocalEncoder, folder)
            return LocalBackend(opened, encoder, num_shards, index)
        return await _start_actors(opened, folder.absolute(), num_shards, num_replicas, index)

    service = await open_service(open_backend, max_fan_outs=num_replicas)
    try:
        gateway = await start_gateway(service, address)
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


async def _start_actors(archive: Archive, model: Path, num_shards: int, num_replicas: int, index: str) -> Backend:
    import ray
    from ray.exceptions import RayTaskError

    encoder_class = ray.remote(num_cpus=ENCODER_CPUS, max_restarts=-1)(_Encoder)
    actor = encoder_class.remote(model)
    try:
        async with asyncio.timeout(START_TIMEOUT_S):
            has_text = await actor.has_text.remote()
        return await RayBackend.start(archive, _RayEncoder(actor, has_text), actor, num_shards, num_replicas, index)
    except TimeoutError as err:
        raise InputError(f"the model was not ready after {START_TIMEOUT_S:.0f} s; has the cluster room?") from err
    except RayTaskError as err:
        raise err.cause from err
