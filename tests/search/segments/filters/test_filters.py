"""Filters give the answers of Python, whatever form the columns have."""

import re
import time
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pytest
import shapely
from filter_rows import DAY, archive_columns, make_rows, outline, segment_of, table_of

from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import Query
from orbithash.search.segments import bits
from orbithash.search.segments.boxes import read_outlines
from orbithash.search.segments.filters import areas
from orbithash.search.segments.filters.conditions import CHEAP, EXPENSIVE, ColumnCondition, Junction, in_chunks
from orbithash.search.segments.filters.expressions import parse_filter
from orbithash.search.segments.stop import Stop, Stopped

ROWS = make_rows()
TABLE = table_of(ROWS)
NUM_ROWS = len(ROWS)


@pytest.fixture(scope="module")
def forms(tmp_path_factory):
    """The columns of ROWS in memory, in a mapped file, and read from the archive when they are needed."""
    folder = tmp_path_factory.mktemp("segments")
    return [segment_of(TABLE).columns, segment_of(TABLE, folder).columns, archive_columns(TABLE)]


def passing(text, columns, num_rows=NUM_ROWS):
    return bits.to_mask(parse_filter(text).passing(columns, num_rows, Stop()), num_rows).tolist()


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
    "label LIKE 'Ä%'": known("label", lambda v: v.startswith("Ä")),
    "label = '川'": known("label", lambda v: v == "川"),
    "label LIKE '_'": known("label", lambda v: len(v) == 1),
    r"label LIKE '%\_\%'": known("label", lambda v: v.endswith("_%")),
    "caption LIKE '%100%zweite%'": known("caption", lambda v: "100" in v and "zweite" in v),
    "caption < 'caption 2'": known("caption", lambda v: v.encode() < b"caption 2"),
    "key LIKE 'scenes/202_/1_.tif'": known("key", lambda v: re.fullmatch(r"scenes/202./1.\.tif", v) is not None),
    "lon > 3.5": known("lon", lambda v: v > 3.5),
    "3.5 >= lon": known("lon", lambda v: v <= 3.5),
    "lon <> 3.5": known("lon", lambda v: v != 3.5),
    "NOT lon < 3.5": known("lon", lambda v: not v < 3.5),
    "lon IS NULL": lambda row: row["lon"] is None,
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


@pytest.mark.parametrize("text", CASES)
def test_a_condition_equals_python(text, forms, monkeypatch):
    expected = [CASES[text](row) is True for row in ROWS]
    assert parse_filter(text).mask(TABLE.select(parse_filter(text).columns)).tolist() == expected
    for columns in forms:
        assert passing(text, columns) == expected
    monkeypatch.setattr(areas, "_MANY_READ", -1)
    assert passing(text, forms[0]) == expected
    assert 0 < sum(expected) < len(ROWS)


def no(value):
    return None if value is None else not value


def both(*values):
    return False if False in values else None if None in values else True


def random_expression(rng, depth):
    """Return a random expression, and its value for a row by Python."""
    if depth == 0 or rng.random() < 0.2:
        text = list(CASES)[rng.integers(len(CASES))]
        return text, lambda row: None if CASES[text](row) is None else bool(CASES[text](row))
    parts = [random_expression(rng, depth - 1) for _ in range(rng.integers(2, 4))]
    kind = ("AND", "OR", "NOT")[rng.integers(3)]
    if kind == "NOT":
        text, value = parts[0]
        return f"NOT ({text})", lambda row: no(value(row))
    text = f" {kind} ".join(f"({part})" for part, _ in parts)
    if kind == "AND":
        return text, lambda row: both(*(value(row) for _, value in parts))
    return text, lambda row: no(both(*(no(value(row)) for _, value in parts)))


@pytest.mark.parametrize("seed", range(60))
def test_conditions_join_as_in_sql(seed, forms):
    """AND, OR and NOT over true, false and unknown."""
    text, value = random_expression(np.random.default_rng(seed), 4)
    assert passing(text, forms[seed % len(forms)]) == [value(row) is True for row in ROWS]


def test_patterns_equal_regular_expressions():
    rng = np.random.default_rng(0)
    letters = np.array(list("aab1_%ä川\n"))
    values = ["".join(rng.choice(letters, rng.integers(8))) for _ in range(500)] + [None]
    table = pa.table({"caption": values})
    for _ in range(600):
        pattern = "".join(rng.choice(list("aab1ä%%_"), rng.integers(1, 9)))
        regex = re.compile(re.escape(pattern).replace("%", ".*").replace("_", "."), re.DOTALL)
        expected = [value is not None and regex.fullmatch(value) is not None for value in values]
        assert parse_filter(f"caption LIKE '{pattern}'").mask(table).tolist() == expected, pattern
        others = [value is not None and not passes for value, passes in zip(values, expected, strict=True)]
        assert parse_filter(f"NOT caption LIKE '{pattern}'").mask(table).tolist() == others, pattern


