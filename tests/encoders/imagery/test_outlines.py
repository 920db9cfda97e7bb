"""Outlines by RFC 7946: one rule for every source of geometries."""

import contextlib
import math

import numpy as np
import pytest
import shapely
from shapely.geometry import LineString, MultiPoint, MultiPolygon, Point, Polygon, box, shape

from orbithash.encoders.imagery.outlines import (
    bounding_box,
    normalize,
    normalize_wkb,
    place_of,
    project,
    wrap_longitude,
)

CROSSING = shapely.union(box(178, -18, 180, -16), box(-180, -18, -179, -16))


@pytest.mark.parametrize(
    "ring",
    [
        [(178, -18), (181, -18), (181, -16), (178, -16)],
        [(-182, -18), (-179, -18), (-179, -16), (-182, -16)],
        [(178, -18), (-179, -18), (-179, -16), (178, -16)],
        [(178, -18), (178, -16), (-179, -16), (-179, -18)],
        [(178, -18), (180, -18), (-179, -18), (-179, -16), (-180, -16), (178, -16)],
    ],
)
def test_a_polygon_across_180_degrees_is_cut(ring):
    place = place_of(Polygon(ring))
    outline = shapely.from_wkb(place.footprint)
    assert outline.geom_type == "MultiPolygon"
    assert outline.equals(CROSSING)
    assert all(part.exterior.is_ccw for part in outline.geoms)
    assert (place.lon, place.lat) == pytest.approx((179.5, -17))


def test_parts_that_lie_at_180_degrees_are_centred_there():
    place = place_of(CROSSING)
    assert (place.lon, place.lat) == pytest.approx((179.5, -17))
    assert shapely.from_wkb(place.footprint).equals(CROSSING)
    far = MultiPolygon([box(-100, 0, -98, 2), box(100, 0, 102, 2)])
    assert place_of(far).lon == pytest.approx(-179), "the shorter way between the parts"
    near = MultiPolygon([box(-10, 0, -8, 2), box(10, 0, 12, 2)])
    assert place_of(near).lon == pytest.approx(1)


@pytest.mark.parametrize(
    "geometry",
    [
        box(10, 40, 12, 44),
        box(-180, -90, 180, 90),
        box(170, 0, 180, 10),
        Polygon([(0, 0), (10, 0), (10, 10), (0, 10)], [[(4, 4), (6, 4), (6, 6), (4, 6)]]),
        MultiPolygon([box(0, 0, 1, 1), box(2, 0, 3, 1)]),
        Point(180, 90),
        MultiPoint([(1, 2), (3, 4)]),
        LineString([(0, 0), (170, 5)]),
    ],
)
def test_geometries_that_follow_the_rule_are_unchanged(geometry):
    got = normalize(geometry)
    assert got.geom_type == geometry.geom_type
    assert got.equals(geometry)
    np.testing.assert_array_equal(
        np.unique(shapely.get_coordinates(got), axis=0), np.unique(shapely.get_coordinates(geometry), axis=0)
    )


def test_rings_are_counter_clockwise_and_holes_clockwise():
    hole = [(4, 4), (6, 4), (6, 6), (4, 6)]
    got = normalize(Polygon([(0, 0), (0, 10), (10, 10), (10, 0)], [hole]))
    assert got.exterior.is_ccw
    assert not got.interiors[0].is_ccw


def test_a_hole_across_180_degrees_is_cut_too():
    got = normalize(Polygon([(170, 0), (190, 0), (190, 10), (170, 10)], [[(-179, 4), (-179, 6), (179, 6), (179, 4)]]))
    assert got.area == pytest.approx(20 * 10 - 2 * 2)
    assert not shapely.contains_xy(got, 179.5, 5)
    assert shapely.contains_xy(got, 179.5, 3)


@pytest.mark.parametrize("pole", [1, -1])
def test_a_ring_around_a_pole_holds_the_pole(pole):
    got = normalize(Polygon([(-135, pole * 80), (-45, pole * 80), (45, pole * 80), (135, pole * 80)]))
    assert got.bounds == pytest.approx((-180, min(80 * pole, 90 * pole), 180, max(80 * pole, 90 * pole)))
    assert shapely.contains_xy(got, 179.9, pole * 89.9)
    assert not shapely.contains_xy(got, 0, pole * 79)


