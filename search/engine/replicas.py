"""Copies of a shard as one shard: the least loaded is asked, and another one where it fails or is unusually slow."""

import asyncio
import itertools
import math
from collections import deque
from collections.abc import Sequence

from orbithash.encoders.codes import Codes
from orbithash.search.engine.snapshot import Scope, ShardClient
from orbithash.search.index.shard import ShardAnswer
from orbithash.search.observer import Observer

__all__ = ["Copy", "Latencies", "Replicas"]

# A search is sent to two copies at most.
_ATTEMPTS = 2

# The 95th percentile of so many searches says what is slow, once there are enough of them.
_WINDOW, _ENOUGH = 256, 20
# Before that this is: a copy may be silent from its first search on.
_FIRST_HEDGE_S, _MIN_HEDGE_S = 0.5, 0.005

# A copy that the second one outran so often in a row counts as failed: while it starts again it may fall silent
# without an error.
_MAX_OUTRUN = 3


class Copy:
    """How one copy of a shard fares, over all versions of the archive."""

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.is_healthy = True
        self._num_outrun = 0

    def answered(self) -> None:
        """It gave an answer."""
        self.is_healthy, self._num_outrun = True, 0

    def outrun(self) -> None:
        """Another copy, asked later, answered before."""
        self._num_outrun += 1
        if self._num_outrun >= _MAX_OUTRUN:
            self.is_healthy = False

    def end_one(self, task: object) -> None:
        """A search of it has ended."""
        self.num_in_flight -= 1


class Latencies:
    """How long the searches of a shard took lately."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_WINDOW)

    def add(self, seconds: float) -> None:
        """Notes a search."""
        self._seconds.append(seconds)

    @property
    def hedge_s(self) -> float:
        """After how long a search is slower than nearly all."""
        if len(self._seconds) < _ENOUGH:
            return _FIRST_HEDGE_S
        return max(_MIN_HEDGE_S, sorted(self._seconds)[math.ceil(0.95 * len(self._seconds)) - 1])


class Replicas:
    """A shard client over clients of its copies, in the order of `copies`."""

    def __init__(
        self,
        clients: Sequence[ShardClient],
        copies: Sequence[Copy],
        latencies: Latencies,
        observer: Observer | None = None,
    ) -> None:
        self._clients = list(zip(clients, copies, strict=True))
        self._latencies = latencies
        self._observer = observer or Observer()
        self.num_rows = clients[0].num_rows
        self.num_replicas = len(clients)

    @property
    def num_healthy(self) -> int:
        """See `ShardClient`."""
        return sum(copy.is_healthy for _, copy in self._clients)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`. The first answer counts; the error is the last one."""
        if len(self._clients) == 1:
            return await self._ask(*self._clients[0], queries, k, scope, timeout_s)
        # Stable: among equals the first.
        order = sorted(self._clients, key=lambda each: (not each[1].is_healthy, each[1].num_in_flight))[:_ATTEMPTS]
        waiting = iter(order)
        tasks: set[asyncio.Task[ShardAnswer]] = set()
        first: asyncio.Task[ShardAnswer] | None = None
        failure: BaseException | None = None
        num_started = 0
        try:
            while True:
                # At first, after a failure, and when the first copy is slow.
                for client, copy in itertools.islice(waiting, 1):
                    if num_started:
                        self._observer.count("hedged_shard_calls" if failure is None else "retried_shard_calls")
                    num_started += 1
                    # At once, for the next search to see it.
                    copy.num_in_flight += 1
                    task = asyncio.create_task(self._ask(client, copy, queries, k, scope, timeout_s))
                    task.add_done_callback(copy.end_one)
                    tasks.add(task)
                    first = first or task
                if not tasks:
                    assert failure is not None, "an attempt ends in an answer or an error"
                    raise failure
                patience = self._latencies.hedge_s if num_started < len(order) else None
                done, tasks = await asyncio.wait(tasks, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
                # Of all of them, or asyncio complains of an error that nobody looked at.
                failures = [task.exception() for task in done]
                for task, failure in zip(done, failures, strict=True):
                    if failure is None:
                        if first in tasks:
                            order[0][1].outrun()
                        return task.result()
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(
        self, client: ShardClient, copy: Copy, queries: Codes, k: int, scope: Scope, timeout_s: float
    ) -> ShardAnswer:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            answer = await client.search(queries, k, scope, timeout_s)
        except Exception:
            copy.is_healthy = False
            raise
        copy.answered()
        self._latencies.add(loop.time() - started)
        return answer
