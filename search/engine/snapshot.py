"""A snapshot: one version of an archive with everything that searches need to answer from it.

A search ends on the snapshot that it began with. Another snapshot can replace it at any moment.
"""

import asyncio
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import cast

import numpy as np

from orbithash.search.engine.column_cache import ColumnCache
from orbithash.search.engine.protocols import ArchiveReader, QueryEncoder, QuickShardClient, ShardClient
from orbithash.search.engine.row_cache import RowCache
from orbithash.search.engine.selections import Selections
from orbithash.search.index.host import Diff

__all__ = ["Snapshot", "Usage"]


@dataclass(frozen=True)
class Snapshot:
    """One version of an archive, its shards (at least one, together all rows), the model, and caches of the version.

    Attributes:
        archive: the version, for reading.
        shards: clients of all shards.
        encoder: the model that computed the codes.
        selections: the rows that pass each filter.
        row_cache: the columns that hits show.
        column_caches: the columns that rescoring reads, by name.
        quick_shards: the same shards if all of them are `QuickShardClient`, else empty.
        usage: the searches in flight on this snapshot.
        is_exact: whether the shards compare a query with every code.
    """

    archive: ArchiveReader
    shards: Sequence[ShardClient]
    encoder: QueryEncoder
    selections: Selections
    row_cache: RowCache
    column_caches: Mapping[str, ColumnCache]
    quick_shards: Sequence[QuickShardClient]
    usage: "Usage"
    is_exact: bool

    @classmethod
    def of(
        cls, archive: ArchiveReader, shards: Sequence[ShardClient], encoder: QueryEncoder, is_exact: bool = True
    ) -> "Snapshot":
        """Return a snapshot with empty caches."""
        assert shards, "an archive has a shard"
        num_rows = sum(shard.num_rows for shard in shards)
        assert num_rows == archive.num_rows, "the shards hold another version of the archive"
        are_quick = all(hasattr(shard, "search_now") for shard in shards)
        quick = cast(Sequence[QuickShardClient], shards) if are_quick else ()
        columns = ["code"] if archive.vector is None else ["code", "vector"]
        caches = {column: ColumnCache(archive, column) for column in columns}
        return cls(archive, shards, encoder, Selections(archive), RowCache(archive), caches, quick, Usage(), is_exact)

    def after(self, before: "Snapshot", diff: Diff) -> "Snapshot":
        """Return this snapshot with the caches of `before`, less the rows that changed between the two versions."""
        assert (before.archive.version, self.archive.version) == (diff.before, diff.after), "the diff of these versions"
        touched = np.union1d(diff.removed, diff.ids)
        return replace(
            self,
            row_cache=before.row_cache.after(self.archive, touched),
            column_caches={
                column: before.column_caches[column].after(self.archive, touched) for column in self.column_caches
            },
            selections=before.selections.after(self.archive, touched),
        )

    async def warmed(self, before: "Snapshot | None" = None) -> "Snapshot":
        """Return this snapshot with filled caches: all rows, if few enough, and the recent filters of `before`."""
        await asyncio.to_thread(self.row_cache.warm)
        if before is None:
            return self
        return replace(self, selections=await before.selections.reloaded(self.archive))

    @property
    def num_rows(self) -> int:
        """Number of rows of the archive."""
        return sum(shard.num_rows for shard in self.shards)


class Usage:
    """Counts the searches in flight: `with usage: …`."""

    def __init__(self) -> None:
        self._number = 0
        self._is_unused = asyncio.Event()
        self._is_unused.set()

    def __enter__(self) -> None:
        self._number += 1
        self._is_unused.clear()

    def __exit__(self, *_: object) -> None:
        self._number -= 1
        if not self._number:
            self._is_unused.set()

    async def ended(self, timeout_s: float) -> None:
        """Wait until no search is in flight, at most `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._is_unused.wait()
