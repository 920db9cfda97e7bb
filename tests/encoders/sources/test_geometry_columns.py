"""Places of a whole geometry column at once equal those of one geometry after another."""

import math

import pyarrow as pa
import pytest
import shapely

from orbithash.encoders.sources.geometry_columns import GeometryColumn

GEOMETRIES = [
    shapely.Point(7, 8),
    shapely.Point(-180, 90),
    shapely.Point(190, 8),
    shapely.Point(7, 95),
    shapely.Point(1, 2, 3),
    shapely.Point(math.nan, 2),
    shapely.Point(),
    None,
    shapely.box(4, 50, 5, 51),
    shapely.Polygon([(4, 50), (4, 51), (5, 51), (5, 50)]),
    shapely.Polygon([(-179, 0), (179, 0), (179, 1), (-179, 1)]),
    shapely.Polygon([(0, 0), (8, 0), (8, 8), (0, 8)], [[(2, 2), (4, 2), (4, 4), (2, 4)]]),
    shapely.box(-30, -20, -10, -5),
    shapely.MultiPoint([(1, 2), (3, 4)]),
    shapely.LineString([(1, 2), (3, 4)]),
    shapely.Polygon([(-120, 80), (0, 80), (120, 80), (-120, 80)]),
]


# Collections in collections; GEOS ends the process that reads them.
NESTED = b"\x01\x07\x00\x00\x00\x01\x00\x00\x00" * 100_000 + shapely.Point(1, 2).wkb


@pytest.mark.parametrize("crs", [None, "EPSG:3857"])
def test_arrays_equal_single_places(crs):
    values = [None if geometry is None else geometry.wkb for geometry in GEOMETRIES] + [b"not WKB", NESTED]
    column = pa.array(values, pa.binary())
    read = GeometryColumn("geometry", "wkb", crs)
    arrays = read.place_arrays(column)
    for row, place in enumerate(read.places(column)):
        if place is None or isinstance(place, ValueError):
            assert math.isnan(arrays.lon[row])
            assert math.isnan(arrays.lat[row])
            assert arrays.footprint[row] is None
            assert arrays.problems.get(row) == (None if place is None else str(place))
        else:
            assert (arrays.lon[row], arrays.lat[row]) == pytest.approx((place.lon, place.lat), abs=1e-12)
            assert arrays.footprint[row] == place.footprint
            assert row not in arrays.problems


def test_points_of_geoarrow(tmp_path):
    column = pa.array([{"x": 7.0, "y": 8.0}, None])
    places = GeometryColumn("geometry", "point", None).place_arrays(column)
    assert (places.lon[0], places.lat[0]) == (7, 8)
    assert shapely.from_wkb(places.footprint[0]) == shapely.Point(7, 8)
    assert places.footprint[1] is None
