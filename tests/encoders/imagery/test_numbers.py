"""Bands as numbers: from the stored values to float32 in physical units, for files and patch folders."""

import warnings

import numpy as np
import pytest
import rasterio
from PIL import Image
from rasterio.enums import ColorInterp

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.images import Limits, Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import Item
from orbithash.encoders.sources.tiles import plan_tiles, read_tile

SIDE = 24
RNG = np.random.default_rng(3)


def write_tiff(path, values, names=None, scales=None, offsets=None, **options):
    count, height, width = values.shape
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **options) as dataset:
        dataset.write(values)
        if names:
            dataset.descriptions = names
        if scales:
            dataset.scales = scales
        if offsets:
            dataset.offsets = offsets
    return path


def write_patch(folder, names=("B02", "B04", "B8A", "B11"), dtype="uint16", prefix="x"):
    """Write one file for each band, B11 at half the resolution; return the stored values."""
    folder.mkdir(parents=True, exist_ok=True)
    stored = {}
    for name in names:
        side = SIDE // 2 if name == "B11" else SIDE
        stored[name] = RNG.integers(1, 10_000, (side, side)).astype(dtype)
        write_tiff(folder / f"{prefix}_{name}.tif", stored[name][None])
    return stored


def counts(bands=2):
    return RNG.integers(1, 10_000, (bands, SIDE, SIDE)).astype(np.uint16)


# Units


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "int32", "float32", "float64"])
def test_raw_values_are_those_of_the_file(tmp_path, dtype):
    values = RNG.integers(0, 120, (12, SIDE, SIDE)).astype(dtype)
    path = write_tiff(tmp_path / "x.tif", values, scales=(0.5,) * 12, offsets=(3.0,) * 12)
    got = read_image(path, Rendering(tuple(range(12, 0, -1)), values="raw"))
    assert (got.dtype, got.shape) == (np.float32, (SIDE, SIDE, 12))
    np.testing.assert_array_equal(got, np.moveaxis(values[::-1], 0, -1))
    scaled = read_image(path, Rendering((1, 2), values="raw", band_scale=(0.25,), band_offset=(-1, 1)))
    np.testing.assert_array_equal(scaled, np.moveaxis(values[:2] * 0.25 + [[[-1]], [[1]]], 0, -1).astype(np.float32))


@pytest.mark.parametrize(
    ("dtype", "tags", "settings", "scale", "offset"),
    [
        ("uint16", {}, {}, 1e-4, 0),
        ("int16", {}, {}, 1e-4, 0),
        ("float32", {}, {}, 1, 0),
        # Landsat's collection 2.
        ("uint16", {"scales": (2.75e-5,) * 2, "offsets": (-0.2,) * 2}, {}, 2.75e-5, -0.2),
        ("uint16", {"scales": (2e-4,) * 2}, {}, 2e-4, 0),
        ("uint8", {"scales": (0.004,) * 2}, {}, 0.004, 0),
        # Settings are stronger than metadata; a scale brings its own offset.
        ("uint16", {"scales": (2e-4,) * 2, "offsets": (-0.2,) * 2}, {"band_scale": (1e-3,)}, 1e-3, 0),
        ("uint16", {"scales": (2e-4,) * 2, "offsets": (-0.2,) * 2}, {"band_offset": (-0.5,)}, 2e-4, -0.5),
        ("uint16", {}, {"band_offset": (-0.1,)}, 1e-4, -0.1),
        ("uint8", {}, {"band_scale": (0.5,), "band_offset": (1,)}, 0.5, 1),
    ],
)
def test_scale_and_offset_of_reflectance(tmp_path, dtype, tags, settings, scale, offset):
    values = RNG.integers(1, 250, (2, SIDE, SIDE)).astype(dtype)
    path = write_tiff(tmp_path / "x.tif", values, **tags)
    got = read_image(path, Rendering((1, 2), values="reflectance", **settings))
    np.testing.assert_allclose(got, np.moveaxis(values, 0, -1) * scale + offset, rtol=1e-6)


