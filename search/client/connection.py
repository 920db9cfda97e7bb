"""What both clients share: the channel's options, the metadata and time limit of a call, and the errors of calls."""

import dataclasses
import json
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc
from grpc_status import rpc_status

from orbithash.encoders.errors import InputError
from orbithash.search.protocol import convert
from orbithash.search.protocol.address import parse_address
from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayError,
    GatewayUnreachable,
    Overloaded,
    SearchError,
)
from orbithash.search.protocol.statuses import error_from_pb

__all__ = ["REFRESH_TIMEOUT_S", "Connection", "Tls"]

# Loading the shards of a large archive takes minutes.
REFRESH_TIMEOUT_S = 1800.0

# Calls that change nothing are repeated while the gateway is unavailable; the time limit covers all attempts. Changes
# are not repeated: the caller decides whether to send one again.
_RETRIES = {
    "methodConfig": [
        {
            "name": [
                {"service": "orbithash.v1.SearchService"},
                {"service": "orbithash.v1.ArchiveService", "method": "Describe"},
            ],
            "retryPolicy": {
                "maxAttempts": 4,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}
_OPTIONS: dict[str, Any] = {
    "grpc.service_config": json.dumps(_RETRIES),
    # A connection that is lost, or refused by a gateway that ends, is tried again before the last of these attempts; by
    # default after a second, and in the end after two minutes.
    "grpc.initial_reconnect_backoff_ms": 100,
    "grpc.max_reconnect_backoff_ms": 1000,
    # gRPC does not repeat larger requests; its default excludes most images.
    "grpc.per_rpc_retry_buffer_size": 16 * 2**20,
    # 10,000 hits with long keys, or 1,000 rows with the largest thumbnails and footprints.
    "grpc.max_receive_message_length": 512 * 2**20,
    # A proxy named in the environment cannot reach this machine's loopback.
    "grpc.enable_http_proxy": 0,
}


@dataclasses.dataclass(frozen=True)
class Tls:
    """Files of an encrypted connection, in PEM.

    Attributes:
        ca: certificates of the authorities to trust; None: those that gRPC comes with.
        certificate, key: the client's own, if the gateway requires one (mutual TLS).
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Return the channel's credentials. Raises `InputError` for unreadable files and a certificate without key."""
        if (self.certificate is None) != (self.key is None):
            raise InputError("a client's certificate and its key come together; give both or neither")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err


class Connection:
    """The address of a gateway, what its calls carry, and what their failures mean."""

    def __init__(
        self, address: str, timeout_s: float, token: str | None, tls: Tls | None, options: Sequence[tuple[str, Any]]
    ) -> None:
        """Check the arguments, see `Client`. The gateway is not contacted before the first call."""
        parse_address(address)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InputError("a token consists of printable ASCII characters")
        self.address = address
        self.timeout_s = _checked(timeout_s)
        self.credentials = None if tls is None else tls.credentials()
        self.options = list({**_OPTIONS, **dict(options)}.items())
        self._token = token

    def timeout(self, timeout_s: float | None) -> float:
        """Return the time limit of a call in seconds, which is the client's if `timeout_s` is None."""
        return self.timeout_s if timeout_s is None else _checked(timeout_s)

    def metadata(self) -> list[tuple[str, str]]:
        """Return the metadata of a call, with a new request id."""
        metadata = [(convert.REQUEST_ID, uuid.uuid4().hex)]
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token}"))
        return metadata

    def late(self, timeout_s: float) -> DeadlineExceeded:
        """Return the error of a call that got no answer in time."""
        return DeadlineExceeded(f"no answer from {self.address} within {timeout_s:.3g} s")

    def error(self, error: grpc.RpcError, timeout_s: float) -> SearchError | GatewayUnreachable:
        """Return the error that a failed call stands for."""
        status = rpc_status.from_call(error) if hasattr(error, "trailing_metadata") else None
        request_id = _request_id(error)
        if status is not None and (own := error_from_pb(status)):
            own.request_id = request_id
            return own
        # The other errors come from gRPC, at this end or the other.
        code, details = error.code(), error.details()
        if code == grpc.StatusCode.UNAVAILABLE:
            return GatewayUnreachable(
                f"no gateway at {self.address}: start one (orbithash serve) or give the address of a running one"
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return self.late(timeout_s)
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"the gateway at {self.address} refused the call: {details}", retry_after_s=1.0)
        suffix = f", request id {request_id}" if request_id else ""
        failure = GatewayError(f"the gateway at {self.address} answered {code.name}: {details}{suffix}")
        failure.request_id = request_id
        return failure


def _checked(timeout_s: float) -> float:
    if not timeout_s > 0:
        raise InputError(f"a time limit is a number of seconds above 0, got {timeout_s!r}")
    return timeout_s


def _request_id(error: grpc.RpcError) -> str | None:
    """Return the id of a failed request in the gateway's log; None if the gateway was not reached."""
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return next((value for name, value in trailing or () if name == convert.REQUEST_ID), None)
