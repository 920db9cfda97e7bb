"""Maintain an archive while it is served: compact small fragments, index new keys, remove old versions.

It runs in the background, beside commits, and no error of it affects a commit.
"""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from orbithash.encoders.archive.archive import Archive

__all__ = ["Maintenance"]

logger = logging.getLogger(__name__)

# Seconds between a commit and the maintenance after it.
_PAUSE_S = 5.0

# Calls a function that may commit versions without changed rows, between the commits of the writer.
Exclusive = Callable[[Callable[[], object]], Awaitable[None]]


class Maintenance:
    """Maintains `archive` after commits. Belongs to one event loop."""

    def __init__(self, archive: Archive, version: int, exclusive: Exclusive) -> None:
        """`version`: the newest version for which `clean_up` was considered."""
        self._archive = archive
        self._considered = version
        self._exclusive = exclusive
        self._is_due = False
        self._task: asyncio.Task[None] | None = None

    def schedule(self) -> None:
        """Run soon, because there was a commit."""
        self._is_due = True
        if self._task is None or self._task.done():
            self._task = asyncio.create_task(self._run())

    async def close(self) -> None:
        """Stop; work that runs in a thread ends on its own."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        while self._is_due:
            # A pause first, so that one run follows a burst of commits.
            await asyncio.sleep(_PAUSE_S)
            self._is_due = False
            try:
                await self._maintain()
            except asyncio.CancelledError:
                raise
            except BaseException as error:
                # A panic of native code is not an `Exception`.
                if isinstance(error, KeyboardInterrupt | SystemExit):
                    raise
                logger.warning("the archive could not be maintained; it is tried again after later commits: %r", error)

    async def _maintain(self) -> None:
        # The long part, which needs no lock.
        compaction = await asyncio.to_thread(self._archive.prepare_compaction)
        must_clean_up = False

        def commit() -> None:
            nonlocal must_clean_up
            if compaction is not None:
                self._archive.commit_compaction(compaction)
            self._archive.update_index()
            must_clean_up = self._archive.is_clean_up_due(self._considered)
            self._considered = self._archive.version

        await self._exclusive(commit)
        if must_clean_up:
            await asyncio.to_thread(self._archive.clean_up)
