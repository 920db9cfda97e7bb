"""Replicas of a shard behind one shard client: ask the least loaded one, retry after a failure, hedge slow calls."""

import asyncio
import itertools
import math
from collections import defaultdict, deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any, TypeVar

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Order, Ranked
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.shards.interface import ShardClient, Unreachable

__all__ = ["Hedging", "Replica", "ReplicatedShard", "waiting_for"]

# Maximum number of replicas that one call is sent to.
_MAX_ATTEMPTS = 2

# A call is slow when it takes longer than the 95th percentile of the last `_WINDOW` calls of its kind.
_WINDOW, _QUANTILE = 256, 0.95
# Delay of a hedge until `_MIN_SAMPLES` calls were measured, and its lower limit afterwards.
_FIRST_DELAY_S, _MIN_SAMPLES, _MIN_DELAY_S = 0.5, 20, 0.005
# Hedges per call, on average, and the maximum number of hedges that may follow each other at once.
_HEDGES_PER_CALL, _MAX_BURST = 0.05, 10.0

# A replica that lost this many hedged races in a row is marked failed until it answers a ping.
_MAX_LOST_RACES = 3

Result = TypeVar("Result")
Call = Callable[[ShardClient, float], Awaitable[Result]]


class Replica:
    """Health of one replica of a shard, over all versions of the archive.

    A replica that failed, or that does not hold the newest version yet, is asked only after the healthy ones. A silent
    one is not asked at all until it answers a ping (`HealthWatch`): each call would wait for its time-out.

    Attributes:
        num_in_flight: number of calls that wait for it.
        calls, interrupted: tasks that wait for it, and those of them that were cancelled because it is lost.
        num_segments, num_bytes: segments of the newest version and memory in bytes, as of the last ping; 0: unknown.
        num_merges, num_evaluations: merges of segments and evaluated filters since its start, as of the last ping.
    """

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.num_segments = self.num_bytes = 0
        self.num_merges = self.num_evaluations = 0
        self.is_silent = False
        self._is_late = False
        self._has_failed = False
        self._num_lost_races = 0
        self.calls: set[asyncio.Task[Any]] = set()
        self.interrupted: set[asyncio.Task[Any]] = set()

    @property
    def is_healthy(self) -> bool:
        """Whether the replica answers and holds the newest version."""
        return not (self.is_silent or self._is_late or self._has_failed)

    def answered(self) -> None:
        """Record the answer to a call."""
        self._has_failed, self._num_lost_races = False, 0

    def failed(self) -> None:
        """Record an error."""
        self._has_failed = True

    def lost_race(self) -> None:
        """Record that another replica, asked later, answered first."""
        self._num_lost_races += 1
        if self._num_lost_races >= _MAX_LOST_RACES:
            self._has_failed = True

    def pinged(self, is_late: bool) -> None:
        """Record the answer to a ping. `is_late`: the replica does not hold the newest version."""
        self.is_silent, self._is_late, self._has_failed = False, is_late, False

    def lost(self) -> None:
        """Record that the replica does not answer pings. Calls that wait for it raise `Unreachable` at once."""
        self.is_silent = True
        for task in self.calls - self.interrupted:
            self.interrupted.add(task)
            task.cancel()


async def waiting_for(replicas: Sequence[Replica], call: Awaitable[Result]) -> Result:
    """Return the result of a call that waits for replicas. Raises `Unreachable` when one of them becomes silent."""
    task = asyncio.current_task()
    assert task is not None, "called from a coroutine"
    for replica in replicas:
        replica.calls.add(task)
    try:
        return await call
    except asyncio.CancelledError:
        num_lost = sum(task in replica.interrupted for replica in replicas)
        if task.cancelling() > num_lost or not num_lost:
            raise
        for _ in range(num_lost):
            task.uncancel()
        raise Unreachable("the replica does not answer any more") from None
    finally:
        for replica in replicas:
            replica.calls.discard(task)
            replica.interrupted.discard(task)


