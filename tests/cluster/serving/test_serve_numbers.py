"""Twelve bands as numbers: from files and patch folders to a trained model, an archive, a gateway and its answers."""

import json
import warnings

import numpy as np
import pytest
import rasterio
import yaml
from rasterio.transform import from_origin
from serving_parts import ready_at

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel
from orbithash.search.client.client import Client
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.trainers.library import evaluate, train

BANDS = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
SIDE = 40
# Stored numbers of B11, the only band in which the classes differ. A stretch of each image would remove the difference.
LEVELS = {"bare": 4500, "water": 400}


def write(path, values, names=BANDS, **options):
    count, height, width = values.shape
    place = {"crs": "EPSG:32633", "transform": from_origin(4e5, 5.8e6, 400 / width, 400 / height)}
    shape = {"count": count, "height": height, "width": width, "dtype": values.dtype}
    with rasterio.open(path, "w", driver="GTiff", **shape, **place, **options) as dataset:
        dataset.write(values)
        dataset.descriptions = names


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("twelve") / "images"
    rng = np.random.default_rng(0)
    for name, level in LEVELS.items():
        (root / name).mkdir(parents=True)
        for number in range(14):
            values = rng.normal(2000, 300, (12, SIDE, SIDE))
            values[10] += level - 2000
            values = values.clip(1, 10_000).astype(np.uint16)
            # Pixels at the edge of a swath.
            values[:, :5, :7] = 0
            write(root / name / f"{name}{number}.tif", values, nodata=0)
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    settings = {"backbone": "resnet8", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 4, "lr": 3e-3}
    train("classifier", images, folder, bands=BANDS, values="reflectance", **settings)
    return folder


@pytest.fixture(scope="module")
def archive(run, images, ray_cluster, tmp_path_factory):
    from orbithash.cluster.encoding.encode import Workers, encode

    folder = tmp_path_factory.mktemp("archives") / "archive"
    (images / "bare" / "damaged.tif").write_bytes(b"II*\0")
    write(images / "bare" / "rgb.tif", np.ones((3, SIDE, SIDE), np.uint16), ("B04", "B03", "B02"))
    write(images / "bare" / "empty.tif", np.zeros((12, SIDE, SIDE), np.uint16), nodata=0)
    encode(str(images), run / "model", str(folder), Workers(1, 1))
    return folder


def stored_codes(archive):
    opened = Archive.open(archive)
    ids, codes = opened.codes()
    return dict(zip(opened.take(ids, ["key"])["key"].to_pylist(), codes, strict=True))


def read_alone(path):
    """Reflectance by rasterio alone; the mask of the file is NaN."""
    with rasterio.open(path) as dataset:
        values = dataset.read(masked=True).astype(np.float64) / 10_000
    return np.moveaxis(values.filled(np.nan), 0, -1).astype(np.float32)


def test_training_computes_the_statistics_of_reflectance(run, images):
    model = HashModel.load(run / "model")
    assert (model.preprocessing.dtype, model.card.network.channels) == ("float32", 12)
    settings = yaml.safe_load((run / "config.yaml").read_text())
    assert settings["band_mean"] == list(model.preprocessing.mean)
    assert settings["band_std"] == list(model.preprocessing.std)
    np.testing.assert_allclose(np.delete(model.preprocessing.mean, 10), 0.2, atol=0.002)
    assert 0.15 < model.preprocessing.std[10] < 0.25
    pixels = np.stack([model.preprocessing.prepare(read_alone(path)) for path in sorted(images.glob("*/*1?.tif"))])
    network_input = model.normalise(pixels).numpy()
    assert (network_input[:, :, 0, 0] == 0).all(), "masked pixels are the mean of their band"
    assert np.abs(network_input.mean(axis=(0, 2, 3))).max() < 0.3
    metrics = evaluate(run, images, cutoffs=[5])["metrics"]
    assert metrics["ap_min@5"]["expected"] > 0.9, "the classes differ in the level of one band only"


@pytest.mark.ray
def test_codes_are_those_of_reflectance_read_alone(run, images, archive):
    model = HashModel.load(run / "model")
    codes = stored_codes(archive)
    assert len(codes) == 28
    for key, code in codes.items():
        np.testing.assert_array_equal(model.encode([read_alone(images / key)])[0], code)
    assert Archive.open(archive).refused() == {
        "bare/damaged.tif": Archive.open(archive).refused()["bare/damaged.tif"],
        "bare/empty.tif": "no valid data",
        "bare/rgb.tif": "no band B01, B05, B06, B07, B08, B8A, B09, B11, B12; the bands are B04, B03, B02",
    }


