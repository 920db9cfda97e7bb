"""Bounds of footprints that are read without shapely, against shapely."""

import numpy as np
import pyarrow as pa
import pytest
import shapely

from orbithash.search.segments import boxes as boxes_module
from orbithash.search.segments.boxes import boxes_of


def random_wkb(rng):
    west, south = rng.uniform(-180, 170), rng.uniform(-90, 80)
    box = shapely.box(west, south, west + rng.uniform(0, 10), south + rng.uniform(0, 10))
    ring = shapely.box(west + 1, south + 1, west + 2, south + 2)
    shape = [
        box,
        shapely.difference(shapely.box(west, south, west + 5, south + 5), ring),
        shapely.MultiPolygon([box, shapely.box(0, 0, 1, 1)]),
        shapely.Point(west, south),
        shapely.LineString([(west, south), (0, 0)]),
        shapely.GeometryCollection([box]),
        shapely.MultiPolygon(),
        shapely.Polygon(),
        shapely.force_3d(box),
    ][rng.integers(9)]
    return bytearray(shapely.to_wkb(shape, byte_order=int(rng.random() < 0.9), include_srid=False))


@pytest.mark.parametrize("seed", range(4))
def test_any_bytes(seed, monkeypatch):
    """WKB that is whole, and WKB in which some bytes are wrong, are missing or follow."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(600):
        wkb = random_wkb(rng)
        match rng.integers(6):
            case 0:
                wkb[rng.integers(min(len(wkb), 20))] = rng.integers(256)
            case 1:
                wkb[rng.integers(len(wkb))] ^= 1 << rng.integers(8)
            case 2:
                wkb = wkb[: rng.integers(len(wkb))]
            case 3:
                wkb += bytes(rng.integers(1, 20))
        rows.append(bytes(wkb) if rng.random() < 0.9 else None)
    # A slice of a larger array.
    footprints = pa.array([b"before", *rows, b"after"], pa.large_binary()).slice(1, len(rows))
    lon, lat = (pa.array([None if rng.random() < 0.1 else 7.0 for _ in rows]) for _ in range(2))
    found = boxes_of(footprints, lon, lat)
    num_simple = boxes_module._simple_bounds(footprints)[1].sum()
    assert num_simple > 50
    monkeypatch.setattr(
        boxes_module, "_simple_bounds", lambda rows: (np.zeros((4, len(rows))), np.zeros(len(rows), np.bool_))
    )
    np.testing.assert_array_equal(found, boxes_of(footprints, lon, lat))


def test_numbers_of_points_beyond_the_bytes():
    wkb = bytearray(shapely.to_wkb(shapely.box(0, 0, 1, 1)))
    rows = []
    for place in (5, 9):
        for number in (0, 2, 3, 6, 2**31, 2**32 - 1):
            wrong = wkb.copy()
            wrong[place : place + 4] = number.to_bytes(4, "little")
            rows.append(bytes(wrong))
    footprints = pa.array(rows, pa.large_binary())
    assert not boxes_module._simple_bounds(footprints)[1].any()
    nothing = pa.nulls(len(rows), pa.float64())
    boxes = boxes_of(footprints, nothing, nothing)
    assert np.isnan(boxes[:, 1:6]).all()
    assert np.isposinf(boxes[2:, 0]).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_coordinates_that_are_not_finite(value):
    """Nothing can be said of such an outline: its box is everywhere."""
    wkb = bytearray(shapely.to_wkb(shapely.box(1, 2, 3, 4)))
    # The second of five points.
    for place in (13 + 16, 13 + 24):
        wkb[place : place + 8] = np.float64(value).tobytes()
    centre = pa.array([2.0])
    boxes = boxes_of(pa.array([bytes(wkb)], pa.large_binary()), centre, centre)
    assert boxes[:, 0].tolist() == [-np.inf, -np.inf, np.inf, np.inf]
