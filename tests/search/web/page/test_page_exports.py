"""Exports: files of the rows of an answer, read back with other libraries."""

import asyncio
import csv
import html
import http.client
import io
import json
import re
import threading
from dataclasses import replace
from urllib.parse import urlencode

import geopandas
import pyarrow.parquet as pq
import pytest
from page_world import HOSTILE, NUM_ROWS_PER_CLASS
from web_parts import read_all, serving_web

from orbithash.search.client import Client
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.web.page import answers
from orbithash.search.web.settings import Rate, WebLimits, WebSettings


@pytest.fixture(scope="module")
def service(gateway):
    rates = {kind: Rate(1000.0, 1000) for kind in ("searches", "uploads", "exports", "logins")}
    settings = WebSettings(gateway=gateway.address, listen="127.0.0.1:0", limits=WebLimits(rates=rates))
    with serving_web(settings) as running:
        yield running


@pytest.fixture(scope="module")
def rows(gateway):
    with Client(gateway.address) as client:
        return {row.key: row for row in client.scroll()}


def path(name, **parameters):
    return f"/export.{name}?{urlencode(parameters)}"


def keys_of(name, body):
    """Return the keys in a file, and the file as a table of geopandas (None for CSV)."""
    if name == "csv":
        lines = list(csv.DictReader(io.StringIO(body.decode(), newline="")))
        return [line["id"] for line in lines], None
    table = geopandas.read_parquet(io.BytesIO(body)) if name == "parquet" else geopandas.read_file(io.BytesIO(body))
    return list(table["id"]), table


@pytest.mark.parametrize("name", ["geojson", "csv", "parquet", "items"])
def test_a_file_of_the_whole_answer_has_every_row_once(service, rows, name, monkeypatch):
    # Three parts.
    monkeypatch.setattr(answers, "_EXPORT_ROWS", 100)
    reply = service.get(path(name, scope="all", seed=4))
    assert reply.status == 200
    keys, table = keys_of(name, reply.body)
    assert sorted(keys) == sorted(rows)
    if name == "csv":
        # The order is that of the answer.
        assert keys[:60] == shown_keys(service, "seed=4")
    if table is not None:
        assert table.crs.name.startswith("WGS 84")
        assert set(table.geom_type) == {"Polygon"}
        # Texts of the archive are neither changed nor cut off.
        (hostile,) = table[table["id"] == HOSTILE["key"]].to_dict("records")
        assert {column: hostile["id" if column == "key" else column] for column in HOSTILE} == HOSTILE


def shown_keys(service, query):
    text = service.get(f"/?{query}").text
    return [html.unescape(key) for key in re.findall(r'<article class="tile"[^>]*? data-key="([^"]*)"', text)]


@pytest.mark.parametrize("name", ["geojson", "csv", "parquet", "items"])
def test_an_answer_without_rows_is_a_valid_file(service, name):
    reply = service.get(path(name, scope="all", **{"from": "2035-01-01"}))
    if name == "parquet":
        assert pq.read_table(io.BytesIO(reply.body)).num_rows == 0
    elif name in ("geojson", "items"):
        assert json.loads(reply.body)["features"] == []
    else:
        assert len(reply.text.splitlines()) == 1


def test_what_is_shown_is_exported_in_its_order(service):
    query = {"q": "a river", "radius": 12}
    keys, _ = keys_of("csv", service.get(path("csv", **query, scope="shown", limit=7)).body)
    assert keys == shown_keys(service, urlencode(query))[:7]


def test_files_have_the_codes_and_say_what_they_are(service, gateway):
    query = {"q": "a river", "radius": 12, "scope": "all"}
    table = pq.read_table(io.BytesIO(service.get(path("parquet", **query)).body))
    items = json.loads(service.get(path("items", **query)).body)
    with Client(gateway.address) as client:
        described = client.describe()
        codes = {key: row.code for key, row in client.get(table["id"].to_pylist(), include=["code"]).items()}
    assert {
        key: bytes(code) for key, code in zip(*table.select(["id", "code"]).to_pydict().values(), strict=True)
    } == codes
    assert {each["id"]: bytes.fromhex(each["properties"]["orbithash:code"]) for each in items["features"]} == codes
    for stated in (json.loads(table.schema.metadata[b"orbithash"]), items["orbithash:codes"]):
        assert (stated["bits"], stated["model_id"]) == (described.bits, described.model_id)


def test_the_cut_off_limits_an_export(service, gateway):
    with Client(gateway.address) as client:
        expected = {hit.key for hit in client.search(text="a river", radius=5, k=1000).hits}
    lines = list(csv.DictReader(io.StringIO(service.get(path("csv", q="a river", radius=5, scope="all")).text)))
    assert {line["id"] for line in lines} == expected
    assert all(int(line["distance"]) <= 5 and line["score"] == "" for line in lines)
    labels, _ = keys_of("csv", service.get(path("csv", label="harbor", scope="all")).body)
    assert len(labels) == NUM_ROWS_PER_CLASS