def test_a_segment_without_outlines_places_rows_at_their_centres():
    rows = [{**row, "footprint": None} for row in ROWS]
    segment = segment_of(table_of(rows))
    assert segment.columns.boxes() is None
    for text in CASES:
        if text.startswith("S_"):
            assert passing(text, segment.columns) == [CASES[text](row) is True for row in rows]


def test_a_box_touches_an_area_by_its_last_digit():
    """Boxes of outlines and areas are compared as float32, rounded outwards."""
    edge = np.nextafter(30.1, 0)
    assert np.float32(edge) > edge
    rows = [
        {**ROWS[0], "footprint": shapely.to_wkb(shapely.box(west, 0, east, 1))}
        for west, east in [(edge, 31), (29, 30), (np.nextafter(edge, 31), 31), (20, edge)]
    ]
    segment = segment_of(table_of(rows))
    text = f"S_INTERSECTS(footprint, BBOX(-10, 0, {float(edge)!r}, 1))"
    assert passing(text, segment.columns, 4) == [True, True, False, True]
    assert passing(f"S_WITHIN(footprint, BBOX(-10, 0, {float(edge)!r}, 1))", segment.columns, 4) == [
        False,
        True,
        False,
        True,
    ]


@pytest.mark.parametrize("lon", [30.1, -30.1, 30.3, -30.3])
def test_a_point_lies_on_the_edge_of_an_area(lon):
    """The coordinates of points are compared as float64, the box of the area is rounded outwards to float32."""
    rows = [{**ROWS[0], "lon": lon, "lat": lat, "footprint": None} for lat in (30.1, -30.1, 30.3, -30.3)]
    columns = segment_of(table_of(rows)).columns
    for west, east in ((lon, 90.0), (-90.0, lon)):
        for south, north in ((-30.3, 30.1), (-30.1, 30.3)):
            found = passing(f"S_INTERSECTS(footprint, BBOX({west}, {south}, {east}, {north}))", columns, 4)
            assert found == [south <= row["lat"] <= north for row in rows]


def random_area(rng):
    """Return an area between 0 and 64 degrees: cells of its grid often end where the boxes of rows do."""
    kind = rng.integers(5)
    points = rng.integers(0, 65, (12, 2)).astype(float)
    if kind == 0:
        return shapely.box(0, 0, 64, 64)
    if kind == 1:
        return shapely.LineString(points[:4])
    if kind == 2:
        return shapely.MultiPoint(points)
    hull = shapely.convex_hull(shapely.MultiPoint(points))
    if kind == 3:
        return shapely.Polygon(hull.exterior, [shapely.box(30, 30, 33, 34).exterior]) if hull.covers(HOLE) else hull
    return shapely.union_all([shapely.box(x, y, x + 7, y + 5) for x, y in points])


HOLE = shapely.box(29, 29, 34, 35)


def squares(rng, num_rows=1500):
    """Return rows with small outlines, or a point, many of which touch each other and the borders of cells."""
    corners = rng.integers(-3, 66, (num_rows, 2)) + rng.choice([0, 0, 0.25, 1e-7, -1e-7], (num_rows, 2))
    outlines = shapely.box(*corners.T, *(corners + rng.choice([0.25, 0.5, 1, 3], corners.shape)).T)
    footprints = [shapely.to_wkb(each) if rng.random() < 0.9 else None for each in outlines]
    places = zip(corners.tolist(), footprints, strict=True)
    return [{**ROWS[0], "lon": lon, "lat": lat, "footprint": footprint} for (lon, lat), footprint in places]


@pytest.mark.parametrize("seed", range(12))
def test_the_grid_of_an_area_decides_as_geometry_does(seed, monkeypatch):
    monkeypatch.setattr(areas, "_MANY_READ", -1)
    rng = np.random.default_rng(seed)
    rows = squares(rng)
    columns = segment_of(table_of(rows)).columns
    for _ in range(3):
        area = random_area(rng)
        tests = {"INTERSECTS": area.intersects, "WITHIN": area.covers, "DISJOINT": area.disjoint}
        for operator, test in tests.items():
            found = passing(f"S_{operator}(footprint, {area.wkt})", columns, len(rows))
            assert found == [bool(test(outline(row))) for row in rows]


