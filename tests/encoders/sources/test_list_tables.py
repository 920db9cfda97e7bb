"""Parquet tables: columns of all types, rows that are refused, times, places."""

import datetime as dt

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.sources import Item, list_source

UTC = dt.UTC


def keys(items):
    return [item.key for item in items]


def write_table(file, /, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_a_table_with_every_column(tmp_path):
    zone = pa.timestamp("ns", "Europe/Berlin")
    moment = dt.datetime(2020, 6, 1, 12, tzinfo=UTC)
    path = write_table(
        tmp_path / "table.parquet",
        uri=["b.tif", f"file://{tmp_path}/a.tif"],
        key=["two", None],
        label=pa.array(["river", None]).dictionary_encode(),
        caption=["A river .", None],
        datetime=pa.array([moment, None], zone),
        lon=[179.5, float("nan")],
        lat=pa.array([-90, None], pa.int64()),
        other=[1, 2],
    )
    first, second = list_source(path)
    assert first == Item(f"file://{tmp_path}/a.tif", str(tmp_path / "a.tif"))
    assert second == Item("two", str(tmp_path / "b.tif"), "river", "A river .", moment, 179.5, -90.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        *[
            (pa.array([dt.datetime(2020, 6, 1, 12)], pa.timestamp(unit)), dt.datetime(2020, 6, 1, 12, tzinfo=UTC))
            for unit in ("s", "ms", "us", "ns")
        ],
        (
            pa.array([1591012800 * 10**9 + 1999], pa.timestamp("ns", "Asia/Tokyo")),
            dt.datetime(2020, 6, 1, 12, 0, 0, 1, UTC),
        ),
        (pa.array([-1001], pa.timestamp("ns")), dt.datetime(1969, 12, 31, 23, 59, 59, 999998, UTC)),
        (pa.array([dt.date(2020, 6, 1)], pa.date32()), dt.datetime(2020, 6, 1, tzinfo=UTC)),
        (pa.array([dt.date(2020, 6, 1)], pa.date64()), dt.datetime(2020, 6, 1, tzinfo=UTC)),
        (pa.array(["2020-06-01T12:00:00Z"]), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
        (pa.array(["2020-06-01T14:00:00+02:00"], pa.large_string()), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
        (pa.array(["2020-06-01 12:00:00"]).dictionary_encode(), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
        (pa.array(["2020-06-01"]), dt.datetime(2020, 6, 1, tzinfo=UTC)),
        (pa.array([""]), None),
        (pa.array([None], pa.null()), None),
        (pa.array([None], pa.timestamp("ns")), None),
    ],
)
def test_times_in_a_table_become_utc(tmp_path, values, expected):
    (item,) = list_source(write_table(tmp_path / "t.parquet", path=["a.tif"], datetime=values))
    assert item.datetime == expected
    assert expected is None or item.datetime.utcoffset() == dt.timedelta(0)


@pytest.mark.parametrize(
    "kind", [pa.int64(), pa.int32(), pa.uint16(), pa.float64(), pa.decimal128(12), pa.time32("s"), pa.duration("s")]
)
def test_times_without_a_unit_are_refused(tmp_path, kind):
    """Seconds, milliseconds and nanoseconds since 1970 look alike."""
    values = pa.array([1234], pa.int32()).cast(kind) if not pa.types.is_duration(kind) else pa.array([1234], kind)
    path = write_table(tmp_path / "t.parquet", path=["a.tif"], datetime=values)
    with pytest.raises(InputError, match=r"column datetime of type .*store timestamps .in pandas by to_datetime"):
        list_source(path)


def test_path_takes_precedence_over_uri_and_numbers_become_labels(tmp_path):
    (item,) = list_source(write_table(tmp_path / "t.parquet", path=["a.tif"], uri=["http://x/a.tif"], label=[3]))
    assert (item.key, item.label) == ("a.tif", "3")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a.tif"]}, "has no column path or uri; it has file"),
        ({"path": [None, ""]}, "found 2 problems"),
        ({"path": ["a.tif"], "lon": [361.0], "lat": [0.0]}, "a.tif: lon 361.0 and lat 0.0; degrees from -360 to 360"),
        ({"path": ["a.tif"], "lat": [float("inf")]}, "lon None and lat inf"),
        ({"path": ["a.tif"], "lon": ["east"]}, "'east' is not a number of degrees"),
        ({"path": ["a.tif"], "datetime": ["noon"]}, "datetime is 'noon'; a time such as"),
        ({"path": ["a.tif"], "lon": [True], "datetime": [1]}, "found 2 problems"),
        (
            {"path": ["a.tif"], "label": [["river", "beach"]]},
            "column label of type list.*: text or numbers are allowed",
        ),
        ({"path": [{"x": 1}]}, "column path of type struct"),
        ({"path": ["ftp://b/a.tif"]}, "ftp://b/a.tif is remote"),
        ({"path": ["a.tif", "b.tif"], "key": ["same", "same"]}, "the key 'same' is there more than once"),
        ({"path": pa.array([], pa.string())}, "lists no image"),
    ],
)
def test_tables_that_are_refused(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        list_source(write_table(tmp_path / "t.parquet", **columns))


def test_a_row_that_cannot_be_used_is_refused_alone(tmp_path):
    path = write_table(
        tmp_path / "t.parquet",
        path=["a.tif", None, "https://x/c.tif", "d.tif", "e.tif"],
        key=[None, "named", None, None, None],
        lon=["5", "5", "5", "500", "n/a"],
        datetime=["2020-06-01"] * 5,
    )
    items = {item.key: item for item in list_source(path)}
    good = items.pop("a.tif")
    assert (good.problem, good.lon) == (None, 5.0)
    reasons = {key: item.problem.partition(";")[0] for key, item in items.items()}
    assert reasons == {
        "named": "row 1 has no path",
        "https://x/c.tif": "https://x/c.tif is remote",
        "d.tif": "lon 500.0 and lat None",
        "e.tif": "'n/a' is not a number of degrees",
    }


def test_times_beyond_the_calendar_are_refused_alone(tmp_path):
    values = pa.array([0, 2**55, -(2**55)], pa.timestamp("ms"))
    first, *others = list_source(write_table(tmp_path / "t.parquet", path=["a.tif", "b.tif", "c.tif"], datetime=values))
    assert first.datetime.year == 1970
    assert {item.problem for item in others} == {"its datetime lies beyond the years 1 to 9999"}


@pytest.mark.parametrize(("lon", "expected"), [(181.0, -179.0), (-181.0, 179.0), (360.0, 0.0), (180.0, 180.0)])
def test_longitudes_beyond_180_degrees_are_wrapped(tmp_path, lon, expected):
    (item,) = list_source(write_table(tmp_path / "t.parquet", path=["a.tif"], lon=[lon], lat=[1]))
    assert (item.lon, item.lat) == (expected, 1.0)


def test_other_columns_may_have_any_type(tmp_path):
    path = write_table(tmp_path / "t.parquet", path=["a.tif"], bbox=[{"xmin": 1.0}], labels=[["river", "beach"]])
    assert keys(list_source(path)) == ["a.tif"]


def test_files_that_are_not_parquet_are_refused(tmp_path):
    for data in (b"", b"PAR1", b"text" * 100):
        (tmp_path / "t.parquet").write_bytes(data)
        with pytest.raises(InputError, match="is not a readable Parquet file"):
            list_source(tmp_path / "t.parquet")
