"""The gateway's client: light enough to import anywhere, no numpy, no torch."""

import json
from types import TracebackType
from typing import Self

import grpc
from grpc_status import rpc_status

from orbithash.search import convert
from orbithash.search.address import parse_address
from orbithash.search.errors import (
    DeadlineExceeded,
    GatewayError,
    GatewayUnreachable,
    Overloaded,
    SearchError,
)
from orbithash.search.queries import Answer, Query
from orbithash.v1 import search_pb2_grpc

__all__ = ["Client"]

# A search changes nothing, so it may be sent again; the deadline bounds all attempts together.
_RETRIES = {
    "methodConfig": [
        {
            "name": [{"service": "orbithash.v1.SearchService", "method": "Search"}],
            "retryPolicy": {
                "maxAttempts": 3,
                "initialBackoff": "0.1s",
                "maxBackoff": "1s",
                "backoffMultiplier": 2,
                "retryableStatusCodes": ["UNAVAILABLE"],
            },
        }
    ]
}


class Client:
    """Asks the gateway at `address` (HOST:PORT); each search has `timeout_s` seconds, retries included.

        with Client("127.0.0.1:50051") as client:
            answer = client.search(key="harbor/harbor_0001.tif", k=5)

    May be shared between threads.
    """

    def __init__(self, address: str, timeout_s: float = 10.0) -> None:
        """Raises `InputError` for what is no address. The gateway is not contacted before the first search."""
        parse_address(address)
        self._address = address
        self._timeout_s = timeout_s
        self._channel = grpc.insecure_channel(
            address,
            options=[
                ("grpc.service_config", json.dumps(_RETRIES)),
                # Requests above this size are not repeated; the default lets few images pass.
                ("grpc.per_rpc_retry_buffer_size", 16 * 2**20),
                # 10,000 hits with long keys.
                ("grpc.max_receive_message_length", 64 * 2**20),
                # A proxy named in the environment cannot reach this machine's loopback.
                ("grpc.enable_http_proxy", 0),
            ],
        )
        self._stub = search_pb2_grpc.SearchServiceStub(self._channel)

    def search(
        self, *, image: bytes | None = None, code: bytes | None = None, key: str | None = None, k: int = 10
    ) -> Answer:
        """The answer to a query by exactly one of `image` (an encoded file), `code` (packed) and `key`.

        Raises:
            InvalidQuery: wrong query; what is wrong without knowing the archive is not sent at all.
            KeyNotFound: no row has the key.
            GatewayUnreachable: nothing answers at the address.
            DeadlineExceeded, Unavailable, Overloaded, GatewayError: the gateway could not answer.
        """
        query = Query(image=image, code=code, key=key, k=k)
        query.check()
        try:
            response = self._stub.Search(convert.query_to_pb(query), timeout=self._timeout_s)
        except grpc.RpcError as error:
            raise self._typed(error) from error
        return convert.answer_from_pb(response)

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _typed(self, error: grpc.RpcError) -> SearchError | GatewayUnreachable:
        status = rpc_status.from_call(error)
        if status is not None and (own := convert.error_from_pb(status)):
            return own
        # What follows was not said by the service but by gRPC, here or at the other end.
        code, details = error.code(), error.details()
        if code == grpc.StatusCode.UNAVAILABLE:
            return GatewayUnreachable(
                f"no gateway at {self._address}: start one (orbithash serve) or give the address of a running one"
            )
        if code == grpc.StatusCode.DEADLINE_EXCEEDED:
            return DeadlineExceeded(f"no answer from {self._address} within {self._timeout_s:.3g} s")
        if code == grpc.StatusCode.RESOURCE_EXHAUSTED:
            return Overloaded(f"the gateway at {self._address} refused the call: {details}", retry_after_s=1.0)
        return GatewayError(f"the gateway at {self._address} answered {code.name}: {details}")
