"""The shards of an archive as Ray actors, with a number of replicas each."""

import asyncio
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from orbithash.cluster.runtime import check_resources
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.backend import codes_of
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Scope
from orbithash.search.index.host import Diff, Selection, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.shard import Ids, ShardAnswer, part_of
from orbithash.search.observer import Observer
from orbithash.search.shards.interface import ShardClient
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard, ReplicaWatch

__all__ = ["RayBackend"]

# CPUs of one replica. A scan is short and takes one thread; the scarce resource of a shard is memory.
SHARD_CPUS = 0.1

# Maximum number of concurrent calls of one replica: searches, changes and health checks.
SHARD_THREADS = 4

# Without limit. A restarted replica reads its rows when a version is requested.
MAX_RESTARTS = -1

START_TIMEOUT_S = 600.0
# A replica that has not applied a change after this time is pinged; a change goes on without a replica that does not
# answer the ping.
APPLY_TIMEOUT_S, PING_TIMEOUT_S = 10.0, 5.0

_MAX_SELECTIONS = 32

_PROTOCOL = pickle.HIGHEST_PROTOCOL


class _ShardActor:
    """One replica of shard `number` of `num_shards` of an archive; holds the versions that were requested."""

    def __init__(self, archive: str, bits: int, number: int, num_shards: int, index: str) -> None:
        self._host = ShardHost(lambda version: codes_of(archive, version), bits, number, num_shards, index)

    def num_rows(self, version: int) -> int:
        return self._host.num_rows(version)

    def apply(self, diff: Diff) -> int:
        return self._host.apply(diff)

    def ping(self) -> None:
        """Return at once, also while another thread loads a version."""

    def search(self, request: bytes, ids: Ids | None = None) -> bytes:
        version, queries, k, radius, after, token = pickle.loads(request)
        selection = None if ids is None else Selection(token, ids)
        return pickle.dumps(self._host.search(version, queries, k, radius, after, selection), _PROTOCOL)


class _RayShardClient:
    """One replica of a shard in one version."""

    num_replicas = num_healthy = 1

    def __init__(self, backend: "RayBackend", actor: Any, version: int, num_rows: int, max_retries: int) -> None:
        self._backend = backend
        self._search = actor.search.options(max_task_retries=max_retries)
        self._version = version
        self.num_rows = num_rows

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        token = "" if scope.selection is None else scope.selection.token
        # As bytes, because Ray serialises arrays more slowly than a shard searches (docs/results.md). Only this process
        # sends these requests, so unpickling them is safe.
        request = pickle.dumps((self._version, queries, k, scope.radius, scope.after, token), _PROTOCOL)
        ids = () if scope.selection is None else (self._backend.reference(self._version, scope.selection),)
        answer: ShardAnswer = pickle.loads(await self._search.remote(request, *ids))
        return answer


