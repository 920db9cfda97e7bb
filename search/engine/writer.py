"""Changes of an archive while it is searched.

What streams want at the same time goes into the archive together: while one commit is made, the next is collected. A
change is acknowledged when it is committed and searches see it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, check_codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.engine.snapshot import QueryEncoder
from orbithash.search.index.host import UNKNOWN, Change
from orbithash.search.logs import current_request, set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.rows import Row, check_keys

__all__ = ["Committed", "Writer"]

logger = logging.getLogger(__name__)

# Rows of one commit, and rows that may wait for one.
_MAX_COMMIT, _MAX_WAITING = 20_000, 100_000

# Commits after which small pieces of the archive are joined, and after which old versions are removed.
_OPTIMIZE_EVERY, _CLEAN_UP_EVERY = 200, 1000


@dataclass(frozen=True)
class Committed:
    """`removed` counts rows that a deletion found."""

    version: int
    removed: int


@dataclass(frozen=True)
class _Wanted:
    """Rows to write, each with its code, or None in place of a row to remove; by key."""

    rows: dict[str, tuple[Row, Codes, bytes | None] | None]
    done: asyncio.Future[Committed]
    request: str = field(default_factory=current_request)


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
        self._num_waiting = 0
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
        """Writes rows; of several with one key the last.

        Raises `InvalidQuery` for rows that are refused, of which none is written, `Overloaded` and `Unavailable`.
        """
        for row in rows:
            row.check()
        codes = np.zeros((len(rows), num_bytes(self._archive.bits)), np.uint8)
        thumbnails = [row.thumbnail for row in rows]
        try:
            for place, row in enumerate(rows):
                if row.code is not None:
                    codes[place] = check_codes(np.frombuffer(row.code, np.uint8), self._archive.bits)
        except InputError as error:
            raise InvalidQuery(("code", f"{error} (row {row.key[:80]!r})")) from error
        places = [place for place, row in enumerate(rows) if row.image is not None]
        if places:
            codes[places], made = await self._encode([rows[place] for place in places])
            for place, thumbnail in zip(places, made, strict=True):
                thumbnails[place] = rows[place].thumbnail or thumbnail
        return await self._commit(
            {row.key: (row, code, thumb) for row, code, thumb in zip(rows, codes, thumbnails, strict=True)}
        )

    async def delete(self, keys: Sequence[str]) -> Committed:
        """Removes the rows with these keys; raises as `upsert`."""
        check_keys(list(keys))
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
        self._waiting, self._num_waiting = [], 0

    async def close(self) -> None:
        """After the last commit that was asked for."""
        if self._task is not None:
            await self._task

    async def _commit(self, rows: dict[str, tuple[Row, Codes, bytes | None] | None]) -> Committed:
        if self._successor is not None:
            return await self._successor._commit(rows)
        if self._num_waiting + len(rows) > _MAX_WAITING:
            raise Overloaded(f"{self._num_waiting} rows wait to be written; try again later", retry_after_s=1.0)
        wanted = _Wanted(rows, asyncio.get_running_loop().create_future())
        self._take([wanted])
        # A caller that goes away does not take back what it asked for.
        return await asyncio.shield(wanted.done)

    def _take(self, waiting: Sequence[_Wanted]) -> None:
        self._waiting += waiting
        self._num_waiting += sum(len(wanted.rows) for wanted in waiting)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            async with self.held:
                # Not before: until then another writer may take them.
                group: list[_Wanted] = []
                while self._waiting and (not group or sum(len(w.rows) for w in group) < _MAX_COMMIT):
                    group.append(self._waiting.pop(0))
                if group:
                    await self._do(group)

    async def _do(self, group: Sequence[_Wanted]) -> None:
        self._num_waiting -= sum(len(wanted.rows) for wanted in group)
        set_requests(wanted.request for wanted in group)
        try:
            change, found = await asyncio.to_thread(self._write, group)
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
        for wanted in group:
            removed = sum(row is None and key in found for key, row in wanted.rows.items())
            if not wanted.done.done():
                wanted.done.set_result(Committed(change.after, removed))

    def _write(self, group: Sequence[_Wanted]) -> tuple[Change, set[str]]:
        """Commits a group, later wishes over earlier ones; what changed, and the keys of removals that were there."""
        wishes: dict[str, tuple[Row, Codes, bytes | None] | None] = {}
        for wanted in group:
            wishes |= wanted.rows
        if not wishes:
            self._archive.refresh()
            nothing = np.empty(0, np.uint64)
            version = self._archive.version
            before = version if version == self._seen else UNKNOWN
            return Change(
                before, version, nothing, nothing, np.empty((0, num_bytes(self._archive.bits)), np.uint8)
            ), set()
        rows = [row for row in wishes.values() if row is not None]
        with self._observer.stage("commit"), self._archive.writing():
            before = self._archive.version
            gone = [key for key, row in wishes.items() if row is None]
            found = set(self._archive.find(gone))
            removed = self._archive.delete(list(found))
            codes = np.array([code for _, code, _ in rows], np.uint8).reshape(-1, num_bytes(self._archive.bits))
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
        self._observer.count("rows_deleted", len(found))
        if before != self._seen or not is_alone:
            # Another program has written meanwhile: what it changed is not known here.
            before = UNKNOWN
        return Change(before, after, removed, ids, codes), found


def _table(bits: int, rows: Sequence[tuple[Row, Codes, bytes | None]], codes: Codes) -> Any:
    """Rows for `Archive.upsert`."""
    names = ("label", "caption", "datetime", "lon", "lat", "footprint")
    return Archive.table(
        codes,
        bits,
        [row.key for row, _, _ in rows],
        [row.uri or row.key for row, _, _ in rows],
        thumbnail=[thumbnail for _, _, thumbnail in rows],
        **{name: [getattr(row, name) for row, _, _ in rows] for name in names},
    )


def _told(error: BaseException) -> Exception:
    """What whoever waits is told."""
    if not isinstance(error, Exception) or (isinstance(error, InputError) and not isinstance(error, SearchError)):
        # Where the archive lies is not for everyone; the log has it.
        return Unavailable("the archive cannot be written now, maybe another program writes; try again later")
    return error