@pytest.mark.ray
def test_an_uploaded_image_of_twelve_bands_finds_itself(run, images, archive, start, tmp_path):
    model = HashModel.load(run / "model")
    process = start("serve", archive, "--model", run / "model", "--local", "--address", "127.0.0.1:0")
    codes = stored_codes(archive)
    with Client(ready_at(process)) as client:
        for key in sorted(codes)[::9]:
            by_image = client.search(image=images / key, k=28)
            by_code = client.search(code=bytes(codes[key]), k=28)
            assert [(hit.id, hit.distance) for hit in by_image.hits] == [(hit.id, hit.distance) for hit in by_code.hits]
            assert {hit.label for hit in by_image.hits[:5]} == {key.partition("/")[0]}
        # As float32 reflectance in another order of bands it is the same image.
        values = read_alone(images / sorted(codes)[0])
        write(tmp_path / "turned.tif", np.moveaxis(values[..., ::-1], -1, 0), BANDS[::-1])
        turned = client.search(image=tmp_path / "turned.tif", k=1)
        assert turned.hits[0].distance == 0
        for path, words in (("rgb", "no band B01"), ("empty", "no valid data")):
            with pytest.raises(InvalidQuery, match=words):
                client.search(image=images / "bare" / f"{path}.tif")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            write(tmp_path / "complex.tif", np.ones((12, SIDE, SIDE), np.complex64))
        with pytest.raises(InvalidQuery, match="complex64"):
            client.search(image=tmp_path / "complex.tif")
    assert model.preprocessing.rendering.bands == BANDS


SIDES = dict.fromkeys(("B01", "B09"), 20) | dict.fromkeys(("B05", "B06", "B07", "B8A", "B11", "B12"), 60)


@pytest.fixture(scope="module")
def patches(tmp_path_factory):
    """Pairs in the layout of BigEarthNet: Sentinel-2 in twelve bands of 10, 20 and 60 m, Sentinel-1 in decibels."""
    root = tmp_path_factory.mktemp("patches") / "data"
    rng = np.random.default_rng(1)
    for number in range(16):
        name, label = f"S2A_MSIL2A_20170613T101031_{number}_1", ("bare", "water")[number % 2]
        optical, radar = root / "S2" / name, root / "S1" / f"S1A_{number}"
        described = {"labels": [label], "corresponding_s2_patch": name}
        for folder in (optical, radar):
            folder.mkdir(parents=True)
            (folder / f"{folder.name}_labels_metadata.json").write_text(json.dumps(described))
        for band in BANDS:
            side = SIDES.get(band, 120)
            values = rng.normal(LEVELS[label] if band == "B11" else 2000, 200, (1, side, side)).clip(1, 10_000)
            write(optical / f"{name}_{band}.tif", values.astype(np.uint16), (None,))
        for band, level in (("VV", -11), ("VH", -18)):
            values = rng.normal(level, 2, (1, 120, 120)).astype(np.float32)
            write(radar / f"{radar.name}_{band}.tif", values, (None,))
    return root


SMALL = {"backbone": "resnet8", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 1}


def test_patch_folders_train_and_encode(patches, tmp_path):
    """A folder has the code of its bands stacked into one GeoTIFF of float32."""
    model = train("classifier", patches, tmp_path / "run", bands=BANDS, values="reflectance", **SMALL)
    mean = dict(zip(BANDS, model.preprocessing.mean, strict=True))
    assert mean.pop("B11") == pytest.approx(0.245, abs=0.07)
    np.testing.assert_allclose(list(mean.values()), 0.2, atol=0.005)
    folders = sorted((patches / "S2").iterdir())
    codes = model.encode_files(folders)
    assert len(np.unique(codes, axis=0)) > 1
    stacked = [tmp_path / f"{folder.name}.tif" for folder in folders]
    for folder, path in zip(folders, stacked, strict=True):
        image = read_image(folder, model.preprocessing.rendering)
        assert image.shape == (120, 120, 12)
        write(path, np.moveaxis(image, -1, 0))
    np.testing.assert_array_equal(model.encode_files(stacked), codes)


def test_two_sources_each_in_its_unit(patches, tmp_path):
    settings = {"num_clusters": 2, "num_latents": 4, "autoencoder_epochs": 2, "hidden": (8,)}
    units = {"values": "reflectance", "second_values": "decibel", "second_bands": ("VV", "VH")}
    model = train("mrhash", patches, tmp_path / "run", bands=BANDS, **units, **SMALL, **settings)
    assert model.preprocessing.rendering.values == "reflectance"
    given = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    np.testing.assert_allclose(given["second_band_mean"], [-11, -18], atol=0.1)
    assert given["band_mean"] == list(model.preprocessing.mean)
    # The same command again finds the complete run: the statistics are the same.
    again = train("mrhash", patches, tmp_path / "run", bands=BANDS, **units, **SMALL, **settings)
    assert again.model_id == model.model_id
