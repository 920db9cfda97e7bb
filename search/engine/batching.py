"""Collect work items that arrive at the same time into batches.

An item that arrives while a batch may start leaves in the next turn of the event loop, together with the items of the
same turn: a lone item never waits. While the maximum number of batches is in flight, items queue up, and the next
batch takes as many as fit. Batches therefore grow with the load.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from orbithash.search.logs import current_request, set_requests
from orbithash.search.protocol.errors import Overloaded

__all__ = ["MAX_BATCH", "Batcher"]

Item = TypeVar("Item")
Result = TypeVar("Result")

# Maximum number of items in one batch.
MAX_BATCH = 64
# Maximum sum of `size` in one batch; for queries: the number of hits that shards send back.
_MAX_BATCH_SIZE = 2**18


@dataclass(frozen=True)
class _Entry(Generic[Item, Result]):
    item: Item
    size: int
    group: Hashable
    deadline: float
    result: asyncio.Future[Result]
    since: float
    request: str = field(default_factory=current_request)


class Batcher(Generic[Item, Result]):
    """Collects items and passes them to `run(items, sizes, group, timeout_s)`, which returns one result per item.

    A batch holds items of one group, and only of similar size (less than a factor of two apart), so that a query for 10
    rows does not pay for another one's 10,000. `timeout_s` is the time until the latest deadline in the batch; callers
    with an earlier deadline cancel their `submit`.
    """

    def __init__(
        self,
        run: Callable[[list[Item], list[int], Any, float], Awaitable[Sequence[Result]]],
        max_in_flight: int,
        max_waiting: int,
        max_batch: int = MAX_BATCH,
        on_batch: Callable[[int, float], None] | None = None,
    ) -> None:
        """Create a batcher.

        Args:
            run: processes a batch.
            max_in_flight: maximum number of batches that are processed at the same time.
            max_waiting: maximum number of items that wait for a batch.
            max_batch: maximum number of items in a batch.
            on_batch: called with the number of items of each batch and the seconds that the oldest one has waited.
        """
        self._run = run
        self._max_in_flight = max_in_flight
        self._max_waiting = max_waiting
        self._max_batch = max_batch
        self._on_batch = on_batch
        self._waiting: deque[_Entry[Item, Result]] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._is_starting = False

    @property
    def num_waiting(self) -> int:
        """Number of items that wait for a batch."""
        return len(self._waiting)

    async def submit(self, item: Item, size: int, group: Hashable, deadline: float) -> Result:
        """Return the result for one item. `deadline` is a time of the running loop's clock.

        Raises `Overloaded` if `max_waiting` items are waiting already, and any error of `run`.
        """
        if len(self._in_flight) >= self._max_in_flight and len(self._waiting) >= self._max_waiting:
            raise Overloaded(f"{len(self._waiting)} queries are waiting already; try again later", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Entry(item, size, group, deadline, result, loop.time()))
        if not self._is_starting and len(self._in_flight) < self._max_in_flight:
            self._is_starting = True
            loop.call_soon(self._start)
        return await result

    def _start(self) -> None:
        self._is_starting = False
        while len(self._in_flight) < self._max_in_flight and (batch := self._next_batch()):
            task = asyncio.create_task(self._process(batch))
            self._in_flight.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._in_flight.remove(task)
        self._start()

    def _next_batch(self) -> list[_Entry[Item, Result]]:
        """Return the oldest item and those that match it, oldest first; empty if no item waits."""
        now = asyncio.get_running_loop().time()
        live = [entry for entry in self._waiting if not entry.result.done() and entry.deadline > now]
        if not live:
            self._waiting.clear()
            return []
        first, magnitude = live[0], live[0].size.bit_length()
        limit = max(1, min(self._max_batch, _MAX_BATCH_SIZE // live[0].size))
        batch = [entry for entry in live if entry.size.bit_length() == magnitude and entry.group == first.group][:limit]
        taken = {id(entry) for entry in batch}
        self._waiting = deque(entry for entry in live if id(entry) not in taken)
        return batch

    async def _process(self, batch: list[_Entry[Item, Result]]) -> None:
        now = asyncio.get_running_loop().time()
        timeout_s = max(entry.deadline for entry in batch) - now
        set_requests(entry.request for entry in batch)
        try:
            if self._on_batch is not None:
                self._on_batch(len(batch), now - batch[0].since)
            items, sizes = [entry.item for entry in batch], [entry.size for entry in batch]
            results = await self._run(items, sizes, batch[0].group, timeout_s)
            assert len(results) == len(batch), "one result per item"
        except BaseException as error:
            # Also for what is not an `Exception`, such as a panic of native code: otherwise the callers would wait on.
            for entry in batch:
                if not entry.result.done():
                    entry.result.set_exception(_exception(error))
            if isinstance(error, asyncio.CancelledError | KeyboardInterrupt | SystemExit):
                raise
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)


def _exception(error: BaseException) -> Exception:
    if isinstance(error, Exception):
        return error
    failure = RuntimeError(f"a batch failed: {error!r}")
    failure.__cause__ = error
    return failure
