"""Images of every kind that is read and of every kind that is refused; what is expected is computed the slow way."""

import contextlib
import datetime as dt
import io
import os
import struct
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
import rasterio
import shapely
from PIL import Image
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.georeference import Georeference, read_georeference
from orbithash.encoders.imagery.images import Limits, Rendering, read_image, stretch_limits
from orbithash.encoders.imagery.rasters import open_tiff

HEIGHT, WIDTH = 20, 24
PLACE = {"crs": "EPSG:32654", "transform": from_origin(4e5, 4e6, 10, 10)}


def noise(bands, dtype=np.uint8, seed=0, low=0, high=None):
    high = high or (np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1000)
    return np.random.default_rng(seed).uniform(low, high, (bands, HEIGHT, WIDTH)).astype(dtype)


def tiff(values, mask=None, colormap=None, datetime=None, **options):
    """A TIFF of values [B, H, W]."""
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore")
        with memory.open(driver="GTiff", **shape, **options) as dataset:
            dataset.write(values)
            if mask is not None:
                dataset.write_mask(mask)
            if colormap is not None:
                dataset.write_colormap(1, colormap)
            if datetime is not None:
                dataset.update_tags(TIFFTAG_DATETIME=datetime)
        return memory.read()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values):
    """A PNG of uint16 values [H, W, channels], written by hand as Pillow cannot."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(width, height, 16, colour, zlib.compress(lines))


def png_of(width, height, depth, colour, data):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def slow_stretch(band, valid, low, high):
    """A pixel at a time, in Python's own numbers."""
    shown = np.zeros(band.shape, np.uint8)
    for place in np.ndindex(band.shape):
        if valid[place] and high > low:
            share = (float(band[place]) - low) / (high - low)
            shown[place] = round(min(max(share, 0.0), 1.0) * 255)
    return shown


def assert_shown(got, expected):
    """Equal to within the rounding of float32."""
    assert (got.dtype, got.shape) == (np.uint8, expected.shape)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1


# 8 bits


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA"])
def test_every_mode_of_8_bit_becomes_rgb(kind, mode):
    colours = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    image = colours.quantize(16) if mode == "P" else colours.convert(mode)
    if mode in ("LA", "RGBA"):
        image.putalpha(Image.fromarray(noise(1, seed=1)[0]))
    got = read_image(encoded(image, kind))
    without_alpha = image.convert("L") if mode in ("1", "LA") else image
    if mode == "RGBA":
        without_alpha = Image.merge("RGB", image.split()[:3])
    np.testing.assert_array_equal(got, np.asarray(without_alpha.convert("RGB")))
    assert got.flags.c_contiguous
    assert got.dtype == np.uint8


@pytest.mark.parametrize("mode", ["L", "RGB"])
def test_jpeg_is_read_as_pillow_reads_it(mode):
    data = encoded(Image.fromarray(np.moveaxis(noise(3), 0, -1)).convert(mode), "JPEG", quality=90)
    np.testing.assert_array_equal(read_image(data), np.asarray(Image.open(io.BytesIO(data)).convert("RGB")))


def test_a_palette_with_transparency_keeps_its_colours():
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1)).quantize(16)
    got = read_image(encoded(image, "PNG", transparency=0))
    np.testing.assert_array_equal(got, np.asarray(image.convert("RGB")))


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
def test_a_band_that_is_not_there_is_refused(source):
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    data = tiff(noise(3)) if source == "tiff" else encoded(image, "PNG")
    with pytest.raises(ImageError, match="band 4 is asked for; it has 3"):
        read_image(data, Rendering((4, 3, 2)))


def test_two_bands_need_a_choice():
    values = noise(2)
    data = tiff(values, photometric="minisblack", alpha="unspecified")
    with pytest.raises(ImageError, match="2 bands without alpha; state those to show"):
        read_image(data)
    np.testing.assert_array_equal(read_image(data, Rendering((2,)))[..., 1], values[1])


# Other data


@pytest.mark.parametrize("dtype", ["uint16", "int16", "uint32", "int32", "float32", "float64", "int8"])
@pytest.mark.parametrize("bands", [1, 4])
def test_percentiles_are_each_bands_own(dtype, bands):
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


