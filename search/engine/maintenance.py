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

# Calls a function that writes to the archive without changing rows, between the commits of the writer.
Exclusive = Callable[[Callable[[], None]], Awaitable[None]]


class Maintenance:
    """Maintains `archive` after commits. Belongs to one event loop."""

    def __init__(self, archive: Archive, exclusive: Exclusive) -> None:
        self._archive = archive
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
        await self._exclusive(self._archive.optimize)
        await asyncio.to_thread(self._archive.clean_up)
