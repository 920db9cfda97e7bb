"""An open archive with its model and the shards that hold its codes, in this process (`cluster` has Ray actors)."""

import asyncio
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol, TypeVar

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Order, Ranked
from orbithash.search.index.row_index import is_exact_index
from orbithash.search.protocol.errors import DeadlineExceeded
from orbithash.search.protocol.queries import has_large
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.selections import Selections
from orbithash.search.segments.stop import Stop, Stopped

__all__ = ["Backend", "LocalBackend", "LocalShardClient"]

Result = TypeVar("Result")

# Maximum time of a search in the event loop, about what a thread costs under load. The time is estimated from earlier
# searches; that of the first one from the number of rows.
_MAX_BLOCKING_S, _ASSUMED_S_PER_ROW = 0.5e-3, 0.5e-9
# Rows of hits that are returned in the event loop.
_MAX_HITS_NOW = 512
# Weight of the last search in the mean of the times of searches.
_LEARNING_RATE = 0.1

# Threads per shard: a search, one that was given up but still runs, and the rows of hits.
_THREADS_PER_SHARD = 3
# Threads that wait for the evaluation of a filter.
_WAITING_THREADS = 64


class Backend(Protocol):
    """One archive with its model, and the shards that hold its codes."""

    index: str
    encoder: QueryEncoder

    @property
    def archive(self) -> Archive:
        """The archive, for writing."""

    async def at(self, version: int) -> Snapshot:
        """Return a snapshot of a version; fast if the shards hold one that is a little older.

        Raises `VersionGone` for a version that is older than all that the shards hold.
        """

    async def close(self) -> None:
        """Release all resources. No search may use a snapshot of this backend any more."""


class LocalBackend:
    """All shards in this process. Searches of shards run in parallel, because they release the interpreter's lock."""

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        num_shards: int,
        index: str = "exact",
        folder: Path | None = None,
    ) -> None:
        """`folder`: root of the files of segments; None: segments are in memory only."""
        self.archive = archive
        self.encoder = encoder
        self.index = index
        self._deal = Deal.of(archive.num_rows, num_shards)
        self._selections = Selections()
        self._hosts = [
            ShardHost(archive.path, archive.bits, self._deal, number, index, folder, self._selections)
            for number in range(num_shards)
        ]
        # Own threads: long searches do not delay other work, and the other way round.
        self._executor = ThreadPoolExecutor(_THREADS_PER_SHARD * num_shards, "shard")
        self._waiting = ThreadPoolExecutor(_WAITING_THREADS, "wait-for-filter")
        self._following = ThreadPoolExecutor(num_shards, "follow")

    async def at(self, version: int) -> Snapshot:
        """See `Backend`."""
        loop = asyncio.get_running_loop()
        await asyncio.gather(*(loop.run_in_executor(self._following, _follow, host, version) for host in self._hosts))
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        shards = [LocalShardClient(host, version, self._executor, self._waiting) for host in self._hosts]
        return Snapshot.of(archive, shards, self._deal, self.encoder, is_exact_index(self.index))

    async def close(self) -> None:
        """See `Backend`."""
        for executor in (self._executor, self._waiting, self._following):
            executor.shutdown(wait=False, cancel_futures=True)
        self._selections.close()
        await asyncio.gather(*(asyncio.to_thread(host.close) for host in self._hosts))


def _follow(host: ShardHost, version: int) -> None:
    host.follow(version)
    # Searches in the event loop must not read the archive.
    host.warm(version)


