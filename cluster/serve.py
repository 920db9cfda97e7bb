"""Serving on Ray: shards and the query encoder as actors, the gateway in this process."""

import asyncio
import signal
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.progress import say
from orbithash.cluster.runtime import check_resources, connected
from orbithash.encoders.archive import Archive
from orbithash.encoders.card import read_model_folder
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.search.engine import Engine, LocalShardClient, ShardClient
from orbithash.search.gateway import Gateway, start_gateway
from orbithash.search.shard import Shard, ShardAnswer, build_shards, split_rows

__all__ = ["serve", "serving"]

# A scan is short and takes one thread; what a shard needs of its node is memory.
SHARD_CPUS = 0.1
ENCODER_CPUS = 0.5

# Searches in one shard at a time; its health is asked beside them.
SHARD_THREADS = 2

# A shard that dies starts again and reads its rows from the archive version that is served.
MAX_RESTARTS = -1

START_TIMEOUT_S = 120.0
STOP_GRACE_S = 5.0


class _ShardActor:
    """Rows `start` to `stop`, by ascending id, of one version of an archive."""

    def __init__(self, archive: str, version: int, start: int, stop: int) -> None:
        opened = Archive.open(archive, version)
        ids, codes = opened.codes()
        self._shard = Shard(ids[start:stop], codes[start:stop], opened.bits)

    def search(self, queries: Codes, k: int) -> ShardAnswer:
        return self._shard.search(queries, k)

    def num_rows(self) -> int:
        return self._shard.num_rows


class _EncoderActor:
    """The model: images are strangers' bytes, and are decoded here and not in the gateway's process."""

    def __init__(self, model: Path) -> None:
        self._encode = _load_encoder(model)

    def encode(self, images: list[bytes]) -> Codes:
        return self._encode(images)


def _load_encoder(model: Path) -> Callable[[list[bytes]], Codes]:
    from orbithash.encoders.images import read_image
    from orbithash.encoders.model import HashModel

    loaded = HashModel.load(model)
    rendering = loaded.preprocessing.rendering
    # The first pass of a network is slow; it is not to be a user's.
    loaded.encode([np.zeros((64, 64, rendering.channels), np.uint8)])
    return lambda images: loaded.encode([read_image(image, rendering) for image in images])


class _RayShardClient:
    """A shard in an actor."""

    def __init__(self, actor: Any, num_rows: int) -> None:
        self._actor = actor
        self.num_rows = num_rows

    async def search(self, queries: Codes, k: int, timeout_s: float) -> ShardAnswer:
        """As `Shard.search`. A search changes nothing, so it is tried again when the actor was restarting."""
        async with asyncio.timeout(timeout_s):
            answer: ShardAnswer = await self._actor.search.options(max_task_retries=1).remote(queries, k)
            return answer


def serve(archive: Path, model: Path, num_shards: int, address: str, local: bool) -> None:
    """Serves until SIGTERM or SIGINT; then refuses new queries, ends those in flight and leaves."""
    if local:
        asyncio.run(_until_signal(archive, model, num_shards, address, local=True))
        return
    # Before the event loop's signal handlers: joining Ray installs its own.
    with connected():
        asyncio.run(_until_signal(archive, model, num_shards, address, local=False))


async def _until_signal(archive: Path, model: Path, num_shards: int, address: str, local: bool) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    async with serving(archive, model, num_shards, address, local) as gateway:
        say(f"ready at {gateway.address}; stop with Ctrl-C")
        await stop.wait()
        say("stopping: queries in flight are answered, new ones refused")


@asynccontextmanager
async def serving(
    archive: Path, model: Path, num_shards: int, address: str, local: bool = False
) -> AsyncIterator[Gateway]:
    """A running gateway over an archive, as long as the block lasts. `local`: all in this process, without Ray."""
    opened = Archive.open(archive)
    card, model_id, _ = read_model_folder(model)
    if (card.bits, model_id) != (opened.bits, opened.model_id):
        raise InputError(
            f"{archive} holds {opened.bits}-bit codes of model {opened.model_id}, and {model} is the {card.bits}-bit "
            f"model {model_id}; give the model that made the archive"
        )
    if num_shards < 1:
        raise InputError(f"{num_shards} shards; at least 1 is needed")
    say(f"loading {opened.num_rows} codes of {opened.bits} bits into {num_shards} shards")
    if local:
        shards, encode_images = await asyncio.to_thread(_start_here, opened, model, num_shards)
        actors: list[Any] = []
    else:
        shards, encode_images, actors = await _start_actors(opened, model.absolute(), num_shards)
    try:
        gateway = await start_gateway(Engine(shards, opened, encode_images), address)
        try:
            yield gateway
        finally:
            await gateway.stop(STOP_GRACE_S)
    finally:
        for actor in actors:
            import ray

            ray.kill(actor)


EncodeImages = Callable[[list[bytes]], Awaitable[Codes]]


def _start_here(archive: Archive, model: Path, num_shards: int) -> tuple[list[ShardClient], EncodeImages]:
    ids, codes = archive.codes()
    shards: list[ShardClient] = [
        LocalShardClient(shard) for shard in build_shards(ids, codes, archive.bits, num_shards)
    ]
    encode = _load_encoder(model)
    # One at a time: the network takes all the threads it has for each image.
    turn = asyncio.Semaphore(1)

    async def encode_images(images: list[bytes]) -> Codes:
        async with turn:
            return await asyncio.to_thread(encode, images)

    return shards, encode_images


async def _start_actors(
    archive: Archive, model: Path, num_shards: int
) -> tuple[list[ShardClient], EncodeImages, list[Any]]:
    import ray
    from ray.exceptions import GetTimeoutError, RayTaskError

    check_resources(f"serving {num_shards} shards", num_shards * SHARD_CPUS + ENCODER_CPUS)
    shard_class = ray.remote(num_cpus=SHARD_CPUS, max_restarts=MAX_RESTARTS, max_concurrency=SHARD_THREADS)(_ShardActor)
    encoder_class = ray.remote(num_cpus=ENCODER_CPUS, max_restarts=MAX_RESTARTS)(_EncoderActor)
    parts = split_rows(archive.num_rows, num_shards)
    actors = [shard_class.remote(archive.path, archive.version, part.start, part.stop) for part in parts]
    encoder = encoder_class.remote(model)
    try:
        counts = ray.get([actor.num_rows.remote() for actor in actors], timeout=START_TIMEOUT_S)
        ray.get(encoder.encode.remote([]), timeout=START_TIMEOUT_S)
    except GetTimeoutError as err:
        raise InputError(f"the shards were not ready after {START_TIMEOUT_S:.0f} s; has the cluster room?") from err
    except RayTaskError as err:
        raise err.cause from err

    async def encode_images(images: list[bytes]) -> Codes:
        try:
            codes: Codes = await encoder.encode.options(max_task_retries=1).remote(images)
        except RayTaskError as err:
            raise err.cause from None
        return codes

    shards: list[ShardClient] = [_RayShardClient(actor, rows) for actor, rows in zip(actors, counts, strict=True)]
    return shards, encode_images, [*actors, encoder]
