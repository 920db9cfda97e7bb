"""The state of the page in its address: both ways, bounds, and hostile input."""

import math
from datetime import date
from urllib.parse import parse_qsl

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from orbithash.encoders.imagery.outlines import bounding_box, normalize
from orbithash.search.segments.filters.expressions import parse_filter
from orbithash.search.web.page.filters import filter_text
from orbithash.search.web.page.rings import MAX_VERTICES
from orbithash.search.web.page.state import FINDS, MAX_MARKS, SORTS, State, format_state, parse_state

# Not crossing itself, but its ends lie over each other.
AROUND = "0 0,100 0,-160 0,-60 0,20 7,20 9,-60 6,-160 6,100 6,0 6"

FULL = State(
    q="boats & “piers” 100%+",
    like=5,
    code=b"\x00\xff\x10",
    good=(3, 1, 2**64 - 1),
    bad=(7,),
    near=(-3.25, 51.0),
    label=("it's", "a,b", "<b>"),
    start=date(2024, 5, 1),
    end=date(2024, 6, 30),
    area=((3.0, 50.0), (4.5, 50.0), (4.0, 51.0)),
    filter="label LIKE 'har%' OR lat > 50",
    radius=12,
    sort="newest",
    hide=(9, 8),
    find="unsure",
    detector="abc-_",
    min_score=-0.5,
    seed=7,
)


def parsed(query):
    return parse_state(parse_qsl(query, keep_blank_values=True))


def test_a_state_returns_from_its_address():
    assert parsed(format_state(FULL)) == parse_state(parse_qsl(format_state(FULL)))
    assert parsed(format_state(FULL)).state == FULL
    assert parsed(format_state(FULL)).problems == {}
    assert format_state(State()) == ""
    assert format_state(FULL, q="", like=None) == format_state(FULL).split("&", 2)[2]


ids = st.lists(st.integers(0, 2**64 - 1), max_size=5, unique=True).map(tuple)


@settings(deadline=None)
@given(
    st.builds(
        State,
        q=st.text(max_size=50).map(str.strip),
        like=st.none() | st.integers(0, 2**64 - 1),
        code=st.binary(max_size=40),
        good=ids,
        near=st.none() | st.tuples(st.floats(-360, 360), st.floats(-90, 90)),
        label=st.lists(st.text(min_size=1, max_size=9).filter(str.strip), max_size=3, unique=True).map(tuple),
        start=st.none() | st.dates(max_value=date(1999, 1, 1)),
        end=st.none() | st.dates(min_value=date(2000, 1, 1)),
        filter=st.text(st.characters(codec="utf-8", exclude_characters="()'\""), max_size=50).map(str.strip),
        radius=st.none() | st.integers(0, 512),
        sort=st.sampled_from(SORTS),
        hide=ids,
        find=st.sampled_from(("", *FINDS)),
        min_score=st.none() | st.floats(-100, 100).map(lambda number: number + 0.0),
        seed=st.integers(0, 2**53 - 1),
    )
)
def test_every_state_returns_from_its_address(state):
    found = parsed(format_state(state))
    assert found.problems == {}
    assert found.state == state


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from([*"qx", "like", "code", "good", "near", "area", "label", "min"]), st.text())))
def test_any_address_has_a_state(pairs):
    found = parse_state(pairs)
    assert parse_state(parse_qsl(format_state(found.state), keep_blank_values=True)).state == found.state
    assert all(isinstance(sentence, str) and len(sentence) < 300 for sentence in found.problems.values())


