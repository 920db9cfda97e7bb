"""Geometry columns of Parquet files: every encoding, reference systems, damaged metadata."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import shapely
from rasterio.crs import CRS
from rasterio.warp import transform_geom

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.sources import list_source

SQUARE = shapely.box(4, 50, 5, 51)
HOLED = shapely.Polygon([(0, 0), (8, 0), (8, 8), (0, 8)], [[(2, 2), (4, 2), (4, 4), (2, 4)]])
WGS84 = {
    "type": "GeographicCRS",
    "name": "WGS 84 longitude-latitude",
    "datum": {
        "type": "GeodeticReferenceFrame",
        "name": "World Geodetic System 1984",
        "ellipsoid": {"name": "WGS 84", "semi_major_axis": 6378137, "inverse_flattening": 298.257223563},
    },
    "coordinate_system": {
        "subtype": "ellipsoidal",
        "axis": [
            {"name": "Geodetic longitude", "abbreviation": "Lon", "direction": "east", "unit": "degree"},
            {"name": "Geodetic latitude", "abbreviation": "Lat", "direction": "north", "unit": "degree"},
        ],
    },
    "id": {"authority": "OGC", "code": "CRS84"},
}


def write(path, column, name="geometry", encoding="WKB", geo=None, **columns):
    """Write a GeoParquet file with one row per geometry; `geo` overrides fields of the column's metadata."""
    metadata = {"version": "1.1.0", "primary_column": name, "columns": {name: {"encoding": encoding, **(geo or {})}}}
    rows = {"path": [f"{number}.tif" for number in range(len(column))], name: column, **columns}
    pq.write_table(pa.table(rows).replace_schema_metadata({"geo": json.dumps(metadata)}), path)
    return path


def wkb(*geometries):
    return pa.array([None if geometry is None else geometry.wkb for geometry in geometries], pa.binary())


def outline(item):
    return shapely.from_wkb(item.footprint)


def test_outlines_are_read_with_their_centres(tmp_path):
    path = write(tmp_path / "t.parquet", wkb(SQUARE, None, shapely.Point(7, 8)))
    square, nowhere, point = list_source(path)
    assert (square.lon, square.lat) == pytest.approx((4.5, 50.5))
    assert outline(square).equals(SQUARE)
    assert (nowhere.lon, nowhere.lat, nowhere.footprint, nowhere.problem) == (None, None, None, None)
    assert (point.lon, point.lat) == (7, 8)


def test_the_primary_column_is_read_under_any_name_beside_others(tmp_path):
    path = write(tmp_path / "t.parquet", wkb(SQUARE), name="outline", geometry=[b"not a geometry"], bbox=[[1.0, 2.0]])
    (item,) = list_source(path)
    assert outline(item).equals(SQUARE)


def test_lon_and_lat_take_precedence_over_the_centre(tmp_path):
    (item,) = list_source(write(tmp_path / "t.parquet", wkb(SQUARE), lon=[4.25], lat=[50.75]))
    assert (item.lon, item.lat) == (4.25, 50.75)
    assert outline(item).equals(SQUARE)


@pytest.mark.parametrize("crs", [WGS84, "OGC:CRS84", "EPSG:4326", CRS.from_epsg(4326).to_wkt()])
def test_wgs_84_is_known_in_every_notation(tmp_path, crs):
    """The first coordinate is the longitude, whatever the reference system says of its axes."""
    (item,) = list_source(write(tmp_path / "t.parquet", wkb(SQUARE), geo={"crs": crs}))
    assert outline(item).equals(SQUARE)


@pytest.mark.parametrize("epsg", [32631, 3035, 3413, 3857])
@pytest.mark.parametrize("notation", ["PROJJSON", "WKT", "code"])
def test_other_reference_systems_are_projected(tmp_path, epsg, notation):
    system = CRS.from_epsg(epsg)
    there = shapely.geometry.shape(transform_geom("EPSG:4326", system, SQUARE))
    crs = {"PROJJSON": system.to_dict(projjson=True), "WKT": system.to_wkt(), "code": f"EPSG:{epsg}"}[notation]
    (item,) = list_source(write(tmp_path / "t.parquet", wkb(there), geo={"crs": crs}))
    assert (item.lon, item.lat) == pytest.approx((4.5, 50.5), abs=0.05)
    corners = shapely.MultiPoint(shapely.get_coordinates(SQUARE))
    assert shapely.covers(outline(item).buffer(1e-6), corners)
    assert outline(item).symmetric_difference(SQUARE).area < 0.02


def test_outlines_across_180_degrees_are_cut(tmp_path):
    crossing = shapely.Polygon([(179, 0), (-179, 0), (-179, 2), (179, 2)])
    (item,) = list_source(write(tmp_path / "t.parquet", wkb(crossing)))
    assert abs(item.lon) == pytest.approx(180)
    assert outline(item).equals(shapely.union(shapely.box(179, 0, 180, 2), shapely.box(-180, 0, -179, 2)))


