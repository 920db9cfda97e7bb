"""Geometries of rows for files: whatever the footprints hold, other programs can read the result."""

import numpy as np
import pytest
import shapely

from orbithash.encoders.places.geometry import (
    NO_PLACE,
    geometries_of,
    hilbert_positions,
    is_nested_deeply,
    item_bbox,
)

SQUARE = shapely.box(1, 2, 3, 4)


def nested(depth, big_endian=False, flags=0):
    """Return the WKB of a point in `depth` collections."""
    order, name = ("big", b"\0") if big_endian else ("little", b"\1")
    header = name + (7 | flags).to_bytes(4, order) + (1).to_bytes(4, order)
    return header * depth + shapely.to_wkb(shapely.Point(1, 2), byte_order=0 if big_endian else 1)


def geometry_of(footprint, lon=9.0, lat=8.0):
    return geometries_of([footprint], np.array([lon]), np.array([lat]))


@pytest.mark.parametrize("footprint", [SQUARE.wkb, shapely.to_wkb(SQUARE, byte_order=0), nested(30), b"\1" * 5])
def test_bytes_of_a_usable_footprint_are_kept(footprint):
    shapes, wkb, keeps, num_unusable = geometry_of(footprint)
    is_usable = footprint != b"\1" * 5
    assert (bool(keeps[0]), num_unusable) == (is_usable, 0 if is_usable else 1)
    assert wkb[0] == (footprint if is_usable else shapely.Point(9, 8).wkb)
    assert shapely.to_wkb(shapes[0]) == shapely.from_wkb(wkb[0]).wkb


@pytest.mark.parametrize(
    "footprint",
    [
        shapely.Polygon([(1, 2, 5), (3, 2, 5), (3, 4, 5)]).wkb,
        shapely.to_wkb(shapely.set_srid(SQUARE, 4326), include_srid=True),
    ],
)
def test_other_dimensions_and_identifiers_are_dropped(footprint):
    _, wkb, keeps, num_unusable = geometry_of(footprint)
    assert (keeps[0], num_unusable) == (False, 0)
    written = shapely.from_wkb(wkb[0])
    assert not written.has_z
    assert shapely.get_srid(written) == 0
    assert written.equals(shapely.force_2d(shapely.from_wkb(footprint)))


@pytest.mark.parametrize(
    "footprint",
    [
        b"",
        b"no geometry",
        SQUARE.wkb[:-3],
        shapely.Polygon().wkb,
        shapely.Point(float("nan"), 1).wkb,
        shapely.LineString([(0, 0), (np.inf, 1)]).wkb,
        nested(7000),
        nested(200_000),
        nested(200_000, big_endian=True),
        nested(200_000, flags=0x80000000),
    ],
)
def test_an_unusable_footprint_becomes_the_point(footprint):
    shapes, wkb, keeps, num_unusable = geometry_of(footprint)
    assert (shapes[0], wkb[0]) == (shapely.Point(9, 8), shapely.Point(9, 8).wkb)
    assert (keeps[0], num_unusable) == (False, 1)
    shapes, wkb, _, _ = geometry_of(footprint, lon=np.nan)
    assert (shapes[0], wkb[0]) == (None, None)


def test_many_parts_are_not_nested():
    points = shapely.GeometryCollection([shapely.Point(x, 7) for x in range(1000)])
    assert not is_nested_deeply(points.wkb)
    assert is_nested_deeply(nested(40))


def test_the_box_of_an_item_crosses_180_degrees_where_its_geometry_does():
    crossing = shapely.MultiPolygon([shapely.box(179, -17, 180, -16), shapely.box(-180, -17, -178, -16)])
    assert item_bbox(crossing) == [179, -17, -178, -16]
    assert item_bbox(SQUARE) == [1, 2, 3, 4]
    around = shapely.box(-180, 80, 180, 90)
    assert item_bbox(around) == [-180, 80, 180, 90]
    three = shapely.MultiPolygon([*crossing.geoms, shapely.box(-10, 0, 10, 1)])
    assert item_bbox(three) == [-180, -17, 180, 1]


def test_neighbours_on_the_curve_are_neighbours_on_the_earth():
    count = 64
    lon, lat = np.meshgrid((np.arange(count) + 0.5) / count * 360 - 180, (np.arange(count) + 0.5) / count * 180 - 90)
    order = np.argsort(hilbert_positions(lon.ravel(), lat.ravel()))
    rows, columns = np.unravel_index(order, (count, count))
    assert (np.abs(np.diff(rows)) + np.abs(np.diff(columns)) == 1).all()


def test_places_at_the_edges_and_without_numbers_have_a_position():
    lon = np.array([-180, 180, 180, 540, np.nan, np.inf, 0])
    lat = np.array([-90, 90, -90, 100, 0, 0, np.nan])
    positions = hilbert_positions(lon, lat).tolist()
    assert positions[0] == 0
    assert max(positions[:4]) < NO_PLACE
    assert positions[4:] == [NO_PLACE] * 3
