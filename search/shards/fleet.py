"""All shards of an archive with their replicas, wherever these run: connections, health, and clients of a version."""

import asyncio
import logging
from collections.abc import Sequence

from orbithash.search.observer import Observer
from orbithash.search.shards.client import RemoteShardClient
from orbithash.search.shards.health import HealthWatch, Link
from orbithash.search.shards.interface import Branch, ShardClient, Unreachable
from orbithash.search.shards.replicas import Hedging, ReplicatedShard, waiting_for
from orbithash.search.shards.tree import Tree

__all__ = ["MAX_FLAT", "Fleet"]

logger = logging.getLogger(__name__)

# Maximum number of shards that a gateway asks itself.
MAX_FLAT = 64

_FOLLOW_TIMEOUT_S = 3600.0
# Once a replica of each shard holds a version, the others get this time and as much again as the first ones took.
_GRACE_S = 2.0
# A shard whose replicas cannot be reached is asked again after this time, until health says that they are out.
_RETRY_EVERY_S = 0.2


class Fleet:
    """The replicas of all shards. Belongs to one event loop.

    Attributes:
        links: the replicas of each shard.
    """

    def __init__(
        self, links: Sequence[Sequence[Link]], observer: Observer | None = None, max_flat: int = MAX_FLAT
    ) -> None:
        """Begin to ping the replicas, which are connected. More than `max_flat` shards are searched by node."""
        self.links = links
        self._observer = observer or Observer()
        self._max_flat = max_flat
        self._hedging = [Hedging() for _ in links]
        self._watch = HealthWatch([link for of_shard in links for link in of_shard], self._observer)
        # Numbers of the last call of `follow`, and of the last one of those that have succeeded.
        self._last_call = self._last_success = 0

    async def follow(self, version: int, timeout_s: float, is_first: bool = False) -> list[int | None]:
        """Make all replicas that answer hold a version; return the number of rows of each shard.

        Returns when each shard holds the version in one replica, and those of its other replicas that are about as fast
        hold it too; the others follow later. A shard without a replica that answers has the number None; with
        `is_first` it is waited for.

        Raises:
            Unavailable: a shard cannot load the version.
            TimeoutError: a shard does not hold the version after `timeout_s`.
        """
        self._last_call = number = self._last_call + 1
        async with asyncio.timeout(timeout_s):
            loop = asyncio.get_running_loop()
            begun = loop.time()
            others: set[asyncio.Task[int]] = set()
            shards = [
                asyncio.create_task(self._follow_shard(of_shard, version, is_first, others)) for of_shard in self.links
            ]
            try:
                num_rows = await asyncio.gather(*shards)
                if others:
                    await asyncio.wait(others, timeout=_GRACE_S + loop.time() - begun)
            finally:
                for task in (*shards, *others):
                    task.cancel()
                    task.add_done_callback(lambda task: task.cancelled() or task.exception())
        if number > self._last_success:
            # From now on, a replica without the version is late.
            self._last_success, self._watch.version = number, version
        return num_rows

    def clients(self, version: int, num_rows: Sequence[int]) -> list[ShardClient]:
        """Return a client of each shard in a version, which `follow` has returned."""
        return [
            ReplicatedShard(
                [RemoteShardClient(link.connection, version, count) for link in of_shard],
                [link.replica for link in of_shard],
                hedging,
                self._observer,
            )
            for of_shard, hedging, count in zip(self.links, self._hedging, num_rows, strict=True)
        ]

    def branches(self, version: int, shards: Sequence[ShardClient]) -> Sequence[Branch]:
        """Return the clients that searches are sent to: `shards`, which `clients` has returned, or a tree of them."""
        return shards if len(shards) <= self._max_flat else [Tree(self.links, shards, version)]

    async def close(self) -> None:
        """Stop pinging and close the connections; calls in flight fail."""
        self._watch.close()
        await asyncio.gather(*(link.connection.close() for of_shard in self.links for link in of_shard))

    async def _follow_shard(
        self, links: Sequence[Link], version: int, is_first: bool, others: set["asyncio.Task[int]"]
    ) -> int | None:
        """Return the rows of a shard when one replica holds the version; put the calls of the others into `others`."""
        failure: Exception | None = None
        while True:
            answering = [link for link in links if not link.replica.is_silent]
            if not answering and not is_first:
                return None
            pending = {asyncio.create_task(_follow(link, version)) for link in answering}
            try:
                while pending:
                    done, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
                    for task in done:
                        if (error := task.exception()) is None:
                            others |= pending
                            pending = set()
                            return task.result()
                        failure = error if isinstance(error, Exception) else RuntimeError(str(error))
            finally:
                for task in pending:
                    task.cancel()
            if failure is not None and not isinstance(failure, Unreachable):
                raise failure
            await asyncio.sleep(_RETRY_EVERY_S)


async def _follow(link: Link, version: int) -> int:
    return await waiting_for([link.replica], link.connection.follow(version, _FOLLOW_TIMEOUT_S))