def test_nodata_is_black_and_counts_for_nothing():
    values = noise(1, np.uint16, low=500, high=900)
    expected_bounds = np.percentile(values[0, 5:], [2, 98])
    values[:, :5] = 65000
    got = read_image(tiff(values, nodata=65000))[..., 0]
    valid = values[0] != 65000
    assert_shown(got, slow_stretch(values[0], valid, *expected_bounds))
    assert (got[:5] == 0).all()


def test_a_mask_and_an_alpha_band_exclude_pixels():
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
def test_numbers_that_are_none_are_black_and_count_for_nothing(bad, nodata):
    values = noise(1, np.float32, low=-5, high=5)
    clean = values[0, 3:].astype(np.float64)
    values[:, :3] = bad
    got = read_image(tiff(values, nodata=nodata))[..., 0]
    assert_shown(got, slow_stretch(values[0], np.isfinite(values[0]), *np.percentile(clean, [2, 98])))


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", "float64"])
@pytest.mark.parametrize("value", [0, 7, 30000])
def test_a_constant_image_is_black(dtype, value):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = read_image(tiff(np.full((3, HEIGHT, WIDTH), value, dtype)))
    assert (got == 0).all()


def test_the_largest_numbers_do_not_overflow():
    for dtype in (np.float32, np.float64):
        largest = float(np.finfo(dtype).max)
        values = np.full((1, HEIGHT, WIDTH), largest, dtype)
        values[:, ::2] = -largest
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            got = read_image(tiff(values), Rendering(stretch=f"range:{-largest}:{largest}"))
        assert sorted(set(got[..., 0].ravel())) == [0, 255]


def test_a_band_without_data_among_others_is_black():
    values = noise(3, np.float32)
    values[1] = np.nan
    got = read_image(tiff(values))
    assert (got[..., 1] == 0).all()
    assert got[..., 0].max() == got[..., 2].max() == 255


@pytest.mark.parametrize("dtype", ["uint8", "uint16", "float32"])
def test_an_image_of_nodata_alone_is_refused(dtype):
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


# What is refused


def test_formats_are_told_by_content_not_by_name(tmp_path):
    values = noise(3)
    path = tmp_path / "photo.jpg"
    path.write_bytes(tiff(values))
    np.testing.assert_array_equal(read_image(path), np.moveaxis(values, 0, -1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world, this is text", r"not a JPEG, PNG or TIFF: begins with b'hello world,'"),
        (b"GIF89a" + bytes(30), "not a JPEG, PNG or TIFF"),
        (b'<VRTDataset rasterXSize="20">', "not a JPEG, PNG or TIFF"),
        (b"\xff\xd8", "not a JPEG, PNG or TIFF"),
        (b"\xff\xd8\xff", "damaged JPEG|truncated JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated: the PNG header is not complete"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "0 x 0 pixels; at least 16 x 16"),
        (b"II*\0", "damaged or truncated"),
        (b"II*\0" + bytes(100), "damaged or truncated"),
        (b"MM\0+" + b"\xff" * 100, "damaged or truncated"),
    ],
)
def test_bytes_that_are_no_image(tmp_path, data, message):
    path = tmp_path / "photo.jpg"
    path.write_bytes(data)
    for source in (data, path):
        with pytest.raises(ImageError, match=message):
            read_image(source)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "TIFF deflate", "PNG 16"])
