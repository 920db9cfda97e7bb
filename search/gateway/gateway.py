"""The gRPC server over a service: `orbithash.v1` and `grpc.health.v1.Health`."""

import asyncio
import errno
import logging
import socket
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from grpc_status import rpc_status

from orbithash.encoders.errors import InputError
from orbithash.search.engine.service import Service, check_num_queries
from orbithash.search.gateway.malformed import Lenient, readable
from orbithash.search.gateway.protection import Protection, audited
from orbithash.search.logs import set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol import convert
from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.protocol.errors import DeadlineExceeded, GatewayError, InvalidQuery, SearchError
from orbithash.search.protocol.rows import MAX_ROWS
from orbithash.search.protocol.statuses import error_to_pb
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["Gateway", "GatewayLimits", "start_gateway"]

logger = logging.getLogger(__name__)

_NAMES = ("SearchService", "ArchiveService")
_SERVICES = ("", *(search_pb2.DESCRIPTOR.services_by_name[name].full_name for name in _NAMES))

_HEALTH_EVERY_S = 0.5
# A call that takes longer is worth a line of the log.
_SLOW_S = 1.0

_OUTCOMES = {code.value[0]: code.name for code in grpc.StatusCode}


@dataclass(frozen=True)
class GatewayLimits:
    """What one caller can ask for.

    Attributes:
        max_receive_bytes: a larger request is refused by gRPC before it is read.
        max_concurrent_rpcs: calls in flight, health checks included; more are refused at once.
        max_timeout_s: the time of a request without a deadline, and of one with a later deadline. Streams of changes
            have it for each piece.
    """

    max_receive_bytes: int = 16 * 2**20
    max_concurrent_rpcs: int = 1024
    max_timeout_s: float = 30.0


