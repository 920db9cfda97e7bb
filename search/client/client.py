"""The gateway's clients, blocking and asyncio: light enough to import anywhere, no numpy, no torch."""

import dataclasses
import itertools
import json
import uuid
from collections.abc import AsyncIterable, AsyncIterator, Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_status import rpc_status

from orbithash.encoders.errors import InputError
from orbithash.search.protocol import convert
from orbithash.search.protocol.address import parse_address
from orbithash.search.protocol.description import Description
from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayError,
    GatewayUnreachable,
    Overloaded,
    SearchError,
)
from orbithash.search.protocol.queries import Answer, Query, check_num_shards
from orbithash.search.protocol.rows import MAX_ROWS, Row, check_keys
from orbithash.search.protocol.statuses import error_from_pb
from orbithash.v1 import search_pb2, search_pb2_grpc

__all__ = ["AsyncClient", "Client", "Tls"]

# What changes nothing may be sent again; the deadline bounds all attempts together. Changes are not: what became of
# them is for the caller to find out, or to send again, which does no harm.
_RETRIES = {
    "methodConfig": [
        {
            "name": [
                {"service": "orbithash.v1.SearchService"},
                {"service": "orbithash.v1.ArchiveService", "method": "Describe"},
            ],
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
_OPTIONS: list[tuple[str, Any]] = [
    ("grpc.service_config", json.dumps(_RETRIES)),
    # Requests above this size are not repeated; the default lets few images pass.
    ("grpc.per_rpc_retry_buffer_size", 16 * 2**20),
    # 10,000 hits with long keys.
    ("grpc.max_receive_message_length", 256 * 2**20),
    # A proxy named in the environment cannot reach this machine's loopback.
    ("grpc.enable_http_proxy", 0),
]

_SERVING = health_pb2.HealthCheckResponse.SERVING

# Images make messages large: pieces of fewer bytes than a gateway takes.
_MAX_PIECE_BYTES = 8 * 2**20


@dataclasses.dataclass(frozen=True)
class Tls:
    """How to know the gateway, and for mutual TLS how it knows this client; files in PEM.

    Attributes:
        ca: certificates to trust; None: those that gRPC comes with.
        certificate, key: of this client.
    """

    ca: Path | None = None
    certificate: Path | None = None
    key: Path | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """`InputError` for files that cannot be read, or half a pair."""
        if (self.certificate is None) != (self.key is None):
            raise InputError("a client's certificate and its key come together; give both or neither")
        return grpc.ssl_channel_credentials(_read(self.ca), _read(self.key), _read(self.certificate))


def _read(path: Path | None) -> bytes | None:
    try:
        return None if path is None else path.read_bytes()
    except OSError as err:
        raise InputError(f"{path}: cannot be read ({err.strerror})") from err


class _Calls:
    """What both clients share: where the gateway is, what a call carries, and what its failures mean."""

    def __init__(self, address: str, timeout_s: float, token: str | None, tls: Tls | None) -> None:
        """Raises `InputError` for what is no address. The gateway is not contacted before the first call."""
        parse_address(address)
        if token is not None and not (token.isascii() and token.isprintable()):
            raise InputError("a token is of printable ASCII characters")
        self._address = address
        self._timeout_s = timeout_s
        self._token = token
        self._credentials = None if tls is None else tls.credentials()

    def _options(self, request_id: str | None = None) -> dict[str, Any]:
        metadata = [(convert.REQUEST_ID, request_id or uuid.uuid4().hex)]
        if self._token is not None:
            metadata.append(("authorization", f"Bearer {self._token}"))
        return {"timeout": self._timeout_s, "metadata": metadata}

    def _typed(self, error: grpc.RpcError) -> SearchError | GatewayUnreachable:
        # The two kinds of client say it in two ways.
        status = rpc_status.from_call(error) if hasattr(error, "trailing_metadata") else None
        request_id = _request_id(error)
        if status is not None and (own := error_from_pb(status)):
            own.request_id = request_id
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
        named = f", request id {request_id}" if request_id else ""
        failure = GatewayError(f"the gateway at {self._address} answered {code.name}: {details}{named}")
        failure.request_id = request_id
        return failure


def _request_id(error: grpc.RpcError) -> str | None:
    """What the gateway calls the failed request; None where it did not get that far."""
    trailing = error.trailing_metadata() if hasattr(error, "trailing_metadata") else None
    return next((value for name, value in trailing or () if name == convert.REQUEST_ID), None)


def _query(query: Query | None, fields: dict[str, Any]) -> Query:
    query = Query(**fields) if query is None else query
    query.check()
    return query


class Client(_Calls):
    """Asks the gateway at `address` (HOST:PORT); each call has `timeout_s` seconds, retries included.

        with Client("127.0.0.1:50051") as client:
            answer = client.search(key="harbor/harbor_0001.tif", k=5, filter="label = 'harbor'")

    May be shared between threads. All methods raise what `search` raises.
    """

    def __init__(
        self, address: str, timeout_s: float = 10.0, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        """`token`: what the gateway asks for, if it does. `tls`: how to know it; None: no encryption."""
        super().__init__(address, timeout_s, token, tls)
        self._channel = (
            grpc.insecure_channel(address, options=_OPTIONS)
            if self._credentials is None
            else grpc.secure_channel(address, self._credentials, options=_OPTIONS)
        )
        self._search = search_pb2_grpc.SearchServiceStub(self._channel)
        self._archive = search_pb2_grpc.ArchiveServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    def search(self, query: Query | None = None, **fields: Any) -> Answer:
        """The answer to a query, or to `Query(**fields)`.

        Raises:
            InvalidQuery: wrong query; what is wrong without knowing the archive is not sent at all.
            KeyNotFound: no row has the key.
            Unauthenticated, PermissionDenied: the gateway asks for a token, or for one of another role.
            GatewayUnreachable: nothing answers at the address.
            DeadlineExceeded, Unavailable, Overloaded, GatewayError: the gateway could not answer.
        """
        request = convert.query_to_pb(_query(query, fields))
        return convert.answer_from_pb(self._call(self._search.Search, request))

    def pages(self, query: Query | None = None, **fields: Any) -> Iterator[Answer]:
        """The answer page by page, `k` hits each, until there are no more."""
        query = _query(query, fields)
        while True:
            answer = self.search(query)
            yield answer
            if answer.next is None:
                return
            query = _after(query, answer)

    def search_many(self, queries: Sequence[Query]) -> list[Answer | SearchError]:
        """An answer, or what went wrong, for each of at most 256 queries."""
        request = search_pb2.SearchManyRequest(requests=[convert.query_to_pb(_query(query, {})) for query in queries])
        return [convert.result_from_pb(result) for result in self._call(self._search.SearchMany, request).results]

    def describe(self) -> Description:
        """What is served."""
        return convert.description_from_pb(self._call(self._archive.Describe, search_pb2.DescribeRequest()))

    def is_serving(self) -> bool:
        """Whether the gateway can answer searches now: some shard can, and it is not about to stop."""
        return bool(self._call(self._health.Check, health_pb2.HealthCheckRequest()).status == _SERVING)

    def upsert(self, rows: Iterable[Row]) -> int:
        """Writes rows, each in place of the row with its key where there is one; how many.

        They are sent as they come, each piece once the one before it is committed and searches see it. When it fails,
        pieces before the failing one are written; all may be sent again.
        """
        done = 0
        for piece in _pieces(rows):
            request = search_pb2.UpsertRequest(rows=map(convert.row_to_pb, piece))
            for response in self._stream(self._archive.Upsert, iter([request])):
                done += response.committed_rows
        return done

    def delete(self, keys: Iterable[str]) -> int:
        """Removes the rows with these keys; how many there were."""
        removed = 0
        for piece in _chunks(keys):
            check_keys(piece)
            for response in self._stream(self._archive.Delete, iter([search_pb2.DeleteRequest(keys=piece)])):
                removed += response.removed_rows
        return removed

    def refresh(self, archive: str = "", model: str = "", shards: int = 0) -> None:
        """Moves the gateway to the newest version of its archive, another archive beside it, or other shards."""
        check_num_shards(shards)
        self._call(self._archive.Refresh, search_pb2.RefreshRequest(archive=archive, model=model, shards=shards))

    def close(self) -> None:
        """Ends the connection."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Any, request: Any) -> Any:
        try:
            return method(request, **self._options())
        except grpc.RpcError as error:
            raise self._typed(error) from error

    def _stream(self, method: Any, requests: Iterator[Any]) -> Iterator[Any]:
        try:
            yield from method(requests, **self._options())
        except grpc.RpcError as error:
            raise self._typed(error) from error


class AsyncClient(_Calls):
    """`Client` for asyncio; it belongs to one event loop.

    async with AsyncClient("127.0.0.1:50051") as client:
        answer = await client.search(text="boats in a harbor", k=5)
    """

    def __init__(
        self, address: str, timeout_s: float = 10.0, *, token: str | None = None, tls: Tls | None = None
    ) -> None:
        """See `Client`."""
        super().__init__(address, timeout_s, token, tls)
        self._channel = (
            grpc.aio.insecure_channel(address, options=_OPTIONS)
            if self._credentials is None
            else grpc.aio.secure_channel(address, self._credentials, options=_OPTIONS)
        )
        self._search: Any = search_pb2_grpc.SearchServiceStub(self._channel)
        self._archive: Any = search_pb2_grpc.ArchiveServiceStub(self._channel)
        self._health = health_pb2_grpc.HealthStub(self._channel)

    async def search(self, query: Query | None = None, **fields: Any) -> Answer:
        """See `Client.search`."""
        request = convert.query_to_pb(_query(query, fields))
        return convert.answer_from_pb(await self._call(self._search.Search, request))

    async def pages(self, query: Query | None = None, **fields: Any) -> AsyncIterator[Answer]:
        """See `Client.pages`."""
        query = _query(query, fields)
        while True:
            answer = await self.search(query)
            yield answer
            if answer.next is None:
                return
            query = _after(query, answer)

    async def search_many(self, queries: Sequence[Query]) -> list[Answer | SearchError]:
        """See `Client.search_many`."""
        request = search_pb2.SearchManyRequest(requests=[convert.query_to_pb(_query(query, {})) for query in queries])
        response = await self._call(self._search.SearchMany, request)
        return [convert.result_from_pb(result) for result in response.results]

    async def describe(self) -> Description:
        """See `Client.describe`."""
        return convert.description_from_pb(await self._call(self._archive.Describe, search_pb2.DescribeRequest()))

    async def is_serving(self) -> bool:
        """See `Client.is_serving`."""
        response = await self._call(self._health.Check, health_pb2.HealthCheckRequest())
        return bool(response.status == _SERVING)

    async def upsert(self, rows: Iterable[Row]) -> int:
        """See `Client.upsert`."""
        done = 0
        for piece in _pieces(rows):
            request = search_pb2.UpsertRequest(rows=map(convert.row_to_pb, piece))
            async for response in self._stream(self._archive.Upsert, [request]):
                done += response.committed_rows
        return done

    async def delete(self, keys: Iterable[str]) -> int:
        """See `Client.delete`."""
        removed = 0
        for piece in _chunks(keys):
            check_keys(piece)
            async for response in self._stream(self._archive.Delete, [search_pb2.DeleteRequest(keys=piece)]):
                removed += response.removed_rows
        return removed

    async def refresh(self, archive: str = "", model: str = "", shards: int = 0) -> None:
        """See `Client.refresh`."""
        check_num_shards(shards)
        await self._call(self._archive.Refresh, search_pb2.RefreshRequest(archive=archive, model=model, shards=shards))

    async def close(self) -> None:
        """Ends the connection."""
        await self._channel.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def _call(self, method: Any, request: Any) -> Any:
        try:
            return await method(request, **self._options())
        except grpc.RpcError as error:
            raise self._typed(error) from error

    async def _stream(self, method: Any, requests: Iterable[Any]) -> AsyncIterator[Any]:
        call: AsyncIterable[Any] = method(iter(requests), **self._options())
        try:
            async for response in call:
                yield response
        except grpc.RpcError as error:
            raise self._typed(error) from error


def _after(query: Query, answer: Answer) -> Query:
    return dataclasses.replace(query, after=answer.next)


def _pieces(rows: Iterable[Row]) -> Iterator[list[Row]]:
    """Rows in messages that a gateway takes."""
    piece: list[Row] = []
    size = 0
    for row in rows:
        row.check()
        bytes_of_row = len(row.image or b"") + len(row.thumbnail or b"") + len(row.footprint or b"")
        if piece and (len(piece) == MAX_ROWS or size + bytes_of_row > _MAX_PIECE_BYTES):
            yield piece
            piece, size = [], 0
        piece.append(row)
        size += bytes_of_row
    if piece:
        yield piece


def _chunks(keys: Iterable[str]) -> Iterator[list[str]]:
    keys = iter(keys)
    while piece := list(itertools.islice(keys, MAX_ROWS)):
        yield piece
