"""Show the versions of an archive to searches."""

import asyncio
import time
from collections import deque
from collections.abc import Callable

from orbithash.search.engine.backend import Backend
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.observer import Observer
from orbithash.search.segments.host import MAX_VERSIONS

__all__ = ["Showing"]

# Maximum seconds that a version waits for the searches on the oldest one, whose place in the shards it takes.
_LAST_SEARCHES_S = 1.0


class Showing:
    """Moves searches to newer versions of one archive, never back. Belongs to one event loop."""

    def __init__(
        self, backend: Backend, snapshot: Snapshot, use: Callable[[Snapshot], None], observer: Observer
    ) -> None:
        """`snapshot`: the version that searches see; `use` makes them see another one."""
        self._backend = backend
        self._use = use
        self._observer = observer
        # Since when searches do not see the newest version that is known.
        self._behind_since: float | None = None
        # The snapshots whose versions the shards hold. A new one replaces the oldest, whose searches are waited for:
        # otherwise shards would have to load a version that they have just dropped.
        self._snapshots = deque([snapshot], maxlen=MAX_VERSIONS)
        self._newest = snapshot.archive.version
        self._task: asyncio.Task[None] | None = None

    @property
    def version(self) -> int:
        """The version that searches see."""
        return self._snapshots[-1].archive.version

    @property
    def lag_s(self) -> float:
        """Seconds since a newer version became known than searches see; 0 if there is none."""
        return 0.0 if self._behind_since is None else time.monotonic() - self._behind_since

    async def show(self, version: int) -> None:
        """Return when searches see `version` or a later one. Raises the errors of shards.

        Searches see the version before until all shards have this one. The work continues if the caller is cancelled,
        and is shared by concurrent calls.
        """
        self._newest = max(self._newest, version)
        if self._newest > self.version and self._behind_since is None:
            self._behind_since = time.monotonic()
        while self.version < version:
            if self._task is None or self._task.done():
                self._task = asyncio.create_task(self._load(self._newest))
                self._task.add_done_callback(_retrieve)
            await asyncio.shield(self._task)

    async def close(self) -> None:
        """Stop the work in progress."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _load(self, version: int) -> None:
        if len(self._snapshots) == MAX_VERSIONS:
            await self._snapshots[0].usage.ended(_LAST_SEARCHES_S)
        try:
            snapshot = await self._backend.at(version)
        except BaseException as error:
            if not isinstance(error, asyncio.CancelledError):
                self._observer.count("failed_showings")
            raise
        self._snapshots.append(snapshot)
        self._use(snapshot)
        if version == self._newest:
            self._behind_since = None


def _retrieve(task: asyncio.Task[None]) -> None:
    """Retrieve the exception of a task whose callers may have gone."""
    if not task.cancelled():
        task.exception()
