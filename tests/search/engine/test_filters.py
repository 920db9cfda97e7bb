import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import shapely

from orbithash.encoders.archive.storage import schema_of
from orbithash.search.engine.filters import COLUMNS, parse_filter
from orbithash.search.protocol.errors import InvalidQuery

DAY = datetime(2024, 5, 1, tzinfo=UTC)


def make_rows(num_rows=400):
    """Rows of which about a third of each value is unknown."""
    rng = np.random.default_rng(0)

    def maybe(value):
        return value if rng.random() < 0.7 else None

    rows = []
    for number in range(num_rows):
        place = rng.random() < 0.8
        lon, lat = (float(rng.uniform(-180, 180)), float(rng.uniform(-90, 90))) if place else (None, None)
        has_outline = rng.random() < 0.4
        outline = shapely.box(rng.uniform(-20, 20), 0, rng.uniform(20, 40), 5) if has_outline else None
        rows.append(
            {
                "key": f"scenes/{2020 + number % 6}/{number}.tif",
                "uri": f"s3://bucket/{number}",
                "label": maybe(["beach", "harbor", "river's bend"][number % 3]),
                "caption": maybe(f"caption {number}"),
                "datetime": maybe(DAY + timedelta(hours=int(rng.integers(-100, 100)), microseconds=number)),
                "lon": lon,
                "lat": lat,
                "footprint": None if outline is None else shapely.to_wkb(outline),
            }
        )
    return rows


ROWS = make_rows()
TABLE = pa.Table.from_pylist(ROWS, pa.schema([schema_of(8, "").field(name) for name in COLUMNS]))


def outline(row):
    if row["footprint"] is not None:
        return shapely.from_wkb(row["footprint"])
    return None if row["lon"] is None else shapely.Point(row["lon"], row["lat"])


def spatial(test):
    return lambda row: None if outline(row) is None else test(outline(row))


def known(name, test):
    return lambda row: None if row[name] is None else test(row[name])


EAST = shapely.box(0, -90, 180, 90)
TRIANGLE = shapely.Polygon([(-10, -10), (30, -10), (30, 60)])

CASES = {
    "label = 'harbor'": known("label", lambda v: v == "harbor"),
    "'harbor' = label": known("label", lambda v: v == "harbor"),
    "label <> 'harbor'": known("label", lambda v: v != "harbor"),
    "label = 'river''s bend'": known("label", lambda v: v == "river's bend"),
    "label IN ('beach', 'harbor')": known("label", lambda v: v in ("beach", "harbor")),
    "NOT label IN ('beach', 'harbor')": known("label", lambda v: v not in ("beach", "harbor")),
    "label IS NULL": lambda row: row["label"] is None,
    "label IS NOT NULL": lambda row: row["label"] is not None,
    "key LIKE 'scenes/2021/%'": lambda row: row["key"].startswith("scenes/2021/"),
    "key LIKE 'scenes/202_/1_.tif'": known("key", lambda v: re.fullmatch(r"scenes/202./1.\.tif", v) is not None),
    "lon > 3.5": known("lon", lambda v: v > 3.5),
    "3.5 >= lon": known("lon", lambda v: v <= 3.5),
    "lat BETWEEN -10 AND 20": known("lat", lambda v: -10 <= v <= 20),
    "datetime >= TIMESTAMP('2024-05-01T00:00:00Z')": known("datetime", lambda v: v >= DAY),
    "datetime < '2024-05-02T02:00:00+02:00'": known("datetime", lambda v: v < DAY + timedelta(days=1)),
    "T_AFTER(datetime, DATE('2024-05-01'))": known("datetime", lambda v: v >= DAY + timedelta(days=1)),
    "T_BEFORE(datetime, DATE('2024-05-01'))": known("datetime", lambda v: v < DAY),
    "T_INTERSECTS(datetime, INTERVAL('2024-05-01', '2024-05-02'))": known(
        "datetime", lambda v: DAY <= v < DAY + timedelta(days=2)
    ),
    "T_INTERSECTS(datetime, INTERVAL('..', '2024-05-01T06:00:00Z'))": known(
        "datetime", lambda v: v <= DAY + timedelta(hours=6)
    ),
    "S_INTERSECTS(footprint, BBOX(0, -90, 180, 90))": spatial(EAST.intersects),
    "S_WITHIN(footprint, BBOX(0, -90, 180, 90))": spatial(EAST.covers),
    "S_DISJOINT(footprint, POLYGON((-10 -10, 30 -10, 30 60, -10 -10)))": spatial(TRIANGLE.disjoint),
    "S_INTERSECTS(footprint, BBOX(170, -90, -170, 90))": spatial(
        lambda shape: shape.intersects(shapely.union(shapely.box(170, -90, 180, 90), shapely.box(-180, -90, -170, 90)))
    ),
}


