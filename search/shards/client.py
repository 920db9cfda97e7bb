"""Call one replica of a shard, and use it as a shard client."""

import asyncio
import logging
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import grpc

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Order, Ranked
from orbithash.search.protocol.errors import Overloaded
from orbithash.search.shards.interface import Unreachable
from orbithash.search.shards.messages import (
    NUMBER_KEY,
    SERVICE,
    TOKEN_KEY,
    answer_from_pb,
    ids_of,
    parsed,
    search_request,
    table_from_bytes,
)
from orbithash.search.shards.rank_messages import counts_from_pb, groups_from_pb, rank_request, ranked_from_pb
from orbithash.v1 import shards_pb2 as pb

__all__ = ["Connection", "Fallback", "RemoteShardClient"]

logger = logging.getLogger(__name__)

# Another way to a shard: (method, request, timeout_s) -> response. It raises an exception if the shard does not answer.
Fallback = Callable[[str, bytes, float], Awaitable[bytes]]

_CONNECT_TIMEOUT_MS, _MIN_BACKOFF_MS, _MAX_BACKOFF_MS = 1000, 100, 500
_OPTIONS = [
    # Environment variables of proxies are meant for the way out of the cluster.
    ("grpc.enable_http_proxy", 0),
    # A connection of its own, which knows nothing of failures of an earlier process at the same address.
    ("grpc.use_local_subchannel_pool", 1),
    ("grpc.min_reconnect_backoff_ms", _CONNECT_TIMEOUT_MS),
    ("grpc.initial_reconnect_backoff_ms", _MIN_BACKOFF_MS),
    ("grpc.max_reconnect_backoff_ms", _MAX_BACKOFF_MS),
    # The answers of a large k, or vectors of many rows.
    ("grpc.max_receive_message_length", 512 * 2**20),
    ("grpc.max_send_message_length", -1),
]

METHODS = ("Search", "Hits", "Read", "Count", "Scroll", "Rank", "Distances", "CountBy", "Follow", "Ping")


