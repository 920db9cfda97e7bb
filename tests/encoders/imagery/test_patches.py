"""Patch folders (one TIFF per band), and images of one to many bands, from the file to the code."""

import warnings

import numpy as np
import pytest
import rasterio
import torch
from rasterio.transform import from_origin
from safetensors.torch import save_file

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.encoders.imagery.images import Limits, Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import Item, list_source

SENTINEL_2 = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
SIDE = 24
# Size of the pixels of each band, as a multiple of the finest.
COARSER = {"B05": 2, "B01": 6}


def write_band(path, values, west=400_000, **options):
    count, height, width = values.shape
    place = {"crs": "EPSG:32633", "transform": from_origin(west, 5_800_000, 240 / width, 240 / height)}
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **{**place, **options}) as dataset:
        dataset.write(values)


def write_patch(folder, bands=("B01", "B02", "B03", "B04", "B05"), dtype=np.uint16, **options):
    """Write a patch of 240 x 240 m; return the values of its bands."""
    folder.mkdir()
    values = {}
    for seed, name in enumerate(bands):
        side = SIDE // COARSER.get(name, 1)
        values[name] = np.random.default_rng(seed).integers(0, 3000, (side, side)).astype(dtype)
        write_band(folder / f"S2A_1_2_{name}.tif", values[name][None], **options)
    (folder / "S2A_1_2_labels_metadata.json").write_text("{}")
    return values


def slow_bilinear(values, factor):
    """Interpolate each fine pixel from the four coarse pixels around its centre; edge pixels extend outwards."""
    height, width = values.shape
    fine = np.empty((height * factor, width * factor))
    for row, col in np.ndindex(fine.shape):
        y, x = (row + 0.5) / factor - 0.5, (col + 0.5) / factor - 0.5
        top, left = int(np.floor(y)), int(np.floor(x))
        fine[row, col] = sum(
            float(values[min(max(top + i, 0), height - 1), min(max(left + j, 0), width - 1)])
            * (y - top if i else 1 - y + top)
            * (x - left if j else 1 - x + left)
            for i in (0, 1)
            for j in (0, 1)
        )
    return fine


# Reading


