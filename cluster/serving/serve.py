"""`serve`: the gateway in this process, shards and query encoder as Ray actors or in this process."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import (
    AbstractAsyncContextManager,
    AbstractContextManager,
    asynccontextmanager,
    contextmanager,
    nullcontext,
)
from functools import partial
from pathlib import Path

from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.serving.encoder_pool import EncoderPools, Network
from orbithash.cluster.serving.query_encoders import LocalEncoder, PooledEncoder
from orbithash.cluster.serving.shards import RayBackend
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import ModelCard, read_model_folder
from orbithash.search.engine.backend import Backend, LocalBackend
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.gateway import Gateway, start_gateway
from orbithash.search.gateway.metrics import Metrics, exposed
from orbithash.search.gateway.protection import Protection
from orbithash.search.logs import Format, is_json, log_to_stderr
from orbithash.search.observer import Observer
from orbithash.search.protocol.queries import MAX_SHARDS
from orbithash.search.service.service import Target, open_service

__all__ = ["serve", "serving"]

logger = logging.getLogger(__name__)

# Decoding takes less time than the network, so two processes keep up with it.
NUM_DECODERS = min(2, os.cpu_count() or 1)
STOP_GRACE_S = 5.0


def serve(
    archive: str,
    model: Path,
    num_shards: int,
    address: str,
    local: bool,
    num_replicas: int = 1,
    index: str = "flat",
    protection: Protection | None = None,
    metrics_address: str | None = None,
    log_format: Format = Format.TEXT,
    num_encoders: tuple[int, int] = (1, 1),
    open_metrics: bool = False,
) -> None:
    """Serve until SIGTERM or SIGINT; then refuse new queries, finish those in flight and return."""
    page = _metrics_page(metrics_address, open_metrics)
    gateway = partial(
        serving, archive, model, num_shards, address, local, num_replicas, index, protection, num_encoders
    )
    # Connect to Ray before the event loop installs its signal handlers, because Ray installs its own.
    with log_to_stderr(log_format), nullcontext() if local else connected():
        asyncio.run(_until_signal(page, gateway))


@contextmanager
def _metrics_page(metrics_address: str | None, allow_remote: bool) -> Iterator[Metrics | None]:
    """Serve metrics over HTTP for the block; yields None without an address."""
    if metrics_address is None:
        yield None
        return
    metrics = Metrics()
    with exposed(metrics, metrics_address, allow_remote) as address:
        _report(f"metrics at http://{address}/metrics")
        yield metrics


def _report(text: str) -> None:
    """Print a line for a person, or log it if the log is JSON."""
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
            # Existing objects stay until the end. Scanning them in each garbage collection would delay queries.
            gc.collect()
            gc.freeze()
            _report(f"ready at {gateway.address}; stop with Ctrl-C")
            await stop.wait()
            _report("stopping: queries in flight are answered, new ones refused")
            gc.unfreeze()


@asynccontextmanager
async def serving(
    archive: str,
    model: Path,
    num_shards: int,
    address: str,
    local: bool = False,
    num_replicas: int = 1,
    index: str = "flat",
    protection: Protection | None = None,
    num_encoders: tuple[int, int] = (1, 1),
    metrics: Metrics | None = None,
) -> AsyncIterator[Gateway]:
    """Run a gateway over an archive for the block.

    `local`: everything in this process, without Ray. `num_encoders`: minimum and maximum number of actors that encode
    queries.
    """
    for number, name in ((num_shards, "shards"), (num_replicas, "replicas of each shard")):
        if not 1 <= number <= MAX_SHARDS:
            raise InputError(f"{number} {name}; from 1 to {MAX_SHARDS} are allowed")
    if local and num_encoders != (1, 1):
        raise InputError("got --local and --encoders; --local encodes queries in this process, so omit --encoders")
    if local and num_replicas > 1:
        raise InputError("got --local and --replicas; --local keeps all shards in this process, so omit --replicas")

    decoder = Decoder(NUM_DECODERS)
    observer = metrics or Observer()

    served = Target(str(archive), str(model), num_shards)
    pools = EncoderPools()

    async def open_backend(target: Target) -> Backend:
        folder, num_shards = Path(target.model), target.num_shards
        _check_beside(target.archive, served.archive, 1)
        _check_beside(target.model, served.model, 2)
        # In a thread, because searches continue while another archive is opened.
        opened, card = await asyncio.to_thread(_open, target.archive, folder)
        _report(f"loading {opened.num_rows} codes of {opened.bits} bits into {num_shards} shards")
        if local:
            network = await asyncio.to_thread(Network, folder)
            local_encoder = LocalEncoder(decoder, card.preprocessing, network, observer)
            return LocalBackend(opened, local_encoder, num_shards, index)
        pool = await pools.open(opened.model_id, folder.absolute(), *num_encoders)
        encoder = PooledEncoder(decoder, card.preprocessing, pool, observer)
        try:
            return await RayBackend.start(opened, encoder, pool.close, num_shards, num_replicas, index, observer)
        except BaseException:
            pool.close()
            raise

    service = await open_service(open_backend, served, observer, max_fan_outs=num_replicas)
    if metrics is not None:
        metrics.watch(service)
    try:
        if not local:
            # Otherwise the first image would wait a second. With --local, processes start when they are needed.
            await decoder.start()
        gateway = await start_gateway(service, address, protection=protection)
        follower = asyncio.create_task(service.follow())
        try:
            yield gateway
        finally:
            follower.cancel()
            # Does not raise an error of the task: the gateway must be stopped whatever happened.
            await asyncio.wait([follower])
            await gateway.stop(STOP_GRACE_S)
    finally:
        await service.close()
        await decoder.close()


def _check_beside(path: str, served: str, levels: int) -> None:
    """Raise `InputError` unless `path` is below the folder `levels` above the path that `serve` was started with.

    A client with the permission to write rows must not be able to make the server read other files.
    """
    if path == served:
        return
    if "://" in served:
        is_beside = path.startswith(served.rstrip("/").rsplit("/", levels)[0] + "/") and ".." not in path.split("/")
    else:
        allowed = Path(served).absolute().parents[levels - 1]
        is_beside = "://" not in path and "\0" not in path
        is_beside = is_beside and Path(path).resolve().is_relative_to(allowed.resolve())
    if not is_beside:
        raise InputError(
            "a gateway moves only to archives and models beside those that it serves; start another gateway for others"
        )


def _open(archive: str, model: Path) -> tuple[Archive, ModelCard]:
    """Open an archive and its model's card; raise `InputError` if the archive was encoded by another model."""
    opened = Archive.open(archive)
    card, model_id, _ = read_model_folder(model)
    if (card.bits, model_id) != (opened.bits, opened.model_id):
        raise InputError(
            f"{opened.path} holds {opened.bits}-bit codes of model {opened.model_id}, and {model} is the "
            f"{card.bits}-bit model {model_id}; give the model that made the archive"
        )
    return opened, card
