"""Interfaces between the engine and the parts that it is built from: shards, archives, and query encoders."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from orbithash.encoders.codes import Codes, Encoded, Kind
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.index.host import Selection
from orbithash.search.index.shard import Ids, ShardAnswer

__all__ = ["ArchiveReader", "QueryEncoder", "QuickShardClient", "Scope", "ShardClient"]


@dataclass(frozen=True)
class Scope:
    """The part of the archive that a search covers. Searches with equal scopes can share a batch.

    Attributes:
        radius: largest distance of a hit in bits, inclusive; None: no limit.
        after: (distance, id) of the last hit of the page before; None: the first page.
        selection: the rows that pass the filter; None: all rows.
        include: columns that hits carry beyond the usual ones.
    """

    radius: int | None = None
    after: tuple[int, int] | None = None
    selection: Selection | None = None
    include: tuple[str, ...] = ()


class ShardClient(Protocol):
    """One shard in one version of the archive, in this process or elsewhere."""

    @property
    def num_rows(self) -> int:
        """Number of rows of the shard, available even while the shard does not answer."""

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the shard."""

    @property
    def num_healthy(self) -> int:
        """Number of replicas that are known to answer."""

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """Search as `ShardHost.search`. The caller cancels the call after `timeout_s`; an exception is a failure."""


class QuickShardClient(Protocol):
    """A shard that can answer short searches without a thread or a process switch."""

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """Search as `ShardClient.search`, or return None if that would block the event loop for too long."""


class ArchiveReader(Protocol):
    """One version of an archive, which does not change (`orbithash.encoders.archive.archive.Archive`)."""

    @property
    def bits(self) -> int:
        """Bits of a code."""

    @property
    def vector(self) -> VectorSpec | None:
        """The stored vectors in the column `vector`; None: there is none."""

    @property
    def model_id(self) -> str:
        """Content hash of the model that computed the codes."""

    @property
    def version(self) -> int:
        """Number of the version."""

    @property
    def num_rows(self) -> int:
        """Number of rows."""

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        """Return the ids of the rows with these keys; keys without a row are omitted."""

    def take(self, ids: Ids, columns: list[str]) -> Any:
        """Return a `pyarrow.Table` of the rows with these ids, in the order of `ids`."""

    def scan(self, columns: list[str], among: Ids | None = None) -> tuple[Ids, Any]:
        """Return the ids of all rows and a `pyarrow.Table` of them in the same order; with `among` only those rows."""

    def scan_batches(self, columns: list[str], among: Ids | None = None) -> Iterator[tuple[Ids, Any]]:
        """Yield the result of `scan` in parts."""


class QueryEncoder(Protocol):
    """The model that computed the codes of an archive."""

    has_text: bool
    # Dimensions of a vector that the model takes.
    num_features: int
    # Name of the published embedding that the model takes instead of images, which may be empty; None: it takes images.
    embedding: str | None

    async def encode(self, kind: Kind, items: list[Any], with_outputs: bool = False) -> Encoded:
        """Return the codes of at least one item and, with `with_outputs`, the outputs of the head.

        Items of one call, and of calls at the same time, share passes of the network.

        Args:
            kind: what the items are.
            items: `image`: encoded image files; `text`: sentences; `vector`: float32 [num_features] each.
            with_outputs: return outputs too.

        Raises:
            InputError: a file is not an image that the model accepts, or the model has no text side. The message is
                shown to the user, so an implementation must not wrap it in another exception.
        """

    async def encode_rows(self, images: list[bytes]) -> tuple[Encoded, list[bytes]]:
        """Return what `encode` returns for image files, without outputs, and the thumbnail of each image as JPEG."""
