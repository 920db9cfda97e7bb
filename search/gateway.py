"""The gRPC server over an engine: `orbithash.v1.SearchService` and `grpc.health.v1.Health`."""

import errno
import logging
import socket
import uuid
from dataclasses import dataclass
from typing import Any

import grpc
from google.rpc import status_pb2
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from orbithash.encoders.errors import InputError
from orbithash.search import convert
from orbithash.search.address import is_loopback, parse_address
from orbithash.search.engine import Engine
from orbithash.search.errors import GatewayError, SearchError
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["Gateway", "GatewayLimits", "start_gateway"]

logger = logging.getLogger(__name__)

_SERVICES = ("", search_pb2.DESCRIPTOR.services_by_name["SearchService"].full_name)


@dataclass(frozen=True)
class GatewayLimits:
    """What one caller can ask for.

    Attributes:
        max_receive_bytes: a larger request is refused by gRPC before it is read.
        max_concurrent_rpcs: calls in flight, health checks included; more are refused at once.
        max_timeout_s: the time of a request without a deadline, and of one with a later deadline.
    """

    max_receive_bytes: int = 16 * 2**20
    max_concurrent_rpcs: int = 1024
    max_timeout_s: float = 30.0


class Gateway:
    """A running server; made by `start_gateway`."""

    def __init__(self, server: grpc.aio.Server, checks: health.aio.HealthServicer, host: str, port: int) -> None:
        self._server = server
        self._checks = checks
        self.port = port
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Reports NOT_SERVING, refuses new calls and gives those in flight `grace_s` seconds to end."""
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(grace_s)


async def start_gateway(engine: Engine, address: str, *, limits: GatewayLimits | None = None) -> Gateway:
    """Serves `engine` at `address` (HOST:PORT of this machine only; port 0 takes a free one).

    Health is SERVING from the return of this function to `Gateway.stop`: the caller starts a gateway when the shards
    are ready. Raises `InputError` when the address is wrong, taken, or open to other machines.
    """
    limits = limits or GatewayLimits()
    host, port = parse_address(address)
    if not is_loopback(host):
        raise InputError(
            f"the gateway has no encryption and no access control yet, so it serves loopback addresses only "
            f"(127.0.0.1, ::1, localhost); got {host!r}"
        )
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        # Without the first, a second gateway on a taken port starts without a word and gets half of the calls.
        options=[("grpc.so_reuseport", 0), ("grpc.max_receive_message_length", limits.max_receive_bytes)],
    )
    checks = health.aio.HealthServicer()
    for service in _SERVICES:
        await checks.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
    search_pb2_grpc.add_SearchServiceServicer_to_server(_SearchServicer(engine, limits.max_timeout_s), server)
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    try:
        _check_free(host, port)
        port = server.add_insecure_port(address)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot listen at {address}: is the port in use? Give another, or 0 for a free one"
        ) from error
    await server.start()
    for service in _SERVICES:
        await checks.set(service, health_pb2.HealthCheckResponse.SERVING)
    return Gateway(server, checks, host, port)


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


class _SearchServicer(search_pb2_grpc.SearchServiceServicer):
    def __init__(self, engine: Engine, max_timeout_s: float) -> None:
        self._engine = engine
        self._max_timeout_s = max_timeout_s

    async def Search(self, request: search_pb2.SearchRequest, context: Any) -> search_pb2.SearchResponse:
        remaining_s = context.time_remaining()
        timeout_s = self._max_timeout_s if remaining_s is None else min(remaining_s, self._max_timeout_s)
        try:
            return convert.answer_to_pb(await self._engine.search(convert.query_from_pb(request), timeout_s))
        except SearchError as error:
            status = convert.error_to_pb(error)
        except Exception:
            request_id = uuid.uuid4().hex
            logger.exception("request %s failed", request_id)
            status = convert.error_to_pb(GatewayError(f"internal error, request id {request_id}"))
        return await _abort(context, status)


async def _abort(context: Any, status: status_pb2.Status) -> search_pb2.SearchResponse:
    """Ends the call with the status; never returns."""
    code, details, trailing_metadata = rpc_status.to_status(status)
    await context.abort(code, details, trailing_metadata)
    raise AssertionError("abort raises")
