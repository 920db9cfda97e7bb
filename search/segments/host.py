"""One shard of an archive in several versions, which share segments."""

import hashlib
import logging
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.changes import CannotFollow, changes_since, commit_id
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import NO_HIT, Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Order, Ranked
from orbithash.search.index.row_index import is_exact_index
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.segments.dealing import Deal, ShardPart
from orbithash.search.segments.files import build_segment
from orbithash.search.segments.rankings.counting import count_by, count_distances
from orbithash.search.segments.rankings.ranking import rank
from orbithash.search.segments.rankings.warming import warm_up
from orbithash.search.segments.selections import Selected, Selections
from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions.history import MAX_VERSIONS, History, VersionGone
from orbithash.search.segments.versions.merging import with_segment
from orbithash.search.segments.versions.shard_folder import ShardFolder
from orbithash.search.segments.versions.shard_version import LiveSegment, ShardVersion
from orbithash.search.segments.versions.source import ShardSource
from orbithash.search.segments.versions.upkeep import Upkeep
from orbithash.v1 import search_pb2

__all__ = ["MAX_VERSIONS", "HostStatus", "ShardHost", "VersionGone"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class HostStatus:
    """What a shard holds.

    Attributes:
        num_rows: rows of the newest version.
        num_segments: segments of the newest version.
        num_bytes: memory of codes, ids, indexes and sets of rows, of all versions.
        versions: the versions that can be searched, ascending.
        num_merges: number of merges that have ended since the start of the process.
        num_evaluations: number of evaluations of a filter over a segment since then.
    """

    num_rows: int
    num_segments: int
    num_bytes: int
    versions: tuple[int, ...]
    num_merges: int = 0
    num_evaluations: int = 0


class ShardHost:
    """Shard `number` of an archive. Thread-safe; calls block their thread.

    A version is held after `follow`. Every other call names a version, and raises `VersionGone` if it is not held,
    `Stopped` when `stop` is set first, and `InvalidQuery` for an invalid filter.

    Attributes:
        is_exact: whether the index is exact.
    """

    def __init__(
        self,
        location: str,
        bits: int,
        deal: Deal,
        number: int,
        index: str = "exact",
        folder: Path | None = None,
        selections: Selections | None = None,
    ) -> None:
        """Hold nothing yet; nothing is read before `follow`.

        Args:
            location: folder or URI of the archive.
            bits: bits of a code.
            deal: which shard has which rows.
            number: number of this shard.
            index: name of the index of the segments.
            folder: root of the files of segments, for all archives; None: segments are in memory only.
            selections: the evaluation of filters, shared with other shards; the caller closes it. None: own.
        """
        self.is_exact = is_exact_index(index)
        self._location = location
        self._bits = check_bits(bits)
        self._index = index
        self._root = folder
        self._history = History()
        self._selections = selections or Selections()
        self._owns_selections = selections is None
        self._source = ShardSource(location, bits, ShardPart(deal, number), index)
        self._upkeep = Upkeep(self._history, self._source, bits, index, self._selections)
        self._other_columns: tuple[Ids, pa.Table] | None = None
        self._lock = threading.Lock()
        self._following = threading.Lock()
        self._pending: dict[int, Future[int]] = {}

    @classmethod
    def of_rows(cls, ids: Ids, table: pa.Table, bits: int, index: str = "exact", version: int = 0) -> "ShardHost":
        """Return a host that holds one version, in memory, of rows without an archive; it cannot follow another one.

        Args:
            ids: uint64 [N], unique, in any order.
            table: the rows, in the order of `ids`: the column code and any others of an archive.
            bits: bits of a code.
            index: name of the index.
            version: number of the version.
        """
        host = cls("", bits, Deal(1), 0, index)
        parts = [LiveSegment.of(build_segment([(ids, table)], bits, index))]
        host._publish(ShardVersion.of(version, "", bits, parts))
        host._other_columns = ids, table
        return host

    def follow(self, version: int) -> int:
        """Hold a version of the archive and return its number of rows in this shard.

        Reads what changed since the newest older version that is held, or that the local files hold; everything if
        there is none. Concurrent callers share the work. Searches do not wait for it.

        Raises:
            InputError: the archive cannot be read.
            VersionGone: the version is older than all that are held.
        """
        with self._lock:
            shared = self._pending.get(version)
            if shared is None:
                mine: Future[int] = Future()
                self._pending[version] = mine
        if shared is not None:
            return shared.result()
        try:
            num_rows = self._follow(version)
        except BaseException as error:
            mine.set_exception(error)
            raise
        else:
            mine.set_result(num_rows)
            return num_rows
        finally:
            with self._lock:
                del self._pending[version]

    def warm(self, version: int) -> None:
        """Read the columns that every hit has, so that the first search does not wait for them."""
        for part in self._history.get(version).parts:
            part.segment.hits(np.zeros(1, np.int64), ())

    def holds(self, version: int) -> bool:
        """Return whether the version is held."""
        return self._history.find(version) is not None

    def num_rows(self, version: int) -> int:
        """Return the number of rows of a version that is held."""
        return self._history.get(version).num_rows

    def reads_archive(self, version: int) -> bool:
        """Return whether rows of hits may have to be read from the archive."""
        shard = self._history.find(version)
        return shard is None or shard.reads_archive

    def is_ready(self, version: int, filter_text: str) -> bool:
        """Return whether calls with this filter do not wait for a long evaluation of it."""
        shard = self._history.find(version)
        return shard is None or not filter_text or self._selections.is_ready(filter_text, shard.segments)

    def search(self, version: int, queries: Codes, k: int, scope: Scope, stop: Stop) -> ShardAnswer:
        """Return the k nearest rows of each query uint8 [Q, B], with the rows if `scope.with_rows`."""
        check_codes(queries, self._bits)
        if queries.ndim != 2 or k < 1:
            raise InputError(
                f"a search requires queries uint8 [Q, B] and k >= 1, got shape {list(queries.shape)} and k {k}"
            )
        shard = self._history.get(version)
        selected = self._selected(shard, scope.filter, stop)
        answer = shard.search(queries, k, scope.radius, scope.after, selected, stop)
        if selected is not None:
            answer = replace(answer, num_matching=shard.num_matching(selected))
        if scope.with_rows:
            ids = answer.ids[answer.distances != NO_HIT]
            answer = replace(answer, rows=tuple(self._hits(shard, ids, scope.include)))
        return answer

    def hits(self, version: int, ids: Ids, include: Sequence[str], stop: Stop) -> list[bytes]:
        """Return rows by id, in their order, as `ShardAnswer.rows`. Thumbnails are read from the archive."""
        stop.check()
        return self._hits(self._history.get(version), ids, include)

    def read(self, version: int, ids: Ids, columns: Sequence[str], stop: Stop) -> Any:
        """Return a `pyarrow.Table` with `columns` of rows by id, in the order of `ids`."""
        stop.check()
        shard = self._history.get(version)
        here = [name for name in columns if shard.parts and (name == "code" or name in shard.column_names)]
        elsewhere = [name for name in columns if name not in here]
        if not elsewhere:
            return shard.read(ids, here)
        others = self._take(shard, ids, elsewhere)
        table = shard.read(ids, here) if here else others
        return pa.table({name: others[name] if name in elsewhere else table[name] for name in columns})

    def count(self, version: int, filter_text: str, stop: Stop) -> int:
        """Return the number of rows that pass a filter ("": all rows)."""
        shard = self._history.get(version)
        selected = self._selected(shard, filter_text, stop)
        return shard.num_rows if selected is None else shard.num_matching(selected)

    def scroll(self, version: int, filter_text: str, after: int | None, limit: int, stop: Stop) -> Ids:
        """Return the first `limit` ids above `after` of rows that pass a filter ("": all rows), ascending."""
        shard = self._history.get(version)
        return shard.scroll(self._selected(shard, filter_text, stop), after, limit)

    def rank(
        self,
        version: int,
        order: Order,
        k: int,
        max_key: int | None,
        after: tuple[int, int] | None,
        filter_text: str,
        stop: Stop,
    ) -> Ranked:
        """Return the k first rows in an order; see `ShardClient.rank`."""
        shard = self._history.get(version)
        return rank(shard, self._selected(shard, filter_text, stop), order, k, max_key, after, stop)

    def distances(self, version: int, code: Codes, filter_text: str, stop: Stop) -> tuple[Counts, int | None]:
        """Return the number of rows at each distance of a code; see `ShardClient.distances`."""
        shard = self._history.get(version)
        selected = self._selected(shard, filter_text, stop)
        return count_distances(shard, selected, code, stop), None if selected is None else shard.num_matching(selected)

    def count_by(self, version: int, by: GroupName, filter_text: str, stop: Stop) -> tuple[dict[str, int], int]:
        """Return the number of rows by group, and of those without a value; see `ShardClient.count_by`."""
        shard = self._history.get(version)
        return count_by(shard, self._selected(shard, filter_text, stop), by, stop)

    def status(self) -> HostStatus:
        """Return what is held now."""
        versions = self._history.versions
        newest = self._history.newest
        parts = [part for shard in versions for part in shard.parts]
        num_bytes = sum(segment.num_bytes for segment in {id(part.segment): part.segment for part in parts}.values())
        alive = {id(part.alive): part.alive for part in parts if part.alive is not None}
        return HostStatus(
            0 if newest is None else newest.num_rows,
            0 if newest is None else len(newest.parts),
            num_bytes + sum(bits.nbytes for bits in alive.values()),
            tuple(shard.version for shard in versions),
            self._upkeep.num_merges,
            self._selections.num_evaluations,
        )

    def close(self) -> None:
        """Stop merging and evaluations, write the local files, and release all versions."""
        if self._owns_selections:
            self._selections.close()
        self._upkeep.close()
        self._history.clear()

    # Following

    def _follow(self, version: int) -> int:
        archive = self._source.open(version)
        commit = commit_id(archive)
        # One after the other, because each begins with the result of the one before.
        with self._following:
            held = self._history.find(version)
            if held is None or held.commit_id != commit:
                held = self._load(archive, commit)
        return held.num_rows

    def _load(self, archive: Archive, commit: str) -> ShardVersion:
        if self._history.newest is None:
            warm_up(self._bits, self._index)
            self._open_files(archive)
        base = self._base(archive)
        if base is not None:
            try:
                return base if base.commit_id == commit else self._changed(base, archive, commit)
            except (CannotFollow, LookupError, Unavailable) as error:
                logger.info("shard %d is read as a whole: %s", self._source.part.number, error)
        self._source.is_stale = False
        parts = [LiveSegment.of(segment) for segment in self._source.all_rows(archive)]
        shard = ShardVersion.of(archive.version, commit, self._bits, parts)
        self._upkeep.forget_stored()
        self._publish(shard)
        if self._source.folder is not None:
            self._upkeep.notify()
        return shard

    def _base(self, archive: Archive) -> ShardVersion | None:
        """Return the newest older version that is held and belongs to the archive; None: read everything."""
        versions = self._history.versions
        if not versions or self._source.is_stale:
            return None
        older = [shard for shard in versions if shard.version <= archive.version]
        base = older[-1] if older else versions[0]
        if not self._belongs(base):
            return None
        if not older:
            raise VersionGone(f"version {archive.version} of the archive is older than all that a shard holds")
        return base

    def _belongs(self, shard: ShardVersion) -> bool:
        """Return whether a version is still one of the archive, which may have been replaced by another one."""
        try:
            return commit_id(self._source.open(shard.version)) == shard.commit_id
        except InputError:
            return False

    def _changed(self, base: ShardVersion, archive: Archive, commit: str) -> ShardVersion:
        """Publish the version of `archive`: `base` with what changed since then."""
        changes = changes_since(archive, base.version, self._source.part)
        new = self._source.written_rows(archive, changes)
        gone = np.union1d(changes.removed, changes.written)
        with self._history.lock:
            # A merge may have replaced its segments.
            base = self._history.find(base.version) or base
            parts = [part.without(gone) for part in base.parts] if len(gone) else list(base.parts)
            if new is not None:
                parts = with_segment(parts, new, self._history.merging, self._bits, self._index)
            shard = ShardVersion.of(archive.version, commit, self._bits, parts)
            self._history.publish(shard, is_newest=base is self._history.newest)
        self._upkeep.notify()
        return shard

    def _publish(self, shard: ShardVersion) -> None:
        with self._history.lock:
            self._history.publish(shard, is_newest=True)

    def _open_files(self, archive: Archive) -> None:
        """Use the local files of the shard, and publish the newest version in them that belongs to the archive."""
        if self._root is None or self._source.folder is not None:
            return
        deal, number = self._source.part.deal, self._source.part.number
        place = hashlib.sha256(self._location.encode()).hexdigest()[:16]
        name = f"{archive.model_id}-{deal.num_shards}-{deal.shift}-{number}"
        try:
            folder = ShardFolder(self._root / place / name)
        except (OSError, InputError) as error:
            logger.warning("shard %d keeps rows in memory: %s", number, error)
            return
        self._source.folder = folder.path
        self._upkeep.use(folder)
        for shard in folder.versions(archive.version, self._bits, self._index):
            if self._belongs(shard):
                self._publish(shard)
                logger.info("rows of shard %d in version %d are mapped from %s", number, shard.version, folder.path)
                # Soon, this replica has a manifest of its own.
                self._upkeep.notify()
                return

    # Reading

    def _selected(self, shard: ShardVersion, text: str, stop: Stop) -> list[Selected] | None:
        return self._selections.select(text, shard.segments, stop) if text else None

    def _hits(self, shard: ShardVersion, ids: Ids, include: Sequence[str]) -> list[bytes]:
        if not len(ids):
            return []
        hits = shard.hits(ids, [name for name in include if name not in ("thumbnail", "vector")])
        # The concatenation of two messages is a message with the fields of both.
        if "thumbnail" in include:
            thumbnails = self._take(shard, ids, ["thumbnail"])["thumbnail"].to_pylist()
            hits = [
                hit + search_pb2.Hit(thumbnail=thumbnail).SerializeToString()
                for hit, thumbnail in zip(hits, thumbnails, strict=True)
            ]
        if "vector" in include and "vector" in shard.column_names:
            vectors, is_known = fixed_size_rows(shard.read(ids, ["vector"])["vector"])
            hits = [
                hit + search_pb2.Hit(vector=vector.tobytes()).SerializeToString() if known else hit
                for hit, vector, known in zip(hits, vectors, is_known.tolist(), strict=True)
            ]
        return hits

    def _take(self, shard: ShardVersion, ids: Ids, columns: list[str]) -> pa.Table:
        """Return columns that segments do not have."""
        if self._other_columns is not None:
            all_ids, table = self._other_columns
            order = np.argsort(all_ids)
            return table.select(columns).take(pa.array(order[all_ids[order].searchsorted(ids)]))
        try:
            return self._source.open(shard.version).take(ids, columns)
        except InputError as error:
            raise Unavailable(f"version {shard.version} of the archive was removed: {error}; ask again") from error
