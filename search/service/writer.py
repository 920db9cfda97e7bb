"""Write to an archive while it is searched.

Changes that arrive at the same time share a commit: while one commit is written, the next one is collected. A change is
acknowledged when it is committed and searches see it.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, Encoded, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import normalize_wkb, wrap_longitude
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.query_codes import check_code, check_vector
from orbithash.search.index.host import Diff
from orbithash.search.index.shard import Ids
from orbithash.search.logs import current_request, set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.rows import Columns, PreparedRow, Row, RowUpdate
from orbithash.search.service.maintenance import Maintenance
from orbithash.search.service.merging import Counts, RowChange, merged, updated_rows

__all__ = ["Committed", "Writer"]

logger = logging.getLogger(__name__)

_NO_IDS: Ids = np.empty(0, np.uint64)

# Limits of one commit, and of the changes that wait for a commit.
_MAX_COMMIT, _MAX_WAITING = 20_000, 100_000
_MAX_COMMIT_BYTES, _MAX_WAITING_BYTES = 256 * 2**20, 512 * 2**20


@dataclass(frozen=True)
class Committed:
    """A committed change: the version that has it, and the existing rows that it removed or updated."""

    version: int
    removed: int = 0
    updated: int = 0


@dataclass(frozen=True)
class _Request:
    """Changes of one caller by key; `done` is resolved when searches see them."""

    rows: dict[str, RowChange]
    num_bytes: int
    done: asyncio.Future[Committed]
    request: str = field(default_factory=current_request)


class Writer:
    """Commits to `archive`. Belongs to one event loop.

    After each commit `show(version, diff)` is called, in the order of versions; it makes searches see the version.
    `diff` is the difference from the version shown before, None if another program has written in between.

    Attributes:
        lock: held during a commit; its holder knows that nothing is written here meanwhile, and new requests wait.
    """

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        show: Callable[[int, Diff | None], Awaitable[None]],
        shown: int,
        observer: Observer | None = None,
    ) -> None:
        """`shown`: the version that searches see now."""
        self.lock = asyncio.Lock()
        self._observer = observer or Observer()
        self._archive = archive
        self._encoder = encoder
        self._show = show
        self._shown = shown
        self._waiting: list[_Request] = []
        self._num_waiting = self._num_waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._successor: Writer | None = None
        self._maintenance = Maintenance(archive, shown, self._maintain)

    @property
    def num_waiting(self) -> int:
        """Number of rows that wait for a commit."""
        return self._num_waiting

    async def upsert(self, rows: Sequence[Row]) -> Committed:
        """Write rows; of several rows with one key the last.

        Raises `InvalidQuery` if a row is invalid (then no row is written), `Overloaded` and `Unavailable`.
        """
        return await self.write(await self.prepare(rows))

    async def prepare(self, rows: Sequence[Row]) -> list[PreparedRow]:
        """Return rows with codes, stored vectors and thumbnails in place of their images and vectors, for `write`.

        Raises `InvalidQuery` for invalid rows, and `Overloaded`.
        """
        for row in rows:
            row.check()
            self._check_content(row)
        stored = [_place(row.key, {"lon": row.lon, "footprint": row.footprint}) for row in rows]
        prepared = [_prepared(row, **place) for row, place in zip(rows, stored, strict=True)]
        places = [place for place, row in enumerate(rows) if row.image is not None]
        if places:
            encoded, thumbnails = await self._encode([rows[place] for place in places])
            for place, one, thumbnail in zip(places, encoded.split(), thumbnails, strict=True):
                row = prepared[place]
                prepared[place] = _with_code(row, one, image=None, thumbnail=row.thumbnail or thumbnail or None)
        vectors = {place: row.vector for place, row in enumerate(rows) if row.vector is not None}
        if vectors:
            dims = self._encoder.num_features
            encoded = await self._encoder.encode("vector", [check_vector(each, dims) for each in vectors.values()])
            for place, one in zip(vectors, encoded.split(), strict=True):
                prepared[place] = _with_code(prepared[place], one, vector=None)
        return prepared

    def _check_content(self, row: Row) -> None:
        """Raise `InvalidQuery` for a code or a vector that does not fit the archive."""
        try:
            if row.code is not None:
                check_code(row.code, self._archive.bits)
            if row.vector is not None:
                check_vector(row.vector, self._encoder.num_features)
        except InvalidQuery as error:
            (problem,) = error.violations
            raise InvalidQuery((problem[0], f"{problem[1]} (row {row.key[:80]!r})")) from error

    async def write(self, rows: Sequence[PreparedRow]) -> Committed:
        """Write rows that `prepare` returned. Raises `Overloaded` and `Unavailable`."""
        return await self._commit({row.key: row for row in rows})

    async def update(self, updates: Sequence[RowUpdate]) -> Committed:
        """Change columns of existing rows; raises as `upsert`."""
        columns: dict[str, RowChange] = {}
        for update in updates:
            update.check()
            update = replace(update, columns=_place(update.key, update.columns))
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
        """Make searches see the newest version, which another program may have written."""
        return await self._commit({})

    async def _encode(self, rows: Sequence[Row]) -> tuple[Encoded, list[bytes]]:
        """Return codes and thumbnails of rows with images; raise `InvalidQuery` that names the first invalid one."""
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
        """Pass all waiting and future requests to another writer of the same archive.

        The caller must hold `lock`: two writers would conflict.
        """
        self._successor = successor
        successor._take(self._waiting)
        self._waiting, self._num_waiting, self._num_waiting_bytes = [], 0, 0

    async def close(self) -> None:
        """Wait for the last commit."""
        if self._task is not None:
            await asyncio.wait([self._task])
        await self._maintenance.close()

    async def _commit(self, rows: dict[str, RowChange]) -> Committed:
        if self._successor is not None:
            return await self._successor._commit(rows)
        size = sum(len(key) if row is None else row.num_bytes for key, row in rows.items())
        if self._num_waiting + len(rows) > _MAX_WAITING or self._num_waiting_bytes + size > _MAX_WAITING_BYTES:
            raise Overloaded(
                f"{self._num_waiting:,} rows of {self._num_waiting_bytes:,} bytes wait to be written; try again later",
                retry_after_s=1.0,
            )
        request = _Request(rows, size, asyncio.get_running_loop().create_future())
        self._take([request])
        # The shield: a request goes on when its caller is cancelled.
        return await asyncio.shield(request.done)

    def _take(self, requests: Sequence[_Request]) -> None:
        self._waiting += requests
        self._num_waiting += sum(len(request.rows) for request in requests)
        self._num_waiting_bytes += sum(request.num_bytes for request in requests)
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def _run(self) -> None:
        while self._waiting:
            async with self.lock:
                # Only now: `hand_over` may have passed the requests on while this task waited for the lock.
                group: list[_Request] = []
                num_rows = size = 0
                while self._waiting and (not group or (num_rows < _MAX_COMMIT and size < _MAX_COMMIT_BYTES)):
                    group.append(self._waiting.pop(0))
                    num_rows += len(group[-1].rows)
                    size += group[-1].num_bytes
                self._num_waiting -= num_rows
                self._num_waiting_bytes -= size
                if group:
                    await self._process(group)

    async def _process(self, group: Sequence[_Request]) -> None:
        """Commit a group of requests and show the version; resolve all requests whatever happens."""
        set_requests(request.request for request in group)
        committed: int | None = None
        try:
            version, diff, counts = await asyncio.to_thread(self._write, group)
            committed = version
            with self._observer.stage("show"):
                await self._show(version, diff)
            self._shown = version
        except BaseException as error:
            # Also for what is not an `Exception`, such as a panic of native code: the callers must get an answer.
            if committed is None:
                logger.exception("a commit of %d requests failed", len(group))
                failure = _commit_error(error)
            else:
                logger.exception("version %d is committed, but was not shown to searches", committed)
                failure = Unavailable(
                    f"version {committed} is committed, but searches do not see it yet; try again later"
                )
            for request in group:
                if not request.done.done():
                    request.done.set_exception(failure)
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
                raise
            return
        for request, (removed, updated) in zip(group, counts, strict=True):
            if not request.done.done():
                request.done.set_result(Committed(version, removed, updated))
        if any(request.rows for request in group):
            self._maintenance.schedule()

    async def _maintain(self, work: Callable[[], object]) -> None:
        """Run `work`, which may commit versions without changed rows, between the commits of requests."""
        async with self.lock:
            if self._successor is not None:
                # The other writer maintains the archive.
                return
            before, after = await asyncio.to_thread(self._versions_around, work)
            if after != self._shown:
                await self._show(after, self._diff(before, after) if before == self._shown else None)
                self._shown = after

    def _versions_around(self, work: Callable[[], object]) -> tuple[int, int]:
        with self._archive.writing():
            before = self._archive.version
            work()
            return before, self._archive.version

    def _write(self, group: Sequence[_Request]) -> tuple[int, Diff | None, Counts]:
        """Commit the changes of a group.

        Returns:
            The new version, its difference from the version that is shown (None if another program has written in
            between), and the counts of each request.
        """
        if not any(request.rows for request in group):
            self._archive.refresh()
            version = self._archive.version
            diff = self._diff(version, version) if version == self._shown else None
            return version, diff, [(0, 0)] * len(group)
        with self._observer.stage("commit"), self._archive.writing():
            before = self._archive.version
            lookups = {
                key for request in group for key, row in request.rows.items() if not isinstance(row, PreparedRow)
            }
            existing = self._archive.find(sorted(lookups))
            changes, counts = merged([request.rows for request in group], existing)
            gone = [key for key, change in changes.items() if change is None and key in existing]
            updates = [change for change in changes.values() if isinstance(change, RowUpdate)]
            rows = [change for change in changes.values() if isinstance(change, PreparedRow)]
            rows += updated_rows(self._archive, updates, existing)
            removed = self._archive.delete(gone)
            codes = _codes(self._archive.bits, rows)
            ids = self._archive.upsert(_table(self._archive, rows, codes)) if rows else np.empty(0, np.uint64)
            after = self._archive.version
        self._observer.count("rows_upserted", len(rows))
        self._observer.count("rows_deleted", len(removed))
        # In an object store, which has no lock, versions of other programs can lie between the two commits.
        is_known = before == self._shown and after == before + bool(len(removed)) + bool(rows)
        return after, self._diff(before, after, removed, ids, codes) if is_known else None, counts

    def _diff(
        self,
        before: int,
        after: int,
        removed: Ids = _NO_IDS,
        ids: Ids = _NO_IDS,
        codes: Codes | None = None,
    ) -> Diff:
        return Diff(before, after, removed, ids, _codes(self._archive.bits, []) if codes is None else codes)


def _prepared(row: Row, **changes: Any) -> PreparedRow:
    return PreparedRow(**{field.name: getattr(row, field.name) for field in fields(row)} | changes)


def _with_code(row: PreparedRow, encoded: Encoded, **changes: Any) -> PreparedRow:
    """Return the row with the code and the stored vector of its content."""
    vector = None if encoded.vectors is None else encoded.vectors.tobytes()
    return replace(row, code=encoded.codes.tobytes(), stored_vector=vector, **changes)


def _place(key: str, columns: Columns) -> Columns:
    """Return columns with the place as the archive stores it: outlines and longitudes within 180 degrees.

    Raises `InvalidQuery` for an outline that is invalid.
    """
    stored = columns.copy()
    if (lon := columns.get("lon")) is not None:
        stored["lon"] = wrap_longitude(lon)
    if (footprint := columns.get("footprint")) is not None:
        try:
            stored["footprint"] = normalize_wkb(footprint)
        except ValueError as error:
            raise InvalidQuery(("footprint", f"{error} (row {key[:80]!r})")) from error
    return stored


def _codes(bits: int, rows: Sequence[PreparedRow]) -> Codes:
    """Return the codes uint8 [N, B] of rows."""
    return np.frombuffer(b"".join(row.code or b"" for row in rows), np.uint8).reshape(-1, num_bytes(bits))


def _table(archive: Archive, rows: Sequence[PreparedRow], codes: Codes) -> Any:
    """Return the table of rows for `Archive.upsert`."""
    names = ("label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")
    return Archive.table(
        codes,
        archive.bits,
        [row.key for row in rows],
        [row.uri or row.key for row in rows],
        None if archive.vector is None else [row.stored_vector for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in names},
    )


def _commit_error(error: BaseException) -> Exception:
    """Return the error for the callers of a failed commit."""
    if not isinstance(error, Exception) or (isinstance(error, InputError) and not isinstance(error, SearchError)):
        # Its message names the archive's path, which is not for every user; it is in the log.
        return Unavailable("the archive cannot be written now; another program may be writing; try again later")
    return error
