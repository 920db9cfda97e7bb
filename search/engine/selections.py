"""Which rows pass which filter, in one version of an archive: found out once, kept for the queries to come.

From one version to the next only the rows that a change touched are looked at again.
"""

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from orbithash.search.engine.filters import parse_filter
from orbithash.search.index.host import Rows
from orbithash.search.index.shard import Ids, are_among

if TYPE_CHECKING:
    from orbithash.search.engine.snapshot import ArchiveReader

__all__ = ["Selections"]

_KEPT = 64
# Ids of all kept selections together.
_MAX_KEPT_IDS = 2**25
# Of more rows it is no longer quicker to look at them one by one.
_MAX_TOUCHED = 10_000


class _Earlier(NamedTuple):
    """The rows that passed in an earlier version, found or being found, and the ids of rows touched since."""

    task: asyncio.Task[Rows]
    touched: Ids


class Selections:
    """The rows of `archive` by filter. Belongs to one event loop."""

    def __init__(self, archive: "ArchiveReader") -> None:
        self._archive = archive
        self._kept: OrderedDict[str, asyncio.Task[Rows]] = OrderedDict()
        self._earlier: dict[str, _Earlier] = {}

    def after(self, archive: "ArchiveReader", touched: Ids) -> "Selections":
        """Those of the next version, in which the rows `touched` are gone, new or other ones."""
        new = Selections(archive)
        earlier = {text: _Earlier(task, np.union1d(ids, touched)) for text, (task, ids) in self._earlier.items()}
        earlier |= {text: _Earlier(task, touched) for text, task in self._kept.items()}
        new._earlier = {text: each for text, each in earlier.items() if len(each.touched) <= _MAX_TOUCHED}
        new._forget()
        return new

    async def rows(self, text: str) -> Rows:
        """The rows that pass the filter; `InvalidQuery` for what is no filter."""
        task = self._kept.get(text)
        if task is None:
            task = self._kept[text] = asyncio.create_task(self._find(text, self._earlier.pop(text, None)))
        self._kept.move_to_end(text)
        try:
            # Others may wait for it when this query is given up.
            rows = await asyncio.shield(task)
        except asyncio.CancelledError:
            raise
        except Exception:
            self._kept.pop(text, None)
            raise
        self._forget()
        return rows

    async def _find(self, text: str, earlier: _Earlier | None) -> Rows:
        if earlier is None:
            return await asyncio.to_thread(self._select, text, None)
        before = await asyncio.shield(earlier.task)
        among = await asyncio.to_thread(self._select, text, earlier.touched)
        untouched = before.ids[~are_among(before.ids, earlier.touched)]
        return Rows(text, np.union1d(untouched, among.ids))

    def _select(self, text: str, among: Ids | None) -> Rows:
        wanted = parse_filter(text)
        ids, table = self._archive.scan(list(wanted.columns), among)
        return Rows(text, np.sort(ids[wanted.mask(table)]))

    def _forget(self) -> None:
        """Drops the oldest selections where they are too many or too large."""

        def is_too_much() -> bool:
            tasks = [*self._kept.values(), *(earlier.task for earlier in self._earlier.values())]
            return len(tasks) > _KEPT or sum(map(_num_ids, tasks)) > _MAX_KEPT_IDS

        while self._earlier and is_too_much():
            self._earlier.pop(next(iter(self._earlier)))
        while len(self._kept) > 1 and is_too_much():
            self._kept.popitem(last=False)


def _num_ids(task: "asyncio.Task[Rows]") -> int:
    is_good = task.done() and not task.cancelled() and task.exception() is None
    return len(task.result().ids) if is_good else 0
