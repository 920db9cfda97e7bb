"""The blocking and the asyncio client, each over a gateway with a real archive."""

import asyncio
import inspect
import threading
from datetime import UTC, datetime
from typing import Unpack, get_origin

import grpc
import numpy as np
import pytest
from archive_parts import encode, serving_archive
from images import encoded, picture
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.search.client import AsyncClient, Client
from orbithash.search.client import streams as client_streams
from orbithash.search.gateway.limits import GatewayLimits
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, KeyNotFound, Overloaded
from orbithash.search.protocol.queries import Example, Query
from orbithash.search.protocol.rows import Row
from orbithash.v1 import search_pb2_grpc

WHEN = datetime(2024, 5, 1, tzinfo=UTC)
METHODS = sorted(name for name, _ in inspect.getmembers(Client, inspect.isfunction) if not name.startswith("_"))


@pytest.fixture
def served(tmp_path):
    """The address of a gateway over an archive with the rows k0 to k9."""
    with serving_archive(tmp_path / "archive") as (address, _, _):
        with Client(address) as client:
            client.upsert(Row(key=f"k{i}", code=bytes([0, i]), label=["beach", "river"][i % 2]) for i in range(10))
        yield address


def test_both_have_the_same_methods_with_the_same_parameters():
    assert (
        sorted(name for name, _ in inspect.getmembers(AsyncClient, inspect.isfunction) if not name.startswith("_"))
        == METHODS
    )
    for name in [*METHODS, "__init__"]:
        blocking, other = (inspect.signature(getattr(kind, name)) for kind in (Client, AsyncClient))
        assert blocking.parameters == other.parameters, name
        results = str(blocking.return_annotation), str(other.return_annotation).replace("AsyncIterator", "Iterator")
        assert results[0] == results[1], name
        for parameter in blocking.parameters.values():
            is_open = parameter.kind in (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
            # The fields of a typed dictionary are completed.
            assert not is_open or get_origin(parameter.annotation) is Unpack, (
                f"{name} has no completion for {parameter}"
            )


def test_each_method_that_calls_the_gateway_has_a_time_limit():
    for name in METHODS:
        if name != "close":
            assert "timeout_s" in inspect.signature(getattr(Client, name)).parameters, name


@pytest.mark.parametrize(
    "fields",
    [{"k": 10}, {"k": 500}, {"filter": ""}, {"include": ()}, {"radius": 3}, {"key": "k1"}, {"min_coverage": 0.0}],
)
def test_a_query_and_fields_together_are_refused(make_client, fields):
    (name,) = fields
    with make_client("127.0.0.1:1") as client:
        for method in (client.search, lambda *a, **f: list(client.pages(*a, **f))):
            with pytest.raises(InvalidQuery, match=f"got a Query and {name}"):
                method(Query(key="k3", k=2), **fields)
        if name != "key":
            with pytest.raises(InvalidQuery, match=f"got a Query and {name}"):
                client.search_batch([Query(key="k3", k=2)], **fields)


def test_wrong_arguments_are_refused_before_they_are_sent(make_client):
    with make_client("127.0.0.1:1") as client:
        for call, words in (
            (lambda: client.search("k3"), "query: a Query, or fields"),
            (lambda: client.search(key=5), "key: a key is a string, got int"),
            (lambda: client.search(key="k3", include="uri"), "include: a sequence of column names"),
            (lambda: client.search(key="k3", include=["thumbnail"], k=1001), "k: at most 1,000 hits"),
            (lambda: client.search_batch("k3"), "queries: a sequence"),
            (lambda: client.search_batch(), "queries: give queries or exactly one of"),
            (lambda: client.search_batch(keys=["a"], texts=["b"]), "got texts and keys"),
            (lambda: client.get("k3"), r"keys: a sequence such as \['a.tif'\], got one str: 'k3'"),
            (lambda: client.get(["k3"], include=["colour"]), "include: unknown column 'colour'"),
            (lambda: client.delete("k3"), "keys: a sequence"),
            (lambda: client.delete(), "give keys or a filter, got neither"),
            (lambda: client.delete(["a"], filter="lon > 1"), "give keys or a filter, got both"),
            (lambda: client.delete(filter=""), "an empty filter would remove all rows"),
            (lambda: client.update({"a": {}}), "columns: no column to update"),
            (lambda: client.update({"a": {"label": 5}}), "label: text, got int"),
            (lambda: client.upsert([Row(key="a", code=b"ab", lat=91)]), "lat: from -90 to 90"),
            (lambda: list(client.scroll(page_size=0)), "page_size"),
            (lambda: client.count(timeout_s=0), "above 0"),
        ):
            with pytest.raises(InputError, match=words):
                call()


def test_rows_by_key_by_page_and_by_number(make_client, served):
    with make_client(served) as client:
        found = client.get((f"k{i}" for i in (3, 99, 1)), include=("code", "uri"))
        assert list(found) == ["k3", "k1"]
        assert (found["k3"].code, found["k3"].label, found["k3"].uri) == (b"\0\3", "river", "k3")
        assert client.get([]) == {}
        assert (client.count(), client.count("label = 'beach'"), client.count("lon > 0")) == (10, 5, 0)
        rows = list(client.scroll("label = 'beach'", page_size=2, include=("code",)))
        assert [row.key for row in rows] == ["k0", "k2", "k4", "k6", "k8"]
        assert [row.id for row in rows] == sorted(row.id for row in rows)
        rest = list(client.scroll("label = 'beach'", after=rows[2].id))
        assert [row.key for row in rest] == ["k6", "k8"]
        assert len(list(client.scroll())) == 10
        # What was read can be written.
        assert client.upsert(rows) == 5
        assert client.count("label = 'beach'") == 5


def test_updates_leave_the_other_columns(make_client, served):
    row = Row(key="full", code=b"ab", uri="file:///x", label="harbor", caption="boats", datetime=WHEN, lon=1.0, lat=2.0)
    with make_client(served) as client:
        client.upsert([row])
        assert client.update({"full": {"label": "port", "caption": None, "lon": 3.0}, "nowhere": {"label": "x"}}) == 1
        found = client.get(["full"], include=("uri", "caption", "code"))["full"]
        assert (found.label, found.caption, found.lon) == ("port", None, 3.0)
        assert (found.uri, found.datetime, found.lat, found.code) == ("file:///x", WHEN, 2.0, b"ab")
        later = datetime(2025, 1, 1, tzinfo=UTC)
        assert client.update({"full": {"datetime": later, "uri": None}}) == 1
        found = client.get(["full"], include=("uri",))["full"]
        assert (found.datetime, found.uri) == (later, "full")
        assert client.update({}) == 0


def test_deletion_by_key_and_by_filter(make_client, served):
    with make_client(served) as client:
        assert client.delete(["k0", "nowhere"]) == 1
        assert client.delete(filter="label = 'beach'") == 4
        assert client.delete(filter="label = 'beach'") == 0
        assert client.count() == 5
        assert client.delete([]) == 0


def test_batches_are_as_long_as_the_caller_wants(make_client, served):
    codes = np.zeros((600, 2), np.uint8)
    codes[:, 1] = np.arange(600) % 10
    with make_client(served) as client:
        answers = client.search_batch(codes=codes, k=1)
        assert [answer.hits[0].key for answer in answers] == [f"k{i % 10}" for i in range(600)]
        found = client.search_batch([Query(key="k1", k=1), Query(key="nowhere"), Query(code=b"x")])
        assert found[0].hits[0].key == "k1"
        assert (type(found[1]), type(found[2])) == (KeyNotFound, InvalidQuery)
        assert len(client.search_batch(keys=["k1"] * 30, k=10_000)) == 30
        assert client.search_batch([]) == []
        assert client.search_batch(keys=["k1", "k2"], filter="label = 'river'", k=1)[1].hits[0].label == "river"


def test_images_and_codes_in_any_form(make_client, served, tmp_path):
    file = encoded(picture(), "PNG")
    path = tmp_path / "image.png"
    path.write_bytes(file)
    pixels = Image.open(path)
    with make_client(served) as client:
        client.upsert([Row(key="bytes", image=file), Row(key="path", image=path), Row(key="text", image=str(path))])
        client.upsert([Row(key="array", code=np.array([0, 77], np.uint8))])
        assert client.search(code=bytearray([0, 77]), k=1).hits[0].key == "array"
        assert client.get(["array"], include=["code"])["array"].code == bytes([0, 77])
        for form in (file, bytearray(file), memoryview(file), path, str(path)):
            assert [hit.distance for hit in client.search(image=form, k=3).hits] == [0, 0, 0]
        assert len(client.search(image=pixels, k=3).hits) == 3
        assert client.search(positives=[Example(image=path)], k=1).hits[0].distance == 0
        for image, words in (
            (tmp_path / "nowhere.png", "nowhere.png: cannot be read"),
            (np.zeros((8, 8, 3), np.uint8), "use PIL.Image.fromarray"),
            (Image.new("CMYK", (8, 8)), "convert it to RGB"),
        ):
            with pytest.raises(InputError, match=words):
                client.search(image=image)
        for code, words in (
            (np.zeros((1, 2), np.uint8), r"shape \[1, 2\]"),
            (np.zeros(16), "format 'd'"),
            ("00ff", "got str"),
        ):
            with pytest.raises(InputError, match=words):
                client.search(code=code)


def test_messages_are_sent_before_the_first_is_acknowledged(make_client, tmp_path, monkeypatch):
    """The second message of a stream is encoded while the first is committed, and commits keep their order."""
    encoded_sizes, second_is_there = [], threading.Event()

    async def record(images):
        encoded_sizes.append(len(images[0]))
        if len(encoded_sizes) == 2:
            second_is_there.set()
        return await encode(images)

    with serving_archive(tmp_path / "archive", encode=record) as (address, service, loop):
        lock = service._served.writer.lock
        asyncio.run_coroutine_threadsafe(lock.acquire(), loop).result(30)

        def release():
            # No commit can end before: the second message is there all the same.
            assert second_is_there.wait(60)
            loop.call_soon_threadsafe(lock.release)

        thread = threading.Thread(target=release)
        thread.start()
        monkeypatch.setattr("orbithash.search.client.arguments.MAX_ROWS", 2)
        with make_client(address, 60.0) as client:
            rows = [Row(key=f"k{i % 7}", image=bytes(100 + i), label=str(i)) for i in range(20)]
            assert client.upsert(rows) == 20
            thread.join()
            assert {key: row.label for key, row in client.get([f"k{i}" for i in range(7)]).items()} == {
                f"k{i % 7}": str(i) for i in range(20)
            }


def test_an_error_in_a_stream_is_raised_and_earlier_rows_stay(make_client, served, monkeypatch):
    monkeypatch.setattr("orbithash.search.client.arguments.MAX_ROWS", 1)
    with make_client(served) as client:
        rows = [Row(key="good", code=b"ab"), Row(key="bad", code=b"too long")]
        with pytest.raises(InvalidQuery, match=r"16 bits.*row 'bad'") as caught:
            client.upsert([*rows, *(Row(key=f"more{i}", code=b"ab") for i in range(50))])
        assert caught.value.request_id
        assert list(client.get(["good", "bad", "more49"])) == ["good"]

        def broken():
            yield rows[0]
            raise RuntimeError("the caller's own fault")

        with pytest.raises(RuntimeError, match="own fault"):
            client.upsert(broken())
        assert client.upsert([rows[0]]) == 1


def test_time_limits_of_calls_and_of_acknowledgements(make_client, tmp_path):
    never = asyncio.Event()

    async def hang(images):
        await never.wait()

    with serving_archive(tmp_path / "archive", encode=hang) as (address, _, _), make_client(address, 600.0) as client:
        for call in (
            lambda: client.search(image=b"x", timeout_s=0.2),
            lambda: client.upsert([Row(key="a", image=b"x")], timeout_s=0.2),
        ):
            with pytest.raises(DeadlineExceeded, match=r"within 0\.\d+ s"):
                call()


def test_channel_options_override_those_of_the_client(make_client, served):
    options = [("grpc.max_receive_message_length", 20)]
    with make_client(served, options=options) as client, pytest.raises(Overloaded, match="larger than max"):
        client.search(key="k1")


def test_idle_streams_leave_room_for_searches_and_end(tmp_path):
    limits = GatewayLimits(max_concurrent_rpcs=12, max_streams=3, max_idle_s=3)
    idle = threading.Event()

    def silent():
        idle.wait(60)
        yield from ()

    with serving_archive(tmp_path / "archive", limits) as (address, _, _), grpc.insecure_channel(address) as channel:
        stub = search_pb2_grpc.ArchiveServiceStub(channel)
        streams = [getattr(stub, name)(silent()) for name in ("Upsert", "Update", "Delete") for _ in range(5)]
        with Client(address) as client:
            assert client.count() == 0
        codes = sorted(stream.code().name for stream in streams)
        idle.set()
        assert codes == ["DEADLINE_EXCEEDED"] * 9 + ["RESOURCE_EXHAUSTED"] * 6
        with Client(address) as client:
            assert client.upsert([Row(key="k1", code=b"ab")]) == 1


def test_the_window_is_bounded(make_client, served, monkeypatch):
    """A client reads at most a few messages ahead of what is acknowledged."""
    monkeypatch.setattr("orbithash.search.client.arguments.MAX_ROWS", 1)
    acknowledged, furthest = [0], [0]

    def rows():
        for i in range(30):
            furthest[0] = max(furthest[0], i - acknowledged[0])
            yield Row(key=f"w{i}", code=b"ab")

    original = client_streams._Stream.receive, client_streams._AsyncStream.receive

    def receive(self):
        response = original[0](self)
        acknowledged[0] += response is not None
        return response

    async def receive_async(self):
        response = await original[1](self)
        acknowledged[0] += response is not None
        return response

    monkeypatch.setattr(client_streams._Stream, "receive", receive)
    monkeypatch.setattr(client_streams._AsyncStream, "receive", receive_async)
    with make_client(served) as client:
        assert client.upsert(rows()) == 30
    assert 1 <= furthest[0] <= client_streams._MAX_IN_FLIGHT + 1


def test_a_refresh_outlives_the_time_limit_of_its_caller(make_client, tmp_path):
    with serving_archive(tmp_path / "archive") as (address, service, loop), make_client(address) as client:
        asyncio.run_coroutine_threadsafe(service._refreshing.acquire(), loop).result(30)
        with pytest.raises(DeadlineExceeded):
            client.refresh(shards=3, timeout_s=0.2)
        loop.call_soon_threadsafe(service._refreshing.release)
        # This one waits for the first.
        client.refresh()
        assert len(client.describe().shards) == 3


@pytest.mark.parametrize("num_vertices", [201, 9_999])
def test_a_filter_may_hold_a_real_boundary(make_client, served, num_vertices):
    angles = np.linspace(0, 2 * np.pi, num_vertices, endpoint=False)
    points = [f"{100 + 3 * np.cos(angle):.15f} {-40 + 3 * np.sin(angle):.15f}" for angle in angles]
    boundary = f"S_INTERSECTS(footprint, POLYGON(({', '.join([*points, points[0]])})))"
    with make_client(served) as client:
        client.update({"k1": {"lon": 101.0, "lat": -41.0}, "k2": {"lon": 104.0, "lat": -41.0}})
        assert [hit.key for hit in client.search(key="k5", filter=boundary).hits] == ["k1"]
        assert client.count(boundary) == 1
