"""The shards of an archive as named Ray actors, which gateways call directly."""

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.runtime import check_resources
from orbithash.cluster.serving.memory import asked_bytes, node_shortage
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.changes import num_ids
from orbithash.encoders.errors import InputError
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.row_index import is_exact_index
from orbithash.search.observer import Observer
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.files import warm_up
from orbithash.search.segments.host import ShardHost
from orbithash.search.shards.client import Connection
from orbithash.search.shards.fleet import Fleet
from orbithash.search.shards.health import Link
from orbithash.search.shards.interface import Unreachable
from orbithash.search.shards.server import ServerLimits, ShardServer

__all__ = ["NAMESPACE", "SHARD_CPUS", "Joinable", "RayBackend"]

logger = logging.getLogger(__name__)

# Ray's namespace of the actors.
NAMESPACE = "orbithash"

# CPUs of one replica. A search is short; the scarce resource of a shard is memory (`memory.asked_bytes`).
SHARD_CPUS = 0.1

# Threads of one replica that search and read, and threads of Arrow that read the archive.
SHARD_THREADS, READ_THREADS = 2, 2

# Without limit. A restarted replica maps its files, or reads its rows, when it is asked to follow a version.
MAX_RESTARTS = -1

START_TIMEOUT_S = 600.0
# Seconds after which a gateway that joins goes on without a replica that does not answer.
JOIN_TIMEOUT_S = 5.0
# Seconds that the replicas get to write their files when a gateway stops.
CLOSE_TIMEOUT_S = 3.0


