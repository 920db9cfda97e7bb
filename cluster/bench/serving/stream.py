"""A stream of single queries to a gateway, with the latency of each."""

import asyncio
import time
from typing import NamedTuple

import numpy as np

from orbithash.encoders.codes import Codes
from orbithash.search.client.async_client import AsyncClient

__all__ = ["Latencies", "QueryStream"]


class Latencies(NamedTuple):
    """Number of queries, number of those that failed, and latencies in ms."""

    num_queries: int
    num_failed: int
    p50_ms: float
    p99_ms: float
    slowest_ms: float


class QueryStream:
    """Queries sent one after the other while `running()` lasts; use as an asynchronous context manager."""

    def __init__(self, client: AsyncClient, queries: Codes, k: int) -> None:
        self._client = client
        self._codes = [code.tobytes() for code in queries]
        self._k = k
        # Beginning of each query, its seconds, and whether it failed.
        self._sent: list[tuple[float, float, bool]] = []
        self._task: asyncio.Task[None]

    async def __aenter__(self) -> "QueryStream":
        self._task = asyncio.create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        await asyncio.gather(self._task, return_exceptions=True)

    def latencies(self, begin: float, end: float) -> Latencies:
        """Return those of the queries that were in progress between two times of `time.perf_counter`."""
        part = [each for each in self._sent if each[0] < end and each[0] + each[1] > begin]
        if not part:
            return Latencies(0, 0, float("nan"), float("nan"), float("nan"))
        seconds = 1e3 * np.array([each[1] for each in part])
        p50, p99 = np.percentile(seconds, [50, 99])
        return Latencies(len(part), sum(each[2] for each in part), float(p50), float(p99), float(seconds.max()))

    async def _run(self) -> None:
        number = 0
        while True:
            begun, failed = time.perf_counter(), False
            try:
                await self._client.search(code=self._codes[number % len(self._codes)], k=self._k)
            except Exception:
                failed = True
                # A gateway that refuses at once must not be asked without a pause.
                await asyncio.sleep(0.001)
            self._sent.append((begun, time.perf_counter() - begun, failed))
            number += 1
