"""Queries that arrive together go out together.

A query that finds a free fan-out leaves in the next turn of the event loop, with those that arrived in the same turn:
a lone query never waits. While all fan-outs are in flight queries queue up, and the next free one takes as many as fit,
so that under load the batches grow by themselves.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from orbithash.encoders.codes import Codes
from orbithash.search.logs import current_request, set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import Overloaded

__all__ = ["Batcher"]

Result = TypeVar("Result")

_MAX_BATCH = 64
# Queries x k of one batch: bounds what shards send back.
_MAX_BATCH_HITS = 2**18


@dataclass(frozen=True)
class _Waiting(Generic[Result]):
    code: Codes
    k: int
    group: Hashable
    deadline: float
    result: asyncio.Future[Result]
    since: float
    request: str = field(default_factory=current_request)


class Batcher(Generic[Result]):
    """Collects queries and hands them to `run(codes [Q, B], ks [Q], group, timeout_s)`, which gives Q results.

    A batch holds queries of one group, and of similar k only (less than a factor of two apart), so that a query for 10
    rows does not pay for its neighbour's 10,000. `timeout_s` is the time of the most patient query of the batch; the
    others leave by themselves.
    """

    def __init__(
        self,
        run: Callable[[Codes, Sequence[int], Any, float], Awaitable[Sequence[Result]]],
        max_fan_outs: int,
        max_waiting: int,
        observer: Observer | None = None,
    ) -> None:
        self._run = run
        self._max_fan_outs = max_fan_outs
        self._max_waiting = max_waiting
        self._observer = observer or Observer()
        self._waiting: deque[_Waiting[Result]] = deque()
        self._in_flight: set[asyncio.Task[None]] = set()
        self._is_starting = False

    @property
    def num_waiting(self) -> int:
        """Queries that are in no batch yet."""
        return len(self._waiting)

    async def submit(self, code: Codes, k: int, group: Hashable, deadline: float) -> Result:
        """The result for one code uint8 [B]. `deadline` is a time of the running loop's clock.

        Raises `Overloaded` when `max_waiting` queries wait already, and whatever `run` raises.
        """
        if len(self._in_flight) >= self._max_fan_outs and len(self._waiting) >= self._max_waiting:
            self._observer.count("shed_queries")
            raise Overloaded(f"{len(self._waiting)} queries are waiting already; try again later", retry_after_s=1.0)
        loop = asyncio.get_running_loop()
        result: asyncio.Future[Result] = loop.create_future()
        self._waiting.append(_Waiting(code, k, group, deadline, result, loop.time()))
        if not self._is_starting and len(self._in_flight) < self._max_fan_outs:
            self._is_starting = True
            loop.call_soon(self._start)
        return await result

    def _start(self) -> None:
        self._is_starting = False
        while len(self._in_flight) < self._max_fan_outs and (batch := self._next_batch()):
            task = asyncio.create_task(self._answer(batch))
            self._in_flight.add(task)
            task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._in_flight.remove(task)
        self._start()

    def _next_batch(self) -> list[_Waiting[Result]]:
        """The oldest query and those like it, oldest first; empty when none waits."""
        now = asyncio.get_running_loop().time()
        live = [entry for entry in self._waiting if not entry.result.done() and entry.deadline > now]
        if not live:
            self._waiting.clear()
            return []
        first, size = live[0], live[0].k.bit_length()
        limit = max(1, min(_MAX_BATCH, _MAX_BATCH_HITS // live[0].k))
        batch = [entry for entry in live if entry.k.bit_length() == size and entry.group == first.group][:limit]
        taken = {id(entry) for entry in batch}
        self._waiting = deque(entry for entry in live if id(entry) not in taken)
        return batch

    async def _answer(self, batch: list[_Waiting[Result]]) -> None:
        now = asyncio.get_running_loop().time()
        timeout_s = max(entry.deadline for entry in batch) - now
        self._observer.batch(len(batch), now - batch[0].since)
        set_requests(entry.request for entry in batch)
        try:
            results = await self._run(
                np.stack([entry.code for entry in batch]), [entry.k for entry in batch], batch[0].group, timeout_s
            )
        except Exception as error:
            for entry in batch:
                if not entry.result.done():
                    entry.result.set_exception(error)
            return
        for entry, result in zip(batch, results, strict=True):
            if not entry.result.done():
                entry.result.set_result(result)
