"""Mosaics: tiles across the borders of files, gaps, and hostile VRTs."""

import shutil
import subprocess

import numpy as np
import pytest
import rasterio

from orbithash.encoders.archive.stamps import file_version, make_stamp, same_content
from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rasters import open_raster, stretch_limits
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source
from orbithash.encoders.sources.tiles import plan_tiles, read_tile
from tests.encoders.imagery.mosaic_folders import numbers, source, write_list, write_tif, write_vrt

NUMBERS = Rendering((1,), values="raw")


def pixels(path, window):
    with open_raster(path) as dataset:
        values = dataset.read(1, window=rasterio.windows.Window(*window))
        return np.where(dataset.read_masks(1, window=rasterio.windows.Window(*window)) > 0, values, 0)


@pytest.fixture
def two(tmp_path):
    """Two files beside each other and their values as one image."""
    left, right = numbers(64, 64, 1), numbers(64, 64, 2)
    write_tif(tmp_path / "a.tif", left)
    write_tif(tmp_path / "sub/b.tif", right, col=64)
    return np.concatenate([left[0], right[0]], axis=1)


def test_tiles_of_a_list_cross_the_borders_of_files(tmp_path, two):
    path = write_list(tmp_path / "scene.mosaic", "sub/b.tif", "a.tif")
    assert plan_tiles(path, 48) == [
        (0, 0, 48, 48),
        (48, 0, 48, 48),
        (80, 0, 48, 48),
        (0, 16, 48, 48),
        (48, 16, 48, 48),
        (80, 16, 48, 48),
    ]
    assert (pixels(path, (48, 8, 48, 48)) == two[8:56, 48:96]).all()


def test_a_list_and_a_vrt_of_the_same_files_are_the_same_scene(tmp_path, two):
    listed = write_list(tmp_path / "scene.mosaic", "a.tif", "sub/b.tif")
    vrt = write_vrt(tmp_path / "scene.vrt", source("a.tif"), source("sub/b.tif", col=64))
    for window in plan_tiles(listed, 32):
        assert (pixels(vrt, window) == pixels(listed, window)).all()
        assert read_georeference(vrt, window) == read_georeference(listed, window)
    whole = write_tif(tmp_path / "whole.tif", two[None])
    assert read_georeference(listed, (48, 8, 48, 48)) == read_georeference(whole, (48, 8, 48, 48))


def test_a_vrt_of_gdal_is_read(tmp_path, two):
    """The form that gdalbuildvrt writes."""
    properties = (
        '<SourceProperties RasterXSize="64" RasterYSize="64" DataType="UInt16" BlockXSize="64" BlockYSize="64" />'
    )
    sources = [
        source("a.tif", more=properties),
        source("sub/b.tif", col=64, kind="ComplexSource", more="<NODATA>0</NODATA>"),
    ]
    stated = "<NoDataValue>0</NoDataValue><ColorInterp>Gray</ColorInterp><Metadata><MDI key='a'>b</MDI></Metadata>"
    path = write_vrt(
        tmp_path / "a.vrt", *sources, inner=stated, more='<OverviewList resampling="nearest">2</OverviewList>'
    )
    assert (pixels(path, (0, 0, 128, 64)) == two).all()


@pytest.mark.skipif(shutil.which("gdalbuildvrt") is None, reason="gdalbuildvrt is not installed")
@pytest.mark.parametrize("options", [[], ["-addalpha"], ["-r", "bilinear"], ["-srcnodata", "0", "-vrtnodata", "0"]])
def test_files_of_gdalbuildvrt(tmp_path, two, options):
    write = ["gdalbuildvrt", "-q", *options, "m.vrt", "a.tif", "sub/b.tif"]
    subprocess.run(write, cwd=tmp_path, check=True, capture_output=True)
    assert (pixels(tmp_path / "m.vrt", (0, 0, 128, 64)) == two).all()


