"""Outlines of tiles on the page, compared with the georeference of their scenes."""

import numpy as np
import pytest
import rasterio
from rasterio.transform import Affine, from_origin
from rasterio.warp import transform

from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.search.protocol.queries import Hit
from orbithash.search.web.page.state import State
from orbithash.search.web.page.tiles import tiles_of

# Grids of scenes: of UTM, turned by 20 degrees, at a high latitude, in degrees, and at 180 degrees.
GRIDS = {
    "utm": ("EPSG:32654", from_origin(361_000, 4_105_000, 150, 150)),
    "turned": ("EPSG:32654", Affine.translation(361_000, 4_105_000) @ Affine.rotation(20) @ Affine.scale(30, -30)),
    "north": ("EPSG:32633", from_origin(380_000, 8_700_000, 10, 10)),
    "degrees": ("EPSG:4326", from_origin(3.0, 51.5, 0.001, 0.001)),
    "date line": ("EPSG:32660", from_origin(830_500, 8_000, 30, 30)),
}


def check_corners(path, window):
    """Assert that each corner of a window of a scene is a vertex of its tile's outline, to 0.1 of a pixel."""
    place = read_georeference(path, window)
    hit = Hit(1, 0, 1, path.name, None, place.lon, place.lat, None, {"footprint": place.footprint})
    (tile,) = tiles_of([hit], State(), "random", 64)
    ring = np.array([[float(number) for number in vertex.split(",")] for vertex in tile.ring.split()])
    left, top, width, height = window
    with rasterio.open(path) as scene:
        corners = [
            scene.transform @ corner
            for corner in ((left, top), (left + width, top), (left + width, top + height), (left, top + height))
        ]
        x, y = transform("EPSG:4326", scene.crs, *ring.T)
        # Metres or degrees, as the scene has it.
        gaps = np.abs(np.array([x, y]).T[None] - np.array(corners)[:, None])
        if scene.crs.is_geographic:
            gaps[..., 0] = np.minimum(gaps[..., 0] % 360, -gaps[..., 0] % 360)
        pixel = min(np.hypot(scene.transform.a, scene.transform.d), np.hypot(scene.transform.b, scene.transform.e))
    assert gaps.max(axis=2).min(axis=1).max() < 0.1 * pixel


@pytest.mark.parametrize("name", GRIDS)
def test_corners_of_tiles_are_those_of_their_scene(tmp_path, name):
    crs, grid = GRIDS[name]
    profile = {"driver": "GTiff", "width": 256, "height": 192, "count": 1, "dtype": "uint8"}
    with rasterio.open(tmp_path / "scene.tif", "w", crs=crs, transform=grid, **profile):
        pass
    for window in ((0, 0, 256, 192), (64, 128, 64, 64), (192, 0, 64, 64)):
        check_corners(tmp_path / "scene.tif", window)


def test_corners_of_tiles_are_those_of_landsat(shared):
    path = shared / "data" / "landsat8_sample" / "LC81070352015122LGN00_B4.tif"
    with rasterio.open(path) as scene:
        right, bottom = scene.width - 64, scene.height - 64
    for window in ((0, 0, 64, 64), (right, 0, 64, 64), (right // 2, bottom // 2, 64, 64), (right, bottom, 64, 64)):
        check_corners(path, window)
