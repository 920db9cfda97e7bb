"""JPEG 2000 files: the same pixels, place and limits as a TIFF; left out where GDAL has no driver for them."""

import contextlib
import os
import subprocess
import sys

import numpy as np
import pytest
from image_files import PLACE, jpeg_2000, noise, tiff

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.georeference import Georeference, read_georeference
from orbithash.encoders.imagery.images import Limits, Rendering, image_format, read_image, stretch_limits
from orbithash.encoders.imagery.rasters import open_raster
from orbithash.encoders.sources.sources import list_source
from orbithash.encoders.sources.tiles import plan_tiles, read_tile


@pytest.mark.parametrize("codec", ["JP2", "J2K"])
@pytest.mark.parametrize(("bands", "dtype"), [(3, np.uint8), (1, np.uint8), (4, np.uint16), (1, np.int16)])
def test_the_pixels_are_those_of_a_tiff(tmp_path, codec, bands, dtype):
    values = noise(bands, dtype, high=4000 if dtype != np.uint8 else 255)
    data = jpeg_2000(values, codec)
    assert image_format(data) == "JPEG 2000"
    # The name is that of another format.
    path = tmp_path / "a.png"
    path.write_bytes(data)
    last = Rendering((bands, 1), "range:0:3000")
    for source in (data, path):
        np.testing.assert_array_equal(read_image(source), read_image(tiff(values, photometric="minisblack")))
        np.testing.assert_array_equal(read_image(source, last), read_image(tiff(values), last))


def test_pixels_without_data_are_black():
    values = noise(4, low=1)
    values[3] = 255
    values[3, 5:8, 5:8] = 0
    data = jpeg_2000(values, photometric="RGB", alpha="YES")
    got = read_image(data)
    assert not got[5:8, 5:8].any()
    np.testing.assert_array_equal(got, np.where(values[3, ..., None] > 0, np.moveaxis(values[:3], 0, -1), 0))


def test_place_of_a_jpeg_2000_file(tmp_path):
    values = noise(1, np.uint16)
    data = jpeg_2000(values, **PLACE)
    path = tmp_path / "a.jp2"
    path.write_bytes(data)
    expected = read_georeference(tiff(values, **PLACE))
    assert expected.lon is not None
    for source in (data, path):
        assert read_georeference(source) == expected
        assert read_georeference(source, (2, 3, 8, 9)) == read_georeference(tiff(values, **PLACE), (2, 3, 8, 9))
    assert read_georeference(jpeg_2000(values)) == read_georeference(jpeg_2000(values, "J2K")) == Georeference()


def test_sidecar_files_of_jpeg_2000_are_not_read(tmp_path):
    for codec in ("JP2", "J2K"):
        path = tmp_path / f"a.{codec.lower()}"
        path.write_bytes(jpeg_2000(noise(1, np.uint16), codec))
        for name in ("a.j2w", "a.wld", f"{path.name}w"):
            (tmp_path / name).write_bytes(b"10\n0\n0\n-10\n400000\n4000000\n")
        (tmp_path / f"{path.name}.aux.xml").write_bytes(
            b"<PAMDataset><SRS>EPSG:32654</SRS><GeoTransform>4e5,10,0,4e6,0,-10</GeoTransform></PAMDataset>"
        )
        assert read_georeference(path) == Georeference()
        with open_raster(path) as dataset:
            assert dataset.transform.is_identity
            assert dataset.files == [str(path)]


@pytest.mark.parametrize("codec", ["JP2", "J2K"])
def test_a_truncated_file_is_refused(codec):
    data = jpeg_2000(noise(3, np.uint16), codec, **(PLACE if codec == "JP2" else {}))
    lengths = [*range(0, len(data) - 200, 97), *range(len(data) - 200, len(data) - 2)]
    for length in lengths:
        with pytest.raises(ImageError) as caught:
            read_image(data[:length])
        assert "\n" not in str(caught.value)
        assert "vsimem" not in str(caught.value)


def test_damaged_bytes_give_an_image_or_are_refused():
    data = jpeg_2000(noise(3, np.uint16), **PLACE)
    random = np.random.default_rng(0)
    for _ in range(100):
        broken = bytearray(data)
        for place in random.integers(12, len(data), 3):
            broken[place] = random.integers(256)
        with contextlib.suppress(ImageError):
            assert read_image(bytes(broken)).dtype == np.uint8


