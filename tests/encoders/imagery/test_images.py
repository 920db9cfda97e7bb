"""Reading of images of every supported kind; expected pixels are computed one at a time."""

import io
import struct
import warnings

import numpy as np
import pytest
import rasterio
from image_files import HEIGHT, PLACE, WIDTH, assert_shown, encoded, noise, png16, slow_stretch, tiff
from PIL import Image, ImageOps
from rasterio.enums import ColorInterp

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.encoders.imagery.images import Rendering, read_image

# 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_8_bit_becomes_rgb(kind, mode):
    colours = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    image = colours.quantize(16) if mode == "P" else colours.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise(1, seed=1)[0]))
    got = read_image(encoded(image, kind))
    expected = np.array(image.convert("L" if mode in ("1", "LA") else "RGBA").convert("RGB"))
    if mode in ("LA", "RGBA"):
        expected[np.asarray(image.getchannel("A")) == 0] = 0
    np.testing.assert_array_equal(got, expected)
    assert got.flags.c_contiguous
    assert got.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_read_as_pillow_reads_it(mode):
    data = encoded(Image.fromarray(np.moveaxis(noise(3), 0, -1)).convert(mode), "JPEG", quality=90)
    np.testing.assert_array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_the_transparent_colour_of_a_palette_is_black():
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1)).quantize(16)
    got = read_image(encoded(image, "PNG", transparency=0))
    expected = np.array(image.convert("RGB"))
    expected[np.asarray(image) == 0] = 0
    np.testing.assert_array_equal(got, expected)


def test_bands_are_chosen_and_reordered():
    values = noise(5)
    data = tiff(values, photometric="minisblack")
    np.testing.assert_array_equal(read_image(data), np.moveaxis(values[:3], 0, -1))
    np.testing.assert_array_equal(read_image(data, Rendering((4, 1, 5))), np.moveaxis(values[[3, 0, 4]], 0, -1))
    grey = read_image(data, Rendering((2,)))
    for channel in range(3):
        np.testing.assert_array_equal(grey[..., channel], values[1])
    png = encoded(Image.fromarray(np.moveaxis(values[:3], 0, -1)), "PNG")
    np.testing.assert_array_equal(read_image(png, Rendering((3, 2, 1))), np.moveaxis(values[[2, 1, 0]], 0, -1))
    for chosen in ((2, 1), (1, 2, 3, 1), (3, 3, 2, 1, 1)):
        several = np.moveaxis(values[[band - 1 for band in chosen]], 0, -1)
        np.testing.assert_array_equal(read_image(data, Rendering(chosen)), several)
        np.testing.assert_array_equal(read_image(png, Rendering(chosen)), several)


def test_8_bit_data_are_not_stretched():
    values = np.full((1, HEIGHT, WIDTH), 7, np.uint8)
    assert (read_image(tiff(values), Rendering(stretch="range:0:10")) == 7).all()


@pytest.mark.parametrize("source", ["tiff", "png"])
def test_a_missing_band_is_refused(source):
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    data = tiff(noise(3)) if source == "tiff" else encoded(image, "PNG")
    with pytest.raises(ImageError, match="no band 4; the image has 3"):
        read_image(data, Rendering((4, 3, 2)))


def test_two_bands_need_a_choice():
    values = noise(2)
    data = tiff(values, photometric="minisblack", alpha="unspecified")
    with pytest.raises(ImageError, match="2 bands without alpha; state the bands to show"):
        read_image(data)
    np.testing.assert_array_equal(read_image(data, Rendering((2,)))[..., 1], values[1])


