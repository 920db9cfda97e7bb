"""Serve one replica of a shard to gateways over gRPC (`orbithash.v1.ShardService`)."""

import asyncio
import hmac
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import grpc
import numpy as np

from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import ShardAnswer
from orbithash.search.protocol.errors import DeadlineExceeded, GatewayError, Overloaded, SearchError, Unavailable
from orbithash.search.segments.host import ShardHost
from orbithash.search.segments.stop import Stop, Stopped
from orbithash.search.shards.messages import (
    NUMBER_KEY,
    SERVICE,
    TOKEN_KEY,
    BadMessage,
    answer_to_pb,
    codes_of,
    error_response,
    ids_of,
    parsed,
    scope_of,
    table_to_bytes,
)
from orbithash.search.shards.neighbours import Neighbours
from orbithash.search.shards.rank_messages import after_of, counts_to_pb, groups_to_pb, order_of, ranked_to_pb
from orbithash.v1 import shards_pb2 as pb

__all__ = ["ServerLimits", "ShardServer"]

logger = logging.getLogger(__name__)

# A search that probably takes at most this long runs in the event loop: a thread would cost more under load.
_MAX_BLOCKING_S = 1e-3
# The expected time of a search is the mean of the recent ones of the same kind, later ones counting more; before the
# first, that of comparing the query with each row. One search that waited for a core hardly counts.
_LEARNING_RATE, _ASSUMED_S_PER_ROW = 0.1, 1e-9

_STOP_GRACE_S = 1.0

Result = TypeVar("Result")
Method = Callable[[bytes, Stop], Awaitable[bytes]]


@dataclass(frozen=True)
class ServerLimits:
    """What callers can use of a shard.

    Attributes:
        num_threads: threads of searches and reads. Further calls wait.
        num_filter_threads: threads of calls that wait for the evaluation of a filter.
        max_calls: calls that run or wait, pings excluded; more are refused.
        max_request_bytes: size of the requests of these calls; more are refused.
        max_message_bytes: gRPC refuses a larger request.
        max_timeout_s: time limit of a call without a deadline or with a later one, in seconds.
    """

    num_threads: int = 2
    num_filter_threads: int = 64
    max_calls: int = 256
    max_request_bytes: int = 64 * 2**20
    max_message_bytes: int = 16 * 2**20
    max_timeout_s: float = 3600.0