def test_limits_are_checked_before_pixels_are_decoded():
    values = noise(3)
    # The code stream ends after its header, so that decoding it would be refused as truncated.
    data = jpeg_2000(values)
    header = data[: data.index(b"\xff\x93") + 2]
    size = values[0].size
    with pytest.raises(ImageError, match="truncated"):
        read_image(header)
    with pytest.raises(ImageError, match="24 x 20 pixels; at most 479"):
        read_image(header, limits=Limits(max_pixels=size - 1))
    with pytest.raises(ImageError, match="more than 100 bytes"):
        read_image(data, limits=Limits(max_bytes=100))
    # OpenJPEG decodes to 4 bytes a value.
    decoded = size * 3 * 4
    with pytest.raises(ImageError, match=f"3 bands of uint8 decode to {decoded:,} bytes at once"):
        read_image(header, limits=Limits(max_decoded_bytes=decoded - 1))
    assert read_image(data, limits=Limits(max_decoded_bytes=decoded)).any()
    with pytest.raises(ImageError, match="bands B02 are names"):
        read_image(data, Rendering(("B02",)))


def test_other_formats_can_be_forbidden():
    data = jpeg_2000(noise(3))
    for formats, words in (
        (("JPEG", "PNG", "TIFF"), "not a JPEG, PNG or TIFF: begins"),
        (("PNG",), "not a PNG: begins"),
    ):
        with pytest.raises(ImageError, match=words):
            read_image(data, formats=formats)
    with pytest.raises(ImageError, match="not a JPEG, PNG, TIFF or JPEG 2000: begins with b'text'"):
        read_image(b"text")


def test_a_scene_is_cut_into_tiles(tmp_path):
    values = np.random.default_rng(0).integers(0, 4000, (3, 150, 100)).astype(np.uint16)
    (tmp_path / "s.jp2").write_bytes(jpeg_2000(values, BLOCKXSIZE="64", BLOCKYSIZE="64", **PLACE))
    (tmp_path / "same.tif").write_bytes(tiff(values, **PLACE))
    items = list_source(tmp_path, 64)
    windows = plan_tiles(tmp_path / "same.tif", 64)
    assert {item.window for item in items if item.key.startswith("s.jp2#")} == set(windows)
    scene, same = tmp_path / "s.jp2", tmp_path / "same.tif"
    stretch = stretch_limits(same, Rendering())
    assert stretch_limits(scene, Rendering()) == stretch
    for window in windows:
        got = read_tile(scene, window, stretch=stretch)
        np.testing.assert_array_equal(got, read_tile(same, window, stretch=stretch))
        assert read_georeference(scene, window) == read_georeference(same, window)


def test_files_are_listed(tmp_path):
    data = jpeg_2000(noise(3))
    for name in ("Forest/a.jp2", "Forest/b.J2K", "Sea/c.tif"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    items = list_source(tmp_path)
    assert [(item.key, item.label) for item in items] == [
        ("Forest/a.jp2", "Forest"),
        ("Forest/b.J2K", "Forest"),
        ("Sea/c.tif", "Sea"),
    ]
    assert [item.key for item in list_source(tmp_path / "Forest" / "a.jp2")] == ["a.jp2"]


def test_without_a_driver_files_are_counted_and_refused(tmp_path):
    (tmp_path / "a.jp2").write_bytes(jpeg_2000(noise(3)))
    (tmp_path / "b.tif").write_bytes(tiff(noise(3)))
    program = """
import sys
from pathlib import Path
from collections import Counter
from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.sources.sources import list_source
left_out, root = Counter(), Path(sys.argv[1])
print([item.key for item in list_source(root, left_out=left_out)], dict(left_out))
try:
    read_image(root / "a.jp2")
except ImageError as error:
    print(error)
"""
    environment = {**os.environ, "GDAL_SKIP": "JP2OpenJPEG"}
    command = [sys.executable, "-c", program, str(tmp_path)]
    listed, refused = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True
    ).stdout.splitlines()
    assert listed == "['b.tif'] {'files of a format that is not read (.jp2)': 1}"
    assert refused.startswith("not a JPEG, PNG or TIFF: begins with")