class RayBackend:
    """A backend whose shards are Ray actors; created by `start`."""

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        index: str,
        actors: Sequence[Sequence[Any]],
        close_encoder: Callable[[], None],
        group: Any,
        observer: Observer,
    ) -> None:
        """Take over the actors, by shard and replica, and their placement group `group`, which `close` removes."""
        self._observer = observer
        self._group = group
        self.archive = archive
        self.encoder = encoder
        self.index = index
        self._actors = actors
        self._close_encoder = close_encoder
        self._replicas = [[Replica() for _ in of_shard] for of_shard in actors]
        self._hedging = [Hedging() for _ in actors]
        self._version = archive.version
        self._references: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._watch = ReplicaWatch([(replica, partial(self._probe, actor)) for actor, replica in self._each_replica()])

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
    ) -> "RayBackend":
        """Start the actors, which load their rows when a version is requested.

        `close` calls `close_encoder`. Raises `InputError` if the cluster has no room.
        """
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        num_actors = num_shards * num_replicas
        bundles = [{"CPU": SHARD_CPUS}] * num_actors
        await asyncio.to_thread(check_resources, f"serving {num_actors} shards", bundles)
        # SPREAD places consecutive bundles on different nodes; the replicas of a shard are consecutive.
        group = placement_group(bundles, strategy="SPREAD")
        if not await asyncio.to_thread(group.wait, START_TIMEOUT_S):
            remove_placement_group(group)
            raise InputError(
                f"the cluster had no room for {num_actors} shards within {START_TIMEOUT_S:.0f} s; add nodes or reduce "
                "--shards or --replicas"
            )
        actor_class = ray.remote(num_cpus=SHARD_CPUS, max_restarts=MAX_RESTARTS, max_concurrency=SHARD_THREADS)(
            _ShardActor
        )

        def start_actor(number: int, replica: int) -> Any:
            bundle = PlacementGroupSchedulingStrategy(group, number * num_replicas + replica)
            return actor_class.options(scheduling_strategy=bundle).remote(
                archive.path, archive.bits, number, num_shards, index
            )

        actors = [[start_actor(number, replica) for replica in range(num_replicas)] for number in range(num_shards)]
        return cls(archive, encoder, index, actors, close_encoder, group, observer)

    async def at(self, version: int) -> Snapshot:
        """See `Backend`. Every healthy replica has loaded the version when it returns.

        A replica that is not healthy loads it when it answers again; a shard without healthy replicas does not answer
        until then.
        """
        from ray.exceptions import RayTaskError

        async def load(actor: Any, replica: Replica) -> int:
            try:
                return int(await actor.num_rows.options(max_task_retries=1).remote(version))
            except Exception:
                replica.failed()
                raise

        async def load_shard(number: int) -> int:
            healthy = [each for each in self._replicas_of(number) if each[1].is_healthy]
            counts = await asyncio.gather(*(load(*each) for each in healthy))
            return counts[0] if counts else await asyncio.to_thread(self._num_rows_of, number, version)

        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                counts = await asyncio.gather(*map(load_shard, range(len(self._actors))))
        except TimeoutError as err:
            raise InputError(
                f"the shards were not ready after {START_TIMEOUT_S:.0f} s; check the cluster with `ray status`"
            ) from err
        except RayTaskError as err:
            raise err.cause from err
        return await self._snapshot(version, counts)

    async def apply(self, diff: Diff) -> Snapshot:
        """See `Backend`. A replica that does not answer loads the version when it answers again."""
        import ray

        reference = ray.put(diff)
        counts: list[int] = []
        outcomes = await asyncio.gather(
            *(self._apply_to_shard(number, reference) for number in range(len(self._actors))), return_exceptions=True
        )
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                outcome = await asyncio.to_thread(self._num_rows_of, number, diff.after)
            counts.append(outcome)
        return await self._snapshot(diff.after, counts)

    async def close(self) -> None:
        """See `Backend`."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._watch.close()
        self._close_encoder()
        for of_shard in self._actors:
            for actor in of_shard:
                ray.kill(actor)
        remove_placement_group(self._group)

    def reference(self, version: int, selection: Selection) -> Any:
        """Return a reference to the ids of a selection in Ray's object store, where they are put once."""
        import ray

        key = (version, selection.token)
        if key not in self._references:
            self._references[key] = ray.put(selection.ids)
            while len(self._references) > _MAX_SELECTIONS:
                self._references.popitem(last=False)
        return self._references[key]

    def _num_rows_of(self, number: int, version: int) -> int:
        batches = codes_of(self.archive.path, version)
        return sum(int(part_of(ids, number, len(self._actors)).sum()) for ids, _ in batches)

    def _each_replica(self) -> list[tuple[Any, Replica]]:
        return [each for number in range(len(self._actors)) for each in self._replicas_of(number)]

    def _replicas_of(self, number: int) -> list[tuple[Any, Replica]]:
        """Return the actor and the health of each replica of a shard."""
        return list(zip(self._actors[number], self._replicas[number], strict=True))

    async def _apply_to_shard(self, number: int, reference: Any) -> int:
        """Return the rows of a shard after a change that its healthy replicas have applied.

        Raises an error if no replica has applied it.
        """

        async def apply(actor: Any, replica: Replica) -> int:
            call = asyncio.ensure_future(_result_of(actor.apply.remote(reference)))
            try:
                async with asyncio.timeout(START_TIMEOUT_S):
                    while not (await asyncio.wait([call], timeout=APPLY_TIMEOUT_S))[0]:
                        # A replica that loads the version after a restart answers the ping; one that hangs does not.
                        async with asyncio.timeout(PING_TIMEOUT_S):
                            await actor.ping.remote()
                return int(call.result())
            except Exception:
                replica.failed()
                raise
            finally:
                call.cancel()

        healthy = [each for each in self._replicas_of(number) if each[1].is_healthy]
        outcomes = await asyncio.gather(*(apply(*each) for each in healthy), return_exceptions=True)
        for outcome in outcomes:
            if isinstance(outcome, int):
                return outcome
        raise RuntimeError(f"no replica of shard {number} has applied a change")

    async def _snapshot(self, version: int, counts: Sequence[int]) -> Snapshot:
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        self._version = version
        # Wait for a lone replica that restarts; with several replicas, another one answers.
        max_retries = 1 if len(self._actors[0]) == 1 else 0
        shards: list[ShardClient] = []
        for of_shard, replicas, hedging, count in zip(self._actors, self._replicas, self._hedging, counts, strict=True):
            clients = [_RayShardClient(self, actor, version, count, max_retries) for actor in of_shard]
            shards.append(ReplicatedShard(clients, replicas, hedging, self._observer))
        return Snapshot.of(archive, shards, self.encoder, is_exact_index(self.index))

    async def _probe(self, actor: Any) -> None:
        """Return when the replica has loaded the newest version."""
        await actor.num_rows.remote(self._version)


async def _result_of(reference: Any) -> Any:
    return await reference