class ShardServer:
    """One replica of shard `number`. Belongs to one event loop; searches run in threads."""

    def __init__(self, host: ShardHost, number: int, token: str, limits: ServerLimits | None = None) -> None:
        """Serve `host` to callers that have `token`. The caller closes the host after `stop`."""
        self._host = host
        self._number = number
        self._limits = limits or ServerLimits()
        self._load = _Load(self._limits)
        self._searches = ThreadPoolExecutor(self._limits.num_threads, "search")
        self._filters = ThreadPoolExecutor(self._limits.num_filter_threads, "filter-wait")
        self._follows = ThreadPoolExecutor(1, "follow")
        self._neighbours = Neighbours(token)
        # Seconds of a query that are expected, by the kind of the search.
        self._expected_s: dict[tuple[int, bool, bool], float] = {}
        self._following: dict[int, asyncio.Future[int]] = {}
        self._methods: dict[str, Method] = {
            "Search": self._search,
            "Hits": self._hits,
            "Read": self._read,
            "Count": self._count,
            "Scroll": self._scroll,
            "Rank": self._rank,
            "Distances": self._distances,
            "CountBy": self._count_by,
            "Follow": self._follow,
            "Ping": self._ping,
        }
        self._server: Any = grpc.aio.server(
            interceptors=[_Access(token, number)],
            options=[
                ("grpc.so_reuseport", 0),
                ("grpc.max_receive_message_length", self._limits.max_message_bytes),
                ("grpc.max_send_message_length", -1),
            ],
        )
        handlers = {
            name: grpc.unary_unary_rpc_method_handler(partial(self._serve, name, method))
            for name, method in self._methods.items()
        }
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))

    async def start(self, host: str) -> str:
        """Listen on a free port of the address `host` and return HOST:PORT."""
        place = f"[{host}]" if ":" in host else host
        try:
            port = self._server.add_insecure_port(f"{place}:0")
        except RuntimeError as error:
            raise InputError(f"shard {self._number} cannot listen at {host}: give an address of this node") from error
        await self._server.start()
        return f"{place}:{port}"

    async def stop(self) -> None:
        """Refuse new calls, and give calls in flight a second to end."""
        await self._server.stop(_STOP_GRACE_S)
        await self._neighbours.close()
        for executor in (self._searches, self._filters, self._follows):
            executor.shutdown(wait=False, cancel_futures=True)

    async def call(self, method: str, request: bytes, timeout_s: float) -> bytes:
        """Return the response to a request; for callers that cannot reach the port, and have access otherwise."""
        return await self._answer(method, self._methods[method], request, timeout_s)

    async def _serve(self, name: str, method: Method, request: bytes, context: Any) -> bytes:
        remaining_s = context.time_remaining()
        return await self._answer(
            name, method, request, self._limits.max_timeout_s if remaining_s is None else remaining_s
        )

    async def _answer(self, name: str, method: Method, request: bytes, timeout_s: float) -> bytes:
        """Return the response of a method, which holds its error. Cancelling the call ends its work in threads."""
        stop = Stop(min(timeout_s, self._limits.max_timeout_s))
        try:
            return await method(request, stop)
        except asyncio.CancelledError:
            stop.cancel()
            raise
        except SearchError as error:
            return error_response(name, error)
        except Stopped:
            return error_response(name, DeadlineExceeded("the deadline passed in the shard"))
        except InputError as error:
            return error_response(name, Unavailable(str(error)))
        except BadMessage as error:
            return error_response(name, GatewayError(f"shard {self._number} got a malformed message: {error}"))
        except Exception:
            logger.exception("%s failed", name)
            return error_response(name, GatewayError(f"shard {self._number} failed; its log has the cause"))

    async def _search(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardSearchRequest, data)
        queries, scope = codes_of(request), scope_of(request)

        kind = (request.k.bit_length(), scope.with_rows, bool(scope.filter))

        def answer() -> ShardAnswer:
            begun = time.perf_counter()
            result = self._host.search(request.version, queries, request.k, scope, stop)
            seconds = (time.perf_counter() - begun) / len(queries)
            before = self._expected_s.get(kind, seconds)
            self._expected_s[kind] = before + _LEARNING_RATE * (seconds - before)
            return result

        def response() -> bytes:
            serialised: bytes = answer_to_pb(answer()).SerializeToString()
            return serialised

        is_ready = self._host.is_ready(request.version, scope.filter)
        expected_s = self._expected_s.get(kind, _ASSUMED_S_PER_ROW * self._host.num_rows(request.version))
        is_short = is_ready and len(queries) * expected_s <= _MAX_BLOCKING_S
        if not request.neighbours:
            return response() if is_short else await self._run(response, stop, len(data), is_ready)

        async def own() -> ShardAnswer:
            return answer() if is_short else await self._run(answer, stop, len(data), is_ready)

        remaining_s = stop.remaining_s
        return await self._neighbours.search(request, own(), 0.0 if remaining_s is None else remaining_s)

    async def _hits(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardHitsRequest, data)
        ids, include = ids_of(request.ids), tuple(request.include)

        def work() -> bytes:
            rows = self._host.hits(request.version, ids, include, stop)
            response: bytes = pb.ShardHitsResponse(rows=rows).SerializeToString()
            return response

        return await self._run(work, stop, len(data))

    async def _read(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardReadRequest, data)
        ids, columns = ids_of(request.ids), tuple(request.columns)

        def work() -> bytes:
            table = self._host.read(request.version, ids, columns, stop)
            response: bytes = pb.ShardReadResponse(table=table_to_bytes(table)).SerializeToString()
            return response

        return await self._run(work, stop, len(data))

    async def _count(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardCountRequest, data)

        def work() -> bytes:
            num_rows = self._host.count(request.version, request.filter, stop)
            response: bytes = pb.ShardCountResponse(num_rows=num_rows).SerializeToString()
            return response

        return await self._run(work, stop, len(data), self._host.is_ready(request.version, request.filter))

    async def _scroll(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardScrollRequest, data)
        after = request.after if request.HasField("after") else None

        def work() -> bytes:
            ids = self._host.scroll(request.version, request.filter, after, request.limit, stop)
            response: bytes = pb.ShardScrollResponse(ids=ids.astype("<u8", copy=False).tobytes()).SerializeToString()
            return response

        return await self._run(work, stop, len(data), self._host.is_ready(request.version, request.filter))

    async def _rank(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardRankRequest, data)
        order, after = order_of(request), after_of(request)
        max_key = request.max_key if request.HasField("max_key") else None

        def work() -> bytes:
            ranked = self._host.rank(request.version, order, request.k, max_key, after, request.filter, stop)
            response: bytes = ranked_to_pb(ranked).SerializeToString()
            return response

        return await self._run(work, stop, len(data), self._host.is_ready(request.version, request.filter))

    async def _distances(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardDistancesRequest, data)

        def work() -> bytes:
            code = np.frombuffer(request.code, np.uint8)
            counts = self._host.distances(request.version, code, request.filter, stop)
            response: bytes = counts_to_pb(*counts).SerializeToString()
            return response

        return await self._run(work, stop, len(data), self._host.is_ready(request.version, request.filter))

    async def _count_by(self, data: bytes, stop: Stop) -> bytes:
        request = parsed(pb.ShardCountByRequest, data)

        def work() -> bytes:
            groups = self._host.count_by(request.version, request.by, request.filter, stop)
            response: bytes = groups_to_pb(*groups).SerializeToString()
            return response

        return await self._run(work, stop, len(data), self._host.is_ready(request.version, request.filter))

    async def _follow(self, data: bytes, stop: Stop) -> bytes:
        version = parsed(pb.ShardFollowRequest, data).version
        if (work := self._following.get(version)) is None:
            loop = asyncio.get_running_loop()
            work = loop.run_in_executor(self._follows, self._host.follow, version)
            self._following[version] = work
            work.add_done_callback(partial(self._followed, version))
        # It goes on when its caller gives up: the version will be asked for again.
        num_rows = await asyncio.shield(work)
        response: bytes = pb.ShardFollowResponse(num_rows=num_rows).SerializeToString()
        return response

    def _followed(self, version: int, work: "asyncio.Future[int]") -> None:
        del self._following[version]
        if not work.cancelled() and (error := work.exception()) is not None:
            logger.warning("version %d could not be loaded: %s", version, str(error).partition("\n")[0])

    async def _ping(self, data: bytes, stop: Stop) -> bytes:
        status = self._host.status()
        response: bytes = pb.ShardPingResponse(
            versions=status.versions,
            num_rows=status.num_rows,
            num_segments=status.num_segments,
            num_bytes=status.num_bytes,
            num_merges=status.num_merges,
            num_evaluations=status.num_evaluations,
            num_calls=self._load.num_calls,
        ).SerializeToString()
        return response

    async def _run(self, work: Callable[[], Result], stop: Stop, num_bytes: int, is_ready: bool = True) -> Result:
        """Run a call in a thread. Raises `Overloaded` beyond the limits."""
        self._load.begin(num_bytes)
        future: Future[Result] = (self._searches if is_ready else self._filters).submit(_unless_stopped, work, stop)
        # The thread of a call that was cancelled counts until it has ended.
        future.add_done_callback(lambda _: self._load.end(num_bytes))
        return await asyncio.wrap_future(future)


