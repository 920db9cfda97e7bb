"""Items of STAC in Parquet files: structs of assets, times, geometries, projections, keys."""

import datetime as dt
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.sources import Item, list_source
from tests.encoders.sources.embedding_tables import geo_metadata

# GEOS ends the process that reads it.
NESTED = b"\x01\x07\x00\x00\x00\x01\x00\x00\x00" * 100_000 + shapely.Point(1, 2).wkb
TIF = "image/tiff; application=geotiff"


def write_items(path, count=2, metadata=None, **columns):
    given = {
        "id": [f"item{n}" for n in range(count)],
        "geometry": pa.array([shapely.box(n, 40, n + 2, 44).wkb for n in range(count)], pa.binary()),
        "bbox": [{"xmin": n, "ymin": 40.0, "xmax": n + 2, "ymax": 44.0} for n in range(count)],
        "datetime": pa.array([dt.datetime(2015, 5, 2, tzinfo=dt.UTC)] * count, pa.timestamp("us", "UTC")),
        "assets": [{"visual": {"href": f"./{n}.tif", "type": TIF, "roles": ["visual"]}} for n in range(count)],
        "links": [[{"href": "x", "rel": "self"}]] * count,
        "stac_version": ["1.1.0"] * count,
        "stac_extensions": [[]] * count,
        **columns,
    }
    table = pa.table({name: column for name, column in given.items() if column is not None})
    pq.write_table(table.replace_schema_metadata(geo_metadata() if metadata is None else metadata), path)
    return path


def test_rows_are_items(tmp_path):
    path = write_items(tmp_path / "items.parquet", label=["a", None], caption=[None, "A lake."])
    first, second = list_source(path)
    assert first == Item(
        "item0",
        str(tmp_path / "0.tif"),
        label="a",
        datetime=dt.datetime(2015, 5, 2, tzinfo=dt.UTC),
        lon=1.0,
        lat=42.0,
        footprint=first.footprint,
    )
    assert shapely.from_wkb(first.footprint).equals(shapely.box(0, 40, 2, 44))
    assert (second.path, second.caption) == (str(tmp_path / "1.tif"), "A lake.")


def test_assets_of_one_file_share_a_struct(tmp_path):
    assets = [
        {"visual": {"href": "v.tif", "roles": ["visual"]}, "B04": None, "B03": None},
        {"visual": None, "B04": {"href": "4.tif", "roles": ["data"]}, "B03": {"href": "3.tif", "roles": ["data"]}},
    ]
    first, second = list_source(write_items(tmp_path / "a.parquet", assets=assets))
    assert first.path == str(tmp_path / "v.tif")
    assert second.problem == "its images are single bands (B04, B03); choose one by its name (--asset)"
    first, second = list_source(tmp_path / "a.parquet", asset="B04")
    assert (first.problem, second.path) == ("it has no asset B04; its assets are: visual", str(tmp_path / "4.tif"))


@pytest.mark.parametrize(
    "assets",
    [
        lambda assets: [json.dumps(one) for one in assets],
        lambda assets: pa.array(
            [list(one.items()) for one in assets],
            pa.map_(pa.string(), pa.struct([("href", pa.string()), ("type", pa.string())])),
        ),
    ],
)
def test_assets_as_json_or_as_maps(tmp_path, assets):
    given = [{f"image{n}": {"href": f"{n}.tif", "type": TIF}} for n in range(2)]
    first, second = list_source(write_items(tmp_path / "a.parquet", assets=assets(given)))
    assert (first.path, second.path) == (str(tmp_path / "0.tif"), str(tmp_path / "1.tif"))