def truth(row, text):
    return CASES[text](row)


@pytest.mark.parametrize("text", CASES)
def test_a_condition_equals_python(text):
    found = parse_filter(text)
    expected = [CASES[text](row) is True for row in ROWS]
    assert found.mask(TABLE.select(found.columns)).tolist() == expected
    assert 0 < sum(expected) < len(ROWS)


@pytest.mark.parametrize("seed", range(40))
def test_conditions_join_as_in_sql(seed):
    """AND, OR and NOT over true, false and unknown."""
    rng = np.random.default_rng(seed)
    texts = [list(CASES)[i] for i in rng.integers(len(CASES), size=3)]
    a, b, c = texts
    found = parse_filter(f"({a} AND NOT ({b})) OR NOT ({c} OR {a})").mask(TABLE)

    def no(value):
        return None if value is None else not value

    def both(*values):
        return False if False in values else None if None in values else True

    expected = []
    for row in ROWS:
        x, y, z = (CASES[text](row) for text in texts)
        x, y, z = (None if value is None else bool(value) for value in (x, y, z))
        either = no(both(no(both(x, no(y))), no(no(no(both(no(z), no(x)))))))
        expected.append(either is True)
    assert found.tolist() == expected


def test_chunks_and_empty_tables():
    text = "label = 'harbor' OR S_INTERSECTS(footprint, BBOX(0, -90, 180, 90))"
    chunked = pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7, 0), TABLE.slice(7)])
    assert parse_filter(text).mask(chunked).tolist() == parse_filter(text).mask(TABLE).tolist()
    assert parse_filter(text).mask(TABLE.slice(0, 0)).tolist() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label =", "not an expression in CQL2"),
        ("", "not an expression"),
        ("colour = 'red'", "no column 'colour'; there are key, uri"),
        ("label = harbor", "label is compared with text in 'single quotes', got {'property': 'harbor'}"),
        ("label = 3", "label is compared with text"),
        ("lon > 'x'", "lon is compared with a number"),
        ("lon > true", "lon is compared with a number"),
        ("lon > 1 + 2", "lon is compared with a number"),
        ("datetime > 'yesterday'", "'yesterday' is no time"),
        ("datetime > TIMESTAMP('2024-13-01T00:00:00Z')", "no time"),
        ("footprint = 'x'", "footprint has no order"),
        ("S_INTERSECTS(label, BBOX(0,0,1,1))", "S_INTERSECTS is for footprint"),
        ("S_INTERSECTS(footprint, label)", "no geometry"),
        ("S_INTERSECTS(footprint, POLYGON((0 0, 1 1, 0 1, 1 0, 0 0)))", "not valid"),
        ("S_CROSSES(footprint, BBOX(0,0,1,1))", "S_CROSSES with 2 arguments is not known"),
        ("lon LIKE 'a%'", "LIKE is for key"),
        ("__import__('os').system('true')", "not"),
        ("casei(label) = 'x'", "where a column belongs"),
        ("true", "no condition"),
        ("label", "no condition"),
        ("'a' = 'b'", "where a column belongs"),
        ("lon IN (1, 'a')", "lon is compared with a number"),
        ("key LIKE label", "LIKE with 2 arguments"),
    ],
)
def test_what_is_no_filter_is_told_in_one_line(text, words):
    with pytest.raises(InvalidQuery) as caught:
        parse_filter(text)
    assert words in str(caught.value)
    assert str(caught.value).startswith("filter: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "(" * 2000 + "lon > 1" + ")" * 2000,
        "NOT " * 1000 + "lon > 1",
        "not(" * 1000 + "lon > 1" + ")" * 1000,
        "lon > " + "-" * 4000 + "1",
        "lon > " + "- " * 2000 + "1",
        "lon > " + "1^" * 2000 + "1",
        "lon > " + "1+" * 2000 + "1",
        "casei(" * 600 + "label" + ")" * 600 + " = 'x'",
        "lon IN (" * 500,
        "(" * 4096,
    ],
    ids=lambda text: text[:8],
)
def test_depth_does_not_end_the_process(text):
    with pytest.raises(InvalidQuery):
        parse_filter(text)


def test_long_flat_expressions_pass():
    """As many alternatives as the limit on characters allows."""
    text = " OR ".join(["lon = 1"] * 370)
    assert len(text) < 4096
    assert parse_filter(text).mask(TABLE).sum() == 0
    numbers = ", ".join(["-1"] * 900)
    assert parse_filter(f"lon IN ({numbers})").mask(TABLE).sum() == 0