@pytest.mark.parametrize(
    ("query", "slot", "part"),
    [
        ("filter=a%29+OR+%28b", "filter", "The brackets of the expression do not match."),
        ("filter=%28lon+%3E+1", "filter", "The brackets of the expression do not match."),
        ("q=" + "x" * 10_000, "q", "at most 2,000 characters; this one has 10,000"),
        ("like=-1", "like", "whole number"),
        ("like=1_0", "like", "whole number"),
        ("like=" + "9" * 5000, "like", "whole number"),
        ("code=!!", "image", "Drop the image again"),
        ("code=" + "A" * 3000, "image", "Drop the image again"),
        ("good=1,x", "marks", "not “x”"),
        ("good=" + ",".join(map(str, range(MAX_MARKS + 1))), "marks", f"At most {MAX_MARKS} good tiles"),
        ("near=3", "area", "A place is a longitude and a latitude"),
        ("near=nan,3", "area", "A place is"),
        ("near=3,91", "area", "A place is"),
        ("from=yesterday", "dates", "a date such as 2024-05-01, not “yesterday”"),
        ("from=2024-05-02&to=2024-05-01", "dates", "is after the last day"),
        ("area=0 0,1 1,1 0,0 1", "area", "crosses itself"),
        ("area=179 0,-179 2,-179 0,179 2", "area", "crosses itself"),
        ("area=0 0,1 1", "area", "at least three different corners"),
        ("area=0 0,2 0,1 0", "area", "on one line"),
        (f"area={AROUND}", "area", "less than once around the Earth"),
        ("area=179 1,-179 3,180 2", "area", "on one line"),
        ("area=0 0,1 1,x y", "area", "Draw it again"),
        ("area=0 0,1 1,1e400 0", "area", "Draw it again"),
        ("area=" + ",".join(f"{n} {n * n % 7}" for n in range(MAX_VERTICES + 2)), "area", "Draw"),
        ("filter=" + "x" * 4001, "filter", "at most 4,000 characters"),
        ("radius=1.5", "radius", "whole number"),
        ("radius=٣", "radius", "whole number"),
        ("sort=up", "address", "near or newest or oldest, not “up”"),
        ("find=none", "marks", "all or unsure"),
        ("min=inf", "radius", "a number"),
    ],
)
def test_an_invalid_parameter_is_left_out_and_reported(query, slot, part):
    found = parsed(query + "&hide=4&seed=3")
    assert part in found.problems[slot]
    assert found.state.hide == (4,)
    assert found.state.seed == 3
    assert found.typed == dict(parse_qsl(query)).get("q", "")


def test_an_area_may_cross_the_date_line():
    found = parsed("area=179 -1,-179 -1,181 1,179 1")
    assert found.problems == {}
    assert found.state.area == ((179.0, -1.0), (-179.0, -1.0), (-179.0, 1.0), (179.0, 1.0))


@pytest.mark.parametrize(
    ("area", "box"),
    [
        ("170 0,175 0,-170 0,-170 10,175 10,170 10", "170, 0, -170, 10"),
        ("-170 10,175 10,170 10,170 0,175 0,-170 0", "170, 0, -170, 10"),
        # What the map sends of a view of the whole Earth.
        ("-145 -80,-62 -80,20 -80,102 -80,185 -80,185 80,102 80,20 80,-62 80,-145 80", "-145, -80, 185, 80"),
        ("175 0,-95 0,-5 0,0 0,0 10,-5 10,-95 10,175 10", "175, 0, 360, 10"),
        ("100 0,190 0,280 0,370 0,370 9,280 9,190 9,100 9", "100, 0, 370, 9"),
        ("-100 0,-190 0,-280 0,-370 0,-370 9,-280 9,-190 9,-100 9", "-370, 0, -100, 9"),
    ],
)
def test_the_filter_of_an_area_is_valid_wherever_it_crosses_the_date_line(area, box):
    found = parsed(f"area={area}")
    assert found.problems == {}
    parse_filter(filter_text(found.state))
    west, south, east, north = map(float, box.split(","))
    if abs(west) > 360 or abs(east) > 360:
        west, east = west - math.copysign(360, west), east - math.copysign(360, west)
    outline = normalize(shapely.from_wkt(filter_text(found.state).removeprefix("S_INTERSECTS(footprint, ")[:-1]))
    assert outline.equals(bounding_box(west, south, east, north))


def test_a_tile_is_good_or_bad_and_an_address_is_read_up_to_a_limit():
    found = parse_state([("good", "1,2,2"), ("bad", "2,3"), *[("label", str(n)) for n in range(5000)]])
    assert (found.state.good, found.state.bad) == ((1, 2), (3,))
    assert "At most 100 classes" in found.problems["filter"]


def test_a_filter_is_valid_and_names_stay_text():
    text = filter_text(FULL)
    parse_filter(text)
    assert "label IN ('it''s', 'a,b', '<b>')" in text
    assert "datetime >= DATE('2024-05-01') AND datetime <= DATE('2024-06-30')" in text
    assert "POLYGON((3.0 50.0, 4.5 50.0, 4.0 51.0, 3.0 50.0))" in text
    assert filter_text(State()) == ""
    assert "label IN" not in filter_text(FULL, without="label")
    assert "datetime" not in filter_text(FULL, without="dates")