@pytest.mark.skipif(shutil.which("gdalbuildvrt") is None, reason="gdalbuildvrt is not installed")
def test_files_of_gdalbuildvrt_with_one_file_for_each_band(tmp_path):
    bands = numbers(64, 64, count=3)
    for number, band in enumerate(bands):
        write_tif(tmp_path / f"{number}.tif", band[None])
    names = [f"{number}.tif" for number in range(3)]
    subprocess.run(["gdalbuildvrt", "-q", "-separate", "m.vrt", *names], cwd=tmp_path, check=True)
    with open_raster(tmp_path / "m.vrt") as dataset:
        assert (dataset.read() == bands).all()
        assert (dataset.read_masks() == 255).all()
    write_tif(tmp_path / "2.tif", bands[2:], col=32)
    subprocess.run(["gdalbuildvrt", "-q", "-overwrite", "-separate", "m.vrt", *names], cwd=tmp_path, check=True)
    with pytest.raises(ImageError, match="its bands show files in different places"):
        plan_tiles(tmp_path / "m.vrt", 32)


def test_gaps_have_no_data_and_empty_windows_are_left_out(tmp_path):
    values = numbers(64, 64)
    write_tif(tmp_path / "a.tif", values)
    write_tif(tmp_path / "b.tif", values, col=256, row=64)
    path = write_list(tmp_path / "scene.mosaic", "a.tif", "b.tif")
    assert plan_tiles(path, 64) == [(0, 0, 64, 64), (256, 64, 64, 64)]
    assert (pixels(path, (32, 0, 64, 64)) == np.pad(values[0][:, 32:], ((0, 0), (0, 32)))).all()
    image = read_tile(path, (32, 0, 64, 64), NUMBERS)
    assert np.isnan(image[:, 32:]).all()
    assert not np.isnan(image[:, :32]).any()


def test_the_later_file_is_on_top_where_it_has_data(tmp_path):
    below, above = numbers(64, 64, 1), numbers(64, 64, 2)
    above[0, :, :32] = 0
    write_tif(tmp_path / "a.tif", below, nodata=0)
    write_tif(tmp_path / "b.tif", above, nodata=0)
    path = write_list(tmp_path / "scene.mosaic", "a.tif", "b.tif")
    assert (pixels(path, (0, 0, 64, 64)) == np.where(above[0] > 0, above[0], below[0])).all()


@pytest.mark.parametrize("form", ["list", "vrt"])
def test_each_band_has_its_own_pixels_without_data(tmp_path, form):
    values = numbers(64, 64, dtype="float32", count=2)
    values[1, :10] = -9999
    write_tif(tmp_path / "a.tif", values, nodata=-9999)
    write_tif(tmp_path / "b.tif", values, col=128, nodata=-9999)
    path = write_list(tmp_path / "m.mosaic", "a.tif", "b.tif")
    if form == "vrt":
        if shutil.which("gdalbuildvrt") is None:
            pytest.skip("gdalbuildvrt is not installed")
        path = tmp_path / "m.vrt"
        subprocess.run(["gdalbuildvrt", "-q", path, "a.tif", "b.tif"], cwd=tmp_path, check=True)
    image = read_tile(path, (32, 0, 64, 64), Rendering((1, 2), values="raw"))
    expected = np.full((64, 64, 2), np.nan, np.float32)
    expected[:, :32] = np.moveaxis(np.where(values == -9999, np.nan, values), 0, -1)[:, 32:]
    np.testing.assert_array_equal(image, expected)


def test_files_with_other_values_of_no_data_are_not_one_scene(tmp_path):
    write_tif(tmp_path / "a.tif", numbers(64, 64), nodata=0)
    write_tif(tmp_path / "b.tif", numbers(64, 64), col=64)
    with pytest.raises(ImageError, match=r"their values of no data are None and 0.0"):
        plan_tiles(write_list(tmp_path / "m.mosaic", "a.tif", "b.tif"), 32)


