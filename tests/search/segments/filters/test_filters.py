import re
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pytest
import shapely

from orbithash.encoders.archive.storage import schema_of
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import Query
from orbithash.search.segments.filters.expressions import COLUMNS, parse_filter

DAY = datetime(2024, 5, 1, tzinfo=UTC)


def make_rows(num_rows=400):
    """Return rows in which about a third of the values of each column are null."""
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
AROUND_180 = shapely.union(shapely.box(170, -90, 180, 90), shapely.box(-180, -90, -170, 90))
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
    "S_INTERSECTS(footprint, BBOX(-170, -90, 170, 90))": spatial(shapely.box(-170, -90, 170, 90).intersects),
    **dict.fromkeys(
        (
            "S_INTERSECTS(footprint, BBOX(170, -90, -170, 90))",
            "S_INTERSECTS(footprint, BBOX(170, -90, 190, 90))",
            "S_INTERSECTS(footprint, POLYGON((170 -90, 190 -90, 190 90, 170 90, 170 -90)))",
            "S_INTERSECTS(footprint, POLYGON((170 -90, -170 -90, -170 90, 170 90, 170 -90)))",
        ),
        spatial(AROUND_180.intersects),
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
        ("colour = 'red'", "no column 'colour'; the columns are key, uri"),
        ("label = harbor", "label must be compared with text in 'single quotes', got {'property': 'harbor'}"),
        ("label = 3", "label must be compared with text"),
        ("lon > 'x'", "lon must be compared with a number"),
        ("lon > true", "lon must be compared with a number"),
        ("lon > 1 + 2", "lon must be compared with a number"),
        ("datetime > 'yesterday'", "'yesterday' is not a time"),
        ("datetime > TIMESTAMP('2024-13-01T00:00:00Z')", "is not a time"),
        ("footprint = 'x'", "footprint cannot be compared"),
        ("S_INTERSECTS(label, BBOX(0,0,1,1))", "S_INTERSECTS is allowed for footprint"),
        ("S_INTERSECTS(footprint, label)", "is not a geometry"),
        ("S_INTERSECTS(footprint, BBOX(0, 0, 10, 91))", "BBOX is not in degrees: longitudes from -360 to 360"),
        ("S_INTERSECTS(footprint, POINT(500000 4649776))", "the geometry is not in degrees: it reaches from 500000"),
        ("S_INTERSECTS(footprint, POLYGON((0 0, 1 1, 0 1, 1 0, 0 0)))", "not valid"),
        ("S_CROSSES(footprint, BBOX(0,0,1,1))", "S_CROSSES with 2 arguments is not supported"),
        ("lon LIKE 'a%'", "LIKE is allowed for key"),
        ("__import__('os').system('true')", "not"),
        ("casei(label) = 'x'", "is not a column"),
        ("true", "is not a condition"),
        ("label", "is not a condition"),
        ("'a' = 'b'", "is not a column"),
        ("lon IN (1, 'a')", "lon must be compared with a number"),
        ("key LIKE label", "LIKE with 2 arguments"),
    ],
)
def test_an_invalid_filter_is_refused_in_one_line(text, words):
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
        " OR ".join(["lon = 1"] * 1001),
        " OR ".join(["lon = 1"] * 40_000),
        "lon = 1" + " -1" * 20_000,
        "lon = POINT(1 1)" + " -1" * 20_000,
        "lon = BBOX(1,1,2,2)" + "-1" * 20_000,
    ],
    ids=lambda text: text[:8],
)
def test_depth_does_not_end_the_process(text):
    with pytest.raises(InvalidQuery):
        parse_filter(text)


def test_long_flat_expressions_pass():
    assert parse_filter(" OR ".join(["lon = -1"] * 1000)).mask(TABLE).sum() == 0
    numbers = ", ".join(["-1e-7"] * 40_000)
    assert parse_filter(f"lon IN ({numbers})").mask(TABLE).sum() == 0
    boxes = " OR ".join(["(S_INTERSECTS(footprint, BBOX(-1.5, -2, -1, -1.5)) AND lat BETWEEN -2 AND -1)"] * 200)
    assert parse_filter(boxes).mask(TABLE).sum() == 0