def test_truncation_anywhere_is_refused(kind):
    if kind == "PNG 16":
        data = png16(np.moveaxis(noise(3, np.uint16), 0, -1))
    elif kind == "TIFF deflate":
        data = tiff(noise(3), compress="deflate")
    else:
        data = encoded(Image.fromarray(np.moveaxis(noise(3), 0, -1)), kind)
    read_image(data)
    # The last bytes of JPEG and PNG carry no pixels.
    for length in [*range(8, len(data) - 40, 97), len(data) * 9 // 10]:
        with pytest.raises(ImageError, match=r"truncated|damaged"):
            read_image(data[:length])


def test_a_truncated_jpeg_says_so():
    data = encoded(Image.fromarray(np.moveaxis(noise(3), 0, -1)), "JPEG")
    for share in (0.2, 0.5, 0.9):
        with pytest.raises(ImageError, match=r"truncated JPEG: .*[Tt]runcated"):
            read_image(data[: int(len(data) * share)])


@pytest.mark.parametrize("length", [6, 30, 800])
def test_a_reason_is_the_same_each_time(length):
    data = tiff(noise(3), compress="deflate")
    reasons = set()
    for _ in range(3):
        with pytest.raises(ImageError) as error:
            read_image(data[:length])
        reasons.add(str(error.value))
    (reason,) = reasons
    assert "vsimem" not in reason


def test_flipped_bits_give_an_image_or_an_image_error():
    rng = np.random.default_rng(3)
    image = Image.fromarray(np.moveaxis(noise(3), 0, -1))
    for data in (encoded(image, "JPEG"), encoded(image, "PNG"), tiff(noise(3, np.uint16), compress="lzw")):
        for _ in range(60):
            broken = bytearray(data)
            for place in rng.integers(0, min(len(broken), 400), 3):
                broken[place] ^= 1 << rng.integers(8)
            with contextlib.suppress(ImageError):
                got = read_image(bytes(broken))
                assert (got.dtype, got.ndim, got.shape[2]) == (np.uint8, 3, 3)


@pytest.mark.parametrize(("width", "height"), [(1, 1), (15, 100), (100, 15)])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_images_too_small_are_refused(kind, width, height):
    with pytest.raises(ImageError, match=f"{width} x {height} pixels; at least 16 x 16"):
        read_image(encoded(Image.new("RGB", (width, height)), kind))


def test_sides_of_exactly_the_least_and_pixels_of_exactly_the_most_are_read(tmp_path):
    data = encoded(Image.new("RGB", (16, 16)), "PNG")
    limits = Limits(max_bytes=len(data), max_pixels=256, max_decoded_bytes=1)
    assert read_image(data, limits=limits).shape == (16, 16, 3)
    with pytest.raises(ImageError, match="16 x 16 pixels; at most 255 in all"):
        read_image(data, limits=Limits(max_pixels=255))
    (tmp_path / "a.png").write_bytes(data)
    for source in (data, tmp_path / "a.png"):
        assert read_image(source, limits=Limits(max_bytes=len(data))).any() == 0
        with pytest.raises(ImageError, match=f"more than {len(data) - 1} bytes"):
            read_image(source, limits=Limits(max_bytes=len(data) - 1))


def peak_bytes(call):
    import tracemalloc

    tracemalloc.start()
    call()
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("depth", [8, 16])
def test_a_png_bomb_is_refused_by_its_header(depth):
    """30,000 x 30,000 pixels in a few kilobytes; the pixel data are not even valid."""
    data = png_of(30_000, 30_000, depth, 2, b"never looked at")

    def attempt():
        with pytest.raises(ImageError, match="30000 x 30000 pixels; at most 50,000,000 in all"):
            read_image(data)

    assert peak_bytes(attempt) < 5e6


def test_a_jpeg_bomb_is_refused_by_its_header():
    data = bytearray(encoded(Image.new("RGB", (16, 16)), "JPEG"))
    start = data.index(b"\xff\xc0")
    data[start + 5 : start + 9] = struct.pack(">HH", 60_000, 60_000)
    with pytest.raises(ImageError, match=r"too many pixels: .*3600000000 pixels"):
        read_image(bytes(data))


def test_a_tiff_bomb_is_refused_by_its_header():
    with MemoryFile() as memory:
        with memory.open(
            driver="GTiff", width=30_000, height=30_000, count=3, dtype="uint8", SPARSE_OK="TRUE", **PLACE
        ):
            pass
        data = memory.read()
    with pytest.raises(ImageError, match="30000 x 30000 pixels; at most"):
        read_image(data)


@pytest.mark.parametrize(
    ("count", "dtype", "message"),
    [
        (2000, "uint8", "2000 bands; at most 1024"),
        (1000, "float64", "1000 bands of float64 decode to 8,000,000,000 bytes"),
    ],
)
def test_too_many_bands_are_refused_by_the_header(count, dtype, message):
    with MemoryFile() as memory:
        with memory.open(driver="GTiff", width=1000, height=1000, count=count, dtype=dtype, SPARSE_OK="TRUE", **PLACE):
            pass
        data = memory.read()
    with pytest.raises(ImageError, match=message):
        read_image(data)


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_is_refused_with_advice(kind):
    with pytest.raises(ImageError, match="CMYK colours; convert it to RGB"):
        read_image(encoded(Image.new("CMYK", (20, 20), 5), kind))


def test_complex_values_and_few_bits_are_refused():
    with pytest.raises(ImageError, match="values of type complex64"):
        read_image(tiff(noise(1, np.float32).astype(np.complex64)))
    with pytest.raises(ImageError, match="4 bits a value"):
        read_image(tiff(noise(1, high=15), nbits=4))


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match="there is no such file"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="a folder without bands, which are TIFFs"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="a folder or a device"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="no such file"):
        read_image(Path("/vsicurl/http://127.0.0.1:9/a.tif"))
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_image(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["a#1.tif", "a?b.tif", "zip+a!b.tif", "ü .tif", "a%20b.tif", "GTIFF_DIR:1.tif"])
def test_names_mean_nothing_to_gdal(tmp_path, monkeypatch, name):
    values = noise(1, np.uint16)
    (tmp_path / name).write_bytes(tiff(values, **PLACE))
    monkeypatch.chdir(tmp_path)
    for path in (tmp_path / name, Path(name)):
        assert stretch_limits(path, Rendering()) is not None
        assert read_georeference(path).lon is not None