class Gateway:
    """A running server; made by `start_gateway`."""

    def __init__(
        self, server: grpc.aio.Server, checks: health.aio.HealthServicer, service: Service, host: str, port: int
    ) -> None:
        self._server = server
        self._checks = checks
        self._health = asyncio.create_task(_follow_health(checks, service))
        self.port = port
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Reports NOT_SERVING, refuses new calls and gives those in flight `grace_s` seconds to end."""
        self._health.cancel()
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_gateway(
    service: Service, address: str, *, limits: GatewayLimits | None = None, protection: Protection | None = None
) -> Gateway:
    """Serves `service` at `address` (HOST:PORT; port 0 takes a free one); without `protection` to this machine only.

    Health is SERVING from the return of this function to `Gateway.stop` while any shard has a healthy copy: the caller
    starts a gateway when the shards are ready. Raises `InputError` when the address is wrong, taken, or open to other
    machines without the protection that this takes, and for certificates that are none.
    """
    limits = limits or GatewayLimits()
    protection = protection or Protection()
    host, port = parse_address(address)
    if not is_loopback(host):
        protection.check_open(host)
    credentials = None if protection.tls is None else protection.tls.credentials()
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        # Without the first, a second gateway on a taken port starts without a word and gets half of the calls.
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", limits.max_receive_bytes)],
    )
    checks = health.aio.HealthServicer()
    await _set_health(checks, False)
    calls = _Calls(limits.max_timeout_s, service.observer, protection)
    search_pb2_grpc.add_SearchServiceServicer_to_server(_SearchServicer(service, calls), Lenient(server))
    search_pb2_grpc.add_ArchiveServiceServicer_to_server(_ArchiveServicer(service, calls), Lenient(server))
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    if protection.reflection:
        reflection.enable_server_reflection((*_SERVICES[1:], reflection.SERVICE_NAME), server)
    try:
        _check_free(host, port)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot listen at {address}: is the port in use? Give another, or 0 for a free one"
        ) from error
    await server.start()
    await _set_health(checks, service.can_answer)
    return Gateway(server, checks, service, host, port)


async def _follow_health(checks: health.aio.HealthServicer, service: Service) -> None:
    """Reports whether there is a shard to ask, for as long as it runs."""
    could_answer = True
    while True:
        can_answer = service.can_answer
        if can_answer != could_answer:
            await _set_health(checks, can_answer)
            logger.warning("health: %s", "some shard answers again" if can_answer else "no shard answers")
        could_answer = can_answer
        await asyncio.sleep(_HEALTH_EVERY_S)


async def _set_health(checks: health.aio.HealthServicer, can_answer: bool) -> None:
    status = health_pb2.HealthCheckResponse
    for name in _SERVICES:
        await checks.set(name, status.SERVING if can_answer else status.NOT_SERVING)


def _check_free(host: str, port: int) -> None:
    """`OSError` when something listens there: gRPC would find out too, but would also write about it to stderr."""
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                # Any other failure may concern one of several addresses of the host; gRPC needs one that works.
                if error.errno == errno.EADDRINUSE:
                    raise


@dataclass
class _Call:
    """One call: its id, the time it has, and whose it is."""

    request_id: str
    timeout_s: float
    caller: str


class _Calls:
    """What happens around every call: its id, its deadline, what its caller and the log are told when it fails."""

    def __init__(self, max_timeout_s: float, observer: Observer, protection: Protection) -> None:
        self._max_timeout_s = max_timeout_s
        self._observer = observer
        self._protection = protection

    @asynccontextmanager
    async def call(self, context: Any, name: str) -> AsyncIterator[_Call]:
        """The block ends the call: a `SearchError` with its status, any other error as a fault of the server."""
        started = time.perf_counter()
        self._observer.call_began(name)
        request_id, is_new = _request_id(context)
        set_requests([request_id])
        outcome = "CANCELLED"
        if is_new:
            context.set_trailing_metadata(((convert.REQUEST_ID, request_id),))
        remaining_s = context.time_remaining()
        timeout_s = self._max_timeout_s if remaining_s is None else min(remaining_s, self._max_timeout_s)
        try:
            yield _Call(request_id, timeout_s, self._protection.admit(context, name, request_id))
            outcome = "OK"
            return
        except SearchError as error:
            status = error_to_pb(error)
            outcome = _OUTCOMES[status.code]
        except Exception:
            logger.exception("request %s (%s) failed", request_id, name)
            status = error_to_pb(GatewayError(f"internal error, request id {request_id}"))
            outcome = _OUTCOMES[status.code]
        finally:
            self._ended(name, outcome, time.perf_counter() - started, context)
        await _abort(context, status, request_id)

    def _ended(self, rpc: str, outcome: str, seconds: float, context: Any) -> None:
        self._observer.call_ended(rpc, outcome, seconds)
        if outcome != "OK" or seconds > _SLOW_S:
            peer = context.peer()
            fields = {"rpc": rpc, "outcome": outcome, "ms": round(1e3 * seconds, 3), "peer": peer}
            logger.info("%s of %s ended after %.0f ms: %s", rpc, peer, 1e3 * seconds, outcome, extra=fields)


def _request_id(context: Any) -> tuple[str, bool]:
    """The caller's own id where it is one, else a new one; and whether it is new."""
    for name, value in context.invocation_metadata() or ():
        if name == convert.REQUEST_ID and 0 < len(value) <= 64 and value.isascii() and value.replace("-", "").isalnum():
            return str(value), False
    return uuid.uuid4().hex, True


async def _abort(context: Any, status: status_pb2.Status, request_id: str) -> None:
    """Ends the call with the status; never returns."""
    code, details, trailing_metadata = rpc_status.to_status(status)
    await context.abort(code, details, (*trailing_metadata, (convert.REQUEST_ID, request_id)))