def ring(num_vertices, radius):
    """A ring with all digits of a float, in both signs, as exports of real boundaries have them."""
    angles = np.linspace(0, 2 * np.pi, num_vertices - 1, endpoint=False)
    points = [f"{radius * np.cos(angle):.15f} {radius / 2 * np.sin(angle):.15f}" for angle in angles]
    return f"({', '.join([*points, points[0]])})"


def test_a_boundary_with_as_many_vertices_as_allowed_passes():
    text = f"S_INTERSECTS(footprint, POLYGON({ring(10_000, 150)}))"
    Query(code=b"a", filter=text).check()
    passes = parse_filter(text).mask(TABLE)
    area = shapely.from_wkt(f"POLYGON({ring(10_000, 150)})")
    assert passes.tolist() == [outline(row) is not None and bool(outline(row).intersects(area)) for row in ROWS]
    assert 0 < passes.sum() < len(ROWS)
    islands = ", ".join(f"({ring(1000, radius)})" for radius in (1, 2))
    with pytest.raises(InvalidQuery, match="the geometry is empty or not valid"):
        parse_filter(f"S_INTERSECTS(footprint, MULTIPOLYGON({islands}))")
    with pytest.raises(InvalidQuery, match="more than 10,000 vertices"):
        parse_filter(f"S_INTERSECTS(footprint, POLYGON({ring(10_001, 150)}))")


DATES = {
    "datetime = {day}": lambda v, day: v.date() == day,
    "datetime <> {day}": lambda v, day: v.date() != day,
    "datetime < {day}": lambda v, day: v.date() < day,
    "datetime <= {day}": lambda v, day: v.date() <= day,
    "datetime > {day}": lambda v, day: v.date() > day,
    "datetime >= {day}": lambda v, day: v.date() >= day,
    "{day} >= datetime": lambda v, day: v.date() <= day,
    "{day} < datetime": lambda v, day: v.date() > day,
    "datetime BETWEEN {day} AND {next}": lambda v, day: day <= v.date() <= day + timedelta(days=1),
    "datetime IN ({day})": lambda v, day: v.date() == day,
    "datetime IN ({next}, TIMESTAMP('2024-04-30T05:00:00.000014Z'), {day})": lambda v, day: (
        day <= v.date() <= day + timedelta(days=1) or v == datetime(2024, 4, 30, 5, 0, 0, 14, UTC)
    ),
    "NOT datetime = {day}": lambda v, day: v.date() != day,
    "NOT datetime IN ({day}, {next})": lambda v, day: not day <= v.date() <= day + timedelta(days=1),
    "NOT datetime BETWEEN {day} AND {day}": lambda v, day: v.date() != day,
    "T_INTERSECTS(datetime, {day})": lambda v, day: v.date() == day,
    "T_AFTER(datetime, {day})": lambda v, day: v.date() > day,
    "T_BEFORE(datetime, {day})": lambda v, day: v.date() < day,
}


@pytest.mark.parametrize("form", ["DATE('{}')", "'{}'"])
@pytest.mark.parametrize("text", DATES)
def test_a_date_is_the_whole_day(text, form):
    rows = [{**row, "datetime": row["datetime"]} for row in ROWS]
    moments = [DAY, DAY - timedelta(microseconds=1), DAY + timedelta(days=1, microseconds=-1), DAY + timedelta(days=1)]
    for row, moment in zip(rows, [*moments, datetime(2024, 4, 30, 5, 0, 0, 14, UTC)], strict=False):
        row["datetime"] = moment
    table = pa.Table.from_pylist(rows, TABLE.schema)
    days = {"day": form.format("2024-05-01"), "next": form.format("2024-05-02")}
    expected = [row["datetime"] is not None and DATES[text](row["datetime"], DAY.date()) for row in rows]
    assert parse_filter(text.format(**days)).mask(table).tolist() == expected
    assert 0 < sum(expected) < len(rows)


def test_the_last_day_of_the_calendar():
    assert (
        parse_filter("datetime <= DATE('9999-12-31')").mask(TABLE).sum()
        == TABLE["datetime"].is_valid().to_numpy().sum()
    )
    assert parse_filter("datetime > DATE('9999-12-31')").mask(TABLE).sum() == 0
