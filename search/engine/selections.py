"""Selections of one version of an archive: the rows that pass each filter, computed once and kept for later queries.

From one version to the next only the rows that a change touched are tested again. Filters are evaluated in a few
threads of their own, so that queries without a new filter never wait for them.
"""

import asyncio
import hashlib
import logging
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from orbithash.search.engine.filters import Filter, parse_filter
from orbithash.search.engine.protocols import ArchiveReader
from orbithash.search.index.host import Selection
from orbithash.search.index.shard import Ids, are_among
from orbithash.search.protocol.errors import Overloaded

__all__ = ["MAX_KEPT_IDS", "Selections", "select"]

logger = logging.getLogger(__name__)

# Maximum number of selections kept, and of their ids together.
_MAX_KEPT, MAX_KEPT_IDS = 64, 2**25
# Above this number of touched rows a full scan is faster than testing them one by one.
_MAX_TOUCHED = 10_000

# Filters that are evaluated at the same time, and filters that may be evaluated or wait for that.
_NUM_THREADS, _MAX_PENDING = 2, 64

# A new version is shown to searches after its most recently used selections were computed, at most this many and for
# at most this long.
_MAX_WARMED, _WARM_TIMEOUT_S = 8, 60.0


class _Cancelled(Exception):
    """No query waits for the selection any more."""


@dataclass
class _Entry:
    """A selection that is kept or being computed.

    Attributes:
        task: computes it.
        num_waiting: queries that wait for it.
        is_cancelled: set to stop the computation in its thread.
    """

    task: asyncio.Task[Selection]
    is_cancelled: threading.Event
    num_waiting: int = 0


class _Earlier(NamedTuple):
    """A selection of an earlier version, and the ids of the rows that changes have touched since."""

    entry: _Entry
    touched: Ids


@dataclass
class _Workers:
    """The threads that evaluate filters; shared by the versions of an archive."""

    executor: ThreadPoolExecutor = field(default_factory=lambda: ThreadPoolExecutor(_NUM_THREADS, "filter"))
    num_pending: int = 0


def select(archive: ArchiveReader, filter_: Filter, among: Ids | None = None) -> Ids:
    """Return the ids uint64 [N], ascending, of the rows that pass a filter; with `among` only of those rows."""
    return _select(archive, filter_, among, threading.Event())


def _select(archive: ArchiveReader, filter_: Filter, among: Ids | None, is_cancelled: threading.Event) -> Ids:
    parts = [np.empty(0, np.uint64)]
    for ids, table in archive.scan_batches(list(filter_.columns), among):
        if is_cancelled.is_set():
            raise _Cancelled
        parts.append(ids[filter_.mask(table)])
    return np.sort(np.concatenate(parts))


