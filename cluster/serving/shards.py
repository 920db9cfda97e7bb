"""The shards of an archive as Ray actors, each in as many copies as asked for."""

import asyncio
import pickle
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

from orbithash.cluster.runtime import check_resources
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.backend import codes_of
from orbithash.search.engine.replicas import Copy, Latencies, Replicas
from orbithash.search.engine.snapshot import QueryEncoder, Scope, ShardClient, Snapshot
from orbithash.search.index.host import Change, Rows, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.shard import Ids, ShardAnswer, part_of
from orbithash.search.observer import Observer

__all__ = ["RayBackend"]

# A scan is short and takes one thread; what a shard needs of its node is memory.
SHARD_CPUS = 0.1

# Two searches at a time in one shard; changes and questions after its health go beside them.
SHARD_THREADS = 4

# A shard that dies starts again and reads its rows from the archive version that is asked for.
MAX_RESTARTS = -1

START_TIMEOUT_S = 600.0
# Of a copy that does not take a change for so long, the change goes on without it: it reads the version when asked.
CHANGE_TIMEOUT_S = 10.0
HEALTH_EVERY_S = 0.5

_KEPT_SELECTIONS = 32

_PROTOCOL = pickle.HIGHEST_PROTOCOL


class _ShardActor:
    """Shard `number` of `num_shards` of an archive, in the versions that are asked for."""

    def __init__(self, archive: str, bits: int, number: int, num_shards: int, index: str) -> None:
        self._host = ShardHost(lambda version: codes_of(archive, version), bits, number, num_shards, index)

    def num_rows(self, version: int) -> int:
        return self._host.num_rows(version)

    def change(self, change: Change) -> int:
        return self._host.change(change)

    def search(self, asked: bytes, ids: Ids | None = None) -> bytes:
        version, queries, k, radius, after, token = pickle.loads(asked)
        rows = None if ids is None else Rows(token, ids)
        return pickle.dumps(self._host.search(version, queries, k, radius, after, rows), _PROTOCOL)


class _RayShardClient:
    """One copy of a shard in one version."""

    num_replicas = num_healthy = 1

    def __init__(self, backend: "RayBackend", actor: Any, version: int, num_rows: int, max_retries: int) -> None:
        self._backend = backend
        self._search = actor.search.options(max_task_retries=max_retries)
        self._version = version
        self.num_rows = num_rows

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        token = "" if scope.rows is None else scope.rows.token
        # As bytes: what Ray makes of arrays takes longer than a search (docs/results.md). Nobody outside sends these.
        asked = pickle.dumps((self._version, queries, k, scope.radius, scope.after, token), _PROTOCOL)
        ids = () if scope.rows is None else (self._backend.reference(self._version, scope.rows),)
        answer: ShardAnswer = pickle.loads(await self._search.remote(asked, *ids))
        return answer


