from datetime import UTC, datetime, timedelta, timezone
from urllib.parse import quote

import grpc
import pytest
from google.rpc import error_details_pb2, status_pb2

from orbithash.search.protocol.convert import (
    answer_from_pb,
    answer_to_bytes,
    query_from_pb,
    query_to_pb,
    result_from_pb,
    results_to_bytes,
    row_from_bytes,
    row_from_pb,
    row_to_pb,
    update_from_pb,
    update_to_pb,
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
from orbithash.search.protocol.hits import RowHits, hit_to_pb, row_of
from orbithash.search.protocol.queries import Answer, Coverage, Example, Hit, Query
from orbithash.search.protocol.rows import Row, RowUpdate
from orbithash.search.protocol.statuses import error_from_pb, error_to_pb
from orbithash.v1 import search_pb2


@pytest.mark.parametrize(
    "query",
    [
        Query(image=b"x", k=1),
        Query(code=b"\x00\xff", k=10_000),
        Query(key="é", k=2),
        Query(vector=[0.5, -1e-40], k=3),
        Query(positives=(Example(vector=[1], weight=0.1), Example(text="x")), negatives=(Example(key="a", weight=7),)),
        Query(key="a", rescore="vector", oversampling=1),
        Query(key="a", rescore="asymmetric"),
    ],
)
def test_queries_survive(query):
    request = search_pb2.SearchRequest.FromString(query_to_pb(query).SerializeToString())
    assert query_from_pb(request) == query


def test_an_unknown_way_of_rescoring_is_refused():
    with pytest.raises(InvalidQuery, match="rescore: unknown way of rescoring 9"):
        query_from_pb(search_pb2.SearchRequest(key="a", k=1, rescore=9))


def test_an_empty_request_has_no_example():
    assert query_from_pb(search_pb2.SearchRequest()) == Query(k=0)
    assert query_from_pb(search_pb2.SearchRequest(image=b"", k=3)) == Query(image=b"", k=3)


def test_a_weight_of_zero_differs_from_no_weight():
    request = search_pb2.SearchRequest(k=1)
    request.examples.positives.add(key="a")
    request.examples.positives.add(key="b", weight=0)
    query = query_from_pb(search_pb2.SearchRequest.FromString(request.SerializeToString()))
    assert [example.weight for example in query.positives] == [1, 0]
    with pytest.raises(InvalidQuery, match="weight: a weight is a number above 0 and at most 1,000, got 0"):
        query.check()


def test_a_row_with_a_vector_survives():
    row = Row(key="a", vector=[1.0, 2.0])
    assert row_from_pb(search_pb2.Row.FromString(row_to_pb(row).SerializeToString())) == row


def test_answers_survive_and_zero_differs_from_unknown():
    answer = Answer(
        (
            Hit(1, 0, 2**64 - 1, "a", "", 0.0, -0.0, datetime(1969, 12, 31, 23, 59, 59, 999_999, UTC)),
            Hit(2, 512, 0, "b", None, None, None, None),
            Hit(3, 4, 1, "c", None, None, None, None, {}, -0.25),
            Hit(4, 5, 2, "d", None, None, None, None, {}, 0.0),
        ),
        ties_at_cutoff=2**40,
        coverage=Coverage(1, 3, 1, 2),
        took_ms=0.25,
        model_id="m",
        archive_version=9,
        is_exact=False,
        shortlist_radius=0,
        is_shortlist_bounded=True,
    )
    response = search_pb2.SearchResponse.FromString(answer_to_bytes(answer))
    assert response.coverage.fraction == 1 / 3
    assert answer_from_pb(response) == answer
    scores = [hit.score for hit in answer.hits]
    of_rows = answer._replace(
        hits=RowHits([hit.distance for hit in answer.hits], list(map(row_of, answer.hits)), scores)
    )
    assert answer_from_pb(search_pb2.SearchResponse.FromString(answer_to_bytes(of_rows))) == answer == of_rows


@pytest.mark.parametrize("number", [0, 1, 127, 128, 1023, 1024, 3000])
def test_serialised_rows_are_the_hits_of_a_response(number):
    """Ranks, distances and lengths of one, two and three bytes, with and without columns and scores."""
    hits = tuple(
        Hit(
            rank,
            rank % 513,
            rank**5,
            "k" * (rank % 70 * 40),
            None,
            None,
            0.5,
            None,
            {"code": b"ab"},
            [None, 0.0, -1.5][rank % 3],
        )
        for rank in range(1, number + 1)
    )
    rows = RowHits([hit.distance for hit in hits], list(map(row_of, hits)), [hit.score for hit in hits])
    response = search_pb2.SearchResponse.FromString(rows.serialised())
    assert list(response.hits) == list(map(hit_to_pb, hits))
    assert (len(rows), tuple(rows), rows, rows[:2]) == (number, hits, hits, hits[:2])
    assert RowHits([], []) != (1,)


def test_outcomes_of_a_batch_survive():
    hits = (Hit(1, 0, 1, "a", "b", None, None, None),)
    answer = Answer(hits, 1, Coverage(1, 1, 1, 1), 1.0, "m" * 200, 1)
    response = search_pb2.SearchManyResponse.FromString(results_to_bytes([answer, KeyNotFound("no such key"), answer]))
    first, error, last = map(result_from_pb, response.results)
    assert first == last == answer
    assert (type(error), str(error)) == (KeyNotFound, "no such key")


def test_times_of_other_zones_become_utc():
    local = datetime(2020, 1, 1, 2, tzinfo=timezone(timedelta(hours=2)))
    answer = Answer((Hit(1, 0, 1, "a", None, None, None, local),), 1, Coverage(1, 1, 1, 1), 1.0, "m", 1)
    received = answer_from_pb(search_pb2.SearchResponse.FromString(answer_to_bytes(answer))).hits[0].datetime
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


def test_a_kind_of_an_error_is_sent_as_that_error():
    class VersionGone(Unavailable):
        """A shard no longer has the version."""

    status = error_to_pb(VersionGone("gone"))
    assert type(error_from_pb(status)) is Unavailable


def test_errors_of_other_domains_are_not_converted():
    status = error_to_pb(KeyNotFound("x"))
    info = error_details_pb2.ErrorInfo(reason="KEY_NOT_FOUND", domain="example.org")
    status.details[0].Pack(info)
    assert error_from_pb(status) is None
    assert error_from_pb(status_pb2.Status(code=5, message="x")) is None


@pytest.mark.parametrize("problem", ["x", "é" * 5000, "\U0001f6f0" * 300, "\n" * 400])
@pytest.mark.parametrize("number", [1, 4, 300, 100_000])
def test_a_status_stays_below_the_limit_of_metadata(problem, number):
    """Clients of gRPC accept 8 KiB of metadata, where the message is percent-encoded and the status in base64."""
    error = InvalidQuery(*((f"field{i}", problem) for i in range(number)))
    status = error_to_pb(error)
    sent = len(quote(status.message)) + -(-status.ByteSize() * 4 // 3)
    assert sent <= 7.5 * 1024
    received = error_from_pb(status)
    assert received.violations[0][0] == "field0"
    assert len(received.violations) <= number
    if number > 5:
        assert f"and {number - 5:,} more problems" in str(error)


def test_columns_of_an_update_survive():
    update = RowUpdate("a", {"label": "x", "caption": None, "datetime": datetime(2024, 5, 1, tzinfo=UTC), "lon": 0.0})
    message = search_pb2.RowUpdate.FromString(update_to_pb(update).SerializeToString())
    assert update_from_pb(message) == update
    assert update_from_pb(update_to_pb(RowUpdate("a", {"uri": None}))) == RowUpdate("a", {"uri": None})


def test_rows_survive():
    row = Row(
        key="é", code=b"ab", uri="u", label="", lon=0.0, lat=-0.0, datetime=datetime(1969, 1, 1, tzinfo=UTC), id=0
    )
    assert row_from_pb(search_pb2.Row.FromString(row_to_pb(row).SerializeToString())) == row


def test_a_row_of_a_shard_is_a_row():
    when = datetime(2024, 5, 1, microsecond=7, tzinfo=UTC)
    hit = Hit(0, 0, 2**63, "é", "", 0.0, None, when, {"uri": "u", "code": b"ab", "footprint": b"wkb"})
    expected = Row(key="é", code=b"ab", uri="u", label="", lon=0.0, datetime=when, footprint=b"wkb", id=2**63)
    assert row_from_bytes(row_of(hit)) == expected
    assert row_from_bytes(row_of(Hit(0, 0, 0, "a", None, None, None, None))) == Row(key="a", id=0)


def test_only_a_short_first_line_is_sent():
    assert error_to_pb(KeyNotFound("first\nsecond")).message == "first"
    assert len(error_to_pb(KeyNotFound("é" * 5000)).message) == 300
