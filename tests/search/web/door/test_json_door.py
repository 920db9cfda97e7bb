"""The JSON door: the same answers and errors as over gRPC, and a description that fits them."""

import base64
import itertools
import json

import pytest
from google.protobuf import json_format
from jsonschema import Draft202012Validator
from page_services import GatewayThread
from web_parts import serving_web

from orbithash.search import Client
from orbithash.search.gateway.protection import Protection
from orbithash.search.web.settings import WebSettings
from orbithash.v1 import search_pb2, search_pb2_grpc

READER, STRANGER = "reader-0123456789abcdef", "stranger-0123456789abcdef"


@pytest.fixture(scope="module")
def service(gateway):
    """The web service in front of the gateway of `world`."""
    with serving_web(WebSettings(gateway.address, "127.0.0.1:0")) as running:
        yield running


@pytest.fixture(scope="module")
def stub(gateway):
    """The calls over gRPC."""
    import grpc

    with grpc.insecure_channel(gateway.address) as channel:
        yield search_pb2_grpc.SearchServiceStub(channel)


@pytest.fixture(scope="module")
def description(service):
    return service.get("/api/openapi.json").json


def validator(description, name):
    schema = {"$ref": f"#/components/schemas/{name}", "components": description["components"]}
    return Draft202012Validator(schema)


KEY = "harbor/harbor_03.png"
REQUESTS = [
    ("Search", {"key": KEY, "k": 3}),
    (
        "Search",
        {"text": "a harbor", "k": 5, "filter": "label = 'harbor'", "include": ["COLUMN_CAPTION", "COLUMN_CODE"]},
    ),
    ("Search", {"key": KEY, "k": 2, "after": {"distance": 0, "id": "12"}, "radius": 9}),
    ("SearchMany", {"requests": [{"key": KEY, "k": 1}, {"key": "no such key", "k": 1}]}),
    ("Get", {"keys": [KEY, "no such key"], "include": ["COLUMN_THUMBNAIL"]}),
    ("Count", {"filter": "label = 'river'"}),
    ("Scroll", {"limit": 4, "after": 3}),
    ("Rank", {"shuffle": {"seed": "7"}, "k": 4}),
    ("Rank", {"place": {"lon": 3.2, "lat": 51.05, "max_distance_m": 9000}, "k": 4, "include": ["COLUMN_VECTOR"]}),
    ("Rank", {"linear": {"weights": [1, -2, 3] * 8, "scale": 0.5}, "k": 3, "min_score": -10}),
    ("Rank", {"time": {"newest_first": True}, "k": 3, "filter": "label = 'river'"}),
    ("Distances", {"search": {"key": KEY}}),
    ("CountBy", {"by": "GROUP_BY_LABEL"}),
    ("CountBy", {"by": "GROUP_BY_MONTH", "filter": "label = 'river'"}),
    ("Encode", {"text": "a harbor"}),
    ("View", {"key": KEY, "max_side": 64}),
    ("HeatMap", {"key": KEY, "search": {"text": "a harbor"}, "cells": 2}),
]


@pytest.mark.parametrize(("name", "fields"), REQUESTS)
def test_an_answer_is_that_of_grpc(service, stub, description, name, fields):
    path = "/api/" + "".join(f"_{c.lower()}" if c.isupper() else c for c in name).lstrip("_")
    reply = service.call(path, fields)
    assert reply.status == 200, reply.text
    method = search_pb2.DESCRIPTOR.services_by_name["SearchService"].methods_by_name[name]
    request = json_format.ParseDict(fields, getattr(search_pb2, method.input_type.name)())
    expected = getattr(stub, name)(request)
    answer = json_format.Parse(reply.body, type(expected)())
    for message in (answer, expected):
        for part in [message, *(result.response for result in getattr(message, "results", ()))]:
            if "took_ms" in part.DESCRIPTOR.fields_by_name:
                part.took_ms = 0
    assert answer == expected
    validator(description, method.input_type.name).validate(fields)
    validator(description, method.output_type.name).validate(reply.json)


def test_an_image_is_base64(service, world, gateway):
    image = (world.images / KEY).read_bytes()
    reply = service.call("/api/search", {"image": base64.b64encode(image).decode(), "k": 2})
    with Client(gateway.address) as client:
        hits = client.search(image=image, k=2).hits
    assert [hit["key"] for hit in reply.json["hits"]] == [hit.key for hit in hits]
    assert reply.json["hits"][0]["distance"] == 0, "a value of 0 is there"