def test_decibels_stay_and_power_becomes_decibels(tmp_path):
    power = RNG.gamma(1.0, 0.1, (2, SIDE, SIDE)).astype(np.float32)
    power[0, 0, 0], power[1, 2, 2] = 0, -1e-6
    path = write_tiff(tmp_path / "power.tif", power)
    got = read_image(path, Rendering((1, 2), values="power"))
    with np.errstate(all="ignore"):
        expected = 10 * np.log10(power.astype(np.float64))
    there = power > 0
    np.testing.assert_allclose(np.moveaxis(got, -1, 0)[there], expected[there], rtol=1e-6)
    assert np.isnan(got[0, 0, 0])
    assert np.isnan(got[2, 2, 1])
    decibels = write_tiff(tmp_path / "db.tif", np.where(there, expected, -30).astype(np.float32))
    kept = read_image(decibels, Rendering((1, 2), values="decibel"))
    np.testing.assert_allclose(np.moveaxis(kept, -1, 0)[there], expected[there], rtol=1e-6)
    with pytest.raises(ImageError, match="most values are below 0, which linear power never is; set values=decibel"):
        read_image(decibels, Rendering((1, 2), values="power"))
    with pytest.raises(ImageError, match=r"are not decibels of a radar image, .* set values=power"):
        read_image(write_tiff(tmp_path / "p.tif", np.abs(power)), Rendering((1, 2), values="decibel"))


def test_missing_pixels_are_nan(tmp_path):
    values = RNG.normal(size=(3, SIDE, SIDE)).astype(np.float32)
    values[0, 0, 0], values[0, 0, 1], values[1, 5, 5], values[2, 3] = np.nan, np.inf, -np.inf, -9999
    got = read_image(write_tiff(tmp_path / "x.tif", values, nodata=-9999), Rendering((1, 2, 3), values="raw"))
    missing = ~np.isfinite(values) | (values == -9999)
    np.testing.assert_array_equal(np.isnan(got), np.moveaxis(missing, 0, -1))
    prepared = Preprocessing(Rendering((1, 2, 3), values="raw"), SIDE, SIDE).prepare(got)
    np.testing.assert_array_equal(prepared, got)