class Hedging:
    """Decides when a call is sent to a second replica: when it is slow, and for at most 5 % of the calls."""

    def __init__(self) -> None:
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=_WINDOW))
        self._budget = _MAX_BURST

    def began(self) -> None:
        """Record that a call began."""
        self._budget = min(_MAX_BURST, self._budget + _HEDGES_PER_CALL)

    def took(self, seconds: float, kind: str = "search") -> None:
        """Record how long a call of a replica took, or how long it lasted until it was cancelled.

        Cancelled calls count: without them the percentile would shrink with each hedge, and hedges would multiply.
        """
        self._seconds[kind].append(seconds)

    def delay_s(self, kind: str = "search") -> float:
        """Return the seconds after which a call of this kind is slow."""
        seconds = self._seconds[kind]
        if len(seconds) < _MIN_SAMPLES:
            return _FIRST_DELAY_S
        return max(_MIN_DELAY_S, sorted(seconds)[math.ceil(_QUANTILE * len(seconds)) - 1])

    def take(self) -> bool:
        """Use the budget for one hedge; return False if it is exhausted."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


class ReplicatedShard:
    """A shard client over the clients of its replicas, in the order of `replicas`.

    Every call returns the first answer of a replica. If all attempts fail, it raises the last error.
    """

    def __init__(
        self,
        clients: Sequence[ShardClient],
        replicas: Sequence[Replica],
        hedging: Hedging,
        observer: Observer | None = None,
    ) -> None:
        self._replicas = list(zip(clients, replicas, strict=True))
        self._hedging = hedging
        self._observer = observer or Observer()
        self.num_rows = clients[0].num_rows
        self.num_replicas = len(clients)

    @property
    def num_healthy(self) -> int:
        """See `ShardClient`."""
        return sum(replica.is_healthy for _, replica in self._replicas)

    @property
    def num_segments(self) -> int:
        """Number of segments of the newest version; 0: unknown."""
        return max(replica.num_segments for _, replica in self._replicas)

    @property
    def num_bytes(self) -> int:
        """Memory of the largest replica in bytes; 0: unknown."""
        return max(replica.num_bytes for _, replica in self._replicas)

    @property
    def num_merges(self) -> int:
        """Number of merges of segments of all replicas."""
        return sum(replica.num_merges for _, replica in self._replicas)

    @property
    def num_evaluations(self) -> int:
        """Number of filters that all replicas evaluated over a segment."""
        return sum(replica.num_evaluations for _, replica in self._replicas)

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        kind = "filtered search" if scope.filter else "search"
        return await self._ask(kind, lambda client, time_s: client.search(queries, k, scope, time_s), timeout_s)

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """See `ShardClient`."""
        return await self._ask("hits", lambda client, time_s: client.hits(ids, include, time_s), timeout_s)

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """See `ShardClient`."""
        return await self._ask("read", lambda client, time_s: client.read(ids, columns, time_s), timeout_s)

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """See `ShardClient`."""
        return await self._ask("count", lambda client, time_s: client.count(filter_text, time_s), timeout_s)

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """See `ShardClient`."""
        return await self._ask(
            "scroll", lambda client, time_s: client.scroll(filter_text, after, limit, time_s), timeout_s
        )

    async def rank(
        self,
        order: Order,
        k: int,
        max_key: int | None,
        after: tuple[int, int] | None,
        filter_text: str,
        timeout_s: float,
    ) -> Ranked:
        """See `ShardClient`."""
        return await self._ask(
            f"rank {type(order).__name__}",
            lambda client, time_s: client.rank(order, k, max_key, after, filter_text, time_s),
            timeout_s,
        )

    async def distances(self, code: Codes, filter_text: str, timeout_s: float) -> tuple[Counts, int | None]:
        """See `ShardClient`."""
        return await self._ask(
            "distances", lambda client, time_s: client.distances(code, filter_text, time_s), timeout_s
        )

    async def count_by(self, by: GroupName, filter_text: str, timeout_s: float) -> tuple[dict[str, int], int]:
        """See `ShardClient`."""
        return await self._ask("count by", lambda client, time_s: client.count_by(by, filter_text, time_s), timeout_s)

    async def _ask(self, kind: str, call: Call[Result], timeout_s: float) -> Result:
        candidates = [each for each in self._replicas if not each[1].is_silent]
        if not candidates:
            raise Unreachable("no replica of the shard answers")
        self._hedging.began()
        if len(candidates) == 1:
            # Without a task of its own, which would cost as much as a short search.
            return await self._ask_one(kind, *candidates[0], call, timeout_s)
        # The sort is stable: among equals the first replica is asked.
        order = sorted(candidates, key=lambda each: (not each[1].is_healthy, each[1].num_in_flight))[:_MAX_ATTEMPTS]
        return await self._race(kind, order, call, timeout_s)

    async def _race(
        self, kind: str, order: Sequence[tuple[ShardClient, Replica]], call: Call[Result], timeout_s: float
    ) -> Result:
        """Ask the first replica, and the next one when a call fails or is slow; return the first answer."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + timeout_s
        remaining = iter(order)
        tasks: set[asyncio.Task[Result]] = set()
        first: asyncio.Task[Result] | None = None
        failure: BaseException | None = None
        num_started = 0
        may_start = True
        try:
            while True:
                for client, replica in itertools.islice(remaining, int(may_start)):
                    if num_started:
                        self._observer.count("hedged_shard_calls" if failure is None else "retried_shard_calls")
                    num_started += 1
                    # Here and not in the task, so that the next call sees it at once.
                    replica.num_in_flight += 1
                    task = asyncio.create_task(self._measured(kind, client, replica, call, deadline - loop.time()))
                    task.add_done_callback(partial(_end_call, replica))
                    tasks.add(task)
                    first = first or task
                if not tasks:
                    assert failure is not None, "an attempt ends in an answer or an error"
                    raise failure
                can_hedge = may_start and num_started < len(order)
                delay_s = self._hedging.delay_s(kind) if can_hedge else None
                done, tasks = await asyncio.wait(tasks, timeout=delay_s, return_when=asyncio.FIRST_COMPLETED)
                # Of all tasks: asyncio logs exceptions that were never retrieved.
                failures = [task.exception() for task in done]
                for task, failure in zip(done, failures, strict=True):
                    if failure is None:
                        if first in tasks:
                            order[0][1].lost_race()
                        return task.result()
                    if isinstance(failure, InvalidQuery):
                        raise failure
                may_start = bool(done) or self._hedging.take()
        finally:
            for task in tasks:
                task.cancel()

    async def _ask_one(
        self, kind: str, client: ShardClient, replica: Replica, call: Call[Result], timeout_s: float
    ) -> Result:
        replica.num_in_flight += 1
        try:
            return await self._measured(kind, client, replica, call, timeout_s)
        finally:
            replica.num_in_flight -= 1

    async def _measured(
        self, kind: str, client: ShardClient, replica: Replica, call: Call[Result], timeout_s: float
    ) -> Result:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            result = await waiting_for([replica], call(client, timeout_s))
        except asyncio.CancelledError:
            # It lost a race, or the caller's time-out has passed.
            self._hedging.took(loop.time() - started, kind)
            raise
        except (InvalidQuery, Overloaded):
            raise
        except Exception:
            replica.failed()
            raise
        replica.answered()
        self._hedging.took(loop.time() - started, kind)
        return result


def _end_call(replica: Replica, _: "asyncio.Task[Any]") -> None:
    replica.num_in_flight -= 1