# Other data


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64", "int8"])
@pytest.mark.parametrize("bands", [1, 4])
def test_each_band_is_stretched_by_its_own_percentiles(dtype, bands):
    low = 0 if np.dtype(dtype).kind == "u" else -100
    values = noise(bands, dtype, low=low) * np.arange(1, bands + 1).astype(dtype)[:, None, None]
    got = read_image(tiff(values, photometric="minisblack"))
    for channel in range(3):
        band = values[channel if bands > 1 else 0]
        bounds = np.percentile(band.astype(np.float64), [2, 98])
        assert_shown(got[..., channel], slow_stretch(band, np.ones(band.shape, bool), *bounds))


@pytest.mark.parametrize("dtype", ["int8", "int16", "int32"])
def test_the_whole_range_of_a_signed_type_does_not_overflow(dtype):
    info = np.iinfo(dtype)
    values = np.linspace(info.min, info.max, HEIGHT * WIDTH).astype(dtype).reshape(1, HEIGHT, WIDTH)
    got = read_image(tiff(values), Rendering(stretch="percentile:0:100"))[..., 0].ravel()
    assert (got[0], got[-1]) == (0, 255)
    assert (np.diff(got.astype(int)) >= 0).all()


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_png_of_16_bits(channels):
    values = np.moveaxis(noise(channels, np.uint16), 0, -1)
    got = read_image(png16(values), Rendering(stretch="range:0:65535"))
    for channel in range(3):
        band = values[..., channel if channels > 2 else 0]
        valid = values[..., -1] > 0 if channels in (2, 4) else np.ones(band.shape, bool)
        assert_shown(got[..., channel], slow_stretch(band, valid, 0, 65535))


def test_a_stated_range_is_clipped():
    values = np.arange(HEIGHT * WIDTH, dtype=np.uint16).reshape(1, HEIGHT, WIDTH)
    got = read_image(tiff(values), Rendering(stretch="range:100:300"))[..., 0]
    assert_shown(got, slow_stretch(values[0], np.ones((HEIGHT, WIDTH), bool), 100, 300))
    assert (got[values[0] <= 100] == 0).all()
    assert (got[values[0] >= 300] == 255).all()


def test_nodata_is_black_and_excluded_from_the_stretch():
    values = noise(1, np.uint16, low=500, high=900)
    expected_bounds = np.percentile(values[0, 5:], [2, 98])
    values[:, :5] = 65000
    got = read_image(tiff(values, nodata=65000))[..., 0]
    valid = values[0] != 65000
    assert_shown(got, slow_stretch(values[0], valid, *expected_bounds))
    assert (got[:5] == 0).all()


def test_masked_pixels_are_excluded_from_the_stretch():
    values = noise(3, np.uint16, low=500, high=900)
    mask = np.full((HEIGHT, WIDTH), 255, np.uint8)
    mask[:, :9] = 0
    values[:, :, :9] = 60000
    with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
        masked = tiff(values, mask=mask)
    with_alpha = tiff(np.concatenate([values, mask[None].astype(np.uint16)]), photometric="rgb", alpha="yes")
    for got in (read_image(masked), read_image(with_alpha)):
        assert (got[:, :9] == 0).all()
        for channel in range(3):
            bounds = np.percentile(values[channel][mask > 0], [2, 98])
            assert_shown(got[..., channel], slow_stretch(values[channel], mask > 0, *bounds))


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("nodata", [None, np.nan, -9999.0])
def test_nan_and_infinity_are_black_and_excluded_from_the_stretch(bad, nodata):
    values = noise(1, np.float32, low=-5, high=5)
    clean = values[0, 3:].astype(np.float64)
    values[:, :3] = bad
    got = read_image(tiff(values, nodata=nodata))[..., 0]
    assert_shown(got, slow_stretch(values[0], np.isfinite(values[0]), *np.percentile(clean, [2, 98])))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("value", [0, 7, 30000])
def test_a_constant_image_is_black(dtype, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        got = read_image(tiff(np.full((3, HEIGHT, WIDTH), value, dtype)))
    assert (got == 0).all()


def test_the_largest_numbers_do_not_overflow():
    for dtype in (np.float32, np.float64):
        largest = float(np.finfo(dtype).max)
        values = np.full((1, HEIGHT, WIDTH), largest, dtype)
        values[:, ::2] = -largest
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)
            got = read_image(tiff(values), Rendering(stretch=f"range:{-largest}:{largest}"))
        assert sorted(set(got[..., 0].ravel())) == [0, 255]