class Selections:
    """The selections of `archive` by filter text. Belongs to one event loop."""

    def __init__(self, archive: ArchiveReader, workers: _Workers | None = None) -> None:
        self._archive = archive
        self._workers = workers or _Workers()
        self._kept: OrderedDict[str, _Entry] = OrderedDict()
        self._earlier: dict[str, _Earlier] = {}

    def after(self, archive: ArchiveReader, touched: Ids) -> "Selections":
        """Return the selections of the next version, in which the rows `touched` are removed, new or changed."""
        new = Selections(archive, self._workers)
        earlier = {text: _Earlier(entry, np.union1d(ids, touched)) for text, (entry, ids) in self._earlier.items()}
        earlier |= {text: _Earlier(entry, touched) for text, entry in self._kept.items()}
        new._earlier = {text: each for text, each in earlier.items() if len(each.touched) <= _MAX_TOUCHED}
        new._evict()
        return new

    async def reloaded(self, archive: ArchiveReader) -> "Selections":
        """Return the selections of a version whose difference from this one is unknown.

        The most recently used ones are computed before it returns.
        """
        new = Selections(archive, self._workers)
        recent = [*self._earlier, *self._kept][-_MAX_WARMED:]
        await asyncio.gather(*map(new._warm, recent))
        return new

    async def get(self, text: str) -> Selection:
        """Return the rows that pass the filter.

        The computation stops when no query waits for it any more. Raises `InvalidQuery` for an invalid filter and
        `Overloaded` if too many filters are being evaluated.
        """
        entry = self._kept.get(text)
        if entry is None or entry.is_cancelled.is_set():
            entry = self._start(text)
        self._kept.move_to_end(text)
        selection = await self._wait(text, entry)
        self._evict()
        return selection

    def close(self) -> None:
        """Stop all computations."""
        for entry in self._kept.values():
            entry.is_cancelled.set()
        self._workers.executor.shutdown(wait=False, cancel_futures=True)

    def _start(self, text: str) -> _Entry:
        if self._workers.num_pending >= _MAX_PENDING:
            raise Overloaded(
                f"{self._workers.num_pending} filters are being evaluated already; try again later", retry_after_s=1.0
            )
        is_cancelled = threading.Event()
        task = asyncio.create_task(self._compute(text, self._earlier.pop(text, None), is_cancelled))
        self._workers.num_pending += 1
        task.add_done_callback(lambda task: self._done(text, task))
        entry = self._kept[text] = _Entry(task, is_cancelled)
        return entry

    def _done(self, text: str, task: asyncio.Task[Selection]) -> None:
        self._workers.num_pending -= 1
        # Asking for the exception keeps asyncio from logging it when no query waits any more.
        has_failed = task.cancelled() or task.exception() is not None
        entry = self._kept.get(text)
        if has_failed and entry is not None and entry.task is task:
            del self._kept[text]

    async def _wait(self, text: str, entry: _Entry) -> Selection:
        entry.num_waiting += 1
        try:
            # The shield: other queries may wait for the same selection when this one is cancelled.
            return await asyncio.shield(entry.task)
        finally:
            entry.num_waiting -= 1
            if not entry.num_waiting and not entry.task.done():
                entry.is_cancelled.set()
                entry.task.cancel()
                if self._kept.get(text) is entry:
                    del self._kept[text]

    async def _compute(self, text: str, earlier: _Earlier | None, is_cancelled: threading.Event) -> Selection:
        loop = asyncio.get_running_loop()
        token = hashlib.sha256(text.encode()).hexdigest()
        # Not in the threads for evaluation: an invalid filter is reported without waiting for them.
        filter_ = await asyncio.to_thread(parse_filter, text)

        async def evaluate(among: Ids | None) -> Ids:
            return await loop.run_in_executor(
                self._workers.executor, _select, self._archive, filter_, among, is_cancelled
            )

        before = None if earlier is None else await self._result(text, earlier.entry)
        if earlier is None or before is None:
            return Selection(token, await evaluate(None))
        passing = await evaluate(earlier.touched)
        untouched = before.ids[~are_among(before.ids, earlier.touched)]
        return Selection(token, np.union1d(untouched, passing))

    async def _result(self, text: str, entry: _Entry) -> Selection | None:
        """Return the selection of an earlier version, or None if it was not computed to the end."""
        try:
            return await self._wait(text, entry)
        except asyncio.CancelledError:
            if not entry.task.cancelled():
                raise
        except Exception:
            # Raised to its own queries. For this version the filter is evaluated over all rows, and errors are raised.
            return None
        return None

    async def _warm(self, text: str) -> None:
        try:
            async with asyncio.timeout(_WARM_TIMEOUT_S):
                await self.get(text)
        except Exception as error:
            # The filter is evaluated again when a query needs it.
            logger.warning("a filter was not evaluated for the new version: %r", error)

    def _evict(self) -> None:
        """Drop the least recently used selections while they are too many or too large."""

        def is_too_much() -> bool:
            entries = [*self._kept.values(), *(earlier.entry for earlier in self._earlier.values())]
            return len(entries) > _MAX_KEPT or sum(map(_num_ids, entries)) > MAX_KEPT_IDS

        while self._earlier and is_too_much():
            self._earlier.pop(next(iter(self._earlier)))
        while is_too_much():
            # A selection that queries wait for is not dropped: the next query would compute it again.
            idle = next((text for text, entry in list(self._kept.items())[:-1] if entry.task.done()), None)
            if idle is None:
                return
            del self._kept[idle]


def _num_ids(entry: _Entry) -> int:
    task = entry.task
    is_complete = task.done() and not task.cancelled() and task.exception() is None
    return len(task.result().ids) if is_complete else 0
