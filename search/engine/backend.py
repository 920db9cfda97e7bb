"""An open archive with its model and the shards that hold its codes, in this process (`cluster` has Ray actors)."""

import asyncio
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.engine.filters import parse_filter
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.selections import select
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import NO_HIT, Ids, Scope, ShardAnswer
from orbithash.search.index.host import Selection, ShardHost
from orbithash.search.index.indexes import is_exact_index
from orbithash.search.index.shard import part_of
from orbithash.search.protocol.hits import row_of
from orbithash.search.protocol.queries import Hit
from orbithash.search.shards.interface import ShardClient

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

    async def close(self) -> None:
        """See `Backend`."""
        self._executor.shutdown(wait=False, cancel_futures=True)

    async def _snapshot(self, version: int) -> Snapshot:
        archive = await asyncio.to_thread(Archive.open, self.archive.path, version)
        shards: Sequence[ShardClient] = [
            LocalShardClient(host, version, archive, self._executor) for host in self._hosts
        ]
        return Snapshot.of(archive, shards, _Deal(len(shards)), self.encoder, is_exact_index(self.index))


@dataclass(frozen=True)
class _Deal:
    num_shards: int

    def owner(self, ids: Ids) -> npt.NDArray[np.uint64]:
        return ids % np.uint64(self.num_shards)


class LocalShardClient:
    """A shard in this process, searched in a thread."""

    num_replicas = num_healthy = 1

    def __init__(self, host: ShardHost, version: int, archive: Any, executor: ThreadPoolExecutor | None = None) -> None:
        """`executor`: its threads are used for searches (None: those of the event loop)."""
        self._host = host
        self._version = version
        self._archive = archive
        self._executor = executor
        self._selections: dict[str, Selection] = {}
        self.num_rows = host.num_rows(version)

    async def _run(self, work: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._executor, work)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`. A search that is cancelled runs to its end in its thread."""
        answer: ShardAnswer = await self._run(lambda: self._search(queries, k, scope))
        return answer

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """See `QuickShardClient`."""
        is_plain = not scope.filter
        is_short = len(queries) * self.num_rows <= _SHORT_SCAN and len(queries) * k <= _FEW_HITS
        if not (is_plain and is_short and self._host.holds(self._version)):
            return None
        return self._search(queries, k, scope)

    def hits_now(self, ids: Ids, include: Sequence[str]) -> list[bytes] | None:
        """See `QuickShardClient`."""
        return self._hits(ids, include)

    def _search(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer:
        selection = self._selection(scope.filter) if scope.filter else None
        answer = self._host.search(self._version, queries, k, scope.radius, scope.after, selection)
        rows: list[bytes] = []
        if scope.with_rows:
            ids = answer.ids[answer.distances != NO_HIT]
            rows = self._hits(ids, scope.include)
        num_matching = None if selection is None else len(self._part(selection.ids))
        return replace(answer, rows=tuple(rows), num_matching=num_matching)

    def _part(self, ids: Ids) -> Ids:
        return ids[part_of(ids, self._host._number, self._host._num_shards)]

    def _selection(self, text: str) -> Selection:
        if text not in self._selections:
            self._selections[text] = Selection(text, select(self._archive, parse_filter(text)))
        return self._selections[text]

    def _hits(self, ids: Ids, include: Sequence[str]) -> list[bytes]:
        if not len(ids):
            return []
        table = self._archive.take(ids, ["key", "label", "lon", "lat", "datetime", *include])
        rows = []
        for id_, row in zip(ids.tolist(), table.to_pylist(), strict=True):
            values = [row.pop(name) for name in ("key", "label", "lon", "lat", "datetime")]
            if "code" in row:
                row["code"] = bytes(row["code"])
            rows.append(row_of(Hit(0, 0, id_, *values, row)))
        return rows

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """See `ShardClient`."""
        rows: list[bytes] = await self._run(lambda: self._hits(ids, include))
        return rows

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """See `ShardClient`."""
        return await self._run(lambda: self._archive.take(ids, list(columns)))

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """See `ShardClient`."""
        return await self._run(lambda: len(self._part(self._selection(filter_text).ids)))

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """See `ShardClient`."""
        ids = await self._run(lambda: self._part(self._selection(filter_text or "NOT key IS NULL").ids))
        begin = 0 if after is None else int(ids.searchsorted(np.uint64(after), side="right"))
        return ids[begin : begin + limit]