class RayBackend:
    """An archive whose shards are actors; made by `start`."""

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
        """`group`: the placement group that the actors lie in, and end with."""
        self._observer = observer
        self._group = group
        self.archive = archive
        self.encoder = encoder
        self.index = index
        # By shard, then by copy.
        self._actors = actors
        self._close_encoder = close_encoder
        self._copies = [[Copy() for _ in of_shard] for of_shard in actors]
        self._latencies = [Latencies() for _ in actors]
        self._version = archive.version
        self._references: OrderedDict[tuple[int, str], Any] = OrderedDict()
        self._watch = asyncio.create_task(self._keep_watch())

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
        """Starts the actors; they load their rows when a version is asked for. `close_encoder`: what `close` calls."""
        import ray
        from ray.util.placement_group import placement_group, remove_placement_group
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        num_actors = num_shards * num_replicas
        places = [{"CPU": SHARD_CPUS}] * num_actors
        await asyncio.to_thread(check_resources, f"serving {num_actors} shards", places)
        # Over the nodes by turns, so that the copies of a shard, which follow each other, are on different ones.
        group = placement_group(places, strategy="SPREAD")
        if not await asyncio.to_thread(group.wait, START_TIMEOUT_S):
            remove_placement_group(group)
            raise InputError(
                f"the cluster found no place for {num_actors} shards within {START_TIMEOUT_S:.0f} s; has it room?"
            )
        actor_class = ray.remote(num_cpus=SHARD_CPUS, max_restarts=MAX_RESTARTS, max_concurrency=SHARD_THREADS)(
            _ShardActor
        )

        def started(number: int, copy: int) -> Any:
            place = PlacementGroupSchedulingStrategy(group, number * num_replicas + copy)
            return actor_class.options(scheduling_strategy=place).remote(
                archive.path, archive.bits, number, num_shards, index
            )

        actors = [[started(number, copy) for copy in range(num_replicas)] for number in range(num_shards)]
        return cls(archive, encoder, index, actors, close_encoder, group, observer)

    async def at(self, version: int) -> Snapshot:
        """See `Backend`. Every copy is ready when it returns."""
        from ray.exceptions import RayTaskError

        try:
            async with asyncio.timeout(START_TIMEOUT_S):
                counts = await asyncio.gather(
                    *(
                        actor.num_rows.options(max_task_retries=1).remote(version)
                        for of_shard in self._actors
                        for actor in of_shard
                    )
                )
        except TimeoutError as err:
            raise InputError(f"the shards were not ready after {START_TIMEOUT_S:.0f} s; has the cluster room?") from err
        except RayTaskError as err:
            raise err.cause from err
        num_replicas = len(self._actors[0])
        return await self._snapshot(version, counts[::num_replicas])

    async def change(self, change: Change) -> Snapshot:
        """See `Backend`. A copy that does not answer reads the version when it is asked for it."""
        import ray

        reference = ray.put(change)
        counts: list[int] = []
        outcomes = await asyncio.gather(
            *(self._change_shard(number, reference) for number in range(len(self._actors))), return_exceptions=True
        )
        for number, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                outcome = await asyncio.to_thread(self._num_rows_of, number, change.after)
            counts.append(outcome)
        return await self._snapshot(change.after, counts)

    async def close(self) -> None:
        """See `Backend`."""
        import ray
        from ray.util.placement_group import remove_placement_group

        self._watch.cancel()
        self._close_encoder()
        for of_shard in self._actors:
            for actor in of_shard:
                ray.kill(actor)
        remove_placement_group(self._group)

    def reference(self, version: int, rows: Rows) -> Any:
        """The ids of the rows in Ray's object store, put there once for all shards and searches."""
        import ray

        place = (version, rows.token)
        if place not in self._references:
            self._references[place] = ray.put(rows.ids)
            while len(self._references) > _KEPT_SELECTIONS:
                self._references.popitem(last=False)
        return self._references[place]

    def _num_rows_of(self, number: int, version: int) -> int:
        batches = codes_of(self.archive.path, version)
        return sum(int(part_of(ids, number, len(self._actors)).sum()) for ids, _ in batches)

    async def _change_shard(self, number: int, reference: Any) -> int:
        """Rows of the shard after the change, by whichever copy; waits for all of them."""

        async def of_copy(actor: Any, copy: Copy) -> int:
            try:
                async with asyncio.timeout(CHANGE_TIMEOUT_S):
                    return int(await actor.change.remote(reference))
            except Exception:
                copy.is_healthy = False
                raise

        outcomes = await asyncio.gather(
            *(of_copy(*each) for each in zip(self._actors[number], self._copies[number], strict=True)),
            return_exceptions=True,
        )
        for outcome in outcomes:
            if isinstance(outcome, int):
                return outcome
        raise RuntimeError(f"no copy of shard {number} took a change")

    async def _snapshot(self, version: int, counts: Sequence[int]) -> Snapshot:
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        self._version = version
        # A lone copy that is restarting is worth waiting for; of several another answers meanwhile.
        max_retries = 1 if len(self._actors[0]) == 1 else 0
        shards: list[ShardClient] = []
        for of_shard, copies, latencies, count in zip(self._actors, self._copies, self._latencies, counts, strict=True):
            clients = [_RayShardClient(self, actor, version, count, max_retries) for actor in of_shard]
            shards.append(Replicas(clients, copies, latencies, self._observer))
        return Snapshot.of(archive, shards, self.encoder, is_exact_index(self.index))

    async def _keep_watch(self) -> None:
        """Asks copies that failed whether they are back; the question makes them load their rows."""
        while True:
            await asyncio.sleep(HEALTH_EVERY_S)
            failed = [
                (actor, copy)
                for of_shard, copies in zip(self._actors, self._copies, strict=True)
                for actor, copy in zip(of_shard, copies, strict=True)
                if not copy.is_healthy
            ]
            for actor, copy in failed:
                with suppress(Exception):
                    async with asyncio.timeout(START_TIMEOUT_S):
                        await actor.num_rows.remote(self._version)
                    copy.answered()
