"""Tiles, sentences, charts and bits: what the page says of rows and answers."""

import struct
from datetime import UTC, date, datetime

import numpy as np
import pytest
import shapely

from orbithash.encoders.codes import Encoded
from orbithash.search.engine.composition import compose
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, KeyNotFound, Unavailable
from orbithash.search.protocol.queries import Coverage, Hit
from orbithash.search.web.page.bits import differing_bits, vote
from orbithash.search.web.page.charts import distance_chart, group_chart, heat_chart
from orbithash.search.web.page.rings import MAX_VERTICES, ring_of
from orbithash.search.web.page.sentences import coverage_sentence, empty_advice, problem_of
from orbithash.search.web.page.state import State
from orbithash.search.web.page.tiles import short_name, tiles_of

JPEG = b"\xff\xd8\xff\xe0rest"


def hit(number=1, distance=3, **columns):
    fields = {"key": f"a/{number}.tif", "label": None, "lon": None, "lat": None, "datetime": None, **columns}
    extra = {name: fields.pop(name) for name in ("thumbnail", "caption", "footprint") if name in fields}
    return Hit(number, distance, number, extra=extra, **fields)


def test_a_tile_shows_a_row():
    square = shapely.box(3, 50, 4, 51).wkb
    row = hit(label="harbor", lon=3.5, lat=50.5, datetime=datetime(2024, 5, 1, 12, tzinfo=UTC), footprint=square)
    (tile,) = tiles_of([row], State(good=(1,)), "distance", 64)
    assert (tile.label, tile.day, tile.value, tile.share, tile.mark) == ("harbor", "2024-05-01", "3 bits", 9, "good")
    assert tile.title == "harbor, 3 bits, 2024-05-01"
    assert {tuple(map(float, corner.split(","))) for corner in tile.ring.split()} == {
        (3, 50),
        (4, 50),
        (4, 51),
        (3, 51),
    }
    (bare,) = tiles_of([hit(distance=1)], State(bad=(1,)), "distance", 64)
    assert (bare.name, bare.picture, bare.ring, bare.mark, bare.value) == ("1.tif", "", "", "bad", "1 bit")


@pytest.mark.parametrize(
    ("order", "score", "value"),
    [
        ("score", 1.25, "+1.25"),
        ("score", -0.5, "\N{MINUS SIGN}0.50"),
        ("place", 312.4, "312 m"),
        ("place", 4211.0, "4.2 km"),
        ("random", None, ""),
    ],
)
def test_the_value_of_a_tile_is_that_of_its_order(order, score, value):
    (tile,) = tiles_of([hit()._replace(score=score)], State(), order, 64)
    assert tile.value == value
    assert tile.distance is None
    assert 0 <= tile.share <= 100


def test_only_pictures_become_data_addresses():
    shown = [hit(thumbnail=data) for data in (JPEG, b"\x89PNG\r\n\x1a\nrest", b"<svg onload=alert(1)>", b"", None)]
    kinds = [tile.picture.split(";")[0] for tile in tiles_of(shown, State(), "random", 64)]
    assert kinds == ["data:image/jpeg", "data:image/png", "", "", ""]


@pytest.mark.parametrize(
    "wkb",
    [
        b"",
        b"\x01",
        shapely.Point(1, 2).wkb,
        b"\x01" + struct.pack("<III", 3, 1, 2**31),
        b"\x01" + struct.pack("<III", 3, 1, 3) + struct.pack("<6d", *[float("nan")] * 6),
        b"\x01" + struct.pack("<II", 6, 1) * 900,
    ],
)
def test_a_damaged_outline_is_none(wkb):
    assert ring_of(wkb) == ()


def test_an_outline_of_many_vertices_or_parts_is_drawn_with_few():
    circle = shapely.Point(3, 50).buffer(1, quad_segs=2000)
    assert 50 < len(ring_of(circle.wkb)) <= MAX_VERTICES
    assert ring_of(shapely.MultiPolygon([shapely.box(0, 0, 1, 1), shapely.box(2, 2, 3, 3)]).wkb)[0] in {(0, 0), (1, 0)}
    assert len(ring_of(shapely.to_wkb(shapely.box(0, 0, 1, 1), byte_order=0))) == 4