class _ShardActor:
    """One replica of a shard: holds it, and serves it at a port of this node."""

    def __init__(
        self, archive: str, bits: int, deal: Deal, number: int, index: str, folder: Path | None, token: str
    ) -> None:
        self._open = partial(_open_host, archive, bits, deal, number, index, folder)
        self._number, self._token = number, token
        self._host: ShardHost | None = None
        self._starting: asyncio.Task[tuple[ShardServer, str]] | None = None

    async def address(self) -> str:
        """Return HOST:PORT of this replica. Raises `InputError` if it cannot be started."""
        return (await self._started())[1]

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Answer a call of a gateway that cannot reach the port."""
        return await (await self._started())[0].call(method, request, timeout_s)

    async def close(self) -> None:
        """Write the local files."""
        if self._host is not None:
            await asyncio.to_thread(self._host.close)

    async def _started(self) -> tuple[ShardServer, str]:
        """Return the server and its address; concurrent calls, also those that are cancelled, share one start."""
        if self._starting is None or (self._starting.done() and self._starting.exception() is not None):
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> tuple[ShardServer, str]:
        import ray

        # Not when the actor is created: Ray would report an error there as the death of the actor.
        self._host = await asyncio.to_thread(self._open)
        server = ShardServer(self._host, self._number, self._token, ServerLimits(num_threads=SHARD_THREADS))
        # The address at which other nodes know this one; the loopback interface on a cluster of one machine.
        return server, await server.start(ray.util.get_node_ip_address())


def _open_host(archive: str, bits: int, deal: Deal, number: int, index: str, folder: Path | None) -> ShardHost:
    import pyarrow as pa

    pa.set_cpu_count(READ_THREADS)
    # Before the first call, because searches run in the event loop, where nothing may take seconds.
    logger.info("kernels were ready after %.1f s", warm_up(bits))
    return ShardHost(archive, bits, deal, number, index, folder)


@dataclass(frozen=True)
class Joinable:
    """What another driver of the cluster needs to use the same shards.

    Attributes:
        names: names of the actors of each shard, in `NAMESPACE`.
        deal: which shard has which rows.
        index: name of the index.
        token: opens the shards.
    """

    names: tuple[tuple[str, ...], ...]
    deal: Deal
    index: str
    token: str


class RayBackend:
    """A backend whose shards are Ray actors; created by `start` or `join`."""

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        close_encoder: Callable[[], None],
        joinable: Joinable,
        fleet: Fleet,
        end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """Use the actors of `fleet`. `end` ends them; None: they belong to another backend."""
        self.archive = archive
        self.encoder = encoder
        self.index = joinable.index
        self.joinable = joinable
        self._close_encoder = close_encoder
        self._fleet = fleet
        self._end = end
        # Own actors that do not answer are starting; others may be down.
        self._must_be_whole = end is not None

    @classmethod
    async def start(
        cls,
        archive: Archive,
        encoder: QueryEncoder,
        close_encoder: Callable[[], None],
        num_shards: int,
        num_replicas: int,
        index: str,
        observer: Observer,
        folder: Path | None = None,
    ) -> "RayBackend":
        """Start the actors, which load their rows when a version is requested.

        `close` calls `close_encoder`. `folder` is where each node keeps the files of its shards; None: in memory only.

        Raises:
            InputError: the index is unknown, the cluster has no room, or the actors do not start.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        # Raises for an unknown name.
        is_exact_index(index)
        num_actors = num_shards * num_replicas
        memory = asked_bytes(archive.num_rows, archive.bits, num_shards)
        bundles = [{"CPU": SHARD_CPUS, "memory": memory}] * num_actors
        too_small = partial(node_shortage, num_actors, memory)
        await asyncio.to_thread(check_resources, f"serving {num_actors} shards", bundles, too_small)
        deal = Deal.of(await asyncio.to_thread(num_ids, archive), num_shards)
        service, token = secrets.token_hex(8), secrets.token_hex(32)
        names = tuple(
            tuple(f"{service}-shard-{number}-{replica}" for replica in range(num_replicas))
            for number in range(num_shards)
        )
        # SPREAD places the bundles of a group on different nodes while there are unused ones. In one group for all
        # shards, the replicas of a shard could meet on a node when each node has some bundle.
        groups = [placement_group(bundles[:num_replicas], strategy="SPREAD") for _ in range(num_shards)]

        def remove_groups() -> None:
            for group in groups:
                remove_placement_group(group)

        give_up_at = time.monotonic() + START_TIMEOUT_S
        for group in groups:
            if await asyncio.to_thread(group.wait, max(0.0, give_up_at - time.monotonic())):
                continue
            remove_groups()
            raise InputError(
                f"the cluster had no room for {num_actors} shards within {START_TIMEOUT_S:.0f} s; add nodes or reduce "
                "--shards or --replicas"
            )
        actor_class = ray.remote(num_cpus=SHARD_CPUS, memory=memory, max_restarts=MAX_RESTARTS)(_ShardActor)

        def start_actor(number: int, replica: int) -> Any:
            bundle = PlacementGroupSchedulingStrategy(groups[number], replica)
            options = {"name": names[number][replica], "namespace": NAMESPACE, "scheduling_strategy": bundle}
            return actor_class.options(**options).remote(archive.path, archive.bits, deal, number, index, folder, token)

        actors = [[start_actor(number, replica) for replica in range(num_replicas)] for number in range(num_shards)]

        async def end() -> None:
            every = [actor for of_shard in actors for actor in of_shard]
            # A replica that does not answer reads what its files lack when it starts the next time.
            await asyncio.wait([_task(actor.close.remote()) for actor in every], timeout=CLOSE_TIMEOUT_S)
            for actor in every:
                ray.kill(actor)
            remove_groups()

        joinable = Joinable(names, deal, index, token)
        try:
            fleet = await _started_fleet(actors, joinable, observer)
        except BaseException:
            await end()
            raise
        return cls(archive, encoder, close_encoder, joinable, fleet, end)

    @classmethod
    async def join(
        cls,
        archive: Archive,
        encoder: QueryEncoder,
        close_encoder: Callable[[], None],
        joinable: Joinable,
        observer: Observer,
    ) -> "RayBackend":
        """Use the actors that another driver of the cluster has started; `close` does not end them.

        Raises:
            InputError: the actors do not run any more.
        """
        import ray

        def find() -> list[list[Any]]:
            return [[ray.get_actor(name, NAMESPACE) for name in of_shard] for of_shard in joinable.names]

        try:
            actors = await asyncio.to_thread(find)
        except ValueError as err:
            raise InputError("the shards of the other gateway do not run any more; start it again") from err
        return cls(
            archive, encoder, close_encoder, joinable, await _fleet_of(actors, joinable, observer, JOIN_TIMEOUT_S)
        )

    async def at(self, version: int) -> Snapshot:
        """See `Backend`. Every shard that answers holds the version when it returns, and most of its replicas do.

        A replica that does not answer follows when it answers again. After `start`, the first snapshot waits for all
        shards.
        """
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        try:
            found = await self._fleet.follow(version, START_TIMEOUT_S, self._must_be_whole)
        except TimeoutError as err:
            raise InputError(
                f"the shards were not ready after {START_TIMEOUT_S:.0f} s; check the cluster with `ray status`"
            ) from err
        self._must_be_whole = False
        deal = self.joinable.deal
        num_rows = [count for count in found if count is not None]
        if len(num_rows) < len(found):
            num_rows = await asyncio.to_thread(_num_rows, archive, deal, found)
        shards = self._fleet.clients(version, num_rows)
        branches = self._fleet.branches(version, shards)
        return Snapshot.of(archive, shards, deal, self.encoder, is_exact_index(self.index), branches)

    async def close(self) -> None:
        """See `Backend`."""
        self._close_encoder()
        await self._fleet.close()
        if self._end is not None:
            await self._end()


