"""Places: the row nearest to a place, one place at other times, and outlines of rows."""

import math
import struct

import pytest
import shapely
from page_world import NUM_TIMES, OFTEN, SIDE
from web_parts import serving_web

from orbithash.search.client import Client
from orbithash.search.web.page.rings import MAX_VERTICES, ring_of
from orbithash.search.web.settings import WebSettings


@pytest.fixture(scope="module")
def service(gateway):
    with serving_web(WebSettings(gateway=gateway.address, listen="127.0.0.1:0")) as running:
        yield running


@pytest.fixture(scope="module")
def rows(gateway):
    with Client(gateway.address) as client:
        return {row.key: row for row in client.scroll()}


def test_the_nearest_row_of_a_place(service, rows):
    row = rows["harbor/harbor_07.png"]
    found = service.get(f"/at?lon={row.lon + SIDE / 4}&lat={row.lat}").json
    assert (found["id"], found["key"], found["name"]) == (str(row.id), row.key, "harbor")
    expected = math.radians(SIDE / 4) * 6_371_008.8 * math.cos(math.radians(row.lat))
    assert found["distance_m"] == pytest.approx(expected, rel=1e-4)
    assert found["distance"] == f"{expected:.0f} m"
    # Whole turns do not matter.
    assert service.get(f"/at?lon={row.lon - 360}&lat={row.lat}").json["id"] == str(row.id)


def test_the_nearest_row_is_one_that_passes_the_filters(service, rows):
    row = rows["harbor/harbor_07.png"]
    found = service.get(f"/at?lon={row.lon}&lat={row.lat}&label=beach").json
    nearest = min(
        (other for other in rows.values() if other.label == "beach"),
        key=lambda other: math.hypot((other.lon - row.lon) * math.cos(math.radians(row.lat)), other.lat - row.lat),
    )
    assert found["key"] == nearest.key
    reply = service.get(f"/at?lon={row.lon}&lat={row.lat}&from=2035-01-01", Accept="application/json")
    assert reply.status == 404
    assert reply.error["message"] == "No tile that passes the filters has a place on the map."


@pytest.mark.parametrize("query", ["", "lon=3", "lon=nan&lat=1", "lon=1e400&lat=1", "lon=361&lat=1", "lon=1&lat=91"])
def test_invalid_places_are_refused(service, query):
    reply = service.get(f"/at?{query}", Accept="application/json")
    assert reply.status == 400
    assert "is a number of degrees" in reply.error["message"]


def test_an_invalid_filter_does_not_become_none(service):
    reply = service.get("/at?lon=3&lat=51&from=soon", Accept="application/json")
    assert reply.status == 400
    assert "is a date such as" in reply.error["message"]


def test_one_place_at_other_times(service, rows):
    text = service.get(f"/times/{rows[OFTEN].id}").text
    assert text.count("<li") == NUM_TIMES
    assert f"this place {NUM_TIMES} times" in text
    days = [f"{rows[key].datetime:%Y-%m-%d}" for key in rows if key.startswith(OFTEN.removesuffix(".png"))]
    positions = [text.index(f'"times-day">{day}') for day in sorted(days)]
    assert positions == sorted(positions)
    once = service.get(f"/times/{rows['beach/beach_03.png'].id}").text
    assert "shows this place once" in once
    assert service.get("/times/99999999").status == 404


def polygon(*vertices):
    return shapely.Polygon(vertices).wkb


def nested(depth):
    """Multipolygons in multipolygons."""
    return struct.pack("<BII", 1, 6, 1) * depth + polygon((0, 0), (1, 0), (1, 1))


@pytest.mark.parametrize(
    "wkb",
    [
        None,
        b"",
        b"\x01",
        b"\x01\x03",
        b"POLYGON ((0 0, 1 1, 1 0, 0 0))",
        shapely.Point(1, 2).wkb,
        shapely.LineString([(0, 0), (1, 1)]).wkb,
        shapely.Polygon().wkb,
        shapely.MultiPolygon().wkb,
        struct.pack("<BIII", 1, 3, 1, 2**32 - 1),
        struct.pack("<BIII", 1, 3, 2**32 - 1, 2**19),
        polygon((0, 0), (math.inf, 0), (1, 1)),
        polygon((0, 0), (1e300, 0), (1, 1)),
        polygon((0, 0), (1, 0), (1, 91)),
        nested(2),
        nested(100_000),
    ],
)
def test_what_is_no_outline_has_no_ring(wkb):
    assert ring_of(wkb) == ()


def test_rings_of_outlines():
    square = ((0.0, 0.0), (1.0, 0.0), (1.0, 1.0), (0.0, 1.0))
    assert ring_of(polygon(*square)) == square
    assert ring_of(shapely.to_wkb(shapely.Polygon(square), byte_order=0)) == square
    assert ring_of(shapely.MultiPolygon([shapely.Polygon(square)]).wkb) == square
    assert len(ring_of(shapely.Point(0, 0).buffer(1, quad_segs=2000).wkb)) <= MAX_VERTICES


def test_an_outline_in_two_parts_at_the_date_line_is_one_ring():
    parts = shapely.MultiPolygon([shapely.box(179, -1, 180, 1), shapely.box(-180, -1, -179, 1)])
    ring = shapely.Polygon(ring_of(parts.wkb))
    assert ring.equals(shapely.box(179, -1, 181, 1))
    # A part without vertices, which only other programs write, changes nothing.
    empty = struct.pack("<BIII", 1, 3, 1, 0)
    with_empty = parts.wkb[:5] + struct.pack("<I", 3) + parts.wkb[9:] + empty
    assert shapely.Polygon(ring_of(with_empty)).equals(ring)
    assert ring_of(struct.pack("<BII", 1, 6, 1) + empty) == ()
