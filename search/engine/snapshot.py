"""A snapshot: one version of an archive with everything that searches need to answer from it.

A search ends on the snapshot that it began with. Another snapshot can replace it at any moment.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import cast

from orbithash.search.engine.protocols import ArchiveReader, QueryEncoder
from orbithash.search.segments.dealing import Deal
from orbithash.search.shards.interface import Branch, QuickShardClient, ShardClient

__all__ = ["Snapshot", "Usage"]


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One version of an archive, its shards and the model. Made by `Snapshot.of`.

    Attributes:
        archive: the version, for reading.
        shards: clients of all shards, by number; at least one, together all rows.
        deal: which shard holds which rows.
        encoder: the model that computed the codes.
        branches: the clients that searches are sent to: each searches one shard or several.
        quick_shards: the shards if all of them are `QuickShardClient` and searches are sent to each, else empty.
        usage: the searches in flight on this snapshot.
        is_exact: whether the shards compare a query with every code.
        num_rows: number of rows of the archive.
    """

    archive: ArchiveReader
    shards: Sequence[ShardClient]
    deal: Deal
    encoder: QueryEncoder
    branches: Sequence[Branch]
    quick_shards: Sequence[QuickShardClient]
    usage: "Usage"
    is_exact: bool
    num_rows: int

    @classmethod
    def of(
        cls,
        archive: ArchiveReader,
        shards: Sequence[ShardClient],
        deal: Deal,
        encoder: QueryEncoder,
        is_exact: bool = True,
        branches: Sequence[Branch] = (),
    ) -> "Snapshot":
        """Return a snapshot; without `branches`, searches are sent to each shard."""
        assert len(shards) == deal.num_shards >= 1, "a client of each shard"
        num_rows = sum(shard.num_rows for shard in shards)
        assert num_rows == archive.num_rows, "the shards hold another version of the archive"
        are_quick = not branches and all(hasattr(shard, "hits_now") for shard in shards)
        quick = cast(Sequence[QuickShardClient], shards) if are_quick else ()
        return cls(archive, shards, deal, encoder, branches or shards, quick, Usage(), is_exact, num_rows)


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
