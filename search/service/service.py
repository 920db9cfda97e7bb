"""The service behind the gateway: searches and changes of the archive that is served now."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass
from importlib.metadata import version as version_of
from typing import Any, TypeVar

from orbithash.encoders.errors import InputError
from orbithash.search.engine.backend import Backend
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.lookup import ids_of
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.observer import Observer
from orbithash.search.protocol.description import Description, ShardStatus
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError
from orbithash.search.protocol.queries import check_filter, check_num_shards
from orbithash.search.protocol.rows import PreparedRow, Row, RowUpdate, check_keys
from orbithash.search.service.maintenance import Maintenance
from orbithash.search.service.reading import Reading
from orbithash.search.service.showing import Showing
from orbithash.search.service.supervision import repeat
from orbithash.search.service.writer import TIMEOUT_S, Committed, Writer
from orbithash.search.shards.interface import ShardClient

__all__ = ["Membership", "Service", "Target", "open_service"]

logger = logging.getLogger(__name__)

# Maximum rows of one step of a deletion by filter.
_MAX_DELETE = 20_000

# Maximum number of refreshes in progress or waiting for their turn, which outlive their callers.
_MAX_REFRESHING = 8

# Seconds until the backend of an archive that was replaced is closed; searches that use it must end by then.
_LAST_SEARCHES_S = 60.0

# Seconds between two looks for versions that other programs wrote, and the maximum after repeated failures.
_FOLLOW_EVERY_S, _MAX_FOLLOW_EVERY_S = 0.5, 60.0

Result = TypeVar("Result")


@dataclass(frozen=True)
class Target:
    """An archive to serve, the folder of its model, and the number of shards."""

    archive: str
    model: str
    num_shards: int


OpenBackend = Callable[[Target], Awaitable[Backend]]


@dataclass(frozen=True)
class Membership:
    """The membership of a gateway among those that share shards.

    Attributes:
        maintains: compact the served archive and remove its old versions; one of the gateways does so.
        moved: called with the target and its backend after each move to other shards.
        ask_move: asks the gateway that started the shards to move; None: this gateway moves by itself.
    """

    maintains: bool = True
    moved: Callable[[Target, Backend], Awaitable[None]] | None = None
    ask_move: Callable[[Target], Awaitable[None]] | None = None


@dataclass(frozen=True)
class _Served:
    """An open archive, its writer, and what moves searches to its newer versions."""

    target: Target
    backend: Backend
    showing: Showing
    writer: Writer


class Service(Reading):
    """Serves one archive at a time. Belongs to one event loop; created by `open_service`."""

    def __init__(
        self,
        target: Target,
        backend: Backend,
        engine: Engine,
        open_backend: OpenBackend,
        membership: Membership = Membership(maintains=False),
    ) -> None:
        # Number of gateways that share the shards.
        self.num_gateways = 1
        super().__init__(engine)
        self._membership = membership
        self._open_backend = open_backend
        self._served = self._serve(target, backend, engine.snapshot)
        self._maintenance = Maintenance(backend.archive.path) if membership.maintains else None
        # Only one refresh at a time.
        self._refreshing = asyncio.Lock()
        self._num_refreshing = 0
        self._tasks: set[asyncio.Task[Any]] = set()

    def describe(self) -> Description:
        """Describe the snapshot that new searches use."""
        snapshot = self._engine.snapshot
        archive = snapshot.archive
        return Description(
            snapshot.num_rows,
            archive.bits,
            archive.model_id,
            archive.version,
            self._served.backend.index,
            snapshot.encoder.has_text,
            tuple(map(_status_of, snapshot.shards)),
            version_of("orbithash"),
            snapshot.encoder.num_features,
            snapshot.encoder.embedding,
            snapshot.is_exact,
            self.num_gateways,
            *(archive.vector or (0, 0.0)),
            snapshot.encoder.has_views,
        )

    @property
    def can_answer(self) -> bool:
        """Whether at least one shard can be searched."""
        return any(shard.num_healthy for shard in self._engine.snapshot.shards)

    @property
    def num_queries_waiting(self) -> int:
        """Number of queries that wait for a batch."""
        return self._engine.num_waiting

    @property
    def follow_lag_s(self) -> float:
        """Seconds since a newer version became known than searches see; 0 if there is none."""
        return self._served.showing.lag_s

    @property
    def num_rows_waiting(self) -> int:
        """Number of rows that wait for a commit."""
        return self._served.writer.num_waiting

    async def upsert(self, rows: Sequence[Row], timeout_s: float = TIMEOUT_S) -> Committed:
        """See `Writer.upsert`."""
        return self._changed(await self._served.writer.upsert(rows, timeout_s))

    async def prepare(self, rows: Sequence[Row]) -> list[PreparedRow]:
        """See `Writer.prepare`."""
        return await self._served.writer.prepare(rows)

    async def write(self, rows: Sequence[PreparedRow], timeout_s: float = TIMEOUT_S) -> Committed:
        """See `Writer.write`."""
        return self._changed(await self._served.writer.write(rows, timeout_s))

    async def update(self, updates: Sequence[RowUpdate], timeout_s: float = TIMEOUT_S) -> Committed:
        """See `Writer.update`."""
        return self._changed(await self._served.writer.update(updates, timeout_s))

    async def delete(self, keys: Sequence[str], timeout_s: float = TIMEOUT_S) -> Committed:
        """See `Writer.delete`; raises `InvalidQuery` for invalid keys."""
        check_keys(keys)
        return self._changed(await self._served.writer.delete(keys, timeout_s))

    async def delete_matching(
        self, filter_text: str, timeout_s: float = TIMEOUT_S
    ) -> AsyncIterator[tuple[int, Committed]]:
        """Remove the rows that pass a filter, in steps; yield the number of keys and the outcome of each step.

        `timeout_s` is the time limit of a step. Raises `InvalidQuery` for an invalid or empty filter, and the errors of
        `Writer.delete`.
        """
        check_filter(filter_text)
        if not filter_text:
            raise InvalidQuery(("filter", "an empty filter would remove all rows; write NOT key IS NULL to do so"))
        # The rows of this archive, even if another one is served before the last step.
        snapshot, writer = self._engine.snapshot, self._served.writer
        # Ids take less memory than keys.
        ids = await ids_of(snapshot, filter_text)
        for start in range(0, max(1, len(ids)), _MAX_DELETE):
            table = await asyncio.to_thread(snapshot.archive.take, ids[start : start + _MAX_DELETE], ["key"])
            keys = table["key"].to_pylist()
            yield len(keys), self._changed(await writer.delete(keys, timeout_s))

    async def refresh(self, archive: str = "", model: str = "", num_shards: int = 0) -> Description:
        """Serve the newest version, another archive, or another number of shards; "" and 0 keep the current value.

        It continues when the caller is cancelled. Raises `InvalidQuery` if the target cannot be served.
        """
        check_num_shards(num_shards)
        if self._num_refreshing >= _MAX_REFRESHING:
            raise Overloaded(f"{self._num_refreshing} refreshes are in progress; try again later", retry_after_s=5.0)
        return await asyncio.shield(self._start(self._refresh(archive, model, num_shards)))

    @property
    def backend(self) -> Backend:
        """The shards and the model that serve now."""
        return self._served.backend

    async def move(self, target: Target) -> None:
        """Serve `target`, also if it is the same as now: its shards may be others."""
        async with self._refreshing:
            await self._move(target)

    async def follow(self) -> None:
        """Show versions that other programs and gateways write, until it is cancelled."""
        await repeat("following the archive", self._show_newest, _FOLLOW_EVERY_S, _MAX_FOLLOW_EVERY_S)

    async def close(self) -> None:
        """Finish commits that were requested and release all resources. No search may be in flight. Never raises."""
        await _logged("finishing commits", self._served.writer.close())
        if self._maintenance is not None:
            await self._maintenance.close()
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        await self._served.showing.close()
        await _logged("closing the shards", self._served.backend.close())

    def _start(self, work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
        """Run `work` in a task that `close` cancels."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def _changed(self, committed: Committed) -> Committed:
        """Note that the archive has changed."""
        if self._maintenance is not None:
            self._maintenance.schedule()
        return committed

    async def _show_newest(self) -> None:
        """Show the newest version of the archive."""
        served = self._served
        newest = await asyncio.to_thread(served.backend.archive.newest_version)
        if newest > served.showing.version:
            await served.showing.show(newest)
            if self._maintenance is not None:
                self._maintenance.schedule()

    async def _refresh(self, archive: str, model: str, num_shards: int) -> Description:
        self._num_refreshing += 1
        try:
            return await self._refresh_in_turn(archive, model, num_shards)
        finally:
            self._num_refreshing -= 1

    async def _refresh_in_turn(self, archive: str, model: str, num_shards: int) -> Description:
        async with self._refreshing:
            now = self._served.target
            target = Target(archive or now.archive, model or now.model, num_shards or now.num_shards)
            try:
                if target == now:
                    await self._show_newest()
                else:
                    if self._membership.ask_move is not None:
                        await self._membership.ask_move(target)
                    await self._move(target)
            except SearchError:
                raise
            except InputError as error:
                raise InvalidQuery(("archive", str(error))) from error
        return self.describe()

    async def _move(self, target: Target) -> None:
        old = self._served
        backend = await self._open_backend(target)
        try:
            is_same = old.backend.archive.path == backend.archive.path
            snapshot = await backend.at(backend.archive.version)
            async with old.writer.lock:
                if is_same:
                    # Rows were written while the shards were loaded; searches must not go back to an older version.
                    newest = max(old.backend.archive.version, old.showing.version)
                    if newest > snapshot.archive.version:
                        snapshot = await backend.at(newest)
                        await asyncio.to_thread(backend.archive.refresh)
                self._engine.swap(snapshot)
                self._served = self._serve(target, backend, snapshot)
                if is_same:
                    old.writer.hand_over(self._served.writer)
        except BaseException:
            if self._served.backend is not backend:
                await _logged("closing the new shards", backend.close())
            raise
        if self._maintenance is not None and not is_same:
            await self._maintenance.close()
            self._maintenance = Maintenance(backend.archive.path)
        self._start(_retire(old))
        if self._membership.moved is not None:
            await _logged("telling other gateways of the move", self._membership.moved(target, backend))

    def _serve(self, target: Target, backend: Backend, snapshot: Snapshot) -> _Served:
        def use(newer: Snapshot) -> None:
            if self._served.backend is backend:
                self._engine.swap(newer)

        showing = Showing(backend, snapshot, use, self.observer)
        return _Served(target, backend, showing, Writer(backend.archive, backend.encoder, showing.show, self.observer))