class Connection:
    """The way to one replica of a shard: a channel to its port or, if that cannot be reached, another way.

    Belongs to one event loop.
    """

    def __init__(self, number: int, token: str, fallback: Fallback | None = None) -> None:
        """Create an unconnected one to a replica of shard `number`."""
        self.number = number
        self.address: str | None = None
        self._metadata = ((TOKEN_KEY, token), (NUMBER_KEY, str(number)))
        self._fallback = fallback
        self._channel: Any = None
        self._methods: dict[str, Any] = {}
        # Whether the last call or ping over the channel reached the shard.
        self.is_direct = True

    @property
    def has_fallback(self) -> bool:
        """Whether there is another way than the channel."""
        return self._fallback is not None

    @property
    def node(self) -> str:
        """The host of the address, which is that of the node; "": no address yet."""
        return (self.address or "").rpartition(":")[0]

    async def connect(self, address: str) -> None:
        """Use HOST:PORT from now on; calls in flight to another address fail."""
        channel, self._channel = self._channel, grpc.aio.insecure_channel(address, _OPTIONS)
        self._methods = {name: self._channel.unary_unary(f"/{SERVICE}/{name}") for name in METHODS}
        self.address, self.is_direct = address, True
        if channel is not None:
            await channel.close()

    async def close(self) -> None:
        """End all calls and close the channel."""
        if self._channel is not None:
            channel, self._channel, self._methods = self._channel, None, {}
            await channel.close()

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Return the response to a request, over the channel if the shard was last reached there.

        Raises `TimeoutError`, `Overloaded`, or `Unreachable`.
        """
        if self._fallback is None:
            return await self.call_directly(method, request, timeout_s)
        if self.is_direct:
            try:
                return await self.call_directly(method, request, timeout_s)
            except Unreachable:
                self.is_direct = False
        return await self.call_indirectly(method, request, timeout_s)

    async def call_directly(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Return the response to a request over the channel; raises as `call`."""
        if self._channel is None:
            raise Unreachable(f"shard {self.number} has no address yet")
        try:
            response: bytes = await self._methods[method](request, timeout=timeout_s, metadata=self._metadata)
            return response
        except grpc.aio.AioRpcError as error:
            code, details = error.code(), (error.details() or "").partition("\n")[0]
        except (grpc.aio.UsageError, asyncio.InvalidStateError):
            # The channel was closed by `connect` or `close`.
            code, details = grpc.StatusCode.UNAVAILABLE, "the channel was closed"
        if code is grpc.StatusCode.DEADLINE_EXCEEDED:
            raise TimeoutError(f"shard {self.number} did not answer within {timeout_s:.3g} s")
        if code is grpc.StatusCode.RESOURCE_EXHAUSTED:
            raise Overloaded(f"shard {self.number} refused a call: {details}", 1.0)
        raise Unreachable(f"shard {self.number} at {self.address} cannot be reached: {details}")

    async def call_indirectly(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Return the response to a request on the other way; raises as `call`."""
        if self._fallback is None:
            raise Unreachable(f"shard {self.number} has no other way in")
        async with asyncio.timeout(timeout_s):
            return await self._fallback(method, request, timeout_s)

    async def follow(self, version: int, timeout_s: float) -> int:
        """Make the shard hold a version, and return its number of rows."""
        request = pb.ShardFollowRequest(version=version).SerializeToString()
        response = parsed(pb.ShardFollowResponse, await self.call("Follow", request, timeout_s))
        return int(response.num_rows)


class RemoteShardClient:
    """One replica of a shard in one version, a `ShardClient`."""

    num_replicas = num_healthy = 1
    num_segments = num_bytes = num_merges = num_evaluations = 0

    def __init__(self, connection: Connection, version: int, num_rows: int) -> None:
        self.connection = connection
        self.num_rows = num_rows
        self._version = version

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        request = search_request(self._version, queries, k, scope)
        return answer_from_pb(await self._call("Search", request, pb.ShardSearchResponse, timeout_s))

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """See `ShardClient`."""
        request = pb.ShardHitsRequest(version=self._version, ids=_bytes_of(ids), include=include)
        return list((await self._call("Hits", request, pb.ShardHitsResponse, timeout_s)).rows)

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """See `ShardClient`."""
        request = pb.ShardReadRequest(version=self._version, ids=_bytes_of(ids), columns=columns)
        return table_from_bytes((await self._call("Read", request, pb.ShardReadResponse, timeout_s)).table)

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """See `ShardClient`."""
        request = pb.ShardCountRequest(version=self._version, filter=filter_text)
        return int((await self._call("Count", request, pb.ShardCountResponse, timeout_s)).num_rows)

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """See `ShardClient`."""
        request = pb.ShardScrollRequest(version=self._version, filter=filter_text, after=after, limit=limit)
        return ids_of((await self._call("Scroll", request, pb.ShardScrollResponse, timeout_s)).ids)

    async def rank(
        self,
        order: Order,
        k: int,
        max_key: int | None,
        after: tuple[int, int] | None,
        filter_text: str,
        timeout_s: float,
    ) -> Ranked:
        """See `ShardClient`."""
        request = rank_request(self._version, order, k, max_key, after, filter_text)
        return ranked_from_pb(await self._call("Rank", request, pb.ShardRankResponse, timeout_s))

    async def distances(self, code: Codes, filter_text: str, timeout_s: float) -> tuple[Counts, int | None]:
        """See `ShardClient`."""
        request = pb.ShardDistancesRequest(version=self._version, code=code.tobytes(), filter=filter_text)
        return counts_from_pb(await self._call("Distances", request, pb.ShardDistancesResponse, timeout_s))

    async def count_by(self, by: GroupName, filter_text: str, timeout_s: float) -> tuple[dict[str, int], int]:
        """See `ShardClient`."""
        request = pb.ShardCountByRequest(version=self._version, by=by, filter=filter_text)
        return groups_from_pb(await self._call("CountBy", request, pb.ShardCountByResponse, timeout_s))

    async def _call(self, method: str, request: Any, response: type[Any], timeout_s: float) -> Any:
        return parsed(response, await self.connection.call(method, request.SerializeToString(), timeout_s))


def _bytes_of(ids: Ids) -> bytes:
    return ids.astype("<u8", copy=False).tobytes()
