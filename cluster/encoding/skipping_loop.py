"""An event loop that does not wait: its clock jumps to the next event."""

import asyncio
import selectors
import time
from collections.abc import Callable
from concurrent.futures import Executor
from typing import TypeVar, TypeVarTuple

__all__ = ["SkippingLoop"]

Result = TypeVar("Result")
_Args = TypeVarTuple("_Args")


class _Impatient(selectors.SelectSelector):
    """A selector that adds up the times that it would have waited."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "the loop waits for an event that cannot come"
        self.skipped_s += max(0.0, timeout)
        # No file has events in a simulation.
        return []


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock shows the skipped waiting time; with `counts_work` also the time of the work done."""

    def __init__(self, counts_work: bool) -> None:
        self._impatient, self._counts_work = _Impatient(), counts_work
        super().__init__(self._impatient)

    def time(self) -> float:
        """Return the time of the clock, seconds; see `asyncio`."""
        return self._impatient.skipped_s + (time.perf_counter() if self._counts_work else 0.0)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Args], Result], *args: *_Args
    ) -> asyncio.Future[Result]:
        """Run `func` at once: the clock would not wait for a thread."""
        future: asyncio.Future[Result] = self.create_future()
        future.set_result(func(*args))
        return future
