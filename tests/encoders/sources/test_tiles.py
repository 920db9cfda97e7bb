"""Tiles against the scenes that they cover."""

import warnings

import numpy as np
import pytest
import rasterio
import rasterio.warp
import shapely
from rasterio.transform import from_origin

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.encoders.imagery.images import Limits, Rendering, read_image, stretch_limits
from orbithash.encoders.sources.tiles import check_tile, plan_tiles, read_tile, tile_key

PLACE = {"crs": "EPSG:32654", "transform": from_origin(4e5, 4e6, 10, 10)}
BLOCK = {"tiled": True, "blockxsize": 256, "blockysize": 256}


def write_scene(path, values, **options):
    count, height, width = values.shape
    options = {**PLACE, **options}
    with (
        warnings.catch_warnings(),
        rasterio.open(
            path, "w", driver="GTiff", count=count, height=height, width=width, dtype=values.dtype, **options
        ) as dataset,
    ):
        dataset.write(values)
    return path


def noise_scene(path, height, width, dtype=np.uint8, **options):
    values = np.random.default_rng(0).integers(1, 250, (3, height, width)).astype(dtype)
    return write_scene(path, values, **options), values


@pytest.mark.parametrize(
    ("height", "width"), [(64, 64), (64, 65), (65, 64), (128, 192), (127, 191), (129, 193), (64, 1000)]
)
def test_tiles_cover_the_scene_and_are_full_size(tmp_path, height, width):
    path, values = noise_scene(tmp_path / "scene.tif", height, width)
    windows = plan_tiles(path, 64)
    covered = np.zeros((height, width), int)
    rebuilt = np.zeros((height, width, 3), np.uint8)
    for col, row, tile_width, tile_height in windows:
        assert (tile_width, tile_height) == (64, 64)
        covered[row : row + 64, col : col + 64] += 1
        rebuilt[row : row + 64, col : col + 64] = read_tile(path, (col, row, 64, 64))
    assert covered.min() == 1
    np.testing.assert_array_equal(rebuilt, np.moveaxis(values, 0, -1))
    assert len(windows) == -(-height // 64) * -(-width // 64), "no more tiles than needed"
    assert len(set(windows)) == len(windows)
    assert windows == sorted(windows, key=lambda window: (window[1], window[0]))


def test_tiles_of_one_scene_share_its_stretch(tmp_path):
    values = np.linspace(0, 10_000, 128 * 128).astype(np.uint16).reshape(1, 128, 128)
    path = write_scene(tmp_path / "scene.tif", values)
    rendering = Rendering()
    stretch = stretch_limits(path, rendering)
    whole = read_image(path, rendering)
    for window in plan_tiles(path, 64):
        col, row, width, height = window
        tile = read_tile(path, window, rendering, stretch=stretch)
        np.testing.assert_array_equal(tile, whole[row : row + height, col : col + width])
    alone = read_tile(path, (0, 0, 64, 64), rendering)
    assert alone.max() == 255
    assert read_tile(path, (0, 0, 64, 64), rendering, stretch=stretch).max() < 140


def test_a_scene_beyond_the_limits_of_an_image_is_read_by_window(tmp_path):
    path, values = noise_scene(tmp_path / "scene.tif", 512, 512, tiled=True, blockxsize=64, blockysize=64)
    limits = Limits(max_bytes=1000, max_pixels=64 * 64, max_decoded_bytes=3 * 64 * 64)
    with pytest.raises(ImageError, match="bytes"):
        read_image(path, limits=limits)
    tile = read_tile(path, (100, 200, 64, 64), limits=limits)
    np.testing.assert_array_equal(tile, np.moveaxis(values[:, 200:264, 100:164], 0, -1))
    with pytest.raises(ImageError, match="65 x 64 pixels; at most 4,096"):
        read_tile(path, (0, 0, 65, 64), limits=limits)


def test_blocks_too_large_to_decode_are_refused(tmp_path):
    path, _ = noise_scene(tmp_path / "scene.tif", 256, 256, interleave="pixel", **BLOCK)
    with pytest.raises(
        ImageError, match="decode to 196,608 bytes at once; at most 100,000 are allowed: cut it into tiles, or rewrite"
    ):
        read_tile(path, (0, 0, 64, 64), limits=Limits(max_decoded_bytes=100_000))
    with pytest.raises(ImageError, match="at once"):
        stretch_limits(path, Rendering(), Limits(max_decoded_bytes=100_000))


def test_a_tile_without_valid_data_is_refused(tmp_path):
    values = np.full((1, 128, 128), 500, np.uint16)
    values[:, :, :64] = 0
    values[0, 0, 63] = 7
    path = write_scene(tmp_path / "scene.tif", values, nodata=0)
    stretch = ((0.0, 1000.0),)
    with pytest.raises(ImageError, match="no valid data"):
        read_tile(path, (0, 64, 64, 64), stretch=stretch)
    assert read_tile(path, (0, 0, 64, 64), stretch=stretch)[0, 63, 0] == 2, "one valid pixel is enough"
    assert (read_tile(path, (64, 0, 64, 64), stretch=stretch) == 128).all()


@pytest.mark.parametrize(
    "window", [(-1, 0, 64, 64), (0, -1, 64, 64), (65, 0, 64, 64), (0, 65, 64, 64), (10**9, 0, 64, 64)]
)
def test_a_window_beyond_the_scene_is_refused(tmp_path, window):
    path, _ = noise_scene(tmp_path / "scene.tif", 128, 128)
    with pytest.raises(ImageError, match="is not within the scene of 128 x 128 pixels"):
        read_tile(path, window)


def test_a_scene_smaller_than_a_tile_is_refused(tmp_path):
    path, _ = noise_scene(tmp_path / "scene.tif", 63, 200)
    with pytest.raises(ImageError, match="200 x 63 pixels, smaller than a tile of 64 x 64"):
        plan_tiles(path, 64)


def test_a_scene_of_too_many_tiles_is_refused(tmp_path):
    """A side of a billion pixels, in a file of a few hundred bytes."""
    path = tmp_path / "scene.tif"
    options = {"tiled": True, "blockxsize": 2**20, "blockysize": 2**20, "SPARSE_OK": "TRUE", "BIGTIFF": "YES"}
    side = 1_000_000_000
    with rasterio.open(path, "w", driver="GTiff", count=1, width=side, height=side, dtype="uint8", **PLACE, **options):
        pass
    with pytest.raises(ImageError, match="are 244,140,625,000,000 tiles; at most 1,000,000"):
        plan_tiles(path, 64)


def test_other_formats_have_no_tiles(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"\xff\xd8\xff but a JPEG")
    with pytest.raises(ImageError, match="not a TIFF"):
        plan_tiles(tmp_path / "a.tif", 64)
    (tmp_path / "a.tif").write_bytes(b"")
    with pytest.raises(ImageError, match="the file is empty"):
        plan_tiles(tmp_path / "a.tif", 64)


@pytest.mark.parametrize("tile_px", [0, -64, 15, 10_000, True, 64.0, "64"])
def test_invalid_sides_are_refused(tmp_path, tile_px):
    with pytest.raises(InputError, match="the tile's side is"):
        check_tile(tile_px)
    with pytest.raises(InputError, match="the tile's side is"):
        plan_tiles(tmp_path / "never opened.tif", tile_px)


def test_keys_contain_scene_and_window():
    assert tile_key("a/scene.tif", (0, 256, 64, 64)) == "a/scene.tif#0,256,64,64"


def test_a_real_scene(shared, tmp_path):
    """Landsat 8, bands 4, 3, 2: tiles lie where the transform of the scene says, and together equal the scene."""
    folder = shared / "data" / "landsat8_sample"
    bands = []
    for band in (4, 3, 2):
        with rasterio.open(folder / f"LC81070352015122LGN00_B{band}.tif") as dataset:
            bands.append(dataset.read(1))
            crs, transform = dataset.crs, dataset.transform
    path = write_scene(tmp_path / "rgb.tif", np.stack(bands), crs=crs, transform=transform, nodata=0)
    height, width = bands[0].shape
    rendering = Rendering(stretch="percentile:1:99")
    stretch = stretch_limits(path, rendering)
    for (low, high), band in zip(stretch, bands, strict=True):
        np.testing.assert_allclose((low, high), np.percentile(band[band > 0], [1, 99]), rtol=0.01)

    windows = plan_tiles(path, 256)
    assert len(windows) == 7 * 7
    rebuilt = np.zeros((height, width, 3), np.uint8)
    for window in windows:
        col, row, tile_width, tile_height = window
        x, y = transform.a * (col + 128) + transform.c, transform.e * (row + 128) + transform.f
        (lon,), (lat,) = rasterio.warp.transform(crs, "EPSG:4326", [x], [y])
        place = read_georeference(path, window)
        assert (place.lon, place.lat) == pytest.approx((lon, lat), abs=1e-9)
        outline = shapely.from_wkb(place.footprint)
        assert outline.contains(shapely.Point(lon, lat))
        # 256 pixels of 150 m are 38.4 km; lengths of degrees on the ellipsoid within 1 %.
        east = 111.32 * np.cos(np.radians(lat))
        assert outline.area * east * 111.0 == pytest.approx(38.4**2, rel=0.01)
        tile = read_tile(path, window, rendering, stretch=stretch)
        rebuilt[row : row + tile_height, col : col + tile_width] = tile
    for channel, ((low, high), band) in enumerate(zip(stretch, bands, strict=True)):
        expected = np.rint(np.clip((band.astype(float) - low) / (high - low), 0, 1) * 255)
        assert np.abs(rebuilt[..., channel] - np.where(band > 0, expected, 0)).max() <= 1
