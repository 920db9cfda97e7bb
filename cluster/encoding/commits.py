"""Commits of a job, in a thread beside it. They are few, because each of them writes the list of all fragments anew."""

import threading
import time
from types import TracebackType

import pyarrow as pa

from orbithash.cluster.encoding.stages import Written
from orbithash.encoders.archive.archive import Archive

__all__ = ["COMMIT_EVERY_S", "Commits", "commit"]

# Seconds between two commits. Rows that wait for a commit are encoded again when the job is killed, and readers do not
# see them.
COMMIT_EVERY_S = 3.0


class Commits:
    """Commits what is added within its block: the first at once, later ones together every few seconds.

    Nothing else may change the archive object within the block. What was added is also committed when the block fails.
    """

    def __init__(self, archive: Archive, every_s: float = COMMIT_EVERY_S) -> None:
        """Take the archive, which this process has the right to write."""
        self._archive = archive
        self._every_s = every_s
        self._waiting: list[Written] = []
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

    def add(self, written: Written) -> None:
        """Commit rows and refused items with the next commit. Raises the error of an earlier commit."""
        with self._changed:
            if self._error is not None:
                raise self._error
            self._waiting.append(written)
            self._changed.notify()

    def _run(self) -> None:
        last = -float("inf")
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(lambda: self._waiting or self._is_closed)
                    self._changed.wait_for(lambda: self._is_closed, timeout=last + self._every_s - time.monotonic())
                    waiting, self._waiting = self._waiting, []
                if not waiting:
                    return
                commit(self._archive, waiting)
                last = time.monotonic()
        except BaseException as error:
            with self._changed:
                self._error = error


def commit(archive: Archive, results: list[Written]) -> None:
    """Commit refused items, new rows and rows that replace others; the caller has the right to write."""
    # The side table first: after a kill between two commits, work is repeated and no reason is lost.
    refused = [item for written in results for item in written.refused_items()]
    stamps = {key: stamp for written in results for key, stamp in zip(written.refused, written.stamps, strict=True)}
    archive.refuse(refused, stamps)
    archive.commit([fragment for written in results for fragment in written.fragments])
    tables = [rows for written in results if (rows := written.replacing_rows()) is not None]
    if tables:
        archive.upsert(pa.concat_tables(tables))
