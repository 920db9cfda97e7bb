"""Maintain an archive while it is served: compact small fragments, index new keys, remove old versions.

It runs in the background, beside commits, and no error of it affects a commit.
"""

import asyncio
import logging
from contextlib import suppress

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import ArchiveBusy
from orbithash.search.service.supervision import repeat

__all__ = ["Maintenance"]

logger = logging.getLogger(__name__)

# Seconds between a change and the maintenance after it, and between two looks for what other programs left behind.
_PAUSE_S, _EVERY_S = 5.0, 600.0
# Maximum seconds between two attempts after failures.
_MAX_PAUSE_S = 300.0

# Seconds to wait for a process that writes.
_LOCK_S = 5.0


class Maintenance:
    """Maintains the archive at `path` at the start, after changes and from time to time. Belongs to one event loop."""

    def __init__(self, path: str) -> None:
        self._path = path
        self._is_due = asyncio.Event()
        self._is_due.set()
        # Each run begins with a pause, so that it follows a burst of changes.
        self._task = asyncio.create_task(repeat("maintaining the archive", self._run, _PAUSE_S, _MAX_PAUSE_S))

    def schedule(self) -> None:
        """Maintain the archive soon, because it has changed."""
        self._is_due.set()

    async def close(self) -> None:
        """Stop; work that runs in a thread ends on its own."""
        self._task.cancel()
        await asyncio.wait([self._task])

    async def _run(self) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(_EVERY_S):
                await self._is_due.wait()
        self._is_due.clear()
        try:
            await asyncio.to_thread(_maintain, self._path)
        except ArchiveBusy as error:
            # The process that writes or maintains the archive makes a new version, which is followed.
            logger.info("the archive is maintained later: %s", error)


def _maintain(path: str) -> None:
    # An object of its own: the writer's changes while it commits.
    Archive.open(path).maintain(_LOCK_S)