def test_transparent_pixels_of_pictures_are_missing(tmp_path):
    pixels = RNG.integers(0, 256, (SIDE, SIDE, 4)).astype(np.uint8)
    pixels[..., 3] = np.where(np.arange(SIDE) < 5, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    got = read_image(tmp_path / "x.png", Rendering(values="raw", band_scale=(2,)))
    assert np.isnan(got[:, :5]).all()
    np.testing.assert_array_equal(got[:, 5:], pixels[:, 5:, :3] * np.float32(2))


@pytest.mark.parametrize("number", [1, 4])
def test_one_band_becomes_three_equal_ones(tmp_path, number):
    values = counts(4)
    path = write_tiff(tmp_path / "x.tif", values)
    got = read_image(path, Rendering((number,), values="reflectance"))
    for channel in range(3):
        np.testing.assert_allclose(got[..., channel], values[number - 1] * 1e-4, rtol=1e-6)


# Names of bands


@pytest.mark.parametrize(
    ("names", "requested", "positions"),
    [
        (("B2", "B3", "B4", "B8A"), ("B04", "b03", "B8A"), (2, 1, 3)),
        (("red", "green", "nir"), ("nir", "Red"), (2, 0)),
        (("B02", "B03", "B04", "B08", "B8A", "B11"), ("red", "nir", "nir08", "swir16"), (2, 3, 4, 5)),
        (("blue", "nir08", "B8A2"), ("blue", "nir08"), (0, 1)),
        (("b02", "B02"), ("B02", "b02"), (1, 0)),
    ],
)
def test_bands_of_a_file_by_its_descriptions(tmp_path, names, requested, positions):
    values = counts(len(names))
    path = write_tiff(tmp_path / "x.tif", values, names)
    got = read_image(path, Rendering(requested, values="raw"))
    expected = np.moveaxis(values[list(positions)], 0, -1)
    np.testing.assert_array_equal(got, expected)
    as_picture = read_image(path, Rendering(requested, "range:0:10000"))
    assert np.abs(as_picture - expected / 10_000 * 255).max() < 0.51


@pytest.mark.parametrize(
    ("names", "requested", "message"),
    [
        (None, ("B02", "B03"), "B02,B03 are names, and the bands of this file have none .*: state numbers"),
        (("B2", "B3"), ("B04", "B02"), "no band B04; the bands are B2, B3"),
        # Of Landsat, band 8 is panchromatic and band 5 near infrared.
        (("B2", "B3", "B4", "B5", "B8"), ("nir", "red"), "no band nir, red; the bands are B2, B3, B4, B5, B8"),
        (("B02", "B2"), ("b2", "B02"), "band b2 occurs 2 times"),
        (("a\nb" * 90, "B02"), ("B03",), "no band B03; the bands are a ba ba b.{31}, B02$"),
        (tuple(f"N{n}" for n in range(25)), ("B03",), "N18, N19, and 5 more$"),
    ],
)
def test_bands_that_a_file_does_not_have(tmp_path, names, requested, message):
    path = write_tiff(tmp_path / "x.tif", counts(2 if names is None else len(names)), names)
    with pytest.raises(ImageError, match=message) as caught:
        read_image(path, Rendering(requested, values="raw"))
    assert "\n" not in str(caught.value)


def test_what_stac_states_counts_where_the_file_states_nothing(tmp_path):
    values = counts(2)
    stated = (BandInfo(("B04", "red"), 1e-4, -0.1), BandInfo(("B08", "nir"), 1e-4, -0.1))
    path = write_tiff(tmp_path / "x.tif", values)
    got = read_image(path, Rendering(("nir", "red"), values="reflectance"), stated=stated)
    np.testing.assert_allclose(got, np.moveaxis(values[::-1], 0, -1) * 1e-4 - 0.1, atol=1e-6)
    tagged = write_tiff(tmp_path / "y.tif", values, scales=(1e-3, 1e-3))
    got = read_image(tagged, Rendering(("red", "nir"), values="reflectance"), stated=stated)
    np.testing.assert_allclose(got, np.moveaxis(values, 0, -1) * 1e-3, rtol=1e-6)
    with pytest.raises(ImageError, match="are names, and the bands of this file have none"):
        read_image(path, Rendering(("red",), values="reflectance"), stated=stated[:1])


# Patch folders


def test_a_patch_folder_as_reflectance(tmp_path):
    stored = write_patch(tmp_path / "patch")
    got = read_image(tmp_path / "patch", Rendering(("B04", "nir08", "B02", "swir16"), values="reflectance"))
    assert got.dtype == np.float32
    for channel, name in enumerate(("B04", "B8A", "B02")):
        np.testing.assert_allclose(got[..., channel], stored[name] * 1e-4, rtol=1e-6)
    coarse = np.asarray(Image.fromarray(stored["B11"] * np.float32(1e-4)).resize((SIDE, SIDE), Image.BILINEAR))
    np.testing.assert_allclose(got[..., 3], coarse, rtol=1e-5)
    scaled = Rendering(("B02", "B11"), values="raw", band_scale=(1, 2))
    np.testing.assert_allclose(read_image(tmp_path / "patch", scaled)[..., 1], coarse * 2e4, rtol=1e-5)


METADATA = """<n1:Level-2A_User_Product xmlns:n1="https://psd-14.sentinel2.eo.esa.int/"><n1:General_Info>
<QUANTIFICATION_VALUES_LIST><BOA_QUANTIFICATION_VALUE unit="none">{divisor}</BOA_QUANTIFICATION_VALUE>
<AOT_QUANTIFICATION_VALUE unit="none">1000.0</AOT_QUANTIFICATION_VALUE></QUANTIFICATION_VALUES_LIST>
<BOA_ADD_OFFSET_VALUES_LIST>{offsets}</BOA_ADD_OFFSET_VALUES_LIST></n1:General_Info></n1:Level-2A_User_Product>"""


def write_metadata(folder, offsets, divisor="10000"):
    listed = "".join(f'<BOA_ADD_OFFSET band_id="{band}">{value}</BOA_ADD_OFFSET>' for band, value in offsets.items())
    (folder / "MTD_MSIL2A.xml").write_text(METADATA.format(divisor=divisor, offsets=listed))


def reflectance_of(folder):
    """Scale and offset with which B02 and B8A of a patch were read."""
    stored = write_patch(folder)
    found = {}
    for channel, name in enumerate(("B02", "B8A")):
        got = read_image(folder, Rendering(("B02", "B8A"), values="reflectance"))[..., channel]
        scale, offset = np.polyfit(stored[name].ravel().astype(float), got.ravel().astype(float), 1)
        found[name] = round(scale, 9), round(offset, 5)
    assert found["B02"][0] == found["B8A"][0]
    return found["B02"][0], found["B02"][1], found["B8A"][1]


OLD, NEW = (1e-4, 0, 0), (1e-4, -0.1, -0.1)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("patch", OLD),
        ("S2A_MSIL2A_20170613T101031_87_48", OLD),
        ("S2A_MSIL2A_20210613T101031_N0300_R022_T33UUP_20210613T101031_1_2", OLD),
        ("S2B_MSIL2A_20220613T101031_N0400_R022_T33UUP_20220613T101031", NEW),
        ("S2C_MSIL1C_20250613T101031_N0511_R022_T33UUP_20250613T101031_1_2", NEW),
        # Products that users processed, as in BigEarthNet version 2, say nothing.
        ("S2A_MSIL2A_20170613T101031_N9999_R022_T33UUP_26_57", OLD),
        ("S2B_MSIL2A_20220613T101031_N0510_R022_T33UUP_20220613T101031.SAFE/GRANULE/L2A/patch", NEW),
        ("S2A_MSIL2A_20210613T101031_N0300_R022_T33UUP_20210613T101031.SAFE/GRANULE/L2A/patch", OLD),
    ],
)
def test_the_offset_of_baseline_4_by_the_name_of_the_product(tmp_path, name, expected):
    assert reflectance_of(tmp_path / name) == expected


