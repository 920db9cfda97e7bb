"""An event loop in which nobody waits: its clock jumps to whatever is due next."""

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
    """Does not wait, but notes for how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self.skipped_s += max(0.0, timeout)
        # No file is waited for.
        return []


class SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock shows the time that would have been waited; with `counts_work` also that of work."""

    def __init__(self, counts_work: bool) -> None:
        self._impatient, self._counts_work = _Impatient(), counts_work
        super().__init__(self._impatient)

    def time(self) -> float:
        """See `asyncio`."""
        return self._impatient.skipped_s + (time.perf_counter() if self._counts_work else 0.0)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Args], Result], *args: *_Args
    ) -> asyncio.Future[Result]:
        """At once: the clock would not wait for a thread."""
        future: asyncio.Future[Result] = self.create_future()
        future.set_result(func(*args))
        return future