def test_coarser_bands_are_resampled_to_the_finest_chosen_band(tmp_path):
    values = write_patch(tmp_path / "patch")
    got = read_image(tmp_path / "patch", Rendering(("B05", "B02", "B01"), "range:0:3000"))
    assert (got.shape, got.dtype) == ((SIDE, SIDE, 3), np.uint8)
    for channel, name in enumerate(("B05", "B02", "B01")):
        expected = slow_bilinear(values[name], COARSER.get(name, 1)) / 3000 * 255
        # GDAL rounds interpolated values to integers.
        assert np.abs(got[..., channel] - expected).max() <= 0.5 + 0.5 / 3000 * 255 + 0.01
    with pytest.raises(ImageError, match="4 x 4 pixels; at least"):
        read_image(tmp_path / "patch", Rendering(("B01",)))
    alone = read_image(tmp_path / "patch", Rendering(("B05",), "range:0:3000"), Limits(min_side=4))
    assert alone.shape == (SIDE // 2, SIDE // 2, 3), "the finest of the chosen bands"


def test_the_chosen_bands_are_read_in_their_order(tmp_path):
    values = write_patch(tmp_path / "patch", dtype=np.uint8)
    got = read_image(tmp_path / "patch", Rendering(("B03", "B02", "B04", "B02")))
    np.testing.assert_array_equal(got, np.stack([values[name] for name in ("B03", "B02", "B04", "B02")], axis=2))
    grey = read_image(tmp_path / "patch", Rendering(("B02",)))
    np.testing.assert_array_equal(grey, np.stack([values["B02"]] * 3, axis=2))


@pytest.mark.parametrize(
    ("bands", "rgb"), [(("B02", "B03", "B04", "B08"), ("B04", "B03", "B02")), (("VH", "VV"), ("VV", "VH", "VV"))]
)
def test_default_bands(tmp_path, bands, rgb):
    values = write_patch(tmp_path / "patch", bands)
    got = read_image(tmp_path / "patch")
    np.testing.assert_array_equal(got, read_image(tmp_path / "patch", Rendering(rgb)))
    for channel, name in enumerate(rgb):
        low, high = np.percentile(values[name], [2, 98])
        expected = np.clip((values[name] - low) / (high - low), 0, 1) * 255
        assert np.abs(got[..., channel] - expected).max() < 0.51


def test_invalid_pixels_are_black_and_do_not_spread(tmp_path):
    values = np.full((1, SIDE, SIDE), 1000, np.uint16)
    coarse = np.full((1, SIDE // 2, SIDE // 2), 2000, np.uint16)
    coarse[0, :4] = 65535
    (tmp_path / "patch").mkdir()
    write_band(tmp_path / "patch" / "x_A.tif", values)
    write_band(tmp_path / "patch" / "x_B.tif", coarse, nodata=65535)
    got = read_image(tmp_path / "patch", Rendering(("A", "B"), "range:0:2000"))
    assert (got[..., 0] == 128).all()
    assert (got[:8, :, 1] == 0).all()
    assert (got[8:, :, 1] == 255).all()
    write_band(tmp_path / "patch" / "x_A.tif", np.zeros_like(values), nodata=0)
    with pytest.raises(ImageError, match="no valid data"):
        read_image(tmp_path / "patch", Rendering(("A",)))


def truncate(path):
    path.write_bytes(path.read_bytes()[:-200])


def write_noise(path):
    path.write_bytes(b"no image")


def write_three(path):
    write_band(path, np.zeros((3, SIDE, SIDE), np.uint16))


def write_odd(path):
    write_band(path, np.ones((1, 16, SIDE), np.uint16))


def write_elsewhere(path):
    write_band(path, np.ones((1, SIDE, SIDE), np.uint16), west=400_240)


def write_larger(path):
    write_band(path, np.ones((1, 7000, 8000), np.uint8), compress="deflate")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda path: path.unlink(), "no band B03; the bands are B01, B02, B04, B05"),
        (truncate, "band B03: damaged or truncated"),
        (write_noise, "band B03: not a JPEG, PNG.* begins with b'no image'"),
        (lambda path: path.write_bytes(b""), "band B03: the file is empty"),
        (write_three, "band B03: its file has 3 bands; one is required"),
        (write_odd, "band B03: 24 x 16 pixels do not divide the 24 x 24 of band B02"),
        (write_elsewhere, "band B03: its place differs from that of band B02"),
        (write_larger, "8000 x 7000 pixels; at most 50,000,000 in all"),
        (lambda path: path.rename(path.with_name("other_B02.tif")), "band B02 occurs twice: S2A_1_2_B02.tif and"),
    ],
)
def test_a_band_that_is_missing_or_damaged_is_named(tmp_path, damage, message):
    write_patch(tmp_path / "patch")
    damage(tmp_path / "patch" / "S2A_1_2_B03.tif")
    bands = Rendering(("B02", "B03"))
    with pytest.raises(ImageError, match=message) as caught:
        read_image(tmp_path / "patch", bands)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value), "the caller knows the path"
    if "twice" not in message:
        assert read_image(tmp_path / "patch", Rendering(("B02", "B04"))).shape == (SIDE, SIDE, 2), "not opened"


def test_all_bands_are_within_the_limits_together(tmp_path):
    write_patch(tmp_path / "patch")
    bands = Rendering(("B02", "B03", "B04"))
    sizes = [(tmp_path / "patch" / f"S2A_1_2_{name}.tif").stat().st_size for name in bands.bands]
    read_image(tmp_path / "patch", bands, Limits(max_bytes=sum(sizes), max_decoded_bytes=SIDE * SIDE * 27))
    with pytest.raises(ImageError, match="band B04: more than"):
        read_image(tmp_path / "patch", bands, Limits(max_bytes=sum(sizes) - 1))
    with pytest.raises(ImageError, match="3 bands of 24 x 24 pixels decode to 15,552 bytes"):
        read_image(tmp_path / "patch", bands, Limits(max_decoded_bytes=SIDE * SIDE * 27 - 1))