def test_a_query_string_is_enough(service):
    by_query = service.get("/api/search?key=harbor/harbor_03.png&filter=label%20%3D%20%27harbor%27&include=COLUMN_CODE")
    assert by_query.status == 200, by_query.text
    by_body = service.call(
        "/api/search", {"key": KEY, "filter": "label = 'harbor'", "k": 10, "include": ["COLUMN_CODE"]}
    )
    assert len(by_query.json["hits"]) == 10
    assert by_query.json["hits"] == by_body.json["hits"]
    last = by_query.json["hits"][4]
    page = service.get(f"/api/search?key={KEY}&k=3&after.distance={last['distance']}&after.id={last['id']}")
    assert page.status == 200
    assert service.get("/api/count").json["rows"] == service.get("/api/archive").json["rows"]
    assert len(service.get("/api/scroll").json["rows"]) == 10
    near = service.get("/api/rank?place.lon=3.2&place.lat=51.05&k=3&include=COLUMN_CAPTION&include=COLUMN_CODE").json
    place = {"place": {"lon": 3.2, "lat": 51.05}, "k": 3, "include": ["COLUMN_CAPTION", "COLUMN_CODE"]}
    assert near["hits"] == service.call("/api/rank", place).json["hits"]


@pytest.mark.parametrize(
    ("fields", "status", "field", "text"),
    [
        ({"kk": 3}, 400, "kk", "is not a field"),
        ({"key": KEY, "k": 1, "after": {"where": 1}}, 400, "where", "the fields here are distance, id"),
        ({"key": KEY, "k": "many"}, 400, "k", ""),
        ({"key": KEY, "k": -1}, 400, "k", ""),
        ({"key": KEY, "text": "both", "k": 1}, 400, None, "oneof"),
        ({"code": "not base64!", "k": 1}, 400, None, ""),
        ({"key": KEY}, 400, "k", "from 1 to 10,000"),
        ({"k": 1}, 400, None, ""),
        ({"key": KEY, "k": 1, "filter": "label ="}, 400, "filter", ""),
        ({"key": "<script>alert(1)</script>", "k": 1}, 404, None, "<script>"),
        ("[1, 2]", 400, "body", ""),
        ("{", 400, "body", ""),
        (b"\xff\xfe", 400, "body", ""),
        ("[" * 100_000, 400, "body", ""),
        ('{"k": 1, "k": 2}', 400, "body", ""),
        ('{"k": ' + "9" * 10_000 + "}", 400, None, ""),
    ],
)
def test_an_error_names_the_field(service, description, fields, status, field, text):
    reply = service.call("/api/search", fields)
    assert reply.status == status, reply.text
    validator(description, "Error").validate(reply.json)
    error = reply.error
    assert error["code"] == status
    assert text in error["message"]
    assert "\n" not in error["message"]
    kinds = {detail["@type"].rpartition(".")[2]: detail for detail in error["details"]}
    assert kinds["ErrorInfo"]["reason"] == ("INVALID_QUERY" if status == 400 else "KEY_NOT_FOUND")
    if field is not None:
        assert [violation["field"] for violation in kinds["BadRequest"]["field_violations"]] == [field]
    assert reply.headers["Content-Type"] == "application/json"


@pytest.mark.parametrize(
    ("path", "status"),
    [
        ("/api/search?kk=3", 400),
        ("/api/search?k=1&k=2&key=a", 400),
        ("/api/search?examples.positives=1", 400),
        ("/api/search?after=1", 400),
        ("/api/search?a.b.c.d=1", 400),
        ("/api/search?include=NOTHING&key=a", 400),
        ("/api/archive/", 404),
        ("/api/upsert", 404),
        ("/api/refresh", 404),
        ("/api/", 404),
    ],
)
def test_wrong_addresses(service, path, status):
    reply = service.get(path)
    assert reply.status == status, reply.text
    assert reply.error["code"] == status


def test_a_large_request_is_refused(service):
    reply = service.call("/api/search", b'{"image": "' + b"A" * 16 * 2**20 + b'"}')
    assert reply.status == 413
    assert "larger than 15 MiB" in reply.error["message"]


def test_pages_of_other_sites_get_nothing(service):
    for headers in ({"Sec_Fetch_Site": "cross-site"}, {"Origin": "https://evil.example"}):
        assert service.call("/api/search", {"key": KEY, "k": 1}, **headers).status == 403
    assert service.get("/api/search?key=a", Sec_Fetch_Site="cross-site", Sec_Fetch_Mode="no-cors").status == 403
    reply = service.call("/api/search", {"key": KEY, "k": 1})
    assert not [name for name in reply.headers if name.lower().startswith("access-control-")]