class _SearchServicer(search_pb2_grpc.SearchServiceServicer):
    def __init__(self, service: Service, calls: _Calls) -> None:
        self._service = service
        self._calls = calls

    async def Search(self, request: search_pb2.SearchRequest, context: Any) -> search_pb2.SearchResponse:
        async with self._calls.call(context, "Search") as call:
            query = convert.query_from_pb(readable(request))
            return convert.answer_to_pb(await self._service.search(query, call.timeout_s))
        raise AssertionError("abort raises")

    async def SearchMany(self, request: search_pb2.SearchManyRequest, context: Any) -> search_pb2.SearchManyResponse:
        async with self._calls.call(context, "SearchMany") as call:
            # Before anything is made of them: a message has room for millions.
            requests = readable(request).requests
            check_num_queries(len(requests))
            queries = [convert.query_from_pb(each) for each in requests]
            found = await self._service.search_many(queries, call.timeout_s)
            return search_pb2.SearchManyResponse(results=map(convert.result_to_pb, found))
        raise AssertionError("abort raises")


Response = TypeVar("Response")


class _ArchiveServicer(search_pb2_grpc.ArchiveServiceServicer):
    def __init__(self, service: Service, calls: _Calls) -> None:
        self._service = service
        self._calls = calls

    async def Describe(self, request: search_pb2.DescribeRequest, context: Any) -> search_pb2.DescribeResponse:
        async with self._calls.call(context, "Describe"):
            readable(request)
            return convert.description_to_pb(self._service.describe())
        raise AssertionError("abort raises")

    async def Upsert(
        self, request_iterator: AsyncIterator[search_pb2.UpsertRequest], context: Any
    ) -> AsyncIterator[search_pb2.UpsertResponse]:
        num_rows = 0
        async with self._calls.call(context, "Upsert") as call:
            async for request in request_iterator:
                messages = readable(request).rows
                _check_size("rows", len(messages))
                rows = [convert.row_from_pb(row) for row in messages]
                with audited(call.caller, "Upsert", f"{len(rows)} rows", call.request_id) as change:
                    done = await _within(call.timeout_s, self._service.upsert(rows))
                    change.version = done.version
                num_rows += len(rows)
                yield search_pb2.UpsertResponse(committed_rows=num_rows, archive_version=done.version)

    async def Delete(
        self, request_iterator: AsyncIterator[search_pb2.DeleteRequest], context: Any
    ) -> AsyncIterator[search_pb2.DeleteResponse]:
        num_keys = num_removed = 0
        async with self._calls.call(context, "Delete") as call:
            async for request in request_iterator:
                keys = list(readable(request).keys)
                _check_size("keys", len(keys))
                with audited(call.caller, "Delete", f"{len(keys)} keys", call.request_id) as change:
                    done = await _within(call.timeout_s, self._service.delete(keys))
                    change.version = done.version
                num_keys += len(keys)
                num_removed += done.removed
                yield search_pb2.DeleteResponse(
                    committed_keys=num_keys, removed_rows=num_removed, archive_version=done.version
                )

    async def Refresh(self, request: search_pb2.RefreshRequest, context: Any) -> search_pb2.RefreshResponse:
        async with self._calls.call(context, "Refresh") as call:
            wanted = readable(request)
            what = f"archive {wanted.archive[:200]!a}" if wanted.archive else "the archive"
            what += f" in {wanted.shards} shards" if wanted.shards else ""
            with audited(call.caller, "Refresh", what, call.request_id) as change:
                now = await self._service.refresh(wanted.archive, wanted.model, wanted.shards)
                change.version = now.archive_version
            return search_pb2.RefreshResponse(archive_version=now.archive_version, rows=now.rows, model_id=now.model_id)
        raise AssertionError("abort raises")


def _check_size(field: str, count: int) -> None:
    if not 1 <= count <= MAX_ROWS:
        raise InvalidQuery((field, f"a piece has from 1 to {MAX_ROWS} {field}, got {count}"))


async def _within(timeout_s: float, work: Awaitable[Response]) -> Response:
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(f"not committed within {timeout_s:.3g} s; it may be later: send it again") from None
