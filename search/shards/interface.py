"""The interface of a shard in one version of an archive, in this process or elsewhere."""

from collections.abc import Sequence
from typing import Any, Protocol

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Order, Ranked
from orbithash.search.protocol.errors import Unavailable

__all__ = ["Branch", "QuickShardClient", "ShardClient", "Unreachable"]


class Unreachable(Unavailable):
    """A shard, or one replica of it, does not answer."""


class Branch(Protocol):
    """One shard, or several of them together, that a search is sent to."""

    @property
    def num_rows(self) -> int:
        """Number of rows, available even while no shard answers."""

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """Return the k nearest rows of each query uint8 [Q, B]."""


class ShardClient(Branch, Protocol):
    """One shard in one version of the archive.

    Every call raises an exception if the shard does not answer. Its caller cancels it after `timeout_s`; a cancelled
    call leaves no work behind.
    """

    @property
    def num_replicas(self) -> int:
        """Number of replicas of the shard."""

    @property
    def num_segments(self) -> int:
        """Number of segments of the newest version; 0: unknown."""

    @property
    def num_bytes(self) -> int:
        """Memory of one replica for codes, ids, indexes and sets of rows, in bytes; 0: unknown."""

    @property
    def num_merges(self) -> int:
        """Number of merges of segments that have ended since the start of the replica."""

    @property
    def num_evaluations(self) -> int:
        """Number of evaluations of a filter over a segment since then."""

    @property
    def num_healthy(self) -> int:
        """Number of replicas that are known to answer."""

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """Return rows of the shard by id, in their order, as `ShardAnswer.rows`."""

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """Return a `pyarrow.Table` with `columns` of rows of the shard, in the order of `ids`."""

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """Return the number of rows of the shard that pass a filter."""

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """Return the first `limit` ids above `after` of rows that pass a filter ("": all rows), ascending."""

    async def rank(
        self,
        order: Order,
        k: int,
        max_key: int | None,
        after: tuple[int, int] | None,
        filter_text: str,
        timeout_s: float,
    ) -> Ranked:
        """Return the first rows in an order.

        Args:
            order: what the keys of rows are computed from. Rows without the value are left out.
            k: maximum number of rows.
            max_key: largest key of a row; None: no limit.
            after: return only rows after this (key, id) in the order; None: from the first.
            filter_text: only rows that pass this filter; "": all rows.
            timeout_s: see `ShardClient`.

        Raises `InvalidQuery` if the order does not fit the stored vectors.
        """

    async def distances(self, code: Codes, filter_text: str, timeout_s: float) -> tuple[Counts, int | None]:
        """Return the number of rows that pass a filter at each distance of a code, and of all of them.

        `code` is uint8 [B]. The numbers are int64 [bits + 1]; their total is None without a filter.
        """

    async def count_by(self, by: GroupName, filter_text: str, timeout_s: float) -> tuple[dict[str, int], int]:
        """Return the number of rows that pass a filter by group, and of those without a label or a time.

        Groups are labels, months as "2024-05" or years as "2024", in UTC, in ascending order.
        """


class QuickShardClient(Protocol):
    """A shard that can answer short searches without a thread or a process switch."""

    def search_now(self, queries: Codes, k: int, scope: Scope) -> ShardAnswer | None:
        """Search as `ShardClient.search`, or return None if that would block the event loop for too long."""

    def hits_now(self, ids: Ids, include: Sequence[str]) -> list[bytes] | None:
        """Return rows as `ShardClient.hits`, or None if that would block the event loop for too long."""
