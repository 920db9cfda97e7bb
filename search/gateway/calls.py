"""What happens around each call: its id, its time limit, its caller's rights, its status and its line in the log."""

import asyncio
import itertools
import logging
import secrets
import time
from collections.abc import Awaitable
from contextlib import ExitStack
from typing import Any, TypeVar

import grpc
from google.rpc import status_pb2
from grpc_status import rpc_status

from orbithash.search.gateway.limits import BytesInProgress, GatewayLimits, SlowMessages, Streams
from orbithash.search.gateway.malformed import Pending, num_bytes, readable
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

# Responses of at most this size are not counted: those of all calls in flight take little memory.
_SMALL_BYTES = 64 * 2**10

# New ids of requests: 16 random hexadecimal digits of this process, and a number.
_PROCESS, _numbers = secrets.token_hex(8), itertools.count()

_OUTCOMES = {code.value[0]: code.name for code in grpc.StatusCode}

Result = TypeVar("Result")
Message = TypeVar("Message")


class Call:
    """One call, made by `Calls.call`: admitted at the beginning of its block, ended with a status after it.

    A `SearchError` of the block ends the call with its status, another error with INTERNAL.

    Attributes:
        request_id: its id in the log.
        timeout_s: its time limit, and the limit of each message of a stream, in seconds.
        caller: the name of the caller for the audit log; "" if the call changes nothing.
    """

    def __init__(self, calls: "Calls", context: Any, name: str, is_stream: bool) -> None:
        self.caller = ""
        self._calls = calls
        self._context = context
        self._name = name
        self._is_stream = is_stream
        self._held = ExitStack()
        self._num_bytes = 0
        self._started = time.perf_counter()
        self.request_id, is_new = _request_id(context)
        if is_new:
            context.set_trailing_metadata(((REQUEST_ID, self.request_id),))
        remaining_s, limit_s = context.time_remaining(), calls.limits.max_timeout_s
        self.timeout_s = limit_s if remaining_s is None else min(remaining_s, limit_s)

    async def read(self, request: Message) -> Message:
        """Return the message of a request, which is in progress until the call ends.

        Raises `InvalidQuery` for a missing message and for bytes that are no message, `Overloaded`, and
        `DeadlineExceeded` for a message that does not arrive.
        """
        if isinstance(request, Pending):
            timeout_s = min(self.timeout_s, self._calls.limits.max_idle_s)
            request = await self._calls.slow_messages.receive(request.read(), timeout_s)
        size = num_bytes(request)
        self._calls.request_bytes.add(size)
        self._num_bytes += size
        return readable(request)

    def respond(self, response: Message) -> Message:
        """Return the response, whose bytes are in progress until it has been sent. Raises `Overloaded`."""
        size = len(response) if isinstance(response, bytes) else response.ByteSize()  # type: ignore[attr-defined]
        if size > _SMALL_BYTES:
            response_bytes = self._calls.response_bytes
            response_bytes.add(size)
            # The end of the call, after the client has taken the response.
            self._context.add_done_callback(lambda _: response_bytes.remove(size))
        return response

    async def __aenter__(self) -> "Call":
        self._calls.observer.call_began(self._name)
        set_requests([self.request_id])
        try:
            self.caller = self._calls.protection.admit(self._context, self._name, self.request_id)
            if self._is_stream:
                self._held.enter_context(self._calls.streams.hold(self._name))
        except BaseException as error:
            await self.__aexit__(type(error), error, None)
            raise
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, _: Any) -> None:
        self._held.close()
        self._calls.request_bytes.remove(self._num_bytes)
        if error is None:
            self._ended("OK")
            return
        if isinstance(error, SearchError):
            status = error_to_pb(error)
        elif isinstance(error, Exception):
            logger.error("request %s (%s) failed", self.request_id, self._name, exc_info=error)
            status = error_to_pb(GatewayError(f"internal error, request id {self.request_id}"))
        else:
            self._ended("CANCELLED")
            return
        self._ended(_OUTCOMES[status.code])
        await _abort(self._context, status, self.request_id)

    def _ended(self, outcome: str) -> None:
        seconds = time.perf_counter() - self._started
        self._calls.observer.call_ended(self._name, outcome, seconds)
        if outcome != "OK" or seconds > _SLOW_S:
            peer = self._context.peer()
            fields = {"rpc": self._name, "outcome": outcome, "ms": round(1e3 * seconds, 3), "peer": peer}
            logger.info("%s of %s ended after %.0f ms: %s", self._name, peer, 1e3 * seconds, outcome, extra=fields)


class Calls:
    """The calls of one gateway."""

    def __init__(self, limits: GatewayLimits, observer: Observer, protection: Protection) -> None:
        self.limits = limits
        self.request_bytes = BytesInProgress("requests", limits.max_request_bytes)
        self.response_bytes = BytesInProgress("responses", limits.max_response_bytes)
        self.slow_messages = SlowMessages(limits.max_slow_messages)
        self.streams = Streams(limits.max_streams)
        self.observer = observer
        self.protection = protection

    def call(self, context: Any, name: str, is_stream: bool = False) -> Call:
        """Return a call for `async with`."""
        return Call(self, context, name, is_stream)


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
    return f"{_PROCESS}{next(_numbers):016x}", True


async def _abort(context: Any, status: status_pb2.Status, request_id: str) -> None:
    """End the call with the status; never returns."""
    code, details, trailing_metadata = rpc_status.to_status(status)
    await context.abort(code, details, (*trailing_metadata, (REQUEST_ID, request_id)))
