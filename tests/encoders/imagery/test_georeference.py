"""Place and time of GeoTIFFs."""

import contextlib
import datetime as dt
import os
import shutil
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from image_files import HEIGHT, WIDTH, encoded, noise, tiff
from PIL import Image
from rasterio.transform import from_origin
from rasterio.warp import transform

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.georeference import Georeference, check_projections, read_georeference


def test_place_of_a_utm_image():
    """In UTM zone 31, easting 500 km and northing 0 are at 3 degrees east on the equator."""
    data = tiff(noise(1), crs="EPSG:32631", transform=from_origin(500_000 - 12 * 10, 10 * 10, 10, 10))
    got = read_georeference(data)
    assert abs(got.lon - 3) < 1e-9
    assert abs(got.lat) < 1e-9
    west, south, east, north = shapely.from_wkb(got.footprint).bounds
    # On the equator a degree of longitude is 111.320 km and of latitude 110.574 km; the scale of UTM is 0.9996.
    assert abs((east - west) - 240 / 111_320 / 0.9996) < 1e-7
    assert abs((north - south) - 200 / 110_574 / 0.9996) < 1e-7
    assert got.datetime is None


def test_place_of_a_window():
    data = tiff(noise(1), crs="EPSG:4326", transform=from_origin(10, 50, 0.5, 0.25))
    got = read_georeference(data, (4, 8, 2, 4))
    assert (got.lon, got.lat) == pytest.approx((12.5, 47.5))
    assert shapely.from_wkb(got.footprint).equals(shapely.box(12, 47, 13, 48))
    whole = read_georeference(data)
    assert (whole.lon, whole.lat) == pytest.approx((16, 47.5))
    assert shapely.from_wkb(whole.footprint).equals(shapely.box(10, 45, 22, 50))


def test_place_of_a_grid_of_0_to_360_degrees():
    got = read_georeference(tiff(noise(1), crs="EPSG:4326", transform=from_origin(200, 50, 0.5, 0.25)))
    assert got.lon == pytest.approx(206 - 360)
    assert shapely.from_wkb(got.footprint).bounds == pytest.approx((-160, 45, -148, 50))


def test_an_image_across_180_degrees_has_two_parts():
    # UTM zone 60 ends at 180 degrees; its central meridian, 177 degrees east, has easting 500 km.
    data = tiff(noise(1), crs="EPSG:32660", transform=from_origin(500_000 + 3 * 111_000 - 60_000, 100_000, 5000, 5000))
    got = read_georeference(data)
    outline = shapely.from_wkb(got.footprint)
    assert abs(abs(got.lon) - 180) < 1
    assert outline.geom_type == "MultiPolygon"
    assert sum(part.area for part in outline.geoms) == pytest.approx(120 / 111.32 * 100 / 110.57, rel=0.01)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"crs": "EPSG:32631"},
        {"transform": from_origin(5, 5, 1, 1)},
        {"crs": 'LOCAL_CS["x",UNIT["m",1]]', "transform": from_origin(5, 5, 1, 1)},
        {"crs": "EPSG:4326", "transform": from_origin(0, 500, 1, 1)},
        {"crs": "EPSG:32631", "transform": from_origin(1e30, 1e30, 1, 1)},
    ],
)
def test_images_without_a_usable_place(options):
    got = read_georeference(tiff(noise(1), datetime="2015:05:02 01:31:04", **options))
    assert (got.lon, got.lat, got.footprint) == (None, None, None)
    assert got.datetime == dt.datetime(2015, 5, 2, 1, 31, 4, tzinfo=dt.UTC)


@pytest.mark.parametrize("tag", ["", "2015-05-02", "0000:00:00 00:00:00", "2015:13:02 01:31:04", "yesterday"])
def test_an_invalid_date_is_ignored(tag):
    assert read_georeference(tiff(noise(1), datetime=tag)).datetime is None


def test_other_formats_have_no_place_and_other_files_are_refused(tmp_path):
    assert read_georeference(encoded(Image.new("RGB", (20, 20)), "JPEG")) == Georeference()
    with pytest.raises(ImageError, match="not a JPEG, PNG"):
        read_georeference(b"text")
    with pytest.raises(ImageError, match="no such file"):
        read_georeference(tmp_path / "a.tif")


@pytest.mark.parametrize("west", [178.5, -181.5, 538.5])
def test_grids_of_degrees_that_differ_by_360_have_the_same_place(west):
    """178.5 to 180.5 degrees east."""
    got = read_georeference(tiff(noise(1), crs="EPSG:4326", transform=from_origin(west, -16, 2 / WIDTH, 2 / HEIGHT)))
    assert (got.lon, got.lat) == pytest.approx((179.5, -17))
    expected = shapely.union(shapely.box(178.5, -18, 180, -16), shapely.box(-180, -18, -179.5, -16))
    outline = shapely.from_wkb(got.footprint)
    assert shapely.symmetric_difference(outline, expected).area < 1e-9
    assert (outline.bounds[0], outline.bounds[2]) == (-180, 180)