def test_outlines_within_the_cells_of_an_area_are_not_read(monkeypatch):
    num_read = 0

    def counted(footprints):
        nonlocal num_read
        num_read += len(footprints)
        return read_outlines(footprints)

    rows = squares(np.random.default_rng(0), 100_000)
    columns = segment_of(table_of(rows)).columns
    monkeypatch.setattr(areas, "read_outlines", counted)
    text = "S_INTERSECTS(footprint, POLYGON((0 0, 64 0, 64 64, 32 50, 0 64, 0 0)))"
    assert sum(passing(text, columns, len(rows))) > 70_000
    assert num_read < 40_000


def test_coordinates_may_have_exponents():
    for written, plain in (
        ("POINT(1e-05 2.5)", "POINT(0.00001 2.5)"),
        ("POINT(10 -2.5E-06)", "POINT(10 -0.0000025)"),
        ("POLYGON((0 0, 1e1 0, 1.e+1 .5e1, 0 0))", "POLYGON((0 0, 10 0, 10 5, 0 0))"),
        ("BBOX(-1e-7, 0, 1e-7, 1)", "BBOX(-0.0000001, 0, 0.0000001, 1)"),
    ):
        rows = pa.table({"footprint": [shapely.from_wkt("POINT(0.00001 2.5)").wkb], "lon": [1e-05], "lat": [2.5]})
        texts = [f"S_INTERSECTS(footprint, {area}) OR key = 'POINT(1e-05 2)'" for area in (written, plain)]
        table = rows.append_column("key", pa.array(["POINT(1e-05 2)"]))
        first, second = (parse_filter(text).mask(table) for text in texts)
        assert first.all()
        assert second.all()
        first, second = (parse_filter(text.partition(" OR ")[0]).mask(rows) for text in texts)
        assert first.tolist() == second.tolist()
    with pytest.raises(InvalidQuery, match="2\\)\\)' is not expected"):
        parse_filter("S_INTERSECTS(footprint, POINT(1e9999 2))")


@pytest.mark.parametrize("num_parts", [3, 40])
def test_an_area_in_parts_on_both_sides_of_180_degrees(num_parts, forms):
    """Of more parts than 16, the boxes are put together."""
    west = np.resize([-180, 172, -20, 5, 30], num_parts) + np.arange(num_parts) / 10
    parts = [shapely.box(lon, lat, lon + 0.09, lat + 0.5) for lon, lat in zip(west, np.arange(num_parts), strict=True)]
    area = shapely.MultiPolygon(parts)
    expected = [outline(row) is not None and bool(outline(row).intersects(area)) for row in ROWS]
    assert 0 < sum(expected) < len(ROWS)
    for columns in forms:
        assert passing(f"S_INTERSECTS(footprint, {area.wkt})", columns) == expected


def test_outlines_that_cannot_be_compared_are_missing():
    """GEOS refuses some coordinates that are not finite, even if WKB may hold them."""
    ring = [[-1.0, np.inf], [1, 1], [1, 1], [5, 5], [1, 10], [-1, np.inf]]
    strange = shapely.to_wkb(shapely.Polygon(ring))
    good = shapely.to_wkb(shapely.box(2, 2, 3, 3))
    with pytest.raises(shapely.errors.GEOSException), np.errstate(all="ignore"):
        shapely.intersects(shapely.box(0, 0, 10, 10), shapely.from_wkb(strange))
    rows = [
        {**ROWS[0], "lon": lon, "lat": 5.0, "footprint": footprint}
        for lon, footprint in [(5.0, strange), (50.0, strange), (None, strange), (50.0, good), (50.0, None)]
    ]
    for columns in (segment_of(table_of(rows)).columns, archive_columns(table_of(rows))):
        assert passing("S_INTERSECTS(footprint, BBOX(0, 0, 10, 10))", columns, 5) == [True, False, False, True, False]
        assert passing("S_DISJOINT(footprint, BBOX(0, 0, 10, 10))", columns, 5) == [False, True, False, False, True]


def test_labels_with_more_values_than_their_codes_can_count():
    """The code of null is one more than those of the labels."""
    labels = [f"{number % 128}" if number % 3 else None for number in range(1000)]
    indices = pa.array([None if label is None else int(label) for label in labels], pa.int8())
    dictionary = pa.DictionaryArray.from_arrays(indices, pa.array([str(number) for number in range(128)]))
    table = pa.table({"label": dictionary})
    for text, expected in [
        ("label = '127'", [label == "127" for label in labels]),
        ("label IS NULL", [label is None for label in labels]),
        ("NOT label LIKE '%7'", [label is not None and not label.endswith("7") for label in labels]),
    ]:
        assert parse_filter(text).mask(table).tolist() == expected


