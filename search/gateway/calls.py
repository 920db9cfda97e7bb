"""What happens around each call: its id, its time limit, its caller's rights, its status and its line in the log."""

import asyncio
import logging
import time
import uuid
from collections.abc import AsyncIterator, Awaitable
from contextlib import ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, TypeVar

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from orbithash.search.gateway.limits import GatewayLimits, RequestBytes, Streams
from orbithash.search.gateway.malformed import num_bytes, readable
from orbithash.search.gateway.protection import Protection
from orbithash.search.logs import set_requests
from orbithash.search.observer import Observer
from orbithash.search.protocol.convert import REQUEST_ID
from orbithash.search.protocol.errors import DeadlineExceeded, GatewayError, SearchError
from orbithash.search.protocol.statuses import error_to_pb

__all__ = ["Call", "Calls", "within"]

logger = logging.getLogger(__name__)

# Longer calls are logged.
_SLOW_S = 1.0

_OUTCOMES = {code.value[0]: code.name for code in grpc.StatusCode}

Result = TypeVar("Result")
Message = TypeVar("Message")


@dataclass
class Call:
    """One call.

    Attributes:
        request_id: its id in the log.
        timeout_s: its time limit, and the limit of each message of a stream, in seconds.
        caller: the name of the caller for the audit log; "" if the call changes nothing.
    """

    request_id: str
    timeout_s: float
    caller: str
    _request_bytes: RequestBytes
    _held: ExitStack = field(default_factory=ExitStack)

    def read(self, request: Message) -> Message:
        """Return the message of a request, which is in progress until the call ends.

        Raises `InvalidQuery` for bytes that are no message, and `Overloaded`.
        """
        self._held.enter_context(self._request_bytes.hold(num_bytes(request)))
        return readable(request)


class Calls:
    """The calls of one gateway."""

    def __init__(self, limits: GatewayLimits, observer: Observer, protection: Protection) -> None:
        self.limits = limits
        self.request_bytes = RequestBytes(limits.max_request_bytes)
        self.streams = Streams(limits.max_streams)
        self._observer = observer
        self._protection = protection

    @asynccontextmanager
    async def call(self, context: Any, name: str, is_stream: bool = False) -> AsyncIterator[Call]:
        """Admit a call, and end it after the block: a `SearchError` with its status, other errors as INTERNAL."""
        started = time.perf_counter()
        self._observer.call_began(name)
        request_id, is_new = _request_id(context)
        set_requests([request_id])
        outcome = "CANCELLED"
        if is_new:
            context.set_trailing_metadata(((REQUEST_ID, request_id),))
        remaining_s = context.time_remaining()
        limit_s = self.limits.max_timeout_s
        timeout_s = limit_s if remaining_s is None else min(remaining_s, limit_s)
        try:
            with ExitStack() as held:
                caller = self._protection.admit(context, name, request_id)
                if is_stream:
                    held.enter_context(self.streams.hold(name))
                yield Call(request_id, timeout_s, caller, self.request_bytes, held)
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


async def within(timeout_s: float, work: Awaitable[Result], late: str = "no answer within {:.3g} s") -> Result:
    """Return the result of `work`. Raises `DeadlineExceeded` with the message `late` after `timeout_s`."""
    try:
        async with asyncio.timeout(timeout_s):
            return await work
    except TimeoutError:
        raise DeadlineExceeded(late.format(timeout_s)) from None


def _request_id(context: Any) -> tuple[str, bool]:
    """Return the id of a call, and whether it is new: the caller's own id if that is valid."""
    for name, value in context.invocation_metadata() or ():
        if name == REQUEST_ID and 0 < len(value) <= 64 and value.isascii() and value.replace("-", "").isalnum():
            return str(value), False
    return uuid.uuid4().hex, True


async def _abort(context: Any, status: status_pb2.Status, request_id: str) -> None:
    """End the call with the status; never returns."""
    code, details, trailing_metadata = rpc_status.to_status(status)
    await context.abort(code, details, (*trailing_metadata, (REQUEST_ID, request_id)))
