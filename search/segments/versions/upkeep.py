"""Work beside searches and changes: merging of segments, manifests, removal of files that nothing uses."""

import logging
import threading
from contextlib import suppress

from orbithash.search.segments.bits import empty, full, rows
from orbithash.search.segments.files import merge_segments
from orbithash.search.segments.segment import Segment
from orbithash.search.segments.selections import Selections, lower_priority
from orbithash.search.segments.stop import Stop, Stopped
from orbithash.search.segments.versions.history import History
from orbithash.search.segments.versions.merging import segments_to_merge
from orbithash.search.segments.versions.shard_folder import Manifest, ShardFolder
from orbithash.search.segments.versions.shard_version import LiveSegment, ShardVersion
from orbithash.search.segments.versions.source import MAX_ROWS_IN_MEMORY, ShardSource

__all__ = ["Upkeep"]

logger = logging.getLogger(__name__)

# A manifest is written at least after this number of versions: what comes later is read from the archive at the next
# start, which keeps old versions for some time only.
_STORE_EVERY = 100
# Seconds between two looks for versions that nothing uses any more.
_INTERVAL_S = 60.0
_CLOSE_TIMEOUT_S = 10.0


class Upkeep:
    """Keeps the segments of one shard few and its files up to date, in a thread that gives way to searches.

    Attributes:
        num_merges: number of merges that have ended.
    """

    def __init__(self, history: History, source: ShardSource, bits: int, index: str, selections: Selections) -> None:
        self._history = history
        self._source = source
        self._bits = bits
        self._index = index
        self._selections = selections
        self._stop = Stop()
        self._folder: ShardFolder | None = None
        self._stored: ShardVersion | None = None
        self._working = threading.Lock()
        self._event = threading.Event()
        self._is_closed = False
        self.num_merges = 0
        self._thread: threading.Thread | None = None

    def use(self, folder: ShardFolder) -> None:
        """Write manifests into a folder."""
        self._folder = folder

    def forget_stored(self) -> None:
        """Write a manifest soon, because the stored version is of no use."""
        self._stored = None

    def notify(self) -> None:
        """Look for work soon, because there is another version."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="upkeep", daemon=True)
            self._thread.start()
        self._event.set()

    def work(self) -> bool:
        """Merge segments once, or write a manifest; return whether there was something to do."""
        with self._working:
            newest = self._history.newest
            if newest is None:
                return False
            numbers = segments_to_merge(
                [part.num_alive for part in newest.parts], [part.segment.num_rows for part in newest.parts]
            )
            if not numbers and not self._is_due(newest):
                return False
            self._merge_and_store(newest, {newest.parts[number].segment.name for number in numbers})
            return True

    def close(self) -> None:
        """End the thread and write the manifest of the newest version. A merge that takes long is left to end alone."""
        self._is_closed = True
        self._stop.cancel()
        self._event.set()
        if self._thread is not None:
            self._thread.join(_CLOSE_TIMEOUT_S)
        if not self._working.acquire(timeout=_CLOSE_TIMEOUT_S):
            return
        try:
            newest = self._history.newest
            if newest is not None and self._folder is not None:
                if not self._is_stored(newest):
                    self._merge_and_store(newest, set())
                self._folder.clean(())
        except Exception:
            logger.exception("the segments of shard %d were not stored", self._source.part.number)
        finally:
            if self._folder is not None:
                self._folder.close()
                self._folder = None
            self._working.release()

    def _run(self) -> None:
        lower_priority()
        while not self._is_closed:
            self._event.wait(_INTERVAL_S)
            self._event.clear()
            try:
                while not self._is_closed and self.work():
                    pass
            except Exception:
                # The next version is the next attempt.
                logger.exception("segments of shard %d were not merged", self._source.part.number)
            self._history.drop_unused()

    def _is_due(self, newest: ShardVersion) -> bool:
        """Return whether a manifest should be written although no merge is due."""
        if self._folder is None or self._is_stored(newest):
            return False
        last = self._stored
        return last is None or newest.version < last.version or newest.version - last.version >= _STORE_EVERY

    def _is_stored(self, newest: ShardVersion) -> bool:
        return self._stored is not None and self._stored.commit_id == newest.commit_id

    def _merge_and_store(self, newest: ShardVersion, to_merge: set[str]) -> None:
        """Merge segments of a version, and those that have no file yet; then write its manifest."""
        folder = self._folder
        chosen = set(to_merge)
        if folder is not None:
            chosen |= {part.segment.name for part in newest.parts if not folder.is_stored(part.segment.name)}
        with self._history.lock:
            # Between two changes: a change merges small segments, but none of these.
            if self._history.newest is not newest:
                return
            self._history.merging = frozenset(chosen)
        try:
            group = [part for part in newest.parts if part.segment.name in chosen]
            if group:
                merged = self._merged(newest, group)
                # Queries with filters in use do not wait for their evaluation over the merged segment.
                with suppress(Stopped):
                    self._selections.warm(merged, [part.segment for part in group], self._stop)
                with self._history.lock:
                    self._replace(group, merged)
                self.num_merges += 1
                others = [part for part in newest.parts if part.segment.name not in chosen]
                parts = [*others, LiveSegment.of(merged)]
                newest = ShardVersion.of(newest.version, newest.commit_id, self._bits, parts)
        finally:
            with self._history.lock:
                self._history.merging = frozenset()
        if folder is not None:
            self._store(folder, newest)

    def _merged(self, newest: ShardVersion, group: list[LiveSegment]) -> Segment:
        pairs = [(part.segment, part.alive) for part in group]
        if self._folder is not None:
            try:
                return merge_segments(self._folder.path, pairs, self._bits, self._index)
            except OSError as error:
                logger.warning("shard %d keeps rows in memory: %s", self._source.part.number, error)
        are_few = sum(part.num_alive for part in group) <= MAX_ROWS_IN_MEMORY
        read = None if are_few else self._source.reader(newest.version)
        return merge_segments(None, pairs, self._bits, self._index, read)

    def _replace(self, group: list[LiveSegment], merged: Segment) -> None:
        """Put the merged segment in the place of a group in the newest version, less the rows that are gone since."""
        newest = self._history.newest
        assert newest is not None, "it was merged"
        now = {part.segment.name: part for part in newest.parts}
        result = LiveSegment.of(merged)
        for part in group:
            before = part.alive if part.alive is not None else full(part.segment.num_rows)
            # A segment without a row that exists is not in a version.
            after = now[part.segment.name].alive if part.segment.name in now else empty(part.segment.num_rows)
            if after is not None and after is not part.alive:
                result = result.without(part.segment.ids_of(rows(before & ~after)))
        names = {part.segment.name for part in group}
        others = [part for part in newest.parts if part.segment.name not in names]
        self._history.replace(ShardVersion.of(newest.version, newest.commit_id, self._bits, [*others, result]))

    def _store(self, folder: ShardFolder, newest: ShardVersion) -> None:
        """Write the manifest of a version, and remove the files that nothing uses any more."""
        self._stored = newest
        if not all(folder.is_stored(part.segment.name) for part in newest.parts):
            return
        segments = [(part.segment.name, part.alive) for part in newest.parts]
        try:
            folder.write(Manifest(newest.version, newest.commit_id, segments))
            folder.remove_siblings()
            folder.clean({segment.name for shard in self._history.versions for segment in shard.segments})
        except OSError as error:
            logger.warning("shard %d: %s cannot be written: %s", self._source.part.number, folder.path, error)