def test_a_band_without_valid_data_is_black():
    values = noise(3, np.float32)
    values[1] = np.nan
    got = read_image(tiff(values))
    assert (got[..., 1] == 0).all()
    assert got[..., 0].max() == got[..., 2].max() == 255


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_image_without_valid_data_is_refused(dtype):
    with pytest.raises(ImageError, match="no valid data"):
        read_image(tiff(np.zeros((3, HEIGHT, WIDTH), dtype), nodata=0))


@pytest.mark.parametrize(
    "options", [{"compress": "deflate"}, {"compress": "lzw", "interleave": "pixel"}, {"BIGTIFF": "YES"}]
)
def test_layouts_of_tiff(options):
    values = noise(3)
    np.testing.assert_array_equal(read_image(tiff(values, **options)), np.moveaxis(values, 0, -1))


def test_big_endian_tiff():
    values = noise(3)
    data = tiff(values, ENDIANNESS="BIG")
    assert data.startswith(b"MM")
    np.testing.assert_array_equal(read_image(data), np.moveaxis(values, 0, -1))


# Colours, masks, orientation


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize(
    ("meanings", "shown"),
    [
        ("blue green red nir", (3, 2, 1)),
        ("nir red green blue", (2, 3, 4)),
        ("alpha red green blue", (2, 3, 4)),
        ("red green blue alpha", (1, 2, 3)),
        ("undefined undefined undefined undefined", (1, 2, 3)),
        ("red red green blue", (1, 2, 3)),
        ("gray blue green undefined", (1, 2, 3)),
    ],
)
def test_colours_are_found_by_their_interpretation(tmp_path, dtype, meanings, shown):
    values = noise(4, dtype, low=1)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=4, height=HEIGHT, width=WIDTH, dtype=dtype
    ) as dataset:
        dataset.colorinterp = [ColorInterp[meaning] for meaning in meanings.split()]
        dataset.write(values)
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), read_image(tmp_path / "a.tif", Rendering(shown)))
    first = read_image(tmp_path / "a.tif", Rendering((1, 2, 3)))
    assert np.array_equal(first, read_image(tmp_path / "a.tif")) == (shown == (1, 2, 3))


MASKED = np.zeros((HEIGHT, WIDTH), bool)
MASKED[3:9, 5:17] = True


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("kind", ["nodata", "mask", "alpha", "grey alpha", "PNG", "grey PNG"])
def test_masked_pixels_are_black_at_every_depth(dtype, kind):
    values = noise(1 if "grey" in kind else 3, dtype, low=1, high=200)
    values[:, MASKED] = 201
    opaque = np.where(MASKED, 0, np.iinfo(dtype).max).astype(dtype)[None]
    if kind == "nodata":
        data = tiff(values, nodata=201)
    elif kind == "mask":
        with rasterio.Env(GDAL_TIFF_INTERNAL_MASK=True):
            data = tiff(values, mask=np.where(MASKED, 0, 255).astype(np.uint8))
    elif "PNG" not in kind:
        photometric = "minisblack" if "grey" in kind else "rgb"
        data = tiff(np.concatenate([values, opaque]), photometric=photometric, alpha="yes")
    elif dtype == "uint16":
        data = png16(np.moveaxis(np.concatenate([values, opaque]), 0, -1))
    else:
        data = encoded(Image.fromarray(np.moveaxis(np.concatenate([values, opaque]), 0, -1)), "PNG")
    got = read_image(data, Rendering(stretch="range:0:255"))
    expected = np.moveaxis(np.broadcast_to(np.where(MASKED, 0, values), (3, HEIGHT, WIDTH)), 0, -1)
    np.testing.assert_array_equal(got, expected)