def test_points_and_lines_are_wrapped():
    assert normalize(Point(200, 5)).equals(Point(-160, 5))
    line = normalize(LineString([(170, 0), (-170, 4)]))
    assert line.equals(shapely.union(LineString([(170, 0), (180, 2)]), LineString([(-180, 2), (-170, 4)])))
    assert shapely.get_coordinates(normalize(MultiPoint([(185, 0), (-185, 1)]))).tolist() == [[-175, 0], [175, 1]]


def test_a_third_dimension_is_dropped_and_an_empty_geometry_has_no_place():
    place = place_of(shape({"type": "Polygon", "coordinates": [[[1, 1, 9], [2, 1, 9], [2, 2, 9], [1, 1, 9]]]}))
    assert not shapely.from_wkb(place.footprint).has_z
    assert place_of(Polygon()) is None


@pytest.mark.parametrize("point", [(361, 0), (0, 91), (0, -90.5)])
def test_coordinates_beyond_degrees_are_refused(point):
    with pytest.raises(ValueError, match="longitudes from -360 to 360 and latitudes from -90 to 90"):
        place_of(Point(point))
    with pytest.raises(ValueError, match="not a finite number"):
        place_of(Point(math.inf, 0))


def test_a_polygon_of_another_system_is_projected_with_its_curves():
    square = box(2_500_000, 1_400_000, 7_400_000, 5_500_000)
    outline = project(square, "EPSG:3035", 1000)
    corners = project(MultiPoint(shapely.get_coordinates(square)), "EPSG:3035", 1000)
    assert shapely.covers(outline.buffer(1e-9), corners)
    # Western Norway lies north of the chord between the two northern corners.
    chord = max(lat for _, lat in shapely.get_coordinates(corners))
    assert outline.bounds[3] > chord + 1


@pytest.mark.parametrize("crs", ["EPSG:999999", "a system of my own", 'LOCAL_CS["x",UNIT["m",1]]'])
def test_systems_without_a_place_on_the_earth_are_refused(crs):
    with pytest.raises(ValueError, match=r"is not known|cannot be projected|outside the area"):
        project(box(0, 0, 1, 1), crs, 0.1)


def test_a_box_may_be_wide_and_may_cross_180_degrees():
    assert bounding_box(-170, -10, 170, 10).equals(box(-170, -10, 170, 10))
    for west, east in ((178, -179), (178, 181), (-182, -179)):
        assert bounding_box(west, -18, east, -16).equals(CROSSING)
    assert bounding_box(0, -90, 360, 90).equals(box(-180, -90, 180, 90))
    with pytest.raises(ValueError, match="degrees are allowed"):
        bounding_box(0, 0, 10, 91)


def test_wkb_is_normalized():
    assert normalize_wkb(box(1, 2, 3, 4).wkb) == normalize(box(1, 2, 3, 4)).wkb
    assert shapely.from_wkb(normalize_wkb(box(178, -18, 181, -16).wkb)).equals(CROSSING)
    for damaged in (b"", b"not WKB", box(0, 0, 1, 1).wkb[:-8]):
        with pytest.raises(ValueError, match="it is not WKB"):
            normalize_wkb(damaged)


@pytest.mark.parametrize("depth", [33, 2000, 100_000])
def test_a_geometry_that_is_nested_deeply_is_an_error(depth):
    # GEOS would end the process at the largest depth.
    nested = b"\x01\x07\x00\x00\x00\x01\x00\x00\x00" * depth + Point(1, 2).wkb
    with pytest.raises(ValueError, match="nested too deeply"):
        normalize_wkb(nested)


def test_an_invalid_geometry_is_an_error_or_becomes_valid():
    bow = [(170, 0), (190, 10), (190, 0), (170, 10)]
    assert normalize(Polygon(bow)).is_valid
    holed = Polygon([(0, 0), (10, 10), (10, 0), (0, 10)], [[(1, 1), (2, 2), (2, 1), (1, 2)]])
    with contextlib.suppress(ValueError):
        normalize(holed)


@pytest.mark.parametrize(("lon", "expected"), [(180, 180), (-180, -180), (181, -179), (-181, 179), (360, 0), (0, 0)])
def test_longitudes_are_wrapped(lon, expected):
    assert wrap_longitude(lon) == expected
