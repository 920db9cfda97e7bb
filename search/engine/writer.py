"""Changes of an archive while it is searched.

What streams want at the same time goes into the archive together: while one commit is made, the next is collected. A
change is acknowledged when it is committed and searches see it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, check_codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.merging import Counts, RowChange, merged, updated_rows
from orbithash.search.engine.snapshot import QueryEncoder
from orbithash.search.index.host import UNKNOWN, Change
from orbithash.search.logs import current_request, set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.rows import Row, RowUpdate

__all__ = ["Committed", "Writer"]

logger = logging.getLogger(__name__)

# Limits of one commit, and of the changes that wait for a commit.
_MAX_COMMIT, _MAX_WAITING = 20_000, 100_000
_MAX_COMMIT_BYTES, _MAX_WAITING_BYTES = 256 * 2**20, 512 * 2**20

# Commits after which small pieces of the archive are joined, and after which old versions are removed.
_OPTIMIZE_EVERY, _CLEAN_UP_EVERY = 200, 1000


@dataclass(frozen=True)
class Committed:
    """A committed change: the version that has it, and the existing rows that it removed or updated."""

    version: int
    removed: int = 0
    updated: int = 0


@dataclass(frozen=True)
class _Wanted:
    """Changes that one caller waits for, by key."""

    rows: dict[str, RowChange]
    done: asyncio.Future[Committed]
    request: str = field(default_factory=current_request)

    @property
    def num_bytes(self) -> int:
        """The approximate size of the changes in memory, in bytes."""
        return sum(len(key) if row is None else row.num_bytes for key, row in self.rows.items())


class Writer:
    """Commits to `archive`. Belongs to one event loop.

    `show` makes searches see a change; it is called in the order of the versions, and must not fail.
    """

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        show: Callable[[Change], Awaitable[None]],
        seen: int,
        observer: Observer | None = None,
    ) -> None:
        """`seen`: the version that searches see now."""
        self._observer = observer or Observer()
        self._archive = archive
        self._encoder = encoder
        self._show = show
        self._seen = seen
        self._waiting: list[_Wanted] = []
        self._num_waiting = self._num_waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._num_commits = 0
        # Whoever has it knows that nothing is written here meanwhile; what is asked for waits.
        self.held = asyncio.Lock()
        self._successor: Writer | None = None

    @property
    def num_waiting(self) -> int:
        """Changes of rows that no commit has begun to write."""
        return self._num_waiting

    async def upsert(self, rows: Sequence[Row]) -> Committed:
        """Write rows; of several rows with one key the last.

        Raises `InvalidQuery` for invalid rows, of which none is written, `Overloaded` and `Unavailable`.
        """
        return await self.write(await self.prepare(rows))

    async def prepare(self, rows: Sequence[Row]) -> list[Row]:
        """Return the rows with their codes and thumbnails in place of their images, for `write`.

        Raises `InvalidQuery` for invalid rows, and `Overloaded`.
        """
        for row in rows:
            row.check()
        try:
            for row in rows:
                if row.code is not None:
                    check_codes(np.frombuffer(row.code, np.uint8), self._archive.bits)
        except InputError as error:
            raise InvalidQuery(("code", f"{error} (row {row.key[:80]!r})")) from error
        prepared = list(rows)
        places = [place for place, row in enumerate(rows) if row.image is not None]
        if places:
            codes, thumbnails = await self._encode([rows[place] for place in places])
            for place, code, thumbnail in zip(places, codes, thumbnails, strict=True):
                row = rows[place]
                prepared[place] = replace(
                    row, image=None, code=code.tobytes(), thumbnail=row.thumbnail or thumbnail or None
                )
        return prepared

    async def write(self, rows: Sequence[Row]) -> Committed:
        """Write rows that `prepare` returned. Raises `Overloaded` and `Unavailable`."""
        return await self._commit({row.key: row for row in rows})

    async def update(self, updates: Sequence[RowUpdate]) -> Committed:
        """Change columns of existing rows; raises as `upsert`."""
        columns: dict[str, RowChange] = {}
        for update in updates:
            update.check()
            earlier = columns.get(update.key)
            columns[update.key] = (
                RowUpdate(update.key, {**earlier.columns, **update.columns})
                if isinstance(earlier, RowUpdate)
                else update
            )
        return await self._commit(columns)

    async def delete(self, keys: Sequence[str]) -> Committed:
        """Remove the rows with these keys. Raises `Overloaded` and `Unavailable`."""
        return await self._commit(dict.fromkeys(keys))

    async def refresh(self) -> Committed:
        """Makes searches see what other programs have written."""
        return await self._commit({})

    async def _encode(self, rows: Sequence[Row]) -> tuple[Codes, list[bytes]]:
        """Codes and thumbnails of rows with images; `InvalidQuery` that names the first refused one."""
        try:
            return await self._encoder.encode_rows([row.image or b"" for row in rows])
        except SearchError:
            raise
        except InputError:
            for row in rows:
                try:
                    await self._encoder.encode_rows([row.image or b""])
                except InputError as error:
                    raise InvalidQuery(("image", f"{error} (row {row.key[:80]!r})")) from error
            raise

    def hand_over(self, successor: "Writer") -> None:
        """Another writer of the same archive does what waits here, and whatever is asked for from now on.

        Two would be in each other's way. For whoever has `held`.
        """
        self._successor = successor
        successor._take(self._waiting)
        self._waiting, self._num_waiting, self._num_waiting_bytes = [], 0, 0

    async def close(self) -> None:
        """After the last commit that was asked for."""
        if self._task is not None:
            await self._task

    async def _commit(self, rows: dict[str, RowChange]) -> Committed:
        if self._successor is not None:
            return await self._successor._commit(rows)
        wanted = _Wanted(rows, asyncio.get_running_loop().create_future())
        if (
            self._num_waiting + len(rows) > _MAX_WAITING
            or self._num_waiting_bytes + wanted.num_bytes > _MAX_WAITING_BYTES
        ):
            raise Overloaded(
                f"{self._num_waiting:,} rows of {self._num_waiting_bytes:,} bytes wait to be written; try again later",
                retry_after_s=1.0,
            )
        self._take([wanted])
        # A caller that goes away does not take back what it asked for.
        return await asyncio.shield(wanted.done)

    def _take(self, waiting: Sequence[_Wanted]) -> None:
        self._waiting += waiting
        self._num_waiting += sum(len(wanted.rows) for wanted in waiting)
        self._num_waiting_bytes += sum(wanted.num_bytes for wanted in waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            async with self.held:
                # Not before: until then another writer may take them.
                group: list[_Wanted] = []
                num_rows = size = 0
                while self._waiting and (not group or (num_rows < _MAX_COMMIT and size < _MAX_COMMIT_BYTES)):
                    group.append(self._waiting.pop(0))
                    num_rows += len(group[-1].rows)
                    size += group[-1].num_bytes
                if group:
                    await self._do(group)

    async def _do(self, group: Sequence[_Wanted]) -> None:
        self._num_waiting -= sum(len(wanted.rows) for wanted in group)
        self._num_waiting_bytes -= sum(wanted.num_bytes for wanted in group)
        set_requests(wanted.request for wanted in group)
        try:
            change, counts = await asyncio.to_thread(self._write, group)
            with self._observer.stage("show"):
                await self._show(change)
            self._seen = change.after
        except BaseException as error:
            # A panic in native code is no `Exception`; whoever waits has to hear of it all the same.
            logger.exception("a commit of %d changes failed", len(group))
            for wanted in group:
                if not wanted.done.done():
                    wanted.done.set_exception(_told(error))
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
                raise
            return
        for wanted, (removed, updated) in zip(group, counts, strict=True):
            if not wanted.done.done():
                wanted.done.set_result(Committed(change.after, removed, updated))

    def _write(self, group: Sequence[_Wanted]) -> tuple[Change, Counts]:
        """Commit the changes of a group; return what changed, and the counts of each member of the group."""
        if not any(wanted.rows for wanted in group):
            self._archive.refresh()
            nothing = np.empty(0, np.uint64)
            version = self._archive.version
            before = version if version == self._seen else UNKNOWN
            change = Change(before, version, nothing, nothing, _codes(self._archive.bits, []))
            return change, [(0, 0)] * len(group)
        with self._observer.stage("commit"), self._archive.writing():
            before = self._archive.version
            lookups = {key for wanted in group for key, row in wanted.rows.items() if not isinstance(row, Row)}
            existing = self._archive.find(sorted(lookups))
            changes, counts = merged([wanted.rows for wanted in group], existing)
            gone = [key for key, change in changes.items() if change is None and key in existing]
            updates = [change for change in changes.values() if isinstance(change, RowUpdate)]
            rows = [change for change in changes.values() if isinstance(change, Row)]
            rows += updated_rows(self._archive, updates, existing)
            removed = self._archive.delete(gone)
            codes = _codes(self._archive.bits, rows)
            ids = self._archive.upsert(_table(self._archive.bits, rows, codes)) if rows else np.empty(0, np.uint64)
            after = self._archive.version
            # Each of the two is one version; in an object store, where nothing is locked, others may lie between.
            is_alone = after == before + bool(len(removed)) + bool(rows)
            self._num_commits += 1
            if self._num_commits % _OPTIMIZE_EVERY == 0:
                self._archive.optimize()
                after = self._archive.version
            if self._num_commits % _CLEAN_UP_EVERY == 0:
                self._archive.clean_up()
        self._observer.count("rows_upserted", len(rows))
        self._observer.count("rows_deleted", len(removed))
        if before != self._seen or not is_alone:
            # Another program has written meanwhile: what it changed is not known here.
            before = UNKNOWN
        return Change(before, after, removed, ids, codes), counts


def _codes(bits: int, rows: Sequence[Row]) -> Codes:
    """Return the codes uint8 [N, B] of rows."""
    return np.frombuffer(b"".join(row.code or b"" for row in rows), np.uint8).reshape(-1, num_bytes(bits))


def _table(bits: int, rows: Sequence[Row], codes: Codes) -> Any:
    """Rows for `Archive.upsert`."""
    names = ("label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")
    return Archive.table(
        codes,
        bits,
        [row.key for row in rows],
        [row.uri or row.key for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in names},
    )


def _told(error: BaseException) -> Exception:
    """What whoever waits is told."""
    if not isinstance(error, Exception) or (isinstance(error, InputError) and not isinstance(error, SearchError)):
        # Where the archive lies is not for everyone; the log has it.
        return Unavailable("the archive cannot be written now, maybe another program writes; try again later")
    return error