def test_masked_pixels_of_a_palette_are_black():
    values = np.random.default_rng(0).integers(0, 4, (1, HEIGHT, WIDTH)).astype(np.uint8)
    colours = {index: (40 + index, 60, 80, 255) for index in range(4)}
    got = read_image(tiff(values, nodata=3, colormap=colours))
    assert (got[values[0] == 3] == 0).all()
    assert (got[values[0] == 2] == (42, 60, 80)).all()


def test_an_image_that_is_all_transparent_is_refused():
    with pytest.raises(ImageError, match="no valid data"):
        read_image(encoded(Image.new("RGBA", (WIDTH, HEIGHT), (200, 100, 50, 0)), "PNG"))


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "BigTIFF"])
@pytest.mark.parametrize("orientation", range(10))
def test_photographs_are_turned_upright(kind, orientation):
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    if kind in ("JPEG", "PNG"):
        exif = Image.Exif()
        exif[274] = orientation
        data = encoded(image, kind, exif=exif)
    else:
        data = encoded(image, "TIFF", tiffinfo={274: orientation}, big_tiff=kind == "BigTIFF")
    stored = np.asarray(Image.open(io.BytesIO(data)).convert("RGB")) if kind == "JPEG" else np.asarray(image)
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data)))) if kind != "BigTIFF" else None
    got = read_image(data)
    if upright is not None:
        np.testing.assert_array_equal(got, upright)
    assert got.shape == ((WIDTH, HEIGHT, 3) if orientation in (5, 6, 7, 8) else (HEIGHT, WIDTH, 3))
    assert np.array_equal(got, stored) == (orientation in (0, 1, 9))


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")
def test_damaged_exif_does_not_refuse_a_photograph():
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    for exif in (b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0rubbish", b""):
        data = encoded(image, "JPEG", exif=exif)
        np.testing.assert_array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_georeferenced_image_is_not_turned():
    values = noise(3)
    data = bytearray(tiff(values, **PLACE, photometric="rgb"))
    # GDAL does not write an orientation, so the tag of the planar configuration is replaced by one.
    place = data.find(struct.pack("<HHI", 284, 3, 1))
    data[place : place + 12] = struct.pack("<HHIHH", 274, 3, 1, 6, 0)
    np.testing.assert_array_equal(read_image(bytes(data)), np.moveaxis(values, 0, -1))


# Real images


def test_real_images(shared):
    data = shared / "data"
    pairs = sorted((data / "ucmd_tif_sample").glob("*/*.tif"))[:6]
    for path in pairs:
        original = read_image(path)
        assert original.shape == (256, 256, 3)
        jpeg = read_image(data / "ucmd" / "Images" / path.parent.name / f"{path.stem}.jpg")
        assert np.abs(original.astype(int) - jpeg).mean() < 8, "the JPEG is a compressed version of the TIFF"
    assert read_georeference(pairs[0]).datetime.year == 2009


def test_real_landsat_and_sentinel_scenes(shared):
    band = shared / "data" / "landsat8_sample" / "LC81070352015122LGN00_B4.tif"
    got = read_image(band, Rendering(stretch="range:5000:15000"))
    with rasterio.open(band) as dataset:
        values = dataset.read(1)
        assert_shown(got[..., 0], np.rint(np.clip((values.astype(float) - 5000) / 10000, 0, 1) * 255))
    place = read_georeference(band)
    assert 138 < place.lon < 142, "path 107, row 35 is the coast east of Tokyo"
    assert 35 < place.lat < 37
    patch = next((shared / "data" / "bigearthnet_sample").rglob("S2*_B04.tif"))
    assert read_image(patch).shape == (120, 120, 3)
    radar = next((shared / "data" / "bigearthnet_sample").rglob("S1*_VV.tif"))
    assert read_image(radar).std() > 10
