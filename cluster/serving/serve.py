"""`serve`: gateways in processes, shards and query encoders as Ray actors or in the gateway's process."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import AsyncExitStack, asynccontextmanager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.serving.opening import Joining, Opening
from orbithash.cluster.serving.processes import Processes, ends_with_parent, on_cluster
from orbithash.cluster.serving.registry import FirstGateway, JoinedGateway, OwnerGone
from orbithash.cluster.serving.settings import ServeSettings
from orbithash.cluster.serving.web import page_of
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.gateway import Gateway, PortSharing, start_gateway
from orbithash.search.gateway.metrics import Metrics, exposed
from orbithash.search.logs import is_json, log_to_stderr
from orbithash.search.observer import Observer
from orbithash.search.protocol.address import parse_address
from orbithash.search.service.service import Membership, Service, open_service
from orbithash.search.service.supervision import repeat

__all__ = ["Running", "serve", "serving"]

logger = logging.getLogger(__name__)

# Decoding takes a fifth of the time of a usual network, so a process for four cores keeps up with it.
_CORES = len(os.sched_getaffinity(0))
NUM_DECODERS = min(_CORES, max(2, _CORES // 4), 8)
STOP_GRACE_S = 5.0

# What a gateway does beside serving, until it is cancelled.
Work = Callable[[], Coroutine[Any, Any, None]]

# Seconds between two looks at what the first gateway serves, and the maximum after failures.
_REGISTRY_EVERY_S, _MAX_REGISTRY_EVERY_S = 0.5, 5.0


def serve(settings: ServeSettings, registry: str = "") -> None:
    """Serve until SIGTERM or SIGINT; then refuse new queries, finish those in flight and return.

    `registry`: name of the registry of the gateway whose shards and port this one shares.
    """
    settings.check()
    # Connect to Ray before the event loop installs its signal handlers, because Ray installs its own.
    with log_to_stderr(settings.log_format), nullcontext() if settings.is_local else connected():
        asyncio.run(_until_signal(settings, registry))


async def _until_signal(settings: ServeSettings, registry: str) -> None:
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with ends_with_parent(stop.set), page_of(settings) as page, _metrics_page(settings) as metrics:
        async with serving(settings, metrics, registry) as running:
            # Existing objects stay until the end. Scanning them in each garbage collection would delay queries.
            gc.collect()
            gc.freeze()
            works = {f"gateway {n + 1}": _further(settings, running, n) for n in range(1, settings.num_gateways)}
            if page is not None:
                works["the page"] = page.work(running.gateway.address)
            processes = Processes(works)
            _report(f"ready at {running.gateway.address}; stop with Ctrl-C")
            if page is not None:
                _report(f"page at {page.url}")
            try:
                waiting = [asyncio.create_task(stop.wait()), running.owner_gone]
                await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            finally:
                _report("stopping: queries in flight are answered, new ones refused")
                gc.unfreeze()
                await asyncio.gather(processes.stop(), running.gateway.stop(STOP_GRACE_S))
            if not stop.is_set():
                await running.owner_gone


@contextmanager
def _metrics_page(settings: ServeSettings) -> Iterator[Metrics | None]:
    """Serve metrics over HTTP for the block; yields None without an address."""
    if settings.metrics_address is None:
        yield None
        return
    metrics = Metrics()
    with exposed(metrics, settings.metrics_address, settings.open_metrics) as address:
        _report(f"metrics at http://{address}/metrics")
        yield metrics


def _report(text: str) -> None:
    """Print a line for a person, or log it if the log is JSON."""
    if is_json():
        logger.info("%s", text)
    else:
        say(text)


def _further(settings: ServeSettings, first: "Running", number: int) -> Callable[[], None]:
    """Return a function that runs further gateway `number` (from 1) in another process, until it is stopped."""
    metrics = settings.metrics_address
    if metrics is not None:
        host, port = parse_address(metrics)
        metrics = f"{'[' + host + ']' if ':' in host else host}:{port + number if port else 0}"
    joining = replace(
        settings,
        num_gateways=1,
        joins=True,
        address=first.gateway.address,
        metrics_address=metrics,
        web_address=None,
        web_hosts=(),
        base_map=None,
    )
    return on_cluster(partial(serve, joining, first.registry))


@dataclass(frozen=True)
class Running:
    """A gateway that runs.

    Attributes:
        gateway: its server.
        owner_gone: ends with an error when the gateway whose shards it has joined has ended.
        registry: name of its registry, for gateways that join it; "" without one.
    """

    gateway: Gateway
    owner_gone: asyncio.Task[None]
    registry: str


@asynccontextmanager
async def serving(
    settings: ServeSettings, metrics: Metrics | None = None, registry: str = ""
) -> AsyncIterator[Running]:
    """Run a gateway for the block; `registry` as in `serve`."""
    decoder = Decoder(NUM_DECODERS)
    async with AsyncExitStack() as stack:
        stack.push_async_callback(decoder.close)
        observer = metrics or Observer()
        if settings.joins:
            found = JoinedGateway.named(registry) if registry else await JoinedGateway.find(settings.archive)
            service, work = await _joined(found, settings, decoder, observer, stack)
            sharing = PortSharing.JOIN if registry else PortSharing.NONE
        else:
            first = None if settings.is_local else await FirstGateway.start()
            service, work = await _first(first, settings, decoder, observer, stack)
            registry = "" if first is None else first.name
            sharing = PortSharing.FIRST if settings.num_gateways > 1 else PortSharing.NONE
        if metrics is not None:
            metrics.watch(service)
        if not settings.is_local:
            # Otherwise the first image would wait a second. With --local, processes start when they are needed.
            await decoder.start()
        gateway = await start_gateway(service, settings.address, protection=settings.protection, sharing=sharing)
        stack.push_async_callback(gateway.stop, STOP_GRACE_S)
        tasks = [asyncio.create_task(service.follow()), asyncio.create_task(work())]
        stack.push_async_callback(_end, tasks)
        yield Running(gateway, tasks[1], registry)


async def _end(tasks: list[asyncio.Task[None]]) -> None:
    """Cancel the tasks. No error of theirs is raised: the gateway must be stopped whatever happened."""
    for task in tasks:
        task.cancel()
    await asyncio.wait(tasks)


async def _first(
    registry: FirstGateway | None,
    settings: ServeSettings,
    decoder: Decoder,
    observer: Observer,
    stack: AsyncExitStack,
) -> tuple[Service, Work]:
    """Return the service of a gateway with its own shards, and what it does for gateways that join."""
    opening = Opening(settings, decoder, observer, _report)
    if registry is None:
        service = await open_service(opening.open, opening.served, observer)
        stack.push_async_callback(service.close)
        return service, _forever
    stack.callback(registry.close)
    membership = Membership(moved=partial(opening.publish, registry))
    service = await open_service(opening.open, opening.served, observer, membership, max_fan_outs=settings.num_replicas)
    stack.push_async_callback(service.close)
    await opening.publish(registry, opening.served, service.backend)

    async def move() -> None:
        await registry.serve_move(lambda target: service.refresh(target.archive, target.model, target.num_shards))

    async def count() -> None:
        service.num_gateways = await registry.num_gateways()

    async def work() -> None:
        moving = repeat("moves that other gateways ask for", move, 0.0, _MAX_REGISTRY_EVERY_S)
        counting = repeat("counting the gateways", count, _REGISTRY_EVERY_S, _MAX_REGISTRY_EVERY_S)
        await asyncio.gather(moving, counting)

    return service, work


async def _joined(
    registry: JoinedGateway, settings: ServeSettings, decoder: Decoder, observer: Observer, stack: AsyncExitStack
) -> tuple[Service, Work]:
    """Return the service of a gateway with the shards of another one, and what follows that one until it ends."""
    joining = Joining(registry, settings, decoder, observer)
    published, num_gateways = await registry.published()
    membership = Membership(maintains=False, ask_move=registry.move)
    # As many as the shards have replicas, as in the first gateway.
    max_fan_outs = len(published.shards.names[0])
    service = await open_service(joining.open, published.target, observer, membership, max_fan_outs=max_fan_outs)
    service.num_gateways = num_gateways
    stack.push_async_callback(service.close)

    async def follow() -> None:
        published, service.num_gateways = await registry.published()
        if published.number > joining.number:
            await service.move(published.target)

    async def work() -> None:
        await repeat(
            "following the first gateway", follow, _REGISTRY_EVERY_S, _MAX_REGISTRY_EVERY_S, fatal=(OwnerGone,)
        )

    return service, work


async def _forever() -> None:
    await asyncio.Event().wait()