POINT = pa.struct([("x", pa.float64()), ("y", pa.float64())])
PAIR = pa.list_(pa.float64(), 2)


def native(geometry, is_pair):
    """Return the coordinates of a geometry, nested as in GeoArrow."""

    def nested(value):
        if isinstance(value[0], float):
            return list(value) if is_pair else {"x": value[0], "y": value[1]}
        return [nested(part) for part in value]

    return nested(shapely.geometry.mapping(geometry)["coordinates"])


@pytest.mark.parametrize("is_pair", [False, True])
@pytest.mark.parametrize(
    ("geometry", "depth"),
    [
        (shapely.Point(4.0, 50.0), 0),
        (shapely.LineString([(4.0, 50.0), (5.0, 51.0)]), 1),
        (shapely.MultiPoint([(4.0, 50.0), (5.0, 51.0)]), 1),
        (HOLED, 2),
        (shapely.MultiLineString([[(4.0, 50.0), (5.0, 51.0)], [(0.0, 0.0), (1.0, 1.0)]]), 2),
        (shapely.MultiPolygon([HOLED, shapely.box(10, 0, 12, 2)]), 3),
    ],
)
def test_native_encodings(tmp_path, geometry, depth, is_pair):
    kind = PAIR if is_pair else POINT
    for _ in range(depth):
        kind = pa.list_(kind)
    column = pa.array([native(geometry, is_pair), None], kind)
    first, second = list_source(write(tmp_path / "t.parquet", column, encoding=geometry.geom_type.lower()))
    assert outline(first).equals(geometry)
    assert second.footprint is None


@pytest.mark.parametrize("extension", ["geoarrow.wkb", "geoarrow.point"])
def test_geoarrow_columns_without_metadata_of_geoparquet(tmp_path, extension):
    tags = {"ARROW:extension:name": extension, "ARROW:extension:metadata": json.dumps({"crs": "EPSG:4326"})}
    column = wkb(SQUARE) if extension == "geoarrow.wkb" else pa.array([{"x": 4.5, "y": 50.5}], POINT)
    schema = pa.schema([("path", pa.string()), pa.field("where", column.type, metadata=tags)])
    pq.write_table(pa.table([pa.array(["a.tif"]), column], schema=schema), tmp_path / "t.parquet")
    (item,) = list_source(tmp_path / "t.parquet")
    assert (item.lon, item.lat) == (4.5, 50.5)


def test_a_damaged_geometry_is_refused_alone(tmp_path):
    far = shapely.box(0, 0, 1, 100)
    column = pa.array([SQUARE.wkb, b"not a geometry", b"", far.wkb], pa.binary())
    first, *others = list_source(write(tmp_path / "t.parquet", column))
    assert first.problem is None
    assert [item.problem.partition(";")[0] for item in others] == [
        "its geometry is not a geometry in the encoding wkb",
        "its geometry is not a geometry in the encoding wkb",
        "its geometry has no place on the Earth: it reaches from 0, 0 to 1, 100",
    ]


@pytest.mark.parametrize(
    ("geo", "message"),
    [
        ({"crs": None}, "its coordinate reference system is unknown .null.; set it, or give columns lon and lat"),
        ({"crs": "EPSG:999999"}, "its coordinate reference system EPSG:999999 is not known"),
        ({"crs": {"type": "GeographicCRS"}}, "is not known"),
        ({"encoding": "shapefile"}, "encoding 'shapefile' is not one of wkb, point"),
        ({"encoding": None}, "encoding None is not one of"),
    ],
)
def test_columns_that_cannot_be_read_are_refused(tmp_path, geo, message):
    path = write(tmp_path / "t.parquet", wkb(SQUARE), geo=geo)
    with pytest.raises(InputError, match=message):
        list_source(path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"primary_column": "gone", "columns": {"gone": {"encoding": "WKB"}}}']
)
def test_damaged_metadata_is_refused(tmp_path, text):
    table = pa.table({"path": ["a.tif"], "geometry": wkb(SQUARE)}).replace_schema_metadata({"geo": text})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(InputError, match="the geometry column cannot be read"):
        list_source(tmp_path / "t.parquet")


def test_a_column_that_is_not_read_is_logged(tmp_path, caplog):
    pq.write_table(pa.table({"path": ["a.tif"], "geometry": wkb(SQUARE)}), tmp_path / "plain.parquet")
    (item,) = list_source(tmp_path / "plain.parquet")
    assert item.footprint is None
    assert "column geometry is not read, because it has no GeoParquet metadata" in caplog.text
    (item,) = list_source(write(tmp_path / "t.parquet", wkb(SQUARE), geo={"crs": None}, lon=[1.0], lat=[2.0]))
    assert (item.lon, item.lat, item.footprint) == (1, 2, None)
    assert "column geometry is not read, because its reference system is unknown" in caplog.text