class LocalShardClient:
    """A shard in this process, in one version that it holds."""

    num_replicas = num_healthy = 1

    def __init__(
        self, host: ShardHost, version: int, executor: Executor | None = None, waiting: Executor | None = None
    ) -> None:
        """Create a client of a version.

        Args:
            host: the shard.
            version: a version that it holds.
            executor: its threads are used for searches; None: those of the event loop.
            waiting: its threads wait for new filters; None: `executor`.
        """
        self._host = host
        self._version = version
        self._executor = executor
        self._waiting = waiting or executor
        self._expected_s = _ASSUMED_S_PER_ROW * host.num_rows(version)
        self.num_rows = host.num_rows(version)

    @property
    def num_segments(self) -> int:
        """Number of segments of the newest version."""
        return self._host.status().num_segments

    @property
    def num_bytes(self) -> int:
        """Memory of the shard in bytes."""
        return self._host.status().num_bytes

    @property
    def num_merges(self) -> int:
        """Number of merges of segments since the start."""
        return self._host.status().num_merges

    @property
    def num_evaluations(self) -> int:
        """Number of filters evaluated over a segment since the start."""
        return self._host.status().num_evaluations

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        return await self._run(lambda stop: self._search(queries, k, scope, stop), timeout_s, scope.filter)

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """See `QuickShardClient`."""
        if scope.filter or len(queries) * self._expected_s > _MAX_BLOCKING_S or not self._host.holds(self._version):
            return None
        return self._search(queries, k, scope, Stop())

    def hits_now(self, ids: Ids, include: Sequence[str]) -> list[bytes] | None:
        """See `QuickShardClient`."""
        if has_large(include) or len(ids) > _MAX_HITS_NOW or self._host.reads_archive(self._version):
            return None
        return self._host.hits(self._version, ids, include, Stop())

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """See `ShardClient`."""
        return await self._run(lambda stop: self._host.hits(self._version, ids, include, stop), timeout_s)

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """See `ShardClient`."""
        return await self._run(lambda stop: self._host.read(self._version, ids, columns, stop), timeout_s)

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """See `ShardClient`."""
        return await self._run(lambda stop: self._host.count(self._version, filter_text, stop), timeout_s, filter_text)

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """See `ShardClient`."""
        return await self._run(
            lambda stop: self._host.scroll(self._version, filter_text, after, limit, stop), timeout_s, filter_text
        )

    async def rank(
        self,
        order: Order,
        k: int,
        max_key: int | None,
        after: tuple[int, int] | None,
        filter_text: str,
        timeout_s: float,
    ) -> Ranked:
        """See `ShardClient`."""
        return await self._run(
            lambda stop: self._host.rank(self._version, order, k, max_key, after, filter_text, stop),
            timeout_s,
            filter_text,
        )

    async def distances(self, code: Codes, filter_text: str, timeout_s: float) -> tuple[Counts, int | None]:
        """See `ShardClient`."""
        return await self._run(
            lambda stop: self._host.distances(self._version, code, filter_text, stop), timeout_s, filter_text
        )

    async def count_by(self, by: GroupName, filter_text: str, timeout_s: float) -> tuple[dict[str, int], int]:
        """See `ShardClient`."""
        return await self._run(
            lambda stop: self._host.count_by(self._version, by, filter_text, stop), timeout_s, filter_text
        )

    def _search(self, queries: Codes, k: int, scope: Scope, stop: Stop) -> ShardAnswer:
        begun = time.thread_time()
        answer = self._host.search(self._version, queries, k, scope, stop)
        if not scope.filter and len(queries):
            seconds = (time.thread_time() - begun) / len(queries)
            self._expected_s += _LEARNING_RATE * (seconds - self._expected_s)
        return answer

    async def _run(self, work: Callable[[Stop], Result], timeout_s: float, filter_text: str = "") -> Result:
        """Call `work` in a thread; it stops when this call is cancelled or `timeout_s` has passed."""
        stop = Stop(timeout_s)
        is_ready = self._host.is_ready(self._version, filter_text)
        try:
            return await asyncio.get_running_loop().run_in_executor(
                self._executor if is_ready else self._waiting, work, stop
            )
        except asyncio.CancelledError:
            stop.cancel()
            raise
        except Stopped as error:
            raise DeadlineExceeded("a shard did not answer in time") from error