@pytest.mark.parametrize(("width", "border"), [(1100, 301), (1537, 700)])
def test_a_mosaic_is_stretched_as_one_file_of_its_pixels(tmp_path, width, border):
    values = np.random.default_rng(0).integers(1, 60_000, (3, 1200, width)).astype(np.uint16)
    write_tif(tmp_path / "whole.tif", values)
    write_tif(tmp_path / "a.tif", values[:, :, :border])
    write_tif(tmp_path / "b.tif", values[:, :, border:], col=border)
    path = write_list(tmp_path / "scene.mosaic", "a.tif", "b.tif")
    rendering = Rendering((1, 2, 3))
    assert stretch_limits(path, rendering) == stretch_limits(tmp_path / "whole.tif", rendering)
    window = (border - 20, 500, 64, 64)
    stretch = stretch_limits(path, rendering)
    whole = read_tile(tmp_path / "whole.tif", window, rendering, stretch=stretch)
    assert (read_tile(path, window, rendering, stretch=stretch) == whole).all()


def test_tiles_of_a_mosaic_become_records(tmp_path, two):
    write_list(tmp_path / "scene.mosaic", "a.tif", "sub/b.tif")
    items = list_source(tmp_path / "scene.mosaic", 64)
    assert [item.key for item in items] == ["scene.mosaic#0,0,64,64", "scene.mosaic#64,0,64,64"]
    record = read_record(items[1], Preprocessing(Rendering(), 32, 32))
    assert record.uri == f"{tmp_path}/scene.mosaic#64,0,64,64"
    assert record.lon == pytest.approx(3.0122, abs=1e-3)
    (whole,) = list_source(tmp_path / "scene.mosaic")
    with pytest.raises(ImageError, match="a mosaic is read by tiles only: give --tile"):
        read_record(whole, Preprocessing(Rendering(), 32, 32))


def test_the_stamp_of_a_mosaic_is_that_of_its_files(tmp_path, two):
    path = str(write_list(tmp_path / "scene.mosaic", "a.tif", "sub/b.tif"))
    before = file_version(path)
    stamp = make_stamp(path, before)
    write_tif(tmp_path / "sub/b.tif", numbers(64, 64, 9), col=64)
    assert file_version(path) != before
    assert not same_content(stamp, path, file_version(path))
    write_tif(tmp_path / "sub/b.tif", two[None, :, 64:], col=64)
    assert same_content(stamp, path, file_version(path))
    (tmp_path / "sub/b.tif").unlink()
    assert file_version(path) is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crs": "EPSG:32632"}, "b.tif does not fit a.tif: their coordinate reference systems differ"),
        ({"step": 20}, "their pixels differ in size or direction"),
        ({"col": 64.4}, r"the pixels of b.tif are 0.40 pixels off those of a.tif"),
    ],
)
def test_files_of_different_grids_are_not_one_scene(tmp_path, options, message):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    write_tif(tmp_path / "b.tif", numbers(64, 64), **{"col": 64, **options})
    with pytest.raises(ImageError, match=message):
        plan_tiles(write_list(tmp_path / "scene.mosaic", "a.tif", "b.tif"), 32)


