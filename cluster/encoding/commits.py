"""Commits of a job, made beside it: few, because each of them writes the names of all fragments anew."""

import threading
import time
from collections.abc import Sequence
from types import TracebackType

from orbithash.encoders.archive.archive import Archive

__all__ = ["COMMIT_EVERY_S", "Commits"]

# What has arrived is committed together after so long: what a killed job repeats at most, besides fragments in the
# making, and what a reader waits for.
COMMIT_EVERY_S = 3.0


class Commits:
    """Within its block all that is handed in is committed, at once or with what else arrives until the next commit.

    The archive belongs to the block meanwhile. What was handed in when the block fails is committed all the same.
    """

    def __init__(self, archive: Archive, every_s: float = COMMIT_EVERY_S) -> None:
        """The archive, which this process has the right to write."""
        self._archive = archive
        self._every_s = every_s
        self._fragments: list[str] = []
        self._refused: list[tuple[str, str]] = []
        self._changed = threading.Condition()
        self._is_closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="commits", daemon=True)

    def __enter__(self) -> "Commits":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join()
        if self._error is not None and error is None:
            raise self._error

    def add(self, fragments: Sequence[str], refused: Sequence[tuple[str, str]]) -> None:
        """Fragments of `Archive.write_fragments`, and (key, reason) of refused images; raises what a commit raised."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._fragments += fragments
            self._refused += refused
            self._changed.notify()

    def _run(self) -> None:
        last = -float("inf")
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._fragments or self._refused or self._is_closed)
                    self._changed.wait_for(lambda: self._is_closed, timeout=last + self._every_s - time.monotonic())
                    fragments, refused = self._fragments, self._refused
                    self._fragments, self._refused = [], []
                if not fragments and not refused:
                    return
                # The side table first: a kill between the two commits then repeats work instead of losing a reason.
                self._archive.refuse(refused)
                self._archive.commit(fragments)
                last = time.monotonic()
        except BaseException as error:
            with self._changed:
                self._error = error
