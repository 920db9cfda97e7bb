"""The gRPC server over a service: `orbithash.v1`, health checks and, on request, reflection."""

import asyncio
import errno
import logging
import socket
from enum import Enum

import grpc
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from orbithash.encoders.errors import InputError
from orbithash.search.gateway.calls import Calls
from orbithash.search.gateway.limits import GatewayLimits, LimitedStreams
from orbithash.search.gateway.malformed import Lenient
from orbithash.search.gateway.protection import Protection
from orbithash.search.gateway.servicers import ArchiveServicer, SearchServicer
from orbithash.search.protocol.address import is_loopback, parse_address
from orbithash.search.service.service import Service
from orbithash.search.service.supervision import repeat
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["Gateway", "PortSharing", "start_gateway"]

logger = logging.getLogger(__name__)

_NAMES = ("SearchService", "ArchiveService")
_SERVICES = ("", *(search_pb2.DESCRIPTOR.services_by_name[name].full_name for name in _NAMES))

_HEALTH_EVERY_S, _MAX_HEALTH_EVERY_S = 0.5, 5.0


class PortSharing(Enum):
    """Whether several processes listen at one port. The kernel then gives each connection to one of them."""

    NONE = "none"
    # The first process, which finds the port free.
    FIRST = "first"
    # A further process, at a port that another one shares.
    JOIN = "join"


class Gateway:
    """A running server, made by `start_gateway`."""

    def __init__(
        self, server: grpc.aio.Server, checks: health.aio.HealthServicer, service: Service, host: str, port: int
    ) -> None:
        self._server = server
        self._checks = checks
        self._service = service
        # What was reported last by the task below.
        self._could_answer: bool | None = None
        self._health = asyncio.create_task(
            repeat("reporting the health", self._report_health, _HEALTH_EVERY_S, _MAX_HEALTH_EVERY_S)
        )
        self.port = port
        self.address = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"

    async def stop(self, grace_s: float) -> None:
        """Report NOT_SERVING, refuse new calls, and give calls in flight `grace_s` seconds to end. May be repeated."""
        self._health.cancel()
        await self._checks.enter_graceful_shutdown()
        await self._server.stop(grace_s)

    async def _report_health(self) -> None:
        """Report whether any shard has a healthy replica."""
        can_answer = self._service.can_answer
        if can_answer != self._could_answer:
            await _set_health(self._checks, can_answer)
            if self._could_answer is not None or not can_answer:
                logger.warning("health: %s", "some shard answers again" if can_answer else "no shard answers")
        self._could_answer = can_answer


async def start_gateway(
    service: Service,
    address: str,
    *,
    limits: GatewayLimits | None = None,
    protection: Protection | None = None,
    sharing: PortSharing = PortSharing.NONE,
) -> Gateway:
    """Serve `service` at `address` (HOST:PORT; port 0 takes a free one). `sharing`: with other processes.

    Health is SERVING from the return of this function to `Gateway.stop`, while any shard has a healthy replica. Without
    `protection` the gateway listens on loopback addresses only.

    Raises:
        InputError: the address is invalid or in use, other machines could reach it without the required protection, or
            a certificate is invalid.
    """
    limits = limits or GatewayLimits()
    protection = protection or Protection()
    host, port = parse_address(address)
    if not is_loopback(host):
        protection.check_open(host)
    credentials = None if protection.tls is None else protection.tls.credentials()
    calls = Calls(limits, service.observer, protection)
    server = grpc.aio.server(
        maximum_concurrent_rpcs=limits.max_concurrent_rpcs,
        options=[
            # Where it is not asked for, a second gateway at the same port would silently get half of the calls.
            ("grpc.so_reuseport", 0 if sharing is PortSharing.NONE else 1),
            ("grpc.max_receive_message_length", limits.max_receive_bytes),
            ("grpc.max_connection_idle_ms", round(1e3 * limits.max_idle_connection_s)),
        ],
        interceptors=[LimitedStreams(calls.streams)],
    )
    checks = health.aio.HealthServicer()
    await _set_health(checks, False)
    lenient = Lenient(server, limits.max_idle_s, is_raw=True)
    search_pb2_grpc.add_SearchServiceServicer_to_server(SearchServicer(service, calls), lenient)
    search_pb2_grpc.add_ArchiveServiceServicer_to_server(ArchiveServicer(service, calls), lenient)
    health_pb2_grpc.add_HealthServicer_to_server(checks, Lenient(server, limits.max_idle_s, is_raw=False))
    if protection.reflection:
        reflection.enable_server_reflection((*_SERVICES[1:], reflection.SERVICE_NAME), server)
    try:
        if sharing is not PortSharing.JOIN:
            _check_free(host, port)
        if credentials is None:
            port = server.add_insecure_port(address)
        else:
            port = server.add_secure_port(address, credentials)
    except (OSError, RuntimeError) as error:
        raise InputError(
            f"cannot listen at {address}: the port may be in use; give another port, or 0 for a free one"
        ) from error
    await server.start()
    await _set_health(checks, service.can_answer)
    return Gateway(server, checks, service, host, port)


async def _set_health(checks: health.aio.HealthServicer, can_answer: bool) -> None:
    status = health_pb2.HealthCheckResponse
    for name in _SERVICES:
        await checks.set(name, status.SERVING if can_answer else status.NOT_SERVING)


def _check_free(host: str, port: int) -> None:
    """Raise `OSError` if the port is in use. gRPC would notice too, but would also write to stderr."""
    for family, kind, protocol, _, place in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(place)
            except OSError as error:
                # Other failures may concern one of several addresses of the host; gRPC needs only one.
                if error.errno == errno.EADDRINUSE:
                    raise