def test_files_of_different_bands_are_not_one_scene(tmp_path):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    write_tif(tmp_path / "b.tif", numbers(64, 64, dtype="uint8", count=3), col=64)
    with pytest.raises(ImageError, match=r"does not fit a.tif: 3 bands of Byte, and 1 of UInt16"):
        plan_tiles(write_list(tmp_path / "scene.mosaic", "a.tif", "b.tif"), 32)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../outside.tif", "files in the folder of the mosaic or below it are allowed"),
        ("/etc/hostname", "files in the folder of the mosaic or below it are allowed"),
        ("link.tif", "files in the folder of the mosaic or below it are allowed"),
        ("/vsicurl/http://127.0.0.1:9/a.tif", "files in the folder of the mosaic or below it are allowed"),
        ("/vsizip/a.zip/a.tif", "files in the folder of the mosaic or below it are allowed"),
        ("http://127.0.0.1:9/a.tif", "which is not a file in its folder"),
        ("GTIFF_DIR:1:a.tif", "which is not a file in its folder"),
        ("absent.tif", "which is not a file in its folder"),
        ("x" * 5000, "which is not a path"),
        ("other.vrt", "another mosaic; GeoTIFFs are allowed"),
        ("text.tif", "not a JPEG"),
        ("photo.jpg", "not a TIFF"),
        ("vrt.tif", "not a JPEG"),
    ],
)
@pytest.mark.parametrize("form", ["list", "vrt"])
def test_files_that_a_mosaic_may_not_name(tmp_path, name, message, form):
    folder = tmp_path / "folder"
    write_tif(tmp_path / "outside.tif", numbers(64, 64))
    write_tif(folder / "a.tif", numbers(64, 64))
    (folder / "link.tif").symlink_to(tmp_path / "outside.tif")
    (folder / "text.tif").write_text("text")
    (folder / "photo.jpg").write_bytes(b"\xff\xd8\xff\xe0")
    write_vrt(folder / "other.vrt", source("a.tif"))
    (folder / "vrt.tif").write_bytes((folder / "other.vrt").read_bytes())
    path = write_list(folder / "m.mosaic", name) if form == "list" else write_vrt(folder / "m.vrt", source(name))
    with pytest.raises(ImageError, match=message):
        plan_tiles(path, 32)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"band": 'dataType="UInt16" subClass="VRTDerivedRasterBand"'},
            "a band is a VRTDerivedRasterBand; bands of files",
        ),
        ({"band": 'dataType="UInt16" subClass="VRTRawRasterBand"'}, "a band is a VRTRawRasterBand"),
        (
            {"inner": "<PixelFunctionType>sum</PixelFunctionType>"},
            "an element PixelFunctionType of a band is not allowed",
        ),
        ({"inner": "<KernelFilteredSource/>"}, "an element KernelFilteredSource of a band is not allowed"),
        ({"band": 'dataType="CFloat64"'}, "a band has values of type 'CFloat64'"),
        ({"band": 'dataType="UInt16" band="2"'}, "its bands are not in order"),
        ({"more": "<GDALWarpOptions/>"}, "an element GDALWarpOptions is not allowed"),
        ({"more": "<Group name='/'/>"}, "an element Group is not allowed"),
        ({"width": 2**40}, "its rasterXSize is '1099511627776'|its rasterXSize is 1099511627776"),
        ({"width": 0}, "its rasterXSize is 0"),
        ({"start": '<!DOCTYPE x [<!ENTITY a "b">]>'}, "not a VRT: it begins with"),
        ({"inner": '<!DOCTYPE x [<!ENTITY a "b">]>'}, "declarations of entities are not allowed"),
        ({"inner": "&undefined;"}, "a VRT that is not XML"),
        ({"start": '<?xml version="1.0" encoding="utf-16"?>'}, "not a VRT: it begins with"),
        ({"inner": "<open"}, "a VRT that is not XML"),
    ],
)
def test_a_vrt_may_only_place_files_side_by_side(tmp_path, options, message):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    path = write_vrt(tmp_path / "m.vrt", source("a.tif"), **options)
    with pytest.raises(ImageError, match=message):
        plan_tiles(path, 32)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (source("a.tif", more="<OpenOptions><OOI key='a'>b</OOI></OpenOptions>"), "an element OpenOptions of a source"),
        (source("a.tif", kind="ComplexSource", more="<LUT>0:1</LUT>"), "an element LUT of a source is not allowed"),
        (source("a.tif", more="<NODATA>x</NODATA>"), "its NODATA is 'x'; a number is required"),
        (source("a.tif", band="mask,1"), "its SourceBand is 'mask,1'"),
        (source("a.tif", band="2"), "its SourceBand is 2; 1 to 1 is allowed"),
        (source("a.tif", col="nan"), "a DstRect is not a part of an image"),
        (source("a.tif", width=0), "a SrcRect is not a part of an image"),
        (source("a.tif", scale=32), "a file is shown 32 times smaller; 16 is allowed"),
        ("<SimpleSource/>", "a source names no file"),
        ("", "a band of it shows no file"),
    ],
)
def test_a_source_of_a_vrt_is_shown_as_it_is(tmp_path, text, message):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    with pytest.raises(ImageError, match=message):
        plan_tiles(write_vrt(tmp_path / "m.vrt", text), 32)