@pytest.mark.parametrize(
    ("crs", "bounds"),
    [
        ("EPSG:3413", (200_000, -1_200_000, 900_000, -500_000)),
        ("EPSG:3413", (-700_000, -600_000, 500_000, 600_000)),
        ("EPSG:3031", (-2_000_000, -100_000, 100_000, 2_000_000)),
        ("EPSG:3035", (2_500_000, 1_400_000, 7_400_000, 5_500_000)),
        ("ESRI:54008", (1_000_000, 4_000_000, 2_200_000, 5_200_000)),
        ("EPSG:32601", (200_000, 6_000_000, 400_000, 6_200_000)),
        ("EPSG:4269", (-180, -90, 180, 90)),
        ("EPSG:3857", (-20_037_508, -2e7, 20_037_508, 2e7)),
    ],
)
def test_the_outline_holds_the_points_of_the_scene_and_no_others(crs, bounds):
    west, south, east, north = bounds
    grid = {"crs": crs, "transform": from_origin(west, north, (east - west) / WIDTH, (north - south) / HEIGHT)}
    got = read_georeference(tiff(noise(1), **grid))
    outline = shapely.from_wkb(got.footprint)
    assert outline.is_valid
    assert outline.bounds[0] >= -180
    assert outline.bounds[2] <= 180
    assert len(got.footprint) < 8_000
    share = np.random.default_rng(0).uniform(-0.5, 1.5, (4000, 2))
    xs, ys = west + share[:, 0] * (east - west), south + share[:, 1] * (north - south)
    lons, lats = map(np.asarray, transform(crs, "EPSG:4326", xs, ys))
    on_earth = np.isfinite(lons) & np.isfinite(lats) & (np.abs(lats) <= 90)
    # Points within a hundredth of a side from an edge are left out: a chord may pass on either side of them.
    inside = ((share > 0.01) & (share < 0.99)).all(axis=1) & on_earth
    outside = ((share < -0.01) | (share > 1.01)).any(axis=1) & on_earth
    held = shapely.contains_xy(outline, (lons + 180) % 360 - 180, lats)
    assert held[inside].all()
    if crs not in ("EPSG:4269", "EPSG:3857"):
        # These two cover all longitudes, so that points beyond their edges are points of the scene.
        assert not held[outside].any()


def test_a_small_image_has_four_corners():
    data = tiff(noise(1), crs="EPSG:32631", transform=from_origin(300_000, 5_000_000, 10, 10))
    assert len(shapely.get_coordinates(shapely.from_wkb(read_georeference(data).footprint))) == 5


def test_an_image_of_the_disc_of_the_earth_has_a_centre_and_no_outline():
    """The view from a geostationary orbit at 75 degrees west, whose corners miss the Earth."""
    crs = "+proj=geos +h=35786023 +lon_0=-75 +sweep=x +datum=WGS84"
    got = read_georeference(tiff(noise(1), crs=crs, transform=from_origin(-6e6, 6e6, 12e6 / WIDTH, 12e6 / HEIGHT)))
    assert (got.lon, got.lat) == pytest.approx((-75, 0), abs=1e-6)
    assert got.footprint is None


@pytest.mark.parametrize("variable", ["PROJ_LIB", "PROJ_DATA"])
@pytest.mark.parametrize("database", [None, b"", b"not a database", "of an older PROJ"])
def test_a_proj_database_of_another_installation_is_an_error(tmp_path, variable, database):
    if database == "of an older PROJ":
        shutil.copy(Path(rasterio.__file__).parent / "proj_data" / "proj.db", tmp_path)
        with contextlib.closing(sqlite3.connect(tmp_path / "proj.db")) as connection:
            connection.execute("UPDATE metadata SET value = '0' WHERE key = 'DATABASE.LAYOUT.VERSION.MINOR'")
            connection.commit()
    elif database is not None:
        (tmp_path / "proj.db").write_bytes(database)
    image = tmp_path / "image.tif"
    image.write_bytes(tiff(noise(1), crs="EPSG:32631", transform=from_origin(5e5, 5e6, 10, 10)))
    script = """
import sys
from pathlib import Path
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.georeference import Georeference, check_projections, read_georeference
for read in (check_projections, lambda: read_georeference(Path(sys.argv[1]))):
    try:
        print("no error:", read())
    except InputError as error:
        print(type(error).__name__, error)
"""
    environment = {name: value for name, value in os.environ.items() if name not in ("PROJ_LIB", "PROJ_DATA")}
    done = subprocess.run(
        [sys.executable, "-c", script, str(image)],
        env=environment | {variable: str(tmp_path)},
        capture_output=True,
        text=True,
        check=True,
    )
    for line in done.stdout.splitlines():
        assert line.startswith("InputError PROJ cannot project coordinates, so no image would get a place")
        assert line.endswith(f"unset {variable}={tmp_path}")
    assert len(done.stdout.splitlines()) == 2


def test_a_working_installation_of_proj_passes():
    check_projections()
