"""Which rows pass which filter, in one version of an archive: found out once, kept for the queries to come."""

import asyncio
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np

from orbithash.search.filters import parse_filter
from orbithash.search.host import Rows

if TYPE_CHECKING:
    from orbithash.search.engine import ArchiveReader

__all__ = ["Selections"]

_KEPT = 64
# Ids of all kept selections together.
_MAX_KEPT_IDS = 2**25


class Selections:
    """The rows of `archive` by filter. Belongs to one event loop."""

    def __init__(self, archive: "ArchiveReader") -> None:
        self._archive = archive
        self._kept: OrderedDict[str, asyncio.Task[Rows]] = OrderedDict()

    async def rows(self, text: str) -> Rows:
        """The rows that pass the filter; `InvalidQuery` for what is no filter."""
        task = self._kept.get(text)
        if task is None:
            task = self._kept[text] = asyncio.create_task(asyncio.to_thread(self._select, text))
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

    def _select(self, text: str) -> Rows:
        wanted = parse_filter(text)
        ids, table = self._archive.scan(list(wanted.columns))
        return Rows(text, np.sort(ids[wanted.mask(table)]))

    def _forget(self) -> None:
        def num_ids() -> int:
            return sum(len(task.result().ids) for task in self._kept.values() if _is_good(task))

        while len(self._kept) > _KEPT or (len(self._kept) > 1 and num_ids() > _MAX_KEPT_IDS):
            self._kept.popitem(last=False)


def _is_good(task: "asyncio.Task[Rows]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