async def _retire(served: _Served) -> None:
    """Close the backend of an archive that was replaced, after its last commits and searches."""
    try:
        await served.writer.close()
        await asyncio.sleep(_LAST_SEARCHES_S)
    finally:
        await served.showing.close()
        await _logged("closing the old shards", served.backend.close())


async def _logged(what: str, work: Awaitable[None]) -> None:
    """Await `work`; log an error in place of raising it."""
    try:
        await work
    except Exception:
        logger.exception("%s failed", what)


def _status_of(shard: ShardClient) -> ShardStatus:
    return ShardStatus(
        shard.num_rows,
        shard.num_replicas,
        shard.num_healthy,
        shard.num_segments,
        shard.num_bytes,
        shard.num_merges,
        shard.num_evaluations,
    )


async def open_service(
    open_backend: OpenBackend,
    target: Target,
    observer: Observer | None = None,
    membership: Membership = Membership(),
    **options: float,
) -> Service:
    """Return a service over the backend that `open_backend(target)` opens; `options` are those of `Engine`."""
    backend = await open_backend(target)
    try:
        snapshot = await backend.at(backend.archive.version)
    except BaseException:
        await _logged("closing the shards", backend.close())
        raise
    engine = Engine(snapshot, observer=observer, **options)  # type: ignore[arg-type]
    return Service(target, backend, engine, open_backend, membership)
