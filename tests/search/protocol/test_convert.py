from datetime import UTC, datetime, timedelta, timezone

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from orbithash.search.protocol.convert import (
    answer_from_pb,
    answer_to_pb,
    query_from_pb,
    query_to_pb,
)
from orbithash.search.protocol.errors import (
    DeadlineExceeded,
    GatewayError,
    InvalidQuery,
    KeyNotFound,
    Overloaded,
    PermissionDenied,
    SearchError,
    Unauthenticated,
    Unavailable,
)
from orbithash.search.protocol.queries import Answer, Coverage, Hit, Query
from orbithash.search.protocol.statuses import error_from_pb, error_to_pb
from orbithash.v1 import search_pb2


@pytest.mark.parametrize("query", [Query(image=b"x", k=1), Query(code=b"\x00\xff", k=10_000), Query(key="é", k=2)])
def test_queries_survive(query):
    request = search_pb2.SearchRequest.FromString(query_to_pb(query).SerializeToString())
    assert query_from_pb(request) == query


def test_an_empty_request_is_no_query():
    assert query_from_pb(search_pb2.SearchRequest()) == Query(k=0)
    assert query_from_pb(search_pb2.SearchRequest(image=b"", k=3)) == Query(image=b"", k=3)


def test_answers_survive_with_zeros_and_gaps_kept_apart():
    answer = Answer(
        (
            Hit(1, 0, 2**64 - 1, "a", "", 0.0, -0.0, datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)),
            Hit(2, 512, 0, "b", None, None, None, None),
        ),
        ties_at_cutoff=2**40,
        coverage=Coverage(1, 3, 1, 2),
        took_ms=0.25,
        model_id="m",
        archive_version=9,
    )
    response = answer_to_pb(answer)
    assert response.coverage.fraction == 1 / 3
    assert answer_from_pb(search_pb2.SearchResponse.FromString(response.SerializeToString())) == answer


def test_times_of_other_zones_become_utc():
    local = datetime(2020, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    answer = Answer((Hit(1, 0, 1, "a", None, None, None, local),), 1, Coverage(1, 1, 1, 1), 1.0, "m", 1)
    received = answer_from_pb(answer_to_pb(answer)).hits[0].datetime
    assert (received, received.tzinfo) == (datetime(2020, 1, 1, tzinfo=UTC), UTC)


ERRORS = [
    (InvalidQuery(("k", "too small"), ("key", "empty")), grpc.StatusCode.INVALID_ARGUMENT),
    (KeyNotFound("no such key"), grpc.StatusCode.NOT_FOUND),
    (Overloaded("busy", retry_after_s=1.5), grpc.StatusCode.RESOURCE_EXHAUSTED),
    (DeadlineExceeded("late"), grpc.StatusCode.DEADLINE_EXCEEDED),
    (Unauthenticated("who?"), grpc.StatusCode.UNAUTHENTICATED),
    (PermissionDenied("readers only read"), grpc.StatusCode.PERMISSION_DENIED),
    (Unavailable("gone"), grpc.StatusCode.UNAVAILABLE),
    (GatewayError("internal error"), grpc.StatusCode.INTERNAL),
]


@pytest.mark.parametrize(("error", "code"), ERRORS)
def test_errors_survive(error, code):
    status = error_to_pb(error)
    assert (status.code, status.message) == (code.value[0], str(error))
    received = error_from_pb(status_pb2.Status.FromString(status.SerializeToString()))
    assert (type(received), str(received), vars(received)) == (type(error), str(error), vars(error))


def test_every_error_of_a_search_is_among_them():
    assert {type(error) for error, _ in ERRORS} == set(SearchError.__subclasses__())


def test_an_error_of_another_domain_is_not_ours():
    status = error_to_pb(KeyNotFound("x"))
    info = error_details_pb2.ErrorInfo(reason="KEY_NOT_FOUND", domain="example.org")
    status.details[0].Pack(info)
    assert error_from_pb(status) is None
    assert error_from_pb(status_pb2.Status(code=5, message="x")) is None


def test_only_a_short_first_line_leaves():
    assert error_to_pb(KeyNotFound("first\nsecond")).message == "first"
    assert len(error_to_pb(KeyNotFound("é" * 5000)).message) == 300