def test_the_description_is_valid(description):
    assert description["openapi"] == "3.1.0"
    schemas = description["components"]["schemas"]
    for schema in schemas.values():
        Draft202012Validator.check_schema(schema)
    names = {f"#/components/schemas/{name}" for name in schemas}
    assert references(description) <= names
    operations = [operation for path in description["paths"].values() for operation in path.values()]
    ids = [operation["operationId"] for operation in operations]
    assert len(ids) == len(set(ids))
    assert all(operation["description"] and "200" in operation["responses"] for operation in operations)
    assert schemas["Hit"]["properties"]["rank"]["description"] == "Position in the answer, from 1."
    named = {parameter["name"] for parameter in description["paths"]["/api/rank"]["get"]["parameters"]}
    assert {"place.lon", "time.newest_first", "k", "include"} <= named
    documented = [field for name in ("SearchRequest", "Hit") for field in schemas[name]["properties"].values()]
    assert all(field.get("description") for field in documented)


def references(node):
    if isinstance(node, dict):
        own = {node["$ref"]} if isinstance(node.get("$ref"), str) else set()
        return own.union(*map(references, node.values()))
    if isinstance(node, list):
        return set().union(*map(references, node))
    return set()


def test_the_description_has_exactly_the_routes(description):
    from orbithash.search.web.door.routes import routes

    offered = {(route.path, method.lower()) for route in routes for method in route.methods - {"HEAD"}}
    described = {(path, method) for path, operations in description["paths"].items() for method in operations}
    assert offered - {("/api/openapi.json", "get")} == described


def test_tokens(world, tmp_path):
    (tmp_path / "tokens").write_text(f"read {READER} colleague\n")
    (tmp_path / "tokens").chmod(0o600)
    running = GatewayThread(world, protection=Protection.from_files(None, None, None, tmp_path / "tokens"))
    running.start()
    try:
        with serving_web(WebSettings(running.address, "127.0.0.1:0")) as service:
            for headers in ({}, {"Authorization": f"Bearer {STRANGER}"}, {"Authorization": "Basic YTpi"}):
                for reply in (service.get("/api/archive", **headers), service.call("/api/search", "{}", **headers)):
                    assert reply.status == 401
                    assert reply.headers["WWW-Authenticate"] == "Bearer"
                    assert reply.error["status"] == "UNAUTHENTICATED"
                    assert STRANGER not in reply.text
            assert service.get("/api/archive", Authorization=f"Bearer {READER}").json["bits"] == 24
            assert service.get("/api/openapi.json").status == 200
            # Programs send the token in a header. A cookie alone could come with a request of another site.
            cookie = service.post("/login", f"token={READER}").headers["Set-Cookie"].partition(";")[0]
            assert service.get("/api/archive", Cookie=cookie).status == 200
            assert service.call("/api/search", {"key": KEY, "k": 1}, Cookie=cookie).status == 403
    finally:
        running.stop()


def test_details_of_errors_are_json(service):
    """Every kind of error of the service keeps the details that gRPC would send."""
    from orbithash.search.protocol.errors import InvalidQuery, Overloaded, SearchError
    from orbithash.search.web.errors import failure_of

    kinds = [kind for kind in SearchError.__subclasses__() if kind not in (InvalidQuery, Overloaded)]
    errors = [InvalidQuery(("k", "is 0")), Overloaded("full", 2.0), *(kind("text") for kind in kinds)]
    statuses = {}
    for error in errors:
        failure = failure_of(error)
        json.dumps(failure.details)
        statuses[type(error).__name__] = (failure.status, failure.code)
    assert statuses == {
        "InvalidQuery": (400, "INVALID_ARGUMENT"),
        "Overloaded": (429, "RESOURCE_EXHAUSTED"),
        "KeyNotFound": (404, "NOT_FOUND"),
        "DeadlineExceeded": (504, "DEADLINE_EXCEEDED"),
        "Unavailable": (503, "UNAVAILABLE"),
        "Unauthenticated": (401, "UNAUTHENTICATED"),
        "PermissionDenied": (403, "PERMISSION_DENIED"),
        "GatewayError": (500, "INTERNAL"),
    }
    assert list(itertools.islice(failure_of(Overloaded("full", 2.4)).headers.items(), 1)) == [("Retry-After", "2")]
