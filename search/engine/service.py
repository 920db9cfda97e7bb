"""What the gateway offers, without the wire: searches and changes of the archive that is served at the moment."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version

from orbithash.encoders.errors import InputError
from orbithash.search.engine.backend import Backend
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.lookup import RowPage, count_rows, get_rows, keys_of, scroll_rows
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.engine.writer import Committed, Writer
from orbithash.search.index.host import MAX_VERSIONS, Change
from orbithash.search.observer import Observer
from orbithash.search.protocol.description import Description, ShardStatus
from orbithash.search.protocol.errors import InvalidQuery, SearchError
from orbithash.search.protocol.queries import (
    MAX_BATCH_HITS,
    MAX_K,
    MAX_LARGE_ROWS,
    MAX_QUERIES,
    Answer,
    Column,
    Query,
    check_filter,
    check_num_shards,
    has_large,
)
from orbithash.search.protocol.rows import Row, RowUpdate, check_keys

__all__ = ["Service", "Target", "check_num_queries", "open_service"]

logger = logging.getLogger(__name__)

# Rows of one step of a deletion by filter.
_MAX_DELETE = 20_000

# How long the searches have that began before another archive took its place.
_LAST_SEARCHES_S = 60.0

# How long a change waits for the searches of the version whose place it takes.
_CHANGE_WAITS_S = 1.0

# How soon searches see what other programs write.
_FOLLOW_EVERY_S = 1.0


@dataclass(frozen=True)
class Target:
    """What is to be served: an archive, the folder of its model, and into how many shards it is cut."""

    archive: str
    model: str
    num_shards: int


OpenBackend = Callable[[Target], Awaitable[Backend]]


class Service:
    """Belongs to one event loop; made by `open_service`."""

    def __init__(self, target: Target, backend: Backend, engine: Engine, open_backend: OpenBackend) -> None:
        self._target = target
        self._backend = backend
        self._engine = engine
        self.observer = engine.observer
        self._open_backend = open_backend
        self._writer = self._new_writer(backend)
        # One move to another version at a time.
        self._moving = asyncio.Lock()
        self._ending: set[asyncio.Task[None]] = set()
        self._refreshes: set[asyncio.Task[None]] = set()

    async def search(self, query: Query, timeout_s: float) -> Answer:
        """See `Engine.search`."""
        return await self._engine.search(query, timeout_s)

    async def search_many(self, queries: Sequence[Query], timeout_s: float) -> list[Answer | SearchError]:
        """An answer or what went wrong for each of at most `MAX_QUERIES` queries."""
        check_num_queries(len(queries))
        if (num_hits := sum(query.k for query in queries if 0 < query.k <= MAX_K)) > MAX_BATCH_HITS:
            raise InvalidQuery(
                ("requests", f"at most {MAX_BATCH_HITS:,} hits of all queries together, got {num_hits:,}")
            )
        if (num_large := sum(query.k for query in queries if has_large(query.include))) > MAX_LARGE_ROWS:
            raise InvalidQuery(
                (
                    "requests",
                    f"at most {MAX_LARGE_ROWS:,} hits with thumbnails or footprints of all queries together, got "
                    f"{num_large:,}",
                )
            )
        found = await asyncio.gather(
            *(self._engine.search(query, timeout_s) for query in queries), return_exceptions=True
        )
        for outcome in found:
            if isinstance(outcome, BaseException) and not isinstance(outcome, SearchError):
                raise outcome
        return [outcome for outcome in found if isinstance(outcome, Answer | SearchError)]

    def describe(self) -> Description:
        """What a search that begins now is over."""
        snapshot = self._engine.snapshot
        archive = snapshot.archive
        return Description(
            snapshot.num_rows,
            archive.bits,
            archive.model_id,
            archive.version,
            self._backend.index,
            snapshot.encoder.has_text,
            tuple(ShardStatus(shard.num_rows, shard.num_replicas, shard.num_healthy) for shard in snapshot.shards),
            version("orbithash"),
        )

    @property
    def can_answer(self) -> bool:
        """Whether some part of the archive can be searched."""
        return any(shard.num_healthy for shard in self._engine.snapshot.shards)

    @property
    def num_queries_waiting(self) -> int:
        """Queries that wait for a batch."""
        return self._engine.num_waiting

    @property
    def num_rows_waiting(self) -> int:
        """Changes of rows that wait to be written."""
        return self._writer.num_waiting

    async def get(self, keys: Sequence[str], include: Sequence[Column]) -> RowPage:
        """See `get_rows`."""
        return await get_rows(self._engine.snapshot, keys, include)

    async def count(self, filter_text: str) -> tuple[int, int]:
        """See `count_rows`."""
        return await count_rows(self._engine.snapshot, filter_text)

    async def scroll(self, filter_text: str, after: int | None, limit: int, include: Sequence[Column]) -> RowPage:
        """See `scroll_rows`."""
        return await scroll_rows(self._engine.snapshot, filter_text, after, limit, include)

    async def upsert(self, rows: Sequence[Row]) -> Committed:
        """See `Writer.upsert`."""
        return await self._writer.upsert(rows)

    async def prepare(self, rows: Sequence[Row]) -> list[Row]:
        """See `Writer.prepare`."""
        return await self._writer.prepare(rows)

    async def write(self, rows: Sequence[Row]) -> Committed:
        """See `Writer.write`."""
        return await self._writer.write(rows)

    async def update(self, updates: Sequence[RowUpdate]) -> Committed:
        """See `Writer.update`."""
        return await self._writer.update(updates)

    async def delete(self, keys: Sequence[str]) -> Committed:
        """See `Writer.delete`; raises `InvalidQuery` for invalid keys."""
        check_keys(keys)
        return await self._writer.delete(keys)

    async def delete_matching(self, filter_text: str) -> AsyncIterator[tuple[int, Committed]]:
        """Remove the rows that pass a filter, in steps; yield the number of keys and the outcome of each step.

        Raises `InvalidQuery` for an invalid or empty filter, and as `Writer.delete`.
        """
        check_filter(filter_text)
        if not filter_text:
            raise InvalidQuery(("filter", "an empty filter would remove all rows; write NOT key IS NULL to do so"))
        keys = await keys_of(self._engine.snapshot, filter_text)
        for start in range(0, max(1, len(keys)), _MAX_DELETE):
            step = keys[start : start + _MAX_DELETE]
            yield len(step), await self._writer.delete(step)

    async def refresh(self, archive: str = "", model: str = "", num_shards: int = 0) -> Description:
        """Move to the newest version, to another archive or to another number of shards; "" and 0: no change.

        The move is completed even if the caller is cancelled. Raises `InvalidQuery` if the target cannot be served.
        """
        check_num_shards(num_shards)
        task = asyncio.create_task(self._refresh(archive, model, num_shards))
        self._refreshes.add(task)
        task.add_done_callback(self._refreshed)
        await asyncio.shield(task)
        return self.describe()

    def _refreshed(self, task: asyncio.Task[None]) -> None:
        self._refreshes.discard(task)
        # Retrieves the exception, also if the caller has gone.
        if not task.cancelled() and (error := task.exception()):
            logger.warning("a refresh failed: %s", error)

    async def _refresh(self, archive: str, model: str, num_shards: int) -> None:
        async with self._moving:
            now = self._target
            target = Target(archive or now.archive, model or now.model, num_shards or now.num_shards)
            try:
                if target == now:
                    await self._writer.refresh()
                else:
                    await self._move(target)
            except SearchError:
                raise
            except InputError as error:
                raise InvalidQuery(("archive", str(error))) from error

    async def follow(self) -> None:
        """Shows what other programs write into the archive, for as long as it runs."""
        while True:
            await asyncio.sleep(_FOLLOW_EVERY_S)
            try:
                newest = await asyncio.to_thread(self._backend.archive.newest_version)
                if newest > self._engine.snapshot.archive.version:
                    await self._writer.refresh()
            except (InputError, SearchError) as error:
                logger.warning("the archive could not be followed: %s", error)

    async def close(self) -> None:
        """After the last search: ends what was begun and lets go of everything."""
        refreshes = list(self._refreshes)
        for refresh in refreshes:
            refresh.cancel()
        await asyncio.gather(*refreshes, return_exceptions=True)
        await self._writer.close()
        for task in self._ending:
            task.cancel()
        await self._backend.close()

    async def _move(self, target: Target) -> None:
        backend = await self._open_backend(target)
        old, old_writer = self._backend, self._writer
        async with _closed_on_failure(backend):
            snapshot = await _snapshot(backend)
            async with old_writer.held:
                is_same = old.archive.path == backend.archive.path
                if is_same and old.archive.version > snapshot.archive.version:
                    # Written while the shards were loaded. What searches have seen they go on to see.
                    await asyncio.to_thread(backend.archive.refresh)
                    snapshot = await _snapshot(backend)
                self._engine.swap(snapshot)
                self._target, self._backend, self._writer = target, backend, self._new_writer(backend)
                if is_same:
                    old_writer.hand_over(self._writer)
        task = asyncio.create_task(_end(old, old_writer))
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    def _new_writer(self, backend: Backend) -> Writer:
        # Of the versions that shards hold. One more takes the oldest one's place: who still searches that one is waited
        # for, or changes that come faster than searches end would make shards load what they have just let go of.
        held = deque([self._engine.snapshot], maxlen=MAX_VERSIONS)

        async def show(change: Change) -> None:
            if len(held) == MAX_VERSIONS:
                await held[0].uses.ended(_CHANGE_WAITS_S)
            snapshot = (await backend.change(change)).after(held[-1], change)
            held.append(snapshot)
            if self._backend is backend:
                self._engine.swap(snapshot)

        return Writer(backend.archive, backend.encoder, show, self._engine.snapshot.archive.version, self.observer)


async def _end(backend: Backend, writer: Writer) -> None:
    await writer.close()
    await asyncio.sleep(_LAST_SEARCHES_S)
    await backend.close()


def check_num_queries(count: int) -> None:
    """Raises `InvalidQuery` for more or fewer queries than can be asked at once."""
    if not 1 <= count <= MAX_QUERIES:
        raise InvalidQuery(("requests", f"from 1 to {MAX_QUERIES} queries, got {count}"))


@asynccontextmanager
async def _closed_on_failure(backend: Backend) -> AsyncIterator[None]:
    """Close a new backend if the block fails or is cancelled."""
    try:
        yield
    except BaseException:
        await backend.close()
        raise


async def _snapshot(backend: Backend) -> Snapshot:
    """Return a snapshot of the version that a backend was opened with."""
    snapshot = await backend.at(backend.archive.version)
    await asyncio.to_thread(snapshot.rows.warm)
    return snapshot


async def open_service(
    open_backend: OpenBackend, target: Target, observer: Observer | None = None, **options: float
) -> Service:
    """A service over what `open_backend(target)` opens; `options` are those of `Engine`."""
    backend = await open_backend(target)
    async with _closed_on_failure(backend):
        snapshot = await _snapshot(backend)
    return Service(target, backend, Engine(snapshot, observer=observer, **options), open_backend)  # type: ignore[arg-type]