def test_names_belong_to_folders_and_numbers_to_files(tmp_path):
    write_patch(tmp_path / "patch")
    with pytest.raises(ImageError, match="bands of a folder have names, not numbers: B01, B02"):
        read_image(tmp_path / "patch", Rendering((1, 2)))
    with pytest.raises(ImageError, match="bands B02,B03 are names, and the bands of this file have none"):
        read_image(tmp_path / "patch" / "S2A_1_2_B02.tif", Rendering(("B02", "B03")))
    write_patch(tmp_path / "other", ("B5", "B6"))
    with pytest.raises(ImageError, match="no known RGB among the bands B5, B6; state the bands to show by name"):
        read_image(tmp_path / "other")


def test_hidden_files_and_other_files_are_not_bands(tmp_path):
    values = write_patch(tmp_path / "patch", ("B02",), np.uint8)
    (tmp_path / "patch" / "._S2A_1_2_B02.tif").write_bytes(b"a desktop's notes")
    (tmp_path / "patch" / "S2A_1_2_B03.jpg").write_bytes(b"x")
    (tmp_path / "patch" / "overview.tif").write_bytes(b"x")
    np.testing.assert_array_equal(read_image(tmp_path / "patch", Rendering(("B02",)))[..., 0], values["B02"])


@pytest.mark.parametrize(
    ("bands", "shown"),
    [
        (None, (0, 1, 2)),
        ((5, 1, 2), (0, 1, 2)),
        ((2, 1), (0, 0, 0)),
        ((3, 2, 1, 4), (0, 1, 2)),
        (SENTINEL_2, (3, 2, 1)),
        (("VH", "VV"), (1, 0, 1)),
    ],
)
def test_pictures_of_any_number_of_bands(bands, shown):
    rendering = Rendering(bands)
    image = np.random.default_rng(0).integers(0, 256, (20, 30, rendering.channels), np.uint8)
    np.testing.assert_array_equal(rendering.picture(image), np.stack([image[..., band] for band in shown], axis=2))


# Networks


@pytest.mark.parametrize(("name", "channels"), [("resnet18", 2), ("mobilenet_v3_small", 13), ("alexnet", 4)])
def test_equal_bands_have_the_features_of_a_grey_image(name, channels, tmp_path):
    """All bands beyond three together weigh as much as one colour."""
    import torchvision

    torch.manual_seed(0)
    save_file(torchvision.models.get_model(name, weights=None).state_dict(), tmp_path / "weights.safetensors")
    weights = str(tmp_path / "weights.safetensors")
    grey = torch.randn(2, 1, 64, 64)
    with torch.no_grad():
        brightness = 1 if channels <= 3 else 4 / 3
        expected = build_backbone(name, weights).eval()(brightness * grey.expand(-1, 3, -1, -1))
        backbone = build_backbone(name, weights, channels=channels).eval()
        found = backbone(grey.expand(-1, channels, -1, -1))
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2", "efficientnet_b0", "alexnet"])
def test_random_weights_differ_between_bands(name):
    torch.manual_seed(0)
    backbone = build_backbone(name, channels=4).eval()
    images = torch.zeros(4, 4, 64, 64)
    for band in range(4):
        images[band, band] = 1
    with torch.no_grad():
        features = backbone(images)
    assert features.isfinite().all()
    assert len({tuple(row.flatten().tolist()) for row in features}) == 4


# From the file to the code


def make_model(rendering, channels, side=32):
    torch.manual_seed(0)
    network = HashNetwork(build_backbone("mobilenet_v3_small", channels=channels), HeadSpec(20))
    card = ModelCard(
        method="dhcl",
        network=network.spec,
        thresholds=(0.0,) * 20,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(rendering, side, side),
        classes=(),
        dataset={},
        metrics={},
    )
    return HashModel(card, network)


