"""An open archive with its model and the shards that hold its codes, in this process (`cluster` has Ray actors)."""

import asyncio
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Protocol

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.engine.protocols import QueryEncoder, Scope, ShardClient
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.host import Diff, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.shard import Ids, ShardAnswer

__all__ = ["Backend", "LocalBackend", "LocalShardClient", "codes_of"]

# Maximum number of comparisons and of hits of a search in the event loop: about a millisecond, which is less than a
# thread costs under load.
_SHORT_SCAN, _FEW_HITS = 2**18, 2**12

# Threads per shard: a search, one that was given up but still runs, and the load of another version.
_THREADS_PER_SHARD = 3


class Backend(Protocol):
    """One archive with its model, and the shards that hold its codes."""

    index: str
    encoder: QueryEncoder

    @property
    def archive(self) -> Archive:
        """The archive, for writing."""

    async def at(self, version: int) -> Snapshot:
        """Return a snapshot of any version, whose codes are loaded from the archive."""

    async def apply(self, diff: Diff) -> Snapshot:
        """Return a snapshot of version `diff.after`; fast for shards that hold `diff.before`."""

    async def close(self) -> None:
        """Release all resources. No search may use a snapshot of this backend any more."""


def codes_of(path: str, version: int) -> Iterator[tuple[Ids, Codes]]:
    """Yield the ids and codes of a version of the archive at `path` in batches."""
    return Archive.open(path, version).code_batches()


class LocalBackend:
    """All shards in this process. Searches of shards run in parallel, because FAISS releases the interpreter's lock."""

    def __init__(self, archive: Archive, encoder: QueryEncoder, num_shards: int, index: str = "flat") -> None:
        self.archive = archive
        self.encoder = encoder
        self.index = index

        def load(version: int) -> Iterator[tuple[Ids, Codes]]:
            return codes_of(archive.path, version)

        self._hosts = [ShardHost(load, archive.bits, number, num_shards, index) for number in range(num_shards)]
        # Own threads: long searches do not delay the look-up of keys, and the other way round.
        self._executor = ThreadPoolExecutor(_THREADS_PER_SHARD * num_shards, "shard")

    async def at(self, version: int) -> Snapshot:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        for host in self._hosts:
            await loop.run_in_executor(self._executor, host.num_rows, version)
        return await self._snapshot(version)

    async def apply(self, diff: Diff) -> Snapshot:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._executor, host.apply, diff) for host in self._hosts))
        return await self._snapshot(diff.after)

    async def close(self) -> None:
        """See `Backend`."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _snapshot(self, version: int) -> Snapshot:
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        shards: Sequence[ShardClient] = [LocalShardClient(host, version, self._executor) for host in self._hosts]
        return Snapshot.of(archive, shards, self.encoder, is_exact_index(self.index))


class LocalShardClient:
    """A shard in this process, searched in a thread."""

    num_replicas = num_healthy = 1

    def __init__(self, host: ShardHost, version: int, executor: ThreadPoolExecutor | None = None) -> None:
        """`executor`: its threads are used for searches (None: those of the event loop)."""
        self._host = host
        self._version = version
        self._executor = executor
        self.num_rows = host.num_rows(version)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`. A search that is cancelled runs to its end in its thread."""
        search = partial(self._host.search, self._version, queries, k, scope.radius, scope.after, scope.selection)
        return await asyncio.get_running_loop().run_in_executor(self._executor, search)

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """See `QuickShardClient`."""
        is_plain = scope.radius is None and scope.after is None and scope.selection is None
        is_short = len(queries) * self.num_rows <= _SHORT_SCAN and len(queries) * k <= _FEW_HITS
        if not (is_plain and is_short and self._host.holds(self._version)):
            return None
        return self._host.search(self._version, queries, k)