async def _started_fleet(actors: Sequence[Sequence[Any]], joinable: Joinable, observer: Observer) -> Fleet:
    """Return a fleet that is connected to all actors; raise `InputError` if one does not start."""
    fleet = await _fleet_of(actors, joinable, observer, START_TIMEOUT_S)
    if all(link.connection.address for of_shard in fleet.links for link in of_shard):
        return fleet
    await fleet.close()
    raise InputError(f"the shards did not start within {START_TIMEOUT_S:.0f} s; check the cluster with `ray status`")


async def _fleet_of(actors: Sequence[Sequence[Any]], joinable: Joinable, observer: Observer, timeout_s: float) -> Fleet:
    """Return a fleet of all actors, connected to those that answer within `timeout_s`."""

    async def link_to(number: int, actor: Any) -> Link:
        connection = Connection(number, joinable.token, partial(_call, actor))
        locate = partial(_locate, actor)
        with contextlib.suppress(Unreachable, TimeoutError):
            async with asyncio.timeout(timeout_s):
                await connection.connect(await locate())
        return Link(connection, locate)

    links = [asyncio.gather(*(link_to(number, actor) for actor in of_shard)) for number, of_shard in enumerate(actors)]
    return Fleet(await asyncio.gather(*links), observer)


async def _locate(actor: Any) -> str:
    return str(await _result_of(actor.address.remote()))


async def _call(actor: Any, method: str, request: bytes, timeout_s: float) -> bytes:
    response: bytes = await _result_of(actor.call.remote(method, request, timeout_s))
    return response


async def _result_of(reference: Any) -> Any:
    """Return the result of a call of an actor; raise its `InputError`, or `Unreachable` if it does not answer."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        return await reference
    except asyncio.CancelledError:
        ray.cancel(reference)
        raise
    except RayError as error:
        if isinstance(error, RayTaskError) and isinstance(error.cause, InputError):
            raise error.cause from error
        raise Unreachable(f"an actor does not answer: {str(error).partition(chr(10))[0]}") from error


def _task(reference: Any) -> "asyncio.Task[Any]":
    task = asyncio.ensure_future(_result_of(reference))
    # asyncio logs exceptions that were never retrieved.
    task.add_done_callback(lambda task: task.cancelled() or task.exception())
    return task


def _num_rows(archive: Archive, deal: Deal, found: Sequence[int | None]) -> list[int]:
    """Return the number of rows of each shard, counted in the archive where it is None."""
    counts = np.zeros(deal.num_shards, np.int64)
    for ids, _ in archive.scan_batches([]):
        counts += np.bincount(deal.owner(ids), minlength=deal.num_shards)
    return [int(counts[number]) if count is None else count for number, count in enumerate(found)]
