"""Replicas of a shard behind one shard client: ask the least loaded one, retry after a failure, hedge slow searches."""

import asyncio
import itertools
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Sequence

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Scope
from orbithash.search.index.shard import ShardAnswer
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.shards.interface import ShardClient

__all__ = ["Hedging", "Replica", "ReplicaWatch", "ReplicatedShard"]

logger = logging.getLogger(__name__)

# Maximum number of replicas that one search is sent to.
_MAX_ATTEMPTS = 2

# A search is slow when it takes longer than the 95th percentile of the last `_WINDOW` searches.
_WINDOW, _QUANTILE = 256, 0.95
# Delay of a hedge until `_MIN_SAMPLES` searches were measured, and its lower limit afterwards.
_FIRST_DELAY_S, _MIN_SAMPLES, _MIN_DELAY_S = 0.5, 20, 0.005
# Hedges per search, on average, and the maximum number of hedges that may follow each other at once.
_HEDGES_PER_SEARCH, _MAX_BURST = 0.05, 10.0

# A replica that lost this many hedged races in a row is marked failed: a restarting one may be silent without an error.
_MAX_LOST_RACES = 3
# A replica is marked silent after searches have waited for it this long in total since its last answer.
_SILENT_S = 3.0

_PROBE_EVERY_S, _PROBE_TIMEOUT_S = 0.5, 600.0


class Replica:
    """Health of one replica of a shard, over all versions of the archive.

    A failed replica is asked only after the healthy ones. A silent one, which does not answer and raises no error, is
    not asked at all until it answers a probe (`ReplicaWatch`): each search would wait for its time-out.
    """

    def __init__(self) -> None:
        self.num_in_flight = 0
        self.is_healthy = True
        self.is_silent = False
        self._num_lost_races = 0
        self._waited_s = 0.0

    def answered(self) -> None:
        """Record an answer."""
        self.is_healthy, self.is_silent, self._num_lost_races, self._waited_s = True, False, 0, 0.0

    def failed(self) -> None:
        """Record an error."""
        self.is_healthy = False

    def lost_race(self) -> None:
        """Record that another replica, asked later, answered first."""
        self._num_lost_races += 1
        if self._num_lost_races >= _MAX_LOST_RACES:
            self.is_healthy = False

    def abandoned(self, seconds: float) -> None:
        """Record a search that was cancelled after `seconds` without an answer."""
        self._waited_s += seconds
        if self._waited_s >= _SILENT_S:
            self.is_healthy, self.is_silent = False, True


class Hedging:
    """Decides when a search is sent to a second replica: when it is slow, and for at most 5 % of the searches."""

    def __init__(self) -> None:
        self._seconds: deque[float] = deque(maxlen=_WINDOW)
        self._budget = _MAX_BURST

    def began(self) -> None:
        """Record that a search began."""
        self._budget = min(_MAX_BURST, self._budget + _HEDGES_PER_SEARCH)

    def took(self, seconds: float) -> None:
        """Record how long a call of a replica took, or how long it lasted until it was cancelled.

        Cancelled calls count: without them the percentile would shrink with each hedge, and hedges would multiply.
        """
        self._seconds.append(seconds)

    @property
    def delay_s(self) -> float:
        """Seconds after which a search is slow."""
        if len(self._seconds) < _MIN_SAMPLES:
            return _FIRST_DELAY_S
        return max(_MIN_DELAY_S, sorted(self._seconds)[math.ceil(_QUANTILE * len(self._seconds)) - 1])

    def take(self) -> bool:
        """Use the budget for one hedge; return False if it is exhausted."""
        if self._budget < 1:
            return False
        self._budget -= 1
        return True


class ReplicatedShard:
    """A shard client over the clients of its replicas, in the order of `replicas`."""

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

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`. Return the first answer; if all attempts fail, raise the last error."""
        candidates = [each for each in self._replicas if not each[1].is_silent]
        if not candidates:
            raise Unavailable("no replica of the shard answers")
        # The sort is stable: among equals the first replica is asked.
        order = sorted(candidates, key=lambda each: (not each[1].is_healthy, each[1].num_in_flight))[:_MAX_ATTEMPTS]
        self._hedging.began()
        remaining = iter(order)
        tasks: set[asyncio.Task[ShardAnswer]] = set()
        first: asyncio.Task[ShardAnswer] | None = None
        failure: BaseException | None = None
        num_started = 0
        may_start = True
        try:
            while True:
                for client, replica in itertools.islice(remaining, int(may_start)):
                    if num_started:
                        self._observer.count("hedged_shard_calls" if failure is None else "retried_shard_calls")
                    num_started += 1
                    # Here and not in the task, so that the next search sees it at once.
                    replica.num_in_flight += 1
                    task = asyncio.create_task(self._ask(client, replica, queries, k, scope, timeout_s))
                    task.add_done_callback(lambda _, replica=replica: _end_call(replica))  # type: ignore[misc]
                    tasks.add(task)
                    first = first or task
                if not tasks:
                    assert failure is not None, "an attempt ends in an answer or an error"
                    raise failure
                can_hedge = may_start and num_started < len(order)
                done, tasks = await asyncio.wait(
                    tasks, timeout=self._hedging.delay_s if can_hedge else None, return_when=asyncio.FIRST_COMPLETED
                )
                # Of all tasks: asyncio logs exceptions that were never retrieved.
                failures = [task.exception() for task in done]
                for task, failure in zip(done, failures, strict=True):
                    if failure is None:
                        if first in tasks:
                            order[0][1].lost_race()
                        return task.result()
                may_start = bool(done) or self._hedging.take()
        finally:
            for task in tasks:
                task.cancel()

    async def _ask(
        self, client: ShardClient, replica: Replica, queries: Codes, k: int, scope: Scope, timeout_s: float
    ) -> ShardAnswer:
        loop = asyncio.get_running_loop()
        started = loop.time()
        try:
            answer = await client.search(queries, k, scope, timeout_s)
        except asyncio.CancelledError:
            # It lost a race, or the caller's time-out has passed.
            seconds = loop.time() - started
            self._hedging.took(seconds)
            replica.abandoned(seconds)
            raise
        except Exception:
            replica.failed()
            raise
        replica.answered()
        self._hedging.took(loop.time() - started)
        return answer


def _end_call(replica: Replica) -> None:
    replica.num_in_flight -= 1


class ReplicaWatch:
    """Probes each replica that is not healthy, beside the others, until it answers. Belongs to one event loop."""

    def __init__(self, probes: Sequence[tuple[Replica, Callable[[], Awaitable[object]]]]) -> None:
        """`probes`: each replica with a call that returns when the replica is able to search."""
        self._tasks = [asyncio.create_task(_watch(replica, probe)) for replica, probe in probes]

    def close(self) -> None:
        """Stop probing."""
        for task in self._tasks:
            task.cancel()


async def _watch(replica: Replica, probe: Callable[[], Awaitable[object]]) -> None:
    while True:
        await asyncio.sleep(_PROBE_EVERY_S)
        if replica.is_healthy:
            continue
        try:
            async with asyncio.timeout(_PROBE_TIMEOUT_S):
                await probe()
        except asyncio.CancelledError:
            raise
        except BaseException as error:
            logger.debug("a replica does not answer: %s", error)
            if isinstance(error, KeyboardInterrupt | SystemExit):
                raise
        else:
            replica.answered()
