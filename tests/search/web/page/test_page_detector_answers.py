"""Detectors of the page over HTTP, in front of a real gateway."""

import base64
import html
import json
import re
import zlib
from itertools import pairwise
from urllib.parse import urlencode

import pytest
from web_parts import serving_web

from orbithash.search.client import Client
from orbithash.search.detectors import Detector
from orbithash.search.web.page import detector as page_detector
from orbithash.search.web.settings import WebSettings


@pytest.fixture(scope="module")
def service(gateway):
    with serving_web(WebSettings(gateway=gateway.address, listen="127.0.0.1:0")) as running:
        if running.get("/").status == 503:
            pytest.skip("needs the scripts of the page in search/web/static/vendor: run `make vendor`")
        yield running


@pytest.fixture(scope="module")
def ids(gateway):
    """Ids of the rows of each class."""
    rows: dict[str, list[int]] = {}
    with Client(gateway.address) as client:
        for row in client.scroll():
            rows.setdefault(row.label, []).append(row.id)
    return rows


@pytest.fixture(scope="module")
def marks(ids):
    """The address of six good and six bad marks."""
    join = ",".join
    return {
        "good": join(map(str, ids["roofs"][:6])),
        "bad": join(map(str, (*ids["harbor"][:3], *ids["forest"][:3]))),
    }


def shown(service, **state):
    """The ids of the tiles of an address, in their order."""
    return [
        int(n) for n in re.findall(r'id="tile-(\d+)"', service.get(f"/?{urlencode(state)}", HX_Request="true").text)
    ]


def saved(service, **state):
    reply = service.get(f"/detector.json?{urlencode(state)}")
    assert reply.status == 200, reply.text
    assert reply.headers["Content-Disposition"] == 'attachment; filename="detector.json"'
    return Detector.from_json(reply.body)


def test_marks_find_the_rows_of_their_kind(service, ids, marks):
    found = shown(service, **marks, find="all")
    # The stored vectors are features of a random network: they tell colours apart, but not well.
    assert len(set(found) & set(ids["roofs"])) >= 30
    assert len(set(found[:30]) & set(ids["roofs"])) >= 20


def test_the_file_opens_to_the_same_answer(service, marks):
    detector = saved(service, **marks, find="all")
    assert (detector.num_good, detector.num_bad, detector.folds) == (6, 6, 5)
    reply = service.post("/detector", detector.to_json().encode())
    assert reply.status == 200, reply.text
    text = reply.json["detector"]
    assert shown(service, detector=text) == shown(service, **marks, find="all")
    assert saved(service, detector=text) == detector


def test_the_least_certain_come_first(service, gateway, marks):
    detector = saved(service, **marks, find="unsure")
    with Client(gateway.address) as client:
        scores = {hit.id: hit.score for hit in client.rank(detector.linear(), k=1000).hits}
    order = [abs(scores[row]) for row in shown(service, **marks, find="unsure")]
    # The order counts in whole units of the scale.
    assert all(first <= second + detector.scale for first, second in pairwise(order))


def test_equal_marks_are_fitted_once(service, marks, monkeypatch):
    from orbithash.search.detectors import fitting

    calls = []
    fit = fitting.fit_detector
    monkeypatch.setattr(fitting, "fit_detector", lambda *args: calls.append(args) or fit(*args))
    page_detector._kept.clear()
    first = saved(service, **marks, find="all")
    assert saved(service, **marks, find="unsure") == first
    assert len(calls) == 1


def packed(content):
    return base64.urlsafe_b64encode(zlib.compress(content)).decode().rstrip("=")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("AAAA", "damaged"),
        ("!", "damaged"),
        ("ÿ", "damaged"),
        (packed(b"{}"), "not a detector"),
        (packed(b"[" * 2**22), "larger than"),
    ],
)
def test_damaged_detectors_of_an_address_are_refused_in_a_sentence(service, text, words):
    reply = service.get(f"/?{urlencode({'detector': text})}", HX_Request="true")
    assert words in html.unescape(reply.text)
    assert "<article" not in reply.text


@pytest.mark.parametrize("content", [b"", b"{", b"\x00\xff", b"not JSON", b'{"format": "orbithash.detector"}'])
def test_other_files_are_refused_with_a_sentence(service, content):
    reply = service.post("/detector", content, Accept="application/json")
    assert reply.status == 400
    assert "detector" in reply.error["message"]


def test_a_detector_of_another_model_is_refused_with_a_sentence(service, marks):
    other = json.loads(saved(service, **marks, find="all").to_json()) | {"model_id": "of another one"}
    reply = service.post("/detector", json.dumps(other).encode(), Accept="application/json")
    assert reply.status == 400
    assert "another model" in reply.error["message"]