def test_a_file_of_13_bands_from_disk_to_code(tmp_path):
    values = np.random.default_rng(0).integers(0, 4000, (13, 64, 64)).astype(np.uint16)
    values[10] = 0
    path = tmp_path / "Forest_1.tif"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        write_band(path, values)
    rendering = Rendering(tuple(range(1, 14)))
    image = read_image(path, rendering)
    assert image.shape == (64, 64, 13)
    for band in range(13):
        np.testing.assert_array_equal(image[..., band], read_image(path, Rendering((band + 1,)))[..., 0])
    model = make_model(rendering, 13)
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    assert loaded.preprocessing == model.preprocessing
    record = read_record(Item("a", str(path)), loaded.preprocessing)
    np.testing.assert_array_equal(record.pixels, loaded.preprocessing.prepare(image))
    code = loaded.encode([image])
    np.testing.assert_array_equal(loaded.encode_prepared(record.pixels[None]), code)
    np.testing.assert_array_equal(model.encode([image]), code)
    normalised = (record.pixels.astype(np.float64) / 255 - 0.5) / 0.25
    assert np.abs(loaded.normalise(record.pixels[None]).numpy()[0] - normalised.transpose(2, 0, 1)).max() < 1e-5
    with torch.no_grad():
        hashes = loaded.network(torch.from_numpy(normalised.transpose(2, 0, 1)[None].astype(np.float32))).hashes
    np.testing.assert_array_equal(np.packbits(hashes.numpy() >= 0, axis=1), code)
    tile = read_record(Item("a#0,0,40,40", str(path), window=(0, 0, 40, 40)), loaded.preprocessing)
    assert tile.pixels.shape == (32, 32, 13)
    for wrong in (image[..., :3], image[..., :12]):
        with pytest.raises(InputError, match=r"uint8 \[H, W, 13\]"):
            loaded.encode([np.ascontiguousarray(wrong)])


def test_a_list_of_patch_folders_is_encoded_with_its_places(tmp_path):
    write_patch(tmp_path / "patch")
    (tmp_path / "list.txt").write_text("patch\n")
    (item,) = list_source(tmp_path / "list.txt")
    rendering = Rendering(("B02", "B03", "B05", "B04"), "range:0:3000")
    record = read_record(item, Preprocessing(rendering, 32, 32))
    image = read_image(tmp_path / "patch", rendering)
    np.testing.assert_array_equal(record.pixels, Preprocessing(rendering, 32, 32).prepare(image))
    place = read_georeference(tmp_path / "patch" / "S2A_1_2_B02.tif")
    assert (record.lon, record.lat) == pytest.approx((place.lon, place.lat))
    assert record.thumbnail.startswith(b"\xff\xd8")


def test_a_network_and_its_preprocessing_need_the_same_number_of_bands():
    with pytest.raises(InputError, match="the network takes 3 bands, but preprocessing returns 4"):
        make_model(Rendering((1, 2, 3, 4)), 3)
    with pytest.raises(InputError, match="channels is 1; 2 or more is allowed"):
        build_backbone("resnet18", channels=1)


def test_bands_are_resampled_independently():
    image = np.random.default_rng(0).integers(0, 256, (50, 61, 6), np.uint8)
    found = Preprocessing(Rendering((1, 2, 3, 4, 5, 6)), 40, 32).prepare(image)
    for start in (0, 3):
        three = Preprocessing(Rendering(), 40, 32).prepare(np.ascontiguousarray(image[..., start : start + 3]))
        np.testing.assert_array_equal(found[..., start : start + 3], three)


# Real patches


def test_real_bigearthnet_patches(shared):
    sample = shared / "data" / "bigearthnet_sample"
    for patch in sorted(sample.glob("BigEarthNet-S2-Example/*")):
        values = {}
        for name in ("B04", "B08", "B05", "B01"):
            with rasterio.open(patch / f"{patch.name}_{name}.tif") as dataset:
                values[name] = dataset.read(1)
        rgb = read_image(patch)
        assert rgb.shape == (120, 120, 3)
        whole = read_image(patch, Rendering(SENTINEL_2, "range:0:10000"))
        assert whole.shape == (120, 120, 12)
        for name, factor in (("B04", 1), ("B08", 1), ("B05", 2), ("B01", 6)):
            expected = np.clip(slow_bilinear(values[name], factor) / 10000, 0, 1) * 255
            assert np.abs(whole[..., SENTINEL_2.index(name)] - expected).max() < 0.53
    for patch in sorted(sample.glob("BigEarthNet-S1-Example/*")):
        with rasterio.open(patch / f"{patch.name}_VV.tif") as dataset:
            decibels = dataset.read(1)
        got = read_image(patch, Rendering(stretch="range:-25:5"))
        assert np.abs(got[..., 0] - np.clip((decibels + 25) / 30, 0, 1) * 255).max() < 0.51
        np.testing.assert_array_equal(got[..., 2], got[..., 0])
        assert read_image(patch, Rendering(("VV", "VH"))).shape == (120, 120, 2)