def test_sidecar_files_are_not_read(tmp_path):
    path, names = tmp_path / "a.tif", {"a.tif"}

    def beside(name, data):
        (tmp_path / name).write_bytes(data)
        names.add(name)

    values = noise(1, np.uint16, low=100, high=200)
    path.write_bytes(tiff(values))
    expected = stretch_limits(path, Rendering())
    beside("a.tfw", b"10\n0\n0\n-10\n400000\n4000000\n")
    beside(
        "a.tif.aux.xml",
        b"<PAMDataset><SRS>EPSG:32654</SRS><GeoTransform>4e5,10,0,4e6,0,-10</GeoTransform>"
        b'<PAMRasterBand band="1"><NoDataValue>150</NoDataValue></PAMRasterBand></PAMDataset>',
    )
    beside("a.tif.msk", tiff(np.zeros((1, HEIGHT, WIDTH), np.uint8), INTERNAL_MASK_FLAGS_1="2"))
    assert read_georeference(path) == Georeference()
    assert stretch_limits(path, Rendering()) == expected
    with open_tiff(path) as dataset:
        assert dataset.nodata is None
        assert dataset.read_masks(1).all()
        assert dataset.files == [str(path)]
    assert {entry.name for entry in tmp_path.iterdir()} == names, "nothing is written beside it"


# Rendering


@pytest.mark.parametrize(
    ("bands", "stretch", "messages"),
    [
        ((), "percentile:2:98", ["bands is ()"]),
        ((1, "B02"), "percentile:2:98", ["bands is (1, 'B02')"]),
        (("B02", ""), "percentile:2:98", ["bands is ('B02', '')"]),
        ((0, 1, 2), "percentile:2:98", ["bands is (0, 1, 2)"]),
        ((True,), "percentile:2:98", ["bands is (True,)"]),
        ((1.0,), "percentile:2:98", ["bands is (1.0,)"]),
        (None, "gamma:2", ["stretch is 'gamma:2'"]),
        (None, "percentile:2", ["allowed are percentile:LO:HI and range:LO:HI"]),
        (None, "percentile:98:2", ["percentiles go up from 0 to 100"]),
        (None, "percentile:0:101", ["percentiles go up"]),
        (None, "percentile:nan:98", ["percentiles go up"]),
        (None, "range:5:5", ["a range goes up"]),
        (None, "range:0:inf", ["a range goes up"]),
        ((0,), "range:a:b", ["found 2 problems", "bands is (0,)", "stretch is 'range:a:b'"]),
    ],
)
def test_a_rendering_reports_all_its_problems(bands, stretch, messages):
    with pytest.raises(InputError) as error:
        Rendering(bands, stretch)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    "rendering", [Rendering(), Rendering((4, 3, 2), "range:-0.5:1e4"), Rendering((1,)), Rendering(("B8A", "B02"))]
)
def test_a_rendering_survives_json(rendering):
    import json

    assert Rendering.from_json(json.loads(json.dumps(rendering.to_json()))) == rendering


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"band": [1]}, "no key 'band'; the keys are bands, stretch"),
        ({"bands": 1}, "bands is 1; a list of numbers or names"),
        ({"bands": [[1]]}, r"bands is \(\[1\],\)"),
        ({"stretch": 2}, "stretch is 2; text"),
    ],
)
def test_a_rendering_refuses_foreign_json(data, message):
    with pytest.raises(InputError, match=message):
        Rendering.from_json(data)


