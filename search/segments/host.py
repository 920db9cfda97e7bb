"""One shard of an archive in several versions, which share segments."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids, Scope, ShardAnswer
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.stop import Stop

__all__ = ["MAX_VERSIONS", "HostStatus", "ShardHost", "VersionGone"]

# Number of versions that are kept.
MAX_VERSIONS = 32


class VersionGone(Unavailable):
    """The shard does not hold this version of the archive any more, or not yet; `ShardHost.follow` may load it."""


@dataclass(frozen=True)
class HostStatus:
    """What a shard holds.

    Attributes:
        num_rows: rows of the newest version.
        num_segments: segments of the newest version.
        num_bytes: memory of codes, ids, indexes and sets of rows, of all versions.
        versions: the versions that can be searched, ascending.
    """

    num_rows: int
    num_segments: int
    num_bytes: int
    versions: tuple[int, ...]


class ShardHost:
    """Shard `number` of an archive. Thread-safe; calls block their thread.

    A version is held after `follow`. Every other call names a version, and raises `VersionGone` if it is not held,
    `Stopped` when `stop` is set first, and `InvalidQuery` for an invalid filter.
    """

    def __init__(
        self,
        location: str,
        bits: int,
        deal: Deal,
        number: int,
        index: str = "exact",
        folder: Path | None = None,
    ) -> None:
        """Hold nothing yet; nothing is read before `follow`.

        Args:
            location: folder or URI of the archive.
            bits: bits of a code.
            deal: which shard has which rows.
            number: number of this shard.
            index: name of the index of the segments.
            folder: root of the files of segments, for all archives; None: segments are in memory only.
        """
        raise NotImplementedError

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
        raise NotImplementedError

    def follow(self, version: int) -> int:
        """Hold a version of the archive and return its number of rows in this shard.

        Reads what changed since the newest older version that is held, or that the local files hold; everything if
        there is none. Concurrent callers share the work. Searches do not wait for it.

        Raises:
            InputError: the archive cannot be read.
            VersionGone: the version is older than all that are held.
        """
        raise NotImplementedError

    def holds(self, version: int) -> bool:
        """Return whether the version is held."""
        raise NotImplementedError

    def num_rows(self, version: int) -> int:
        """Return the number of rows of a version that is held."""
        raise NotImplementedError

    def is_ready(self, version: int, filter_text: str) -> bool:
        """Return whether calls with this filter do not wait for a long evaluation of it."""
        raise NotImplementedError

    def search(self, version: int, queries: Codes, k: int, scope: Scope, stop: Stop) -> ShardAnswer:
        """Return the k nearest rows of each query uint8 [Q, B], with the rows if `scope.with_rows`."""
        raise NotImplementedError

    def hits(self, version: int, ids: Ids, include: Sequence[str], stop: Stop) -> list[bytes]:
        """Return rows by id, in their order, as `ShardAnswer.rows`. Thumbnails are read from the archive."""
        raise NotImplementedError

    def read(self, version: int, ids: Ids, columns: Sequence[str], stop: Stop) -> Any:
        """Return a `pyarrow.Table` with `columns` of rows by id, in the order of `ids`."""
        raise NotImplementedError

    def count(self, version: int, filter_text: str, stop: Stop) -> int:
        """Return the number of rows that pass a filter ("": all rows)."""
        raise NotImplementedError

    def scroll(self, version: int, filter_text: str, after: int | None, limit: int, stop: Stop) -> Ids:
        """Return the first `limit` ids above `after` of rows that pass a filter ("": all rows), ascending."""
        raise NotImplementedError

    def status(self) -> HostStatus:
        """Return what is held now."""
        raise NotImplementedError

    def close(self) -> None:
        """Stop merging and evaluations, write the local files, and release all versions."""
        raise NotImplementedError