@pytest.mark.parametrize("place", [".", "patch", "product.SAFE"])
def test_the_offset_of_the_metadata_beside_a_patch(tmp_path, place):
    """Metadata are stronger than the name. Band 8 of the list is B8A."""
    name = "S2B_MSIL2A_20220613T101031_N0400_R022_T33UUP_20220613T101031"
    folder = tmp_path / {".": name, "patch": f"scene/{name}", "product.SAFE": f"product.SAFE/GRANULE/a/{name}"}[place]
    at = {".": folder, "patch": folder.parent, "product.SAFE": tmp_path / "product.SAFE"}[place]
    at.mkdir(parents=True, exist_ok=True)
    write_metadata(at, {1: -1000, 8: -500})
    assert reflectance_of(folder) == (1e-4, -0.1, -0.05)


def test_metadata_without_offsets_are_of_an_older_baseline(tmp_path):
    write_metadata(tmp_path, {}, divisor="1000")
    assert reflectance_of(tmp_path / "patch") == (1e-3, 0, 0)


@pytest.mark.parametrize(
    "text", ["", "<a>", "<a><BOA_ADD_OFFSET>1</BOA_ADD_OFFSET></a>", METADATA.format(divisor="0", offsets="")]
)
def test_damaged_metadata_refuse_the_patch(tmp_path, text):
    write_patch(tmp_path / "patch")
    (tmp_path / "patch" / "MTD_MSIL2A.xml").write_text(text)
    with pytest.raises(ImageError, match=r"MTD_MSIL2A\.xml: the offset of reflectance cannot be read"):
        read_image(tmp_path / "patch", Rendering(("B02", "B04"), values="reflectance"))
    # Other kinds of values do not need them.
    read_image(tmp_path / "patch", Rendering(("B02", "B04"), values="raw"))


# Tiles and thumbnails


def test_tiles_of_numbers_are_windows_of_the_scene(tmp_path):
    values = counts(5).repeat(3, axis=1).repeat(3, axis=2)
    path = write_tiff(tmp_path / "scene.tif", values)
    rendering = Rendering((1, 2, 3, 4, 5), values="reflectance")
    for col, row, width, height in plan_tiles(path, 32):
        got = read_tile(path, (col, row, width, height), rendering)
        expected = np.moveaxis(values[:, row : row + height, col : col + width], 0, -1) * 1e-4
        np.testing.assert_allclose(got, expected, rtol=1e-6)
        item = Item("tile", str(path), window=(col, row, width, height))
        record = read_record(item, Preprocessing(rendering, 32, 32))
        np.testing.assert_array_equal(record.pixels, got)


def test_people_see_a_picture_of_numbers(tmp_path):
    values = RNG.normal(-12, 4, (2, SIDE, SIDE)).astype(np.float32)
    values[0, :4] = np.nan
    path = write_tiff(tmp_path / "x.tif", values)
    rendering = Rendering((1, 2), "range:-30:0", values="decibel")
    picture = rendering.picture(read_image(path, rendering))
    assert (picture.dtype, picture.shape) == (np.uint8, (SIDE, SIDE, 3))
    expected = np.nan_to_num(np.clip((values[0] + 30) / 30, 0, 1) * 255)
    for channel in range(3):
        assert np.abs(picture[..., channel] - expected).max() < 0.51
    record = read_record(Item("x", str(path)), Preprocessing(rendering, SIDE, SIDE))
    assert record.thumbnail.startswith(b"\xff\xd8\xff")
    assert (rendering.picture(np.full((SIDE, SIDE, 2), np.nan, np.float32)) == 0).all()
    named = Rendering(("B2", "B3", "B4", "B8"), values="reflectance")
    image = RNG.uniform(size=(SIDE, SIDE, 4)).astype(np.float32)
    np.testing.assert_array_equal(
        named.picture(image), Rendering(values="reflectance").picture(np.ascontiguousarray(image[..., [2, 1, 0]]))
    )


# Hostile input


def write_complex(path):
    write_tiff(path, np.ones((2, SIDE, SIDE), np.complex64))


