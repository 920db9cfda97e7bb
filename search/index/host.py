"""One part of an archive in the versions that are asked for: what an actor, or this process, keeps of it."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from orbithash.encoders.codes import Codes, num_bytes
from orbithash.search.index.shard import Ids, Shard, ShardAnswer, part_of

__all__ = ["MAX_VERSIONS", "UNKNOWN", "Change", "Rows", "ShardHost"]

# A version that no shard holds.
UNKNOWN = -1

# A search that began before a change ends on the version it began with; one that is gone must be loaded anew.
MAX_VERSIONS = 4
_FILTERED = 16


@dataclass(frozen=True)
class Rows:
    """The rows that pass a filter: their ids, ascending, and what names this set among those of the same version."""

    token: str
    ids: Ids


@dataclass(frozen=True)
class Change:
    """What leads from one version to the next: rows that are gone, and rows that are new or have another code.

    From the version `UNKNOWN` nothing leads to the next: it is loaded.
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
        """`load`: the ids and codes of all rows of a version, some at a time: only those of this part are kept."""
        self._load = load
        self._bits = bits
        self._number, self._num_shards = number, num_shards
        self._index = index
        self._lock, self._loading = threading.Lock(), threading.Lock()
        self._shards: dict[int, Shard] = {}
        self._filtered: OrderedDict[tuple[int, str], Shard] = OrderedDict()

    def holds(self, version: int) -> bool:
        """Whether this version is here already."""
        return version in self._shards

    def num_rows(self, version: int) -> int:
        """Rows of this part of a version, which is loaded where it is not here yet."""
        return self._shard(version).num_rows

    def change(self, change: Change) -> int:
        """Makes the version after the change from the one before it; returns its number of rows."""
        with self._lock:
            before = self._shards.get(change.before)
        if before is not None and change.after not in self._shards:
            mine, gone = (part_of(ids, self._number, self._num_shards) for ids in (change.ids, change.removed))
            self._keep(change.after, before.changed(change.removed[gone], change.ids[mine], change.codes[mine]))
        return self._shard(change.after).num_rows

    def search(
        self,
        version: int,
        queries: Codes,
        k: int,
        radius: int | None = None,
        after: tuple[int, int] | None = None,
        rows: Rows | None = None,
    ) -> ShardAnswer:
        """As `Shard.search`, over the `rows` of one version."""
        shard = self._shard(version) if rows is None else self._of_rows(version, rows)
        return shard.search(queries, k, radius, after)

    def _shard(self, version: int) -> Shard:
        shard = self._shards.get(version)
        if shard is not None:
            return shard
        # Once, however many ask.
        with self._loading:
            shard = self._shards.get(version)
            if shard is None:
                shard = self._keep(version, Shard(*self._part(version), self._bits, self._index))
        return shard

    def _part(self, version: int) -> tuple[Ids, Codes]:
        parts = [(np.empty(0, np.uint64), np.empty((0, num_bytes(self._bits)), np.uint8))]
        for ids, codes in self._load(version):
            mine = part_of(ids, self._number, self._num_shards)
            parts.append((ids[mine], codes[mine]))
        ids, codes = (np.concatenate(column) for column in zip(*parts, strict=True))
        return ids, codes

    def _keep(self, version: int, shard: Shard) -> Shard:
        with self._lock:
            self._shards[version] = shard
            while len(self._shards) > MAX_VERSIONS:
                # Never the newest, from which the next change leads on, for the sake of an old one.
                gone = min(self._shards.keys() - {version})
                del self._shards[gone]
                self._filtered = OrderedDict(item for item in self._filtered.items() if item[0][0] != gone)
        return shard

    def _of_rows(self, version: int, rows: Rows) -> Shard:
        """The shard of some rows, kept for the next query with the same filter."""
        place = (version, rows.token)
        with self._lock:
            shard = self._filtered.get(place)
            if shard is not None:
                self._filtered.move_to_end(place)
                return shard
        shard = self._shard(version).where(rows.ids)
        with self._lock:
            self._filtered[place] = shard
            # Together no larger than the shard itself, so that filters at most double its memory.
            limit = max(shard.num_rows, self._shards[version].num_rows if version in self._shards else 0)
            while len(self._filtered) > _FILTERED or sum(kept.num_rows for kept in self._filtered.values()) > limit:
                self._filtered.popitem(last=False)
        return shard
