"""One version of an archive and what answers for it: shards, the rows of hits, filters, the model.

A snapshot knows shards only by the protocol `ShardClient`, an archive only by `ArchiveReader`, and the model only by
`QueryEncoder`. A search ends on the snapshot that it began with, and another can take its place at any moment.
"""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Protocol, cast

import numpy as np

from orbithash.encoders.codes import Codes
from orbithash.search.engine.hits import HitRows
from orbithash.search.engine.selections import Selections
from orbithash.search.index.host import Change, Rows
from orbithash.search.index.shard import Ids, ShardAnswer

__all__ = ["ArchiveReader", "QueryEncoder", "QuickShardClient", "Scope", "ShardClient", "Snapshot", "Uses"]


@dataclass(frozen=True)
class Scope:
    """What of the archive a search is over. Searches of one scope can share a batch.

    Attributes:
        radius: the largest distance, inclusive; None: any.
        after: (distance, id) after which rows count; None: from the first.
        rows: the rows that pass the filter; None: all.
        include: columns that hits hold beyond the usual ones.
    """

    radius: int | None = None
    after: tuple[int, int] | None = None
    rows: Rows | None = None
    include: tuple[str, ...] = ()


class ShardClient(Protocol):
    """A shard in one version of the archive, wherever it is."""

    @property
    def num_rows(self) -> int:
        """Rows of the shard, known also while it does not answer."""

    @property
    def num_replicas(self) -> int:
        """Copies of the shard."""

    @property
    def num_healthy(self) -> int:
        """Copies that answered when they were last asked."""

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """As `ShardHost.search`. The caller turns to other things after `timeout_s`; an exception is a failed shard."""


class QuickShardClient(Protocol):
    """A shard that may answer without being waited for."""

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """As `search`, where that takes a moment only; None where it would keep the event loop."""


class ArchiveReader(Protocol):
    """What the engine reads of an archive (`orbithash.encoders.archive.archive.Archive`): one version, unchanging."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def model_id(self) -> str:
        """The model that made the codes."""

    @property
    def version(self) -> int:
        """The version that is read."""

    @property
    def num_rows(self) -> int:
        """Rows of that version."""

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """The ids of the rows with these keys; of those that there are."""

    def take(self, ids: Ids, columns: list[str]) -> Any:
        """A `pyarrow.Table` of the rows with these ids, in their order."""

    def scan(self, columns: list[str], among: Ids | None = None) -> tuple[Ids, Any]:
        """The ids of all rows, or of those there are among some ids, and a `pyarrow.Table` of them in that order."""


class QueryEncoder(Protocol):
    """The model that made the codes of an archive."""

    has_text: bool

    async def encode_images(self, images: list[bytes]) -> Codes:
        """Codes uint8 [N, B] of encoded image files.

        Raises `InputError` itself (no wrapper around it) for a file that is no image the model takes: its message goes
        to whoever asked.
        """

    async def encode_rows(self, images: list[bytes]) -> tuple[Codes, list[bytes]]:
        """As `encode_images`, and the thumbnail of each."""

    async def encode_texts(self, texts: list[str]) -> Codes:
        """Codes uint8 [N, B] of sentences; `InputError` of a model without a text side."""


@dataclass(frozen=True)
class Snapshot:
    """One version of an archive and what answers for it: at least one shard, which together hold its codes."""

    archive: ArchiveReader
    shards: Sequence[ShardClient]
    encoder: QueryEncoder
    selections: Selections
    rows: HitRows
    # The same shards, where all of them are of this kind.
    quick_shards: Sequence[QuickShardClient]
    uses: "Uses"
    # Whether the shards compare a query with every code.
    is_exact: bool

    @classmethod
    def of(
        cls, archive: ArchiveReader, shards: Sequence[ShardClient], encoder: QueryEncoder, is_exact: bool = True
    ) -> "Snapshot":
        """With nothing selected and no row read yet."""
        assert shards, "an archive has a shard"
        held = sum(shard.num_rows for shard in shards)
        assert held == archive.num_rows, "the shards hold another version of the archive"
        are_quick = all(hasattr(shard, "search_now") for shard in shards)
        quick = cast(Sequence[QuickShardClient], shards) if are_quick else ()
        return cls(archive, shards, encoder, Selections(archive), HitRows(archive), quick, Uses(), is_exact)

    def after(self, before: "Snapshot", change: Change) -> "Snapshot":
        """Itself, with what `before` knows of rows and filters, where the change leads from there to here."""
        if before.archive.version != change.before:
            return self
        touched = np.union1d(change.removed, change.ids)
        return replace(
            self,
            rows=before.rows.after(self.archive, touched),
            selections=before.selections.after(self.archive, touched),
        )

    @property
    def num_rows(self) -> int:
        """Rows of the archive."""
        return sum(shard.num_rows for shard in self.shards)


class Uses:
    """How many searches are under way: `with uses: …`."""

    def __init__(self) -> None:
        self._number = 0
        self._none = asyncio.Event()
        self._none.set()

    def __enter__(self) -> None:
        self._number += 1
        self._none.clear()

    def __exit__(self, *_: object) -> None:
        self._number -= 1
        if not self._number:
            self._none.set()

    async def ended(self, timeout_s: float) -> None:
        """Returns when there is none, and after `timeout_s`."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._none.wait()
