"""Conversion of what shards are asked for, and of what they answer, to messages and back."""

from typing import Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError
from google.rpc import status_pb2

from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids, Scope, ShardAnswer
from orbithash.search.protocol.errors import DeadlineExceeded, GatewayError, SearchError, Unavailable
from orbithash.search.protocol.statuses import error_from_pb, error_to_pb
from orbithash.v1 import shards_pb2 as pb

__all__ = [
    "NUMBER_KEY",
    "SERVICE",
    "TOKEN_KEY",
    "BadMessage",
    "answer_from_pb",
    "answer_to_pb",
    "codes_of",
    "error_response",
    "ids_of",
    "parsed",
    "scope_of",
    "search_request",
    "table_from_bytes",
    "table_to_bytes",
]

# Name of the service in the paths of gRPC.
SERVICE = pb.DESCRIPTOR.services_by_name["ShardService"].full_name

# Names of the metadata of each call.
TOKEN_KEY, NUMBER_KEY = "orbithash-shard-token", "orbithash-shard"

_IDS, _DISTANCES, _TIES = np.dtype("<u8"), np.dtype("<i4"), np.dtype("<i8")


class BadMessage(ValueError):
    """Bytes that are not the message that they should be."""


class _Response(Protocol):
    error: status_pb2.Status

    def HasField(self, name: str) -> bool: ...


def search_request(version: int, queries: Codes, k: int, scope: Scope) -> pb.ShardSearchRequest:
    """Return the request of a search of queries uint8 [Q, B]."""
    request = pb.ShardSearchRequest(
        version=version,
        queries=queries.tobytes(),
        num_queries=len(queries),
        k=k,
        radius=scope.radius,
        filter=scope.filter,
        include=scope.include,
        with_rows=scope.with_rows,
    )
    if scope.after is not None:
        request.after.distance, request.after.id = scope.after
    return request


def codes_of(request: pb.ShardSearchRequest) -> Codes:
    """Return the queries of a request, uint8 [Q, B], read-only."""
    if not request.num_queries or len(request.queries) % request.num_queries:
        raise BadMessage(f"{len(request.queries)} bytes of {request.num_queries} queries")
    return np.frombuffer(request.queries, np.uint8).reshape(request.num_queries, -1)


def scope_of(request: pb.ShardSearchRequest) -> Scope:
    """Return the scope of a request."""
    return Scope(
        request.radius if request.HasField("radius") else None,
        (request.after.distance, request.after.id) if request.HasField("after") else None,
        request.filter,
        tuple(request.include),
        request.with_rows,
    )


def answer_to_pb(answer: ShardAnswer) -> pb.ShardSearchResponse:
    """Return the response with the answer of a shard."""
    return pb.ShardSearchResponse(
        distances=np.ascontiguousarray(answer.distances, _DISTANCES).tobytes(),
        ids=np.ascontiguousarray(answer.ids, _IDS).tobytes(),
        ties=np.ascontiguousarray(answer.ties, _TIES).tobytes(),
        rows=answer.rows,
        num_matching=answer.num_matching,
        num_rows=answer.num_rows,
        num_shards=answer.num_shards,
    )


def answer_from_pb(response: pb.ShardSearchResponse) -> ShardAnswer:
    """Return the answer in a response; raise `BadMessage` if its arrays do not fit together."""
    ties = np.frombuffer(response.ties, _TIES)
    distances, ids = np.frombuffer(response.distances, _DISTANCES), np.frombuffer(response.ids, _IDS)
    if len(distances) != len(ids) or not len(ties) or len(ids) % len(ties):
        raise BadMessage(f"{len(distances)} distances, {len(ids)} ids and {len(ties)} counts of ties")
    return ShardAnswer(
        distances.reshape(len(ties), -1),
        ids.reshape(len(ties), -1),
        ties,
        tuple(response.rows),
        response.num_matching if response.HasField("num_matching") else None,
        response.num_rows if response.HasField("num_rows") else None,
        response.num_shards,
    )


def ids_of(data: bytes) -> Ids:
    """Return ids uint64 [N] from their bytes, read-only."""
    if len(data) % _IDS.itemsize:
        raise BadMessage(f"{len(data)} bytes of ids")
    return np.frombuffer(data, _IDS)


def table_to_bytes(table: Any) -> bytes:
    """Return a `pyarrow.Table` as a stream of Arrow's IPC format."""
    import pyarrow as pa

    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    data: bytes = sink.getvalue().to_pybytes()
    return data


def table_from_bytes(data: bytes) -> Any:
    """Return the `pyarrow.Table` that `table_to_bytes` has written."""
    import pyarrow as pa

    try:
        return pa.ipc.open_stream(data).read_all()
    except (pa.ArrowInvalid, OSError) as error:
        raise BadMessage(f"not a table: {error}") from error


def error_response(method: str, error: SearchError) -> bytes:
    """Return the serialised response of a method that refuses a call."""
    # All responses have the same field `error`.
    response = getattr(pb, f"Shard{method}Response")(error=error_to_pb(error))
    data: bytes = response.SerializeToString()
    return data


def parsed(message: type[Any], data: bytes) -> Any:
    """Return a message from its bytes. Raises `BadMessage`, and the error that a response carries."""
    try:
        result = message.FromString(data)
    except DecodeError as error:
        raise BadMessage(f"not a {message.DESCRIPTOR.name}") from error
    if "error" in message.DESCRIPTOR.fields_by_name and result.HasField("error"):
        raise _error_of(result)
    return result


def _error_of(response: _Response) -> Exception:
    error = error_from_pb(response.error) or Unavailable("the shard answered with an unknown error")
    if isinstance(error, DeadlineExceeded):
        return TimeoutError(str(error))
    # A fault of one shard is not one of the gateway: other replicas and shards may answer.
    return Unavailable(str(error)) if isinstance(error, GatewayError) else error