def test_projections_and_bands_are_those_of_the_columns(tmp_path):
    bands = [{"name": "B4", "common_name": "red", "scale": 0.0001}]
    path = write_items(
        tmp_path / "a.parquet",
        geometry=pa.nulls(2, pa.binary()),
        bbox=None,
        assets=[{"data": {"href": "a.tif", "bands": bands, "proj:shape": [10, 10]}}] * 2,
        **{
            "proj:code": ["EPSG:32601", None],
            "proj:geometry": pa.array([shapely.box(156_021, 0, 176_021, 20_000).wkb, b"no WKB"], pa.binary()),
        },
    )
    first, second = list_source(path)
    assert abs(first.lon) == pytest.approx(180, abs=2e-3)
    assert first.bands[0].names == ("B4", "red")
    assert (second.lon, second.problem) == (None, None)


def test_a_null_geometry_has_the_place_of_the_bounding_box(tmp_path):
    first, _ = list_source(write_items(tmp_path / "a.parquet", geometry=pa.nulls(2, pa.binary())))
    assert (first.lon, first.lat) == (1.0, 42.0)


def test_times_of_any_unit_and_text(tmp_path):
    for column in (
        pa.array([0, None], pa.timestamp("ns", "UTC")),
        pa.array([0, None], pa.timestamp("s")),
        pa.array(["1970-01-01T00:00:00Z", None]),
    ):
        start = pa.array(["1971-01-01T00:00:00Z"] * 2)
        first, second = list_source(write_items(tmp_path / "a.parquet", datetime=column, start_datetime=start))
        assert (first.datetime.year, second.datetime.year) == (1970, 1971)
    bad, _ = list_source(write_items(tmp_path / "a.parquet", datetime=["yesterday", None]))
    assert bad.problem.startswith("datetime is 'yesterday'")


def test_an_invalid_row_is_refused_alone(tmp_path):
    outline = pa.array([b"no WKB", shapely.box(0, 0, 1, 1).wkb], pa.binary())
    bad, good = list_source(write_items(tmp_path / "a.parquet", geometry=outline))
    assert (bad.problem, good.problem) == ("its geometry is not a geometry in the encoding wkb", None)
    path = write_items(tmp_path / "a.parquet", 3, id=["a", None, "b"])
    assert {item.key: item.problem for item in list_source(path)} == {"a": None, "b": None, "item 1": "it has no id"}


def test_repeated_ids_follow_the_rule_of_item_collections(tmp_path):
    path = write_items(tmp_path / "a.parquet", 3, id=["x", "x", "y"], collection=["A", "B", "A"])
    assert sorted(item.key for item in list_source(path)) == ["A/x", "B/x", "y"]


def test_a_table_of_images_with_ids_stays_one(tmp_path):
    pq.write_table(pa.table({"id": ["a"], "path": ["a.tif"]}), tmp_path / "a.parquet")
    (item,) = list_source(tmp_path / "a.parquet")
    assert item.key == "a.tif"
    with pytest.raises(InputError, match="--asset x names an asset of STAC items"):
        list_source(tmp_path / "a.parquet", asset="x")


def test_a_damaged_file_is_named(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    with pytest.raises(InputError, match=r"a.parquet is not a readable Parquet file"):
        list_source(tmp_path / "a.parquet")


def test_deeply_nested_collections_refuse_their_row_alone(tmp_path):
    outlines = pa.array([NESTED, shapely.box(0, 0, 1, 1).wkb], pa.binary())
    bad, good = list_source(write_items(tmp_path / "a.parquet", geometry=outlines))
    assert (bad.problem, good.problem) == ("its geometry has collections that are nested too deeply", None)
    columns = {"geometry": pa.nulls(2, pa.binary()), "proj:code": ["EPSG:32601"] * 2, "proj:geometry": outlines}
    bad, _ = list_source(write_items(tmp_path / "a.parquet", **columns))
    assert bad.problem == "its proj:geometry is not GeoJSON"


def test_ids_and_times_of_other_types(tmp_path):
    assert [item.key for item in list_source(write_items(tmp_path / "a.parquet", id=[0, 1]))] == ["0", "1"]
    with pytest.raises(InputError, match=r"column start_datetime of type int64: a number has no unit"):
        list_source(write_items(tmp_path / "a.parquet", start_datetime=[0, 1]))
