"""A shard in several versions of an archive, as an actor or this process holds it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from orbithash.encoders.codes import Codes, num_bytes
from orbithash.search.index.shard import Ids, Shard, ShardAnswer, part_of

__all__ = ["MAX_VERSIONS", "Diff", "Selection", "ShardHost"]

# Number of versions held. A search ends on the version that it began with; a version that was dropped is loaded again.
MAX_VERSIONS = 4
# Number of shards of filtered rows held, over all versions.
_MAX_FILTERED = 16


@dataclass(frozen=True)
class Selection:
    """The rows of one version that pass a filter.

    Attributes:
        token: identifies the filter among those of the same version.
        ids: uint64 [N], ascending.
    """

    token: str
    ids: Ids


@dataclass(frozen=True)
class Diff:
    """The difference between two versions of an archive.

    Attributes:
        before, after: the two versions.
        removed: ids uint64 [R] of rows that only `before` has.
        ids, codes: uint64 [N] and uint8 [N, B], the rows that are new in `after` or have another code there.
    """

    before: int
    after: int
    removed: Ids
    ids: Ids
    codes: Codes


class ShardHost:
    """Shard `number` of `num_shards`. Safe for concurrent calls."""

    def __init__(
        self,
        load: Callable[[int], Iterable[tuple[Ids, Codes]]],
        bits: int,
        number: int,
        num_shards: int,
        index: str = "flat",
    ) -> None:
        """`load` yields the ids and codes of all rows of a version in batches; only the shard's own rows are kept."""
        self._load = load
        self._bits = bits
        self._number, self._num_shards = number, num_shards
        self._index = index
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._shards: dict[int, Shard] = {}
        self._filtered: OrderedDict[tuple[int, str], Shard] = OrderedDict()

    def holds(self, version: int) -> bool:
        """Return whether the version is loaded."""
        return version in self._shards

    def num_rows(self, version: int) -> int:
        """Return the shard's number of rows in a version, which is loaded if necessary."""
        return self._shard(version).num_rows

    def apply(self, diff: Diff) -> int:
        """Build version `diff.after` from `diff.before`, or load it if that is not held; return its number of rows."""
        with self._lock:
            before = self._shards.get(diff.before)
        if before is not None and diff.after not in self._shards:
            is_mine, is_gone = (part_of(ids, self._number, self._num_shards) for ids in (diff.ids, diff.removed))
            self._keep(diff.after, before.changed(diff.removed[is_gone], diff.ids[is_mine], diff.codes[is_mine]))
        return self._shard(diff.after).num_rows

    def search(
        self,
        version: int,
        queries: Codes,
        k: int,
        radius: int | None = None,
        after: tuple[int, int] | None = None,
        selection: Selection | None = None,
    ) -> ShardAnswer:
        """Search one version as `Shard.search`, optionally only the rows of a selection."""
        shard = self._shard(version) if selection is None else self._selected(version, selection)
        return shard.search(queries, k, radius, after)

    def _shard(self, version: int) -> Shard:
        shard = self._shards.get(version)
        if shard is not None:
            return shard
        # Concurrent callers wait for one load.
        with self._loading:
            shard = self._shards.get(version)
            if shard is None:
                shard = self._keep(version, Shard(*self._part(version), self._bits, self._index))
        return shard

    def _part(self, version: int) -> tuple[Ids, Codes]:
        parts = [(np.empty(0, np.uint64), np.empty((0, num_bytes(self._bits)), np.uint8))]
        for ids, codes in self._load(version):
            is_mine = part_of(ids, self._number, self._num_shards)
            parts.append((ids[is_mine], codes[is_mine]))
        ids, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, codes

    def _keep(self, version: int, shard: Shard) -> Shard:
        with self._lock:
            self._shards[version] = shard
            while len(self._shards) > MAX_VERSIONS:
                # `version` may be an old one that was loaded again; the newest stays, because the next diff needs it.
                oldest = min(self._shards.keys() - {version})
                del self._shards[oldest]
                self._filtered = OrderedDict(item for item in self._filtered.items() if item[0][0] != oldest)
        return shard

    def _selected(self, version: int, selection: Selection) -> Shard:
        """Return the shard of the selected rows, which is kept for later queries with the same filter."""
        place = (version, selection.token)
        with self._lock:
            shard = self._filtered.get(place)
            if shard is not None:
                self._filtered.move_to_end(place)
                return shard
        shard = self._shard(version).where(selection.ids)
        with self._lock:
            self._filtered[place] = shard
            # Together at most as large as the shard itself, so that filters at most double its memory.
            limit = max(shard.num_rows, self._shards[version].num_rows if version in self._shards else 0)
            while len(self._filtered) > _MAX_FILTERED or sum(kept.num_rows for kept in self._filtered.values()) > limit:
                self._filtered.popitem(last=False)
        return shard
