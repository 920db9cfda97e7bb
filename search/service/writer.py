"""Write to an archive while it is searched.

Changes that arrive at the same time share a commit: while one commit is written, the next one is collected. A change is
acknowledged when it is committed and searches of this gateway see it. If they do not see it within some seconds, it is
acknowledged all the same: it is committed, and searches will see it.
"""

import asyncio
import logging
import time
from collections import deque
from collections.abc import Callable, Collection, Coroutine, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

import numpy as np

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Encoded, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import normalize_wkb, wrap_longitude
from orbithash.search.engine.protocols import QueryEncoder
from orbithash.search.engine.query_codes import check_code, check_vector
from orbithash.search.logs import current_request, set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError, Unavailable
from orbithash.search.protocol.rows import Columns, PreparedRow, Row, RowUpdate
from orbithash.search.service.merging import RowChange, merged, updated_rows

__all__ = ["TIMEOUT_S", "Committed", "Writer"]

logger = logging.getLogger(__name__)

# Limits of one commit, and of the changes that wait for a commit.
_MAX_COMMIT, _MAX_WAITING = 20_000, 100_000
_MAX_COMMIT_BYTES, _MAX_WAITING_BYTES = 256 * 2**20, 512 * 2**20

# Maximum seconds that a commit waits for another process that writes, and that its callers wait until searches see it.
_LOCK_S, _SHOW_S = 5.0, 10.0
# A committed change is acknowledged this many seconds before its caller's deadline, shown or not.
_MARGIN_S = 0.2
# Time limit of a change without a deadline, in seconds.
TIMEOUT_S = 30.0


@dataclass(frozen=True)
class Committed:
    """A committed change: the version that has it, and the existing rows that it removed or updated."""

    version: int
    removed: int = 0
    updated: int = 0


@dataclass(frozen=True)
class _Request:
    """Changes of one caller by key; `done` is resolved when they are acknowledged.

    `deadline` is the time at which the caller stops waiting, in seconds of `time.monotonic`.
    """

    rows: dict[str, RowChange]
    num_bytes: int
    deadline: float
    done: asyncio.Future[Committed]
    request: str = field(default_factory=current_request)

    def resolve(self, outcome: Committed | BaseException) -> None:
        """Acknowledge the changes, or report an error, unless that has been done."""
        if self.done.done():
            return
        if isinstance(outcome, BaseException):
            self.done.set_exception(outcome)
        else:
            self.done.set_result(outcome)


