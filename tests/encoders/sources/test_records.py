"""Records: place, time, thumbnail and pixels of whole images and of tiles."""

import datetime as dt
import io

import numpy as np
import pytest
import rasterio
import shapely
from PIL import Image
from rasterio.transform import from_origin
from rasterio.warp import transform

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.images import Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.sources.records import MAX_THUMBNAIL_PX, read_record
from orbithash.encoders.sources.sources import Item

PREPROCESSING = Preprocessing(Rendering(), 32, 32)
CRS, WEST, NORTH, PIXEL_M = "EPSG:32633", 400_000, 5_800_000, 10
TAKEN = dt.datetime(2021, 6, 13, 10, 20, 30, tzinfo=dt.UTC)


def write_scene(path, values):
    """A GeoTIFF of values [B, H, W] near Berlin."""
    bands, height, width = values.shape
    place = {"crs": CRS, "transform": from_origin(WEST, NORTH, PIXEL_M, PIXEL_M)}
    with rasterio.open(
        path, "w", driver="GTiff", count=bands, height=height, width=width, dtype=values.dtype, **place
    ) as dataset:
        dataset.write(values)
        dataset.update_tags(TIFFTAG_DATETIME="2021:06:13 10:20:30")
    return path


def lon_lat(col, row):
    (lon,), (lat,) = transform(CRS, "EPSG:4326", [WEST + col * PIXEL_M], [NORTH - row * PIXEL_M])
    return lon, lat


@pytest.fixture
def scene(tmp_path):
    values = np.random.default_rng(0).integers(0, 256, (3, 120, 200), np.uint8)
    return write_scene(tmp_path / "scene.tif", values), values


def test_a_whole_geotiff(scene):
    path, values = scene
    record = read_record(Item("a", str(path)), PREPROCESSING)
    assert record.uri == str(path)
    assert record.datetime == TAKEN
    assert (record.lon, record.lat) == pytest.approx(lon_lat(100, 60), abs=1e-9)
    assert (record.pixels == PREPROCESSING.prepare(np.ascontiguousarray(values.transpose(1, 2, 0)))).all()


def test_a_tile_has_its_own_place_and_pixels(scene):
    path, values = scene
    col, row, width, height = window = (120, 40, 64, 64)
    record = read_record(Item("a#120,40,64,64", str(path), window=window), PREPROCESSING)
    assert record.uri == f"{path}#120,40,64,64"
    assert record.datetime == TAKEN
    assert (record.lon, record.lat) == pytest.approx(lon_lat(col + width / 2, row + height / 2), abs=1e-9)
    corners = [lon_lat(c, r) for c in (col, col + width) for r in (row, row + height)]
    expected = shapely.MultiPoint(corners).convex_hull
    outline = shapely.from_wkb(record.footprint)
    assert outline.symmetric_difference(expected).area < 1e-6 * expected.area
    cut = np.ascontiguousarray(values[:, row : row + height, col : col + width].transpose(1, 2, 0))
    assert (record.pixels == PREPROCESSING.prepare(cut)).all()


def test_fields_of_the_item_take_precedence_over_the_file(scene):
    other = dt.datetime(1999, 1, 1, tzinfo=dt.UTC)
    footprint = shapely.box(0, 0, 1, 1).wkb
    # A longitude of 0 is not a missing one.
    item = Item("a", str(scene[0]), datetime=other, lon=0.0, lat=0.0, footprint=footprint)
    record = read_record(item, PREPROCESSING)
    assert (record.datetime, record.lon, record.lat, record.footprint) == (other, 0.0, 0.0, footprint)


def test_an_image_without_georeference_has_no_place(tmp_path):
    Image.new("RGB", (40, 30), (10, 200, 30)).save(tmp_path / "a.png")
    record = read_record(Item("a", str(tmp_path / "a.png")), PREPROCESSING)
    assert (record.datetime, record.lon, record.lat, record.footprint) == (None, None, None, None)
    assert (record.pixels == (10, 200, 30)).all()


@pytest.mark.parametrize(
    ("size", "expected"),
    [((400, 200), (128, 64)), ((200, 400), (64, 128)), ((60, 50), (60, 50)), ((5000, 16), (128, 1))],
)
def test_the_thumbnail_is_a_small_jpeg(tmp_path, size, expected):
    Image.new("RGB", size, (200, 30, 100)).save(tmp_path / "a.png")
    record = read_record(Item("a", str(tmp_path / "a.png")), PREPROCESSING)
    with Image.open(io.BytesIO(record.thumbnail)) as picture:
        assert picture.format == "JPEG"
        assert max(picture.size) <= MAX_THUMBNAIL_PX
        assert picture.size == pytest.approx(expected, abs=1)
        assert np.abs(np.asarray(picture).astype(int) - (200, 30, 100)).max() < 8


def test_all_tiles_of_a_scene_share_one_stretch(tmp_path):
    """A dark and a bright half: with stretches of their own, both tiles would span all grey levels."""
    rng = np.random.default_rng(0)
    values = rng.integers(0, 1000, (3, 64, 128)).astype(np.uint16)
    values[:, :, 64:] += 9000
    path = write_scene(tmp_path / "deep.tif", values)
    dark, bright = (
        read_record(Item(f"a{col}", str(path), window=(col, 0, 64, 64)), PREPROCESSING).pixels for col in (0, 64)
    )
    assert dark.max() < 40
    assert bright.min() > 215
    whole = read_image(path, Rendering())
    assert (dark == PREPROCESSING.prepare(np.ascontiguousarray(whole[:, :64]))).all()


@pytest.mark.parametrize("content", [b"", b"not an image at all", b"\x89PNG\r\n\x1a\n damaged"])
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(ImageError):
        read_record(Item("a", str(tmp_path / "a.png")), PREPROCESSING)