def test_chunks_with_dictionaries_of_their_own():
    parts = [pa.array(["a", "b", None]).dictionary_encode(), pa.array(["c", "b", "a", None]).dictionary_encode()]
    table = pa.table({"label": pa.chunked_array(parts)})
    assert parse_filter("label <> 'b'").mask(table).tolist() == [True, False, False, True, False, True, False]


def test_expensive_conditions_are_tested_only_for_undecided_rows():
    seen = []

    def expensive(values):
        seen.extend(values.to_pylist())
        return pc.greater(values, 90.0)

    table = pa.table({"lon": [float(number) for number in range(100)]})
    parts = [
        ColumnCondition("lon", pa.float64(), expensive, EXPENSIVE),
        ColumnCondition("lon", pa.float64(), lambda values: pc.less(values, 5.0), CHEAP),
        ColumnCondition("lon", pa.float64(), lambda values: pc.greater_equal(values, 95.0), CHEAP),
    ]

    class Columns:
        array = staticmethod(table.column)

    for is_and, expected in ((True, []), (False, [0, 1, 2, 3, 4, *range(91, 100)])):
        seen.clear()
        ((_, truth),) = in_chunks(Junction(is_and, parts).bind(Columns(), Stop()), 100, Stop())
        assert np.flatnonzero(truth.yes).tolist() == expected
        # With AND no row is left; with OR nine of ten are, for which all values are compared.
        assert len(seen) == (0 if is_and else 100)
    few = [parts[0], ColumnCondition("lon", pa.float64(), lambda values: pc.less(values, 92.0), CHEAP)]
    seen.clear()
    ((_, truth),) = in_chunks(Junction(False, few).bind(Columns(), Stop()), 100, Stop())
    assert truth.yes.all()
    assert seen == [float(number) for number in range(92, 100)]


def test_an_evaluation_stops_between_chunks():
    stop = Stop()
    begins = []

    def test(begin, end, among):
        begins.append(begin)
        if len(begins) == 3:
            stop.cancel()
        return parts

    parts = (np.zeros(1, bool), np.zeros(1, bool))
    with pytest.raises(Stopped):
        for _ in in_chunks(test, 10**9, stop):
            pass
    assert len(begins) == 3


def test_chunks_cover_all_rows_once():
    for num_rows in (0, 1, 1000, 2**14, 10**5 + 3, 2**20):
        ends = [0]

        def test(begin, end, among, ends=ends):
            assert begin == ends[-1]
            assert begin % 1024 == 0
            assert begin // 2**16 == (end - 1) // 2**16
            ends.append(end)
            return

        assert len(list(in_chunks(test, num_rows, Stop()))) == len(ends) - 1
        assert ends[-1] == num_rows


def test_chunks_and_empty_tables():
    text = "label = 'harbor' OR S_INTERSECTS(footprint, BBOX(0, -90, 180, 90))"
    chunked = pa.concat_tables([TABLE.slice(0, 7), TABLE.slice(7, 0), TABLE.slice(7)])
    assert parse_filter(text).mask(chunked).tolist() == parse_filter(text).mask(TABLE).tolist()
    assert parse_filter(text).mask(TABLE.slice(0, 0)).tolist() == []


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("label =", "not an expression in CQL2: it ends too early"),
        ("", "not an expression in CQL2: it ends too early"),
        ("label ~~ 3", "not an expression in CQL2: '~~ 3' is not expected"),
        ("lat > 3 AND\nlabel ~~ 'x'", "not an expression in CQL2: \"~~ 'x'\" is not expected"),
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
        ("S_INTERSECTS(footprint, BBOX(lon, 0, 10, 9))", "BBOX requires four numbers, got [{'property': 'lon'}"),
        ("S_INTERSECTS(footprint, BBOX(casei('x'), 0, 10, 9))", "BBOX requires four numbers"),
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
        (f"key LIKE '{'_' * 100_000}'", "the pattern of LIKE is too long (100,000 characters)"),
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


def test_long_numbers_are_read_in_proportion_to_their_length():
    for text in ("1" * 400_000, "1." * 200_000, "+1" * 200_000, ".1e" * 130_000):
        begun = time.process_time()
        for area in (text, f"POINT({text})"):
            with pytest.raises(InvalidQuery):
                parse_filter(f"S_INTERSECTS(footprint, {area}")
        # A millionth of what a search from each digit would take.
        assert time.process_time() - begun < 20


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
