"""Refused images: damaged, truncated, too large, or not an image."""

import contextlib
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from image_files import HEIGHT, PLACE, WIDTH, encoded, noise, png16, png_of, tiff
from PIL import Image
from rasterio.io import MemoryFile

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.georeference import Georeference, read_georeference
from orbithash.encoders.imagery.images import Limits, Rendering, read_image, stretch_limits
from orbithash.encoders.imagery.rasters import open_raster


def test_formats_are_detected_by_content_not_by_name(tmp_path):
    values = noise(3)
    path = tmp_path / "photo.jpg"
    path.write_bytes(tiff(values))
    np.testing.assert_array_equal(read_image(path), np.moveaxis(values, 0, -1))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "the file is empty"),
        (b"hello world, this is text", r"not a JPEG, PNG.* begins with b'hello world,'"),
        (b"GIF89a" + bytes(30), "not a JPEG, PNG"),
        (b'<VRTDataset rasterXSize="20">', "not a JPEG, PNG"),
        (b"\xff\xd8", "not a JPEG, PNG"),
        (b"\xff\xd8\xff", "damaged JPEG|truncated JPEG"),
        (b"\x89PNG\r\n\x1a\n", "truncated: the PNG header is not complete"),
        (b"\x89PNG\r\n\x1a\n" + bytes(40), "0 x 0 pixels; at least 16 x 16"),
        (b"II*\0", "damaged or truncated"),
        (b"II*\0" + bytes(100), "damaged or truncated"),
        (b"MM\0+" + b"\xff" * 100, "damaged or truncated"),
    ],
)
def test_bytes_that_are_not_an_image(tmp_path, data, message):
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
    # The last bytes of JPEG and PNG hold no pixels.
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


def test_images_of_exactly_the_limits_are_read(tmp_path):
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
    """30,000 x 30,000 pixels in a few kilobytes, with invalid pixel data."""
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
    with pytest.raises(ImageError, match="4 bits per value"):
        read_image(tiff(noise(1, high=15), nbits=4))


def test_what_is_not_a_file_is_refused(tmp_path):
    with pytest.raises(ImageError, match="there is no such file"):
        read_image(tmp_path / "nothing.jpg")
    with pytest.raises(ImageError, match="a folder without bands; bands are TIFFs"):
        read_image(tmp_path)
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="a folder or a device"):
        read_image(tmp_path / "pipe.jpg")
    with pytest.raises(ImageError, match="no such file"):
        read_image(Path("/vsicurl/http://127.0.0.1:9/a.tif"))
    with pytest.raises(ImageError, match="cannot be read: File name too long"):
        read_image(tmp_path / ("a" * 300))


@pytest.mark.parametrize("name", ["a#1.tif", "a?b.tif", "zip+a!b.tif", "ü .tif", "a%20b.tif", "GTIFF_DIR:1.tif"])
def test_special_names_of_gdal_are_plain_file_names(tmp_path, monkeypatch, name):
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
    with open_raster(path) as dataset:
        assert dataset.nodata is None
        assert dataset.read_masks(1).all()
        assert dataset.files == [str(path)]
    assert {entry.name for entry in tmp_path.iterdir()} == names, "nothing is written beside it"
