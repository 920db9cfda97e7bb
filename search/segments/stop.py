"""Cancellation and deadline of one request, checked by the threads that work for it."""

import threading
import time
from concurrent.futures import CancelledError, Future
from typing import TypeVar

__all__ = ["Stop", "Stopped"]

Result = TypeVar("Result")


class Stopped(Exception):
    """The request was cancelled or its deadline has passed."""


class Stop:
    """A flag that ends the work for one request: set by `cancel` or when the deadline passes. Thread-safe."""

    def __init__(self, timeout_s: float | None = None) -> None:
        """Set the deadline `timeout_s` seconds from now; None: no deadline."""
        self._deadline = None if timeout_s is None else time.monotonic() + timeout_s
        self._is_cancelled = False
        self._lock = threading.Lock()
        self._waiting: set[threading.Event] = set()

    @property
    def is_set(self) -> bool:
        """Whether the request was cancelled or its deadline has passed."""
        return self._is_cancelled or (self._deadline is not None and time.monotonic() >= self._deadline)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until the deadline, at least 0; None without a deadline."""
        return None if self._deadline is None else max(0.0, self._deadline - time.monotonic())

    def cancel(self) -> None:
        """End the work, and all calls of `wait`."""
        with self._lock:
            self._is_cancelled = True
            for event in self._waiting:
                event.set()

    def check(self) -> None:
        """Raise `Stopped` if the work has to end."""
        if self.is_set:
            raise Stopped("the deadline of the request has passed, or it was cancelled")

    def wait(self, future: Future[Result]) -> Result:
        """Return the result of a future; raise `Stopped` when the work has to end first or the future is cancelled."""
        event = threading.Event()
        with self._lock:
            self._waiting.add(event)
        try:
            # Called at once if the future is complete.
            future.add_done_callback(lambda _: event.set())
            if not self.is_set:
                event.wait(self.remaining_s)
        finally:
            with self._lock:
                self._waiting.discard(event)
        if not future.done():
            raise Stopped("the deadline of the request has passed, or it was cancelled")
        try:
            return future.result()
        except CancelledError as error:
            raise Stopped("the work was cancelled") from error