class Writer:
    """Commits to `archive`. Belongs to one event loop.

    After each commit `show(version)` is called, which returns when searches see the version.

    Attributes:
        lock: held during a commit; its holder knows that nothing is written here meanwhile, and new requests wait.
    """

    def __init__(
        self,
        archive: Archive,
        encoder: QueryEncoder,
        show: Callable[[int], Coroutine[Any, Any, None]],
        observer: Observer | None = None,
    ) -> None:
        self.lock = asyncio.Lock()
        self._observer = observer or Observer()
        self._archive = archive
        self._encoder = encoder
        self._show = show
        self._waiting: deque[_Request] = deque()
        self._num_waiting = self._num_waiting_bytes = 0
        self._task: asyncio.Task[None] | None = None
        self._successor: Writer | None = None

    @property
    def num_waiting(self) -> int:
        """Number of rows that wait for a commit."""
        return self._num_waiting

    async def upsert(self, rows: Sequence[Row], timeout_s: float = TIMEOUT_S) -> Committed:
        """Write rows; of several rows with one key the last. The caller waits up to `timeout_s` seconds.

        Raises `InvalidQuery` if a row is invalid (then no row is written), `Overloaded` and `Unavailable`.
        """
        return await self.write(await self.prepare(rows), timeout_s)

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

    async def write(self, rows: Sequence[PreparedRow], timeout_s: float = TIMEOUT_S) -> Committed:
        """Write rows that `prepare` returned. Raises `Overloaded` and `Unavailable`."""
        return await self._commit({row.key: row for row in rows}, timeout_s)

    async def update(self, updates: Sequence[RowUpdate], timeout_s: float = TIMEOUT_S) -> Committed:
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
        return await self._commit(columns, timeout_s)

    async def delete(self, keys: Sequence[str], timeout_s: float = TIMEOUT_S) -> Committed:
        """Remove the rows with these keys. Raises `Overloaded` and `Unavailable`."""
        return await self._commit(dict.fromkeys(keys), timeout_s)

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
        self._waiting, self._num_waiting, self._num_waiting_bytes = deque(), 0, 0

    async def close(self) -> None:
        """Wait for the last commit."""
        if self._task is not None:
            await asyncio.wait([self._task])

    async def _commit(self, rows: dict[str, RowChange], timeout_s: float) -> Committed:
        if self._successor is not None:
            return await self._successor._commit(rows, timeout_s)
        size = sum(len(key) if row is None else row.num_bytes for key, row in rows.items())
        if self._num_waiting + len(rows) > _MAX_WAITING or self._num_waiting_bytes + size > _MAX_WAITING_BYTES:
            raise Overloaded(
                f"{self._num_waiting:,} rows of {self._num_waiting_bytes:,} bytes wait to be written; try again later",
                retry_after_s=1.0,
            )
        deadline = time.monotonic() + timeout_s
        request = _Request(rows, size, deadline, asyncio.get_running_loop().create_future())
        self._take([request])
        # The shield: a request goes on when its caller is cancelled.
        return await asyncio.shield(request.done)

    def _take(self, requests: Collection[_Request]) -> None:
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
                    group.append(self._waiting.popleft())
                    num_rows += len(group[-1].rows)
                    size += group[-1].num_bytes
                self._num_waiting -= num_rows
                self._num_waiting_bytes -= size
                if group:
                    await self._process(group)

    async def _process(self, group: Sequence[_Request]) -> None:
        """Commit a group of requests and show the version; resolve all requests whatever happens."""
        set_requests(request.request for request in group)
        try:
            version, outcomes = await asyncio.to_thread(self._write, group)
        except BaseException as error:
            # Also for what is not an `Exception`, such as a panic of native code: the callers must get an answer.
            logger.exception("a commit of %d requests failed", len(group))
            for request in group:
                request.resolve(_commit_error(error))
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            return
        showing = asyncio.create_task(self._show_committed(version))
        show_until = time.monotonic() + _SHOW_S
        try:
            for request, outcome in sorted(zip(group, outcomes, strict=True), key=lambda each: each[0].deadline):
                wait_until = min(show_until, request.deadline - _MARGIN_S)
                await asyncio.wait([showing], timeout=max(0.0, wait_until - time.monotonic()))
                request.resolve(outcome)
            if not showing.done():
                await asyncio.wait([showing], timeout=max(0.0, show_until - time.monotonic()))
        finally:
            if not showing.done():
                logger.warning("version %d is committed, but searches do not see it yet", version)
                showing.cancel()
            for request, outcome in zip(group, outcomes, strict=True):
                request.resolve(outcome)

    async def _show_committed(self, version: int) -> None:
        """Show a version that is committed; log an error in place of raising it, because the service follows it."""
        try:
            with self._observer.stage("show"):
                await self._show(version)
        except BaseException as error:
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit | GeneratorExit):
                raise
            logger.exception("version %d is committed, but was not shown to searches", version)

    def _write(self, group: Sequence[_Request]) -> tuple[int, list[Committed | BaseException]]:
        """Commit the changes of a group; return the version that has them and the outcome of each request."""
        if not any(request.rows for request in group):
            return self._archive.version, [Committed(self._archive.version)] * len(group)
        patience_s = min(_LOCK_S, max(request.deadline for request in group) - time.monotonic())
        with self._archive.writing(patience_s), self._observer.stage("commit"):
            lookups = {
                key for request in group for key, row in request.rows.items() if not isinstance(row, PreparedRow)
            }
            existing = self._archive.find(sorted(lookups))
            changes, counts = merged([request.rows for request in group], existing)
            gone = [key for key, change in changes.items() if change is None and key in existing]
            updates = [change for change in changes.values() if isinstance(change, RowUpdate)]
            rows = [change for change in changes.values() if isinstance(change, PreparedRow)]
            rows += updated_rows(self._archive, updates, existing)
            table = _table(self._archive, rows)
            removed = self._archive.delete(gone)
            failure: BaseException | None = None
            try:
                self._archive.write(table)
            except BaseException as error:
                if not len(removed):
                    raise
                logger.exception("rows were removed, but %d rows could not be written", len(rows))
                failure = _commit_error(error)
            version = self._archive.version
        self._observer.count("rows_upserted", 0 if failure else len(rows))
        self._observer.count("rows_deleted", len(removed))
        outcomes: list[Committed | BaseException] = []
        for request, counted in zip(group, counts, strict=True):
            # After a failure, what only removes rows is done.
            if failure is None or all(changes.get(key) is None for key in request.rows):
                outcomes.append(Committed(version, *counted))
            else:
                outcomes.append(failure)
        return version, outcomes


def _prepared(row: Row, **changes: Any) -> PreparedRow:
    # A client may send the stored vector of a row that it has read; only the model decides it.
    given = {field.name: getattr(row, field.name) for field in fields(row)}
    return PreparedRow(**given | {"stored_vector": None} | changes)


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


def _table(archive: Archive, rows: Sequence[PreparedRow]) -> Any:
    """Return the table of rows for `Archive.upsert`."""
    names = ("label", "caption", "datetime", "lon", "lat", "footprint", "thumbnail")
    codes = np.frombuffer(b"".join(row.code or b"" for row in rows), np.uint8)
    return Archive.table(
        codes.reshape(len(rows), num_bytes(archive.bits)),
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