@pytest.mark.parametrize(
    ("write", "values", "message"),
    [
        (write_complex, "raw", "values of type complex64; integers and floating-point numbers are allowed"),
        (lambda path: write_tiff(path, counts(1)), "raw", "no band 2; the image has 1"),
        (lambda path: write_tiff(path, counts() * 0, nodata=0), "reflectance", "no valid data"),
        (lambda path: write_tiff(path, counts() * np.float32(np.nan)), "raw", "no valid data"),
        (lambda path: write_tiff(path, np.full((2, SIDE, SIDE), 1e300)), "raw", "no valid data"),
        (lambda path: write_tiff(path, np.zeros((2, SIDE, SIDE), np.float32)), "power", "no valid data"),
        (lambda path: write_tiff(path, counts().astype(np.uint8)), "reflectance", "uint8 without a scale is no refl"),
        (lambda path: write_tiff(path, counts(), scales=(0.0, 1.0)), "reflectance", "metadata state the scale 0;"),
        (lambda path: write_tiff(path, counts(), offsets=(np.inf, 1)), "reflectance", "metadata state the offset inf"),
    ],
)
def test_files_that_cannot_become_numbers(tmp_path, write, values, message):
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        write(tmp_path / "x.tif")
        with pytest.raises(ImageError, match=message) as caught:
            read_image(tmp_path / "x.tif", Rendering((1, 2), values=values))
    assert "\n" not in str(caught.value)


def test_huge_values_and_constant_bands_are_numbers(tmp_path):
    values = np.full((3, SIDE, SIDE), 7.5)
    values[0, :2], values[0, 2], values[1] = 1e39, -1e308, np.finfo(np.float64).max
    got = read_image(write_tiff(tmp_path / "x.tif", values), Rendering((1, 2, 3), values="raw"))
    assert np.isnan(got[:3, :, 0]).all()
    assert np.isnan(got[..., 1]).all()
    assert (got[3:, :, 0] == 7.5).all()
    assert (got[..., 2] == 7.5).all()


def test_the_size_as_numbers_is_limited(tmp_path):
    values = RNG.integers(0, 2, (1, 64, 64)).astype(np.uint8)
    path = write_tiff(tmp_path / "x.tif", values)
    limits = Limits(max_decoded_bytes=64 * 64 * 60)
    read_image(path, Rendering((1,) * 10, values="raw"), limits)
    with pytest.raises(ImageError, match="11 bands of 4,096 pixels decode to 270,336 bytes as numbers; at most"):
        read_image(path, Rendering((1,) * 11, values="raw"), limits)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"values": "radiance"}, "values is 'radiance'; allowed are picture, raw, reflectance, decibel, power"),
        ({"band_scale": (2.0,)}, "band_scale given, and values is picture; set values to raw, reflectance"),
        ({"band_scale": (1, 2), "bands": (1, 2, 3), "values": "raw"}, "band_scale has 2 numbers; 1 or 3"),
        ({"band_scale": (0.0,), "values": "raw"}, r"band_scale is \[0.0\]; finite numbers other than 0"),
        ({"band_offset": (np.nan,), "values": "raw"}, r"band_offset is \[nan\]; finite numbers are"),
    ],
)
def test_wrong_renderings_are_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Rendering(**fields)


def test_a_rendering_of_numbers_survives_json():
    rendering = Rendering(("B02", "B03"), "range:0:1", "reflectance", (1e-4, 2e-4), (-0.1,))
    assert Rendering.from_json(rendering.to_json()) == rendering
    preprocessing = Preprocessing(rendering, 32, 24, (0.1, 0.2), (0.3, 0.4), 4, "bicubic")
    assert Preprocessing.from_json(preprocessing.to_json()) == preprocessing
    assert (preprocessing.dtype, preprocessing.num_bytes) == ("float32", 24 * 24 * 2 * 4)
    with pytest.raises(InputError, match="interpolation 'nearest'; bilinear, bicubic are allowed"):
        Preprocessing(rendering, 32, 24, interpolation="nearest")
    with pytest.raises(InputError, match=r"an image is float32 .*, got uint8"):
        preprocessing.prepare(np.zeros((30, 30, 2), np.uint8))


def test_alpha_is_no_band(tmp_path):
    values = counts(4)
    values[3] = 65535
    with rasterio.open(
        tmp_path / "x.tif", "w", driver="GTiff", count=4, height=SIDE, width=SIDE, dtype="uint16"
    ) as dataset:
        dataset.colorinterp = [ColorInterp.red, ColorInterp.green, ColorInterp.blue, ColorInterp.alpha]
        dataset.write(values)
    got = read_image(tmp_path / "x.tif", Rendering(values="reflectance"))
    np.testing.assert_allclose(got, np.moveaxis(values[:3], 0, -1) * 1e-4, rtol=1e-6)