def test_the_stretch_of_a_scene_is_that_of_its_pixels(tmp_path):
    values = noise(3, np.uint16)
    values[:, :4] = 0
    path = tmp_path / "scene.tif"
    path.write_bytes(tiff(values, nodata=0))
    got = stretch_limits(path, Rendering())
    for (low, high), band in zip(got, values, strict=True):
        np.testing.assert_allclose((low, high), np.percentile(band[band > 0], [2, 98]), rtol=1e-6)
    assert stretch_limits(path, Rendering((2,), "range:1:9")) == ((1.0, 9.0),)
    path.write_bytes(tiff(noise(3)))
    assert stretch_limits(path, Rendering()) is None
    path.write_bytes(tiff(np.zeros((1, HEIGHT, WIDTH), np.uint16), nodata=0))
    with pytest.raises(ImageError, match="no valid data"):
        stretch_limits(path, Rendering())


def test_a_large_scene_is_read_on_a_grid(tmp_path):
    values = np.zeros((1, 2048, 4096), np.uint16)
    values[:] = np.arange(4096)
    path = tmp_path / "scene.tif"
    path.write_bytes(tiff(values, compress="deflate"))
    ((low, high),) = stretch_limits(path, Rendering(stretch="percentile:10:90"))
    assert abs(low - 409.5) < 4
    assert abs(high - 3685.5) < 4
    assert stretch_limits(path, Rendering(stretch="percentile:10:90")) == ((low, high),)


# Georeference


def test_place_of_a_utm_image():
    """Zone 31 has its middle at 3 degrees east, where northing 0 is the equator and easting 500 km."""
    data = tiff(noise(1), crs="EPSG:32631", transform=from_origin(500_000 - 12 * 10, 10 * 10, 10, 10))
    got = read_georeference(data)
    assert abs(got.lon - 3) < 1e-9
    assert abs(got.lat) < 1e-9
    west, south, east, north = shapely.from_wkb(got.footprint).bounds
    # A degree of longitude on the equator is 111.320 km, of latitude 110.574 km; the zone's scale is 0.9996.
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


def test_place_of_a_grid_that_counts_to_360_degrees():
    got = read_georeference(tiff(noise(1), crs="EPSG:4326", transform=from_origin(200, 50, 0.5, 0.25)))
    assert got.lon == pytest.approx(206 - 360)
    assert shapely.from_wkb(got.footprint).bounds == pytest.approx((-160, 45, -148, 50))


def test_an_image_across_180_degrees_has_two_parts():
    # UTM zone 60 ends at 180 degrees; its middle, 177 degrees east, has easting 500 km.
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
def test_a_damaged_date_is_none(tag):
    assert read_georeference(tiff(noise(1), datetime=tag)).datetime is None


def test_other_formats_have_no_place_and_no_image_no_georeference(tmp_path):
    assert read_georeference(encoded(Image.new("RGB", (20, 20)), "JPEG")) == Georeference()
    with pytest.raises(ImageError, match="not a JPEG, PNG or TIFF"):
        read_georeference(b"text")
    with pytest.raises(ImageError, match="no such file"):
        read_georeference(tmp_path / "a.tif")


# Real images


def test_real_images(shared):
    data = shared / "data"
    pairs = sorted((data / "ucmd_tif_sample").glob("*/*.tif"))[:6]
    for path in pairs:
        original = read_image(path)
        assert original.shape == (256, 256, 3)
        jpeg = read_image(data / "ucmd" / "Images" / path.parent.name / f"{path.stem}.jpg")
        assert np.abs(original.astype(int) - jpeg).mean() < 8, "the same picture, compressed again"
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
