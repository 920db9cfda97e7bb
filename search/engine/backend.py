"""An archive that is opened with its model: what snapshots are made of. Here in this process; `cluster` has actors."""

import asyncio
from collections.abc import Iterator, Sequence
from typing import Protocol

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.engine.snapshot import QueryEncoder, Scope, ShardClient, Snapshot
from orbithash.search.index.host import Change, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.shard import Ids, ShardAnswer

__all__ = ["Backend", "LocalBackend", "LocalShardClient", "codes_of"]

# Comparisons and hits of about a millisecond: less than what it costs to hand work to a thread and back under load.
_SHORT_SCAN, _FEW_HITS = 2**18, 2**12


class Backend(Protocol):
    """One archive with its model, and what holds its codes."""

    index: str
    encoder: QueryEncoder

    @property
    def archive(self) -> Archive:
        """The archive, to write to."""

    async def at(self, version: int) -> Snapshot:
        """A snapshot of any version, loaded from the archive."""

    async def change(self, change: Change) -> Snapshot:
        """A snapshot of the version after the change, which is quick where the one before it is held."""

    async def close(self) -> None:
        """Lets go of everything, once no search needs it any more."""


def codes_of(path: str, version: int) -> Iterator[tuple[Ids, Codes]]:
    """The ids and codes of a version of the archive at `path`, some rows at a time."""
    return Archive.open(path, version).code_batches()


class LocalBackend:
    """All shards in this process. A scan lets go of the interpreter's lock, so shards are searched side by side."""

    def __init__(self, archive: Archive, encoder: QueryEncoder, num_shards: int, index: str = "flat") -> None:
        self.archive = archive
        self.encoder = encoder
        self.index = index

        def load(version: int) -> Iterator[tuple[Ids, Codes]]:
            return codes_of(archive.path, version)

        self._hosts = [ShardHost(load, archive.bits, number, num_shards, index) for number in range(num_shards)]

    async def at(self, version: int) -> Snapshot:
        """See `Backend`."""
        for host in self._hosts:
            await asyncio.to_thread(host.num_rows, version)
        return await self._snapshot(version)

    async def change(self, change: Change) -> Snapshot:
        """See `Backend`."""
        await asyncio.gather(*(asyncio.to_thread(host.change, change) for host in self._hosts))
        return await self._snapshot(change.after)

    async def close(self) -> None:
        """See `Backend`."""

    async def _snapshot(self, version: int) -> Snapshot:
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        shards: Sequence[ShardClient] = [LocalShardClient(host, version) for host in self._hosts]
        return Snapshot.of(archive, shards, self.encoder, is_exact_index(self.index))


class LocalShardClient:
    """A shard in this process, searched in a thread: FAISS lets go of the interpreter's lock."""

    num_replicas = num_healthy = 1

    def __init__(self, host: ShardHost, version: int) -> None:
        self._host = host
        self._version = version
        self.num_rows = host.num_rows(version)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`. A scan cannot be stopped half-way: whoever gives up does not hear its end."""
        return await asyncio.to_thread(
            self._host.search, self._version, queries, k, scope.radius, scope.after, scope.rows
        )

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """See `QuickShardClient`."""
        is_plain = scope.radius is None and scope.after is None and scope.rows is None
        is_short = len(queries) * self.num_rows <= _SHORT_SCAN and len(queries) * k <= _FEW_HITS
        if not (is_plain and is_short and self._host.holds(self._version)):
            return None
        return self._host.search(self._version, queries, k)