def test_a_partial_answer_says_so():
    assert coverage_sentence(Coverage(10, 10, 2, 2)) == ""
    sentence = coverage_sentence(Coverage(729, 1000, 1, 2))
    assert sentence.startswith("Only 72 % of the archive was searched, because 1 of 2 parts did not answer.")


@pytest.mark.parametrize(
    ("state", "advice"),
    [
        (State(), "The archive has no tile to show."),
        (State(radius=3), "Move the cut-off to the right"),
        (State(label=("x",)), "No tile passes the classes. Remove or widen them."),
        (State(label=("x",), end=date(2020, 1, 1), radius=3), "the classes, the dates and the cut-off"),
    ],
)
def test_an_empty_answer_says_what_to_change(state, advice):
    assert advice in empty_advice(state)


@pytest.mark.parametrize(
    ("error", "state", "slot", "part"),
    [
        (KeyNotFound("x"), State(q="x"), "q", "No tile has this name"),
        (InvalidQuery(("filter", "unknown column")), State(filter="x = 1"), "filter", "unknown column"),
        (InvalidQuery(("filter", "no geometry")), State(), "area", "no geometry"),
        (InvalidQuery(("code", "8 bytes")), State(code=b"1"), "image", "does not fit this archive (8 bytes)"),
        (InvalidQuery(("detector", "it was made for another model")), State(), "detector", "another model"),
        (Unavailable("no shard answered"), State(), "gateway", "No shard answered. What you see stays"),
        (DeadlineExceeded("127.0.0.1:1 is slow"), State(), "gateway", "longer than its time limit"),
        (RuntimeError("secret"), State(), "gateway", "The service failed"),
    ],
)
def test_an_error_is_said_where_its_cause_is(error, state, slot, part):
    found, sentence = problem_of(error, state)
    assert found == slot
    assert part in sentence
    assert "secret" not in sentence


def test_charts():
    chart = distance_chart([0, 1, 0, 100])
    assert [bar.height for bar in chart.bars] == [0, 10, 0, 100]
    assert chart.cumulative == (0, 1, 1, 101)
    assert [bar.name for bar in group_chart({"2024-05": 1, "2024-06": 4})] == ["2024-05", "2024-06"]
    many = {f"{year}-{month:02}": 1 for year in range(2000, 2010) for month in range(1, 13)}
    assert [(bar.name, bar.rows) for bar in group_chart(many)][:2] == [("2000", 12), ("2001", 12)]
    assert group_chart({}) == ()
    heat = heat_chart([[4, -1], [2, 0]], (0.1, 0, 0.9, 1))
    assert heat.largest == 4
    assert [(cell.x, cell.y, cell.opacity) for cell in heat.cells] == [
        (0.1, 0, 0.75),
        (0.5, 0, 0),
        (0.1, 0.5, 0.375),
        (0.5, 0.5, 0),
    ]
    assert heat.cells[1].title == "Without this cell: 1.0 bits nearer"


def test_differing_bits_are_counted_from_the_first():
    assert differing_bits(b"\x80\x00", b"\x00\x01") == [0, 15]
    assert differing_bits(b"\xff", b"\xff") == []


@pytest.mark.parametrize("seed", range(20))
def test_a_vote_of_marks_is_that_of_the_gateway(seed):
    rng = np.random.default_rng(seed)
    bits, num_good, num_bad = 20, rng.integers(1, 6), rng.integers(0, 6)
    signs = rng.integers(0, 2, (num_good + num_bad, bits))
    codes = np.packbits(signs, axis=1)
    encoded = [
        Encoded(code[None], (2 * sign[None] - 1).astype(np.int8), None) for code, sign in zip(codes, signs, strict=True)
    ]
    expected = compose(encoded[:num_good], encoded[num_good:], [1.0] * len(codes), bits).codes.tobytes()
    packed = [code.tobytes() for code in codes]
    assert vote(packed[:num_good], packed[num_good:], bits) == expected


@pytest.mark.parametrize(
    ("key", "name"),
    [
        ("a/b/tile.png", "tile.png"),
        ("s/LC81070352015122LGN00.tif#128,64,64,64", "128,64,64,64"),
        ("a-very-long-name-of-a-tile_0042.tif", "a-very…le_0042.tif"),
        ("/", "/"),
    ],
)
def test_names_of_tiles_are_short(key, name):
    assert short_name(key) == name