@pytest.mark.parametrize(
    ("query", "name"),
    [
        ("", "orbithash_20"),
        ("q=Boats+in+a+harbor", "orbithash_boats-in-a-harbor_20"),
        ("q=..%2F..%2Fetc%22%0d%0aX:+1", "orbithash_etc-x-1_20"),
        ("q=%E6%B8%AF", "orbithash_20"),
        ("q=" + "a" * 300, "orbithash_" + "a" * 40 + "_20"),
    ],
)
def test_names_of_files_are_safe(service, query, name):
    reply = service.ask("HEAD", f"/export.csv?{query}&limit=1")
    assert reply.status == 200
    assert reply.body == b""
    assert reply.headers["content-disposition"].startswith(f'attachment; filename="{name}')
    assert reply.headers["content-disposition"].endswith('.csv"')


@pytest.mark.parametrize(
    ("address", "status", "sentence"),
    [
        ("/export.exe?scope=all", 404, "geojson, csv"),
        ("/export.csv?scope=some", 400, "scope is shown or all"),
        ("/export.csv?limit=0", 400, "from 1 to 10,000"),
        ("/export.csv?limit=1e3", 400, "from 1 to 10,000"),
        ("/export.csv?limit=99999", 400, "from 1 to 10,000"),
        # Not a file of all rows, as if there were no filter.
        ("/export.csv?from=soon&scope=all", 400, "is a date such as"),
        ("/export.csv?area=0+0,1+1,1+0,0+1&scope=all", 400, "crosses itself"),
        ("/export.csv?filter=label+~~+3&scope=all", 400, ""),
    ],
)
def test_refused_exports_say_why(service, address, status, sentence):
    reply = service.get(address, Accept="application/json")
    assert reply.status == status
    assert sentence in reply.error["message"]
    assert "content-disposition" not in reply.headers


@pytest.fixture
def parts(monkeypatch):
    """Replace `Answers.page` by a function of the number of the part and of the part."""
    page = answers.Answers.page

    def change(changed):
        numbers = iter(range(1000))

        async def changed_page(self, *arguments):
            return await changed(next(numbers), await page(self, *arguments))

        monkeypatch.setattr(answers, "_EXPORT_ROWS", 100)
        monkeypatch.setattr(answers.Answers, "page", changed_page)

    return change


def partial(shown):
    coverage = replace(shown.coverage, searched_rows=shown.coverage.total_rows // 2, answered_shards=1)
    return replace(shown, coverage=coverage)


def test_a_partial_answer_is_exported_only_on_request(service, parts):
    async def halve(_, shown):
        return partial(shown)

    parts(halve)
    reply = service.get(path("csv", scope="all"), Accept="application/json")
    assert reply.status == 503
    assert "Only 4" in reply.error["message"]
    parts(halve)
    assert service.get(path("csv", scope="all", partial=1)).status == 200


@pytest.mark.parametrize("failure", ["error", "partial"])
@pytest.mark.parametrize("name", ["geojson", "csv", "parquet", "items"])
def test_a_failure_in_the_middle_breaks_the_connection(service, parts, name, failure):
    async def fail(number, shown):
        if number == 1 and failure == "error":
            raise Unavailable("a shard went away")
        return partial(shown) if number == 1 else shown

    parts(fail)
    with pytest.raises((http.client.IncompleteRead, ConnectionError)):
        service.get(path(name, scope="all"))


def test_an_export_ends_when_the_client_leaves(service, parts):
    waits, ended = threading.Event(), threading.Event()

    async def wait(number, shown):
        if number == 1:
            waits.set()
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()
        return shown

    parts(wait)
    with service.connection() as connection:
        connection.sendall(f"GET {path('csv', scope='all')} HTTP/1.1\r\nHost: {service.netloc}\r\n\r\n".encode())
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert waits.wait(60)
    assert ended.wait(60)


def test_an_export_is_sent_in_parts(service, parts):
    """The first part arrives before the last one is read."""
    first_arrived = threading.Event()

    async def wait(number, shown):
        if number == 2:
            await asyncio.to_thread(first_arrived.wait, 30)
        return shown

    parts(wait)
    with service.connection() as connection:
        request = f"GET {path('csv', scope='all')} HTTP/1.1\r\nHost: {service.netloc}\r\nConnection: close\r\n\r\n"
        connection.sendall(request.encode())
        begin = b""
        while b"\r\n\r\n" not in begin or begin.count(b"\r\n") < 100:
            begin += connection.recv(65536)
        first_arrived.set()
        assert read_all(connection).endswith(b"0\r\n\r\n")