def test_other_descriptions_that_are_refused(tmp_path, monkeypatch):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    good = write_vrt(tmp_path / "m.vrt", source("a.tif")).read_text()
    for old, new, message in (
        ("EPSG:32631", "/etc/passwd", "is neither WKT nor EPSG:N"),
        ("EPSG:32631", "http://127.0.0.1:9/crs", "is neither WKT nor EPSG:N"),
        ("EPSG:32631", "EPSG:999999", "its SRS 'EPSG:999999' is not known"),
        ("500000, 10, 0", "500000, 10", "its GeoTransform is not one of six numbers"),
        ("500000, 10, 0", "inf, 10, 0", "its GeoTransform is not one of six numbers"),
        (
            "<VRTDataset ",
            '<VRTDataset subClass="VRTWarpedDataset" ',
            "an attribute subClass of VRTDataset is not allowed",
        ),
    ):
        (tmp_path / "bad.vrt").write_text(good.replace(old, new))
        with pytest.raises(ImageError, match=message):
            plan_tiles(tmp_path / "bad.vrt", 32)
    monkeypatch.setattr("orbithash.encoders.imagery.mosaic_files._MAX_BYTES", 100)
    (tmp_path / "long.vrt").write_text(good)
    with pytest.raises(ImageError, match="it has more than"):
        plan_tiles(tmp_path / "long.vrt", 32)
    for text, message in (("", "it lists no file"), ("\xff", "is not UTF-8 text")):
        (tmp_path / "bad.mosaic").write_bytes(text.encode("latin-1"))
        with pytest.raises(ImageError, match=message):
            plan_tiles(tmp_path / "bad.mosaic", 32)


def test_a_block_that_decodes_to_too_much_is_refused(tmp_path):
    side = 16_384
    grid = {"crs": "EPSG:32631", "transform": rasterio.transform.from_origin(500_000, 5_000_000, 10, 10)}
    blocks = {"tiled": True, "blockxsize": side, "blockysize": side, "sparse_ok": True}
    size = {"count": 1, "height": side, "width": side, "dtype": "float64"}
    rasterio.open(tmp_path / "a.tif", "w", driver="GTiff", **size, **grid, **blocks).close()
    with pytest.raises(ImageError, match="a block of 16384 x 16384 pixels is too large"):
        plan_tiles(write_list(tmp_path / "m.mosaic", "a.tif"), 224)


def test_bytes_are_never_read_as_a_mosaic(tmp_path):
    write_tif(tmp_path / "a.tif", numbers(64, 64))
    data = write_vrt(tmp_path / "m.vrt", source("a.tif")).read_bytes()
    with pytest.raises(ImageError, match="not a JPEG"), open_raster(data):
        pass


@pytest.mark.parametrize("seed", range(5))
def test_windows_that_show_a_file_are_those_that_overlap_it(tmp_path, seed):
    random = np.random.default_rng(seed)
    write_tif(tmp_path / "a.tif", numbers(8, 8))
    places = [(int(col), int(row)) for col, row in random.integers(-20, 120, (6, 2))]
    sources = [source("a.tif", col=col, row=row, width=8, height=8) for col, row in places]
    path = write_vrt(tmp_path / "m.vrt", *sources, width=100, height=90)
    shown = {
        (x, y, 16, 16)
        for x in (*range(0, 96, 16), 84)
        for y in (*range(0, 80, 16), 74)
        for col, row in places
        if x - 8 < col < x + 16 and y - 8 < row < y + 16
    }
    assert set(plan_tiles(path, 16)) == shown
