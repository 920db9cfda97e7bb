"""Ping the replicas of shards, take out those that do not answer, and take them back when they answer again."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from orbithash.search.observer import Observer
from orbithash.search.shards.client import Connection
from orbithash.search.shards.messages import parsed
from orbithash.search.shards.replicas import Replica
from orbithash.v1 import shards_pb2 as pb

__all__ = ["HealthWatch", "Link"]

logger = logging.getLogger(__name__)

# A ping starts every half second, and a replica is out when one has no answer after two seconds: 2.5 s after the last.
_PING_EVERY_S, _PING_TIMEOUT_S = 0.5, 2.0
# Seconds between the pings of one replica for each replica, so that very many take at most a tenth of a core.
_PING_EVERY_S_PER_REPLICA = 0.002
# A ping over the channel that has no answer after this time is also sent on the other way.
_OTHER_WAY_AFTER_S = 0.5
# A ping that ends this much later than its time-out says nothing of the replica: this process was busy.
_MAX_LATE_S = 0.2

_FOLLOW_TIMEOUT_S = 3600.0


async def _no_address() -> str | None:
    return None


@dataclass(eq=False)
class Link:
    """One replica of a shard and the way to it.

    Attributes:
        connection: the way.
        locate: returns the address at which the replica listens now, None if that does not change; it may fail.
        node: name of the node that the replica runs on.
        replica: its health.
    """

    connection: Connection
    locate: Callable[[], Awaitable[str | None]] = _no_address
    node: str = ""
    replica: Replica = field(default_factory=Replica)


class HealthWatch:
    """Pings each replica, beside the others, until it is closed. Belongs to one event loop.

    A replica that does not hold `version`, such as one that was restarted, is asked to follow.

    Attributes:
        version: the newest version that is shown; None: none yet.
    """

    def __init__(self, links: Sequence[Link], observer: Observer) -> None:
        self.version: int | None = None
        self._observer = observer
        self._every_s = max(_PING_EVERY_S, _PING_EVERY_S_PER_REPLICA * len(links))
        self._follows: dict[Link, asyncio.Task[None]] = {}
        self._tasks = [asyncio.create_task(self._watch(link)) for link in links]

    def close(self) -> None:
        """Stop pinging."""
        for task in (*self._tasks, *self._follows.values()):
            task.cancel()

    async def _watch(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        while True:
            begun = loop.time()
            try:
                await self._check(link)
            except (asyncio.CancelledError, KeyboardInterrupt, SystemExit):
                raise
            except BaseException:
                # Also for what is not an `Exception`, such as a panic of native code.
                logger.exception("the health of a replica of shard %d is unknown", link.connection.number)
            await asyncio.sleep(begun + self._every_s - loop.time())

    async def _check(self, link: Link) -> None:
        loop = asyncio.get_running_loop()
        begun = loop.time()
        try:
            status = await _ping(link.connection)
        except Exception as error:
            if loop.time() > begun + _PING_TIMEOUT_S + _MAX_LATE_S:
                return
            if not link.replica.is_silent:
                self._observer.count("replicas_taken_out")
                logger.warning("a replica of shard %d is out: %s", link.connection.number, _reason(error))
            link.replica.lost()
            await self._relocate(link)
        else:
            self._record(link, status)

    def _record(self, link: Link, status: Any) -> None:
        replica, was_silent = link.replica, link.replica.is_silent
        is_late = self.version is not None and self.version not in status.versions
        replica.num_segments, replica.num_bytes = status.num_segments, status.num_bytes
        replica.num_merges, replica.num_evaluations = status.num_merges, status.num_evaluations
        replica.pinged(is_late)
        if was_silent:
            logger.warning("a replica of shard %d answers again", link.connection.number)
        if is_late and link not in self._follows:
            task = asyncio.create_task(self._follow(link))
            self._follows[link] = task
            task.add_done_callback(lambda _: self._follows.pop(link))

    async def _follow(self, link: Link) -> None:
        assert self.version is not None, "a replica is late only for a version"
        try:
            await link.connection.follow(self.version, _FOLLOW_TIMEOUT_S)
        except Exception as error:
            reason = str(error).partition("\n")[0]
            logger.warning("shard %d cannot follow version %d: %s", link.connection.number, self.version, reason)

    async def _relocate(self, link: Link) -> None:
        """Connect to the replica's new address, if it was started again elsewhere."""
        try:
            async with asyncio.timeout(_PING_TIMEOUT_S):
                address = await link.locate()
        except Exception as error:
            logger.debug("shard %d cannot be located: %s", link.connection.number, error)
            return
        if address is not None and address != link.connection.address:
            await link.connection.connect(address)


def _reason(error: Exception) -> str:
    return str(error).partition("\n")[0] or "it did not answer a ping in time"


async def _ping(connection: Connection) -> Any:
    """Return the answer to a ping over the channel or, if that does not answer, on the other way.

    Decides which of the two the calls that follow use.
    """
    async with asyncio.timeout(_PING_TIMEOUT_S):
        if not connection.has_fallback:
            return parsed(pb.ShardPingResponse, await connection.call_directly("Ping", b"", _PING_TIMEOUT_S))
        direct = asyncio.create_task(connection.call_directly("Ping", b"", _PING_TIMEOUT_S))
        tasks = {direct}
        try:
            await asyncio.wait(tasks, timeout=_OTHER_WAY_AFTER_S)
            if not _has_answered(direct):
                tasks.add(asyncio.create_task(connection.call_indirectly("Ping", b"", _PING_TIMEOUT_S)))
                pending = tasks
                while pending and not any(map(_has_answered, tasks)):
                    _, pending = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            answered = next((task for task in (direct, *tasks) if _has_answered(task)), direct)
            response = parsed(pb.ShardPingResponse, answered.result())
        finally:
            for task in tasks:
                task.cancel()
                # asyncio logs exceptions that were never retrieved.
                task.add_done_callback(lambda task: task.cancelled() or task.exception())
        connection.is_direct = answered is direct
        return response


def _has_answered(task: "asyncio.Task[bytes]") -> bool:
    return task.done() and not task.cancelled() and task.exception() is None