def _unless_stopped(work: Callable[[], Result], stop: Stop) -> Result:
    stop.check()
    return work()


class _Load:
    """Counts calls that run or wait, and the bytes of their requests. Thread-safe."""

    def __init__(self, limits: ServerLimits) -> None:
        self._limits = limits
        self._lock = threading.Lock()
        self._num_bytes = 0
        self.num_calls = 0

    def begin(self, num_bytes: int) -> None:
        """Count a call; raise `Overloaded` if there are too many."""
        with self._lock:
            total = self._num_bytes + num_bytes
            if self.num_calls >= self._limits.max_calls or total > self._limits.max_request_bytes:
                raise Overloaded(
                    f"{self.num_calls} calls with {self._num_bytes:,} bytes wait in a shard; try again later", 1.0
                )
            self.num_calls += 1
            self._num_bytes = total

    def end(self, num_bytes: int) -> None:
        """Stop counting a call."""
        with self._lock:
            self.num_calls -= 1
            self._num_bytes -= num_bytes


class _Access(grpc.aio.ServerInterceptor):  # type: ignore[misc]
    """Refuses calls without the token or meant for another shard, before their message is read."""

    def __init__(self, token: str, number: int) -> None:
        self._token = token.encode()
        self._number = str(number)
        # Handlers of a stream, because these start before a message has arrived.
        self._no_token = _refusal(grpc.StatusCode.UNAUTHENTICATED, "the token is missing or wrong")
        self._other_shard = _refusal(grpc.StatusCode.FAILED_PRECONDITION, f"this is shard {number}")

    async def intercept_service(
        self, continuation: Callable[[Any], Awaitable[Any]], details: grpc.HandlerCallDetails
    ) -> Any:
        """Return the handler of a call."""
        metadata = dict(details.invocation_metadata)
        token = metadata.get(TOKEN_KEY, "")
        if not hmac.compare_digest(token.encode() if isinstance(token, str) else token, self._token):
            return self._no_token
        if metadata.get(NUMBER_KEY) != self._number:
            return self._other_shard
        return await continuation(details)


def _refusal(code: grpc.StatusCode, message: str) -> Any:
    async def refuse(_: Any, context: Any) -> None:
        await context.abort(code, message)

    return grpc.stream_unary_rpc_method_handler(refuse)
