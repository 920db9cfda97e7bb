"""Numbers in training: loading, views, settings, the first layer of pretrained networks, batches of every size."""

import dataclasses
import hashlib

import numpy as np
import pytest
import rasterio
import torch
import torchvision
from safetensors.torch import save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.reading import Normaliser
from orbithash.trainers.config import TrainConfig, load_config
from orbithash.trainers.data import loading
from orbithash.trainers.data.augmentation import Augmentation, augment
from orbithash.trainers.data.loading import (
    StreamedImages,
    fits_in_memory,
    load_images,
    views_of_steps,
)
from orbithash.trainers.datasets import Image, Images
from orbithash.trainers.features.features import FeatureExtractor
from orbithash.trainers.loop.run import make_run

SIDE = 32
BANDS = 5
NUMBERS = Preprocessing(
    Rendering((1, 2, 3, 4, 5), values="raw"), SIDE, SIDE, (0.3, 0.2, 0.1, -12, 5000), (0.1, 0.1, 0.2, 4, 900)
)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Two classes of float32 images with holes."""
    root = tmp_path_factory.mktemp("numbers")
    rng = np.random.default_rng(0)
    for name in ("a", "b"):
        (root / name).mkdir()
        for number in range(8):
            unit = rng.normal(size=(BANDS, 40, 40))
            values = unit * np.reshape(NUMBERS.std, (-1, 1, 1)) + np.reshape(NUMBERS.mean, (-1, 1, 1))
            values[:, 3:9, 5:8] = np.nan
            with rasterio.open(
                root / name / f"{number}.tif", "w", driver="GTiff", count=BANDS, height=40, width=40, dtype="float32"
            ) as dataset:
                dataset.write(values.astype(np.float32))
    return root


@pytest.fixture(scope="module")
def images(data):
    paths = [str(path.relative_to(data)) for path in sorted(data.glob("*/*.tif"))]
    hashes = [hashlib.sha256(path.encode()).hexdigest() for path in paths]
    return Images.of(Image(path, path, (), "train", sha256) for path, sha256 in zip(paths, hashes, strict=True))


def model_of(preprocessing):
    torch.manual_seed(1)
    network = HashNetwork(build_backbone("resnet8", channels=preprocessing.channels), HeadSpec(16))
    card = ModelCard("test", network.spec, (0.0,) * 16, "none", 1, preprocessing, (), {}, {})
    return HashModel(card, network)


def test_views_of_numbers_have_the_geometry_of_pictures():
    picture = np.random.default_rng(0).integers(0, 256, (40, 40, 4)).astype(np.uint8)
    for seed in range(8):
        view = augment(picture.astype(np.float32), 24, np.random.default_rng(seed))
        assert view.dtype == np.float32
        assert np.abs(view - augment(picture, 24, np.random.default_rng(seed))).max() < 1.3


def test_views_use_the_interpolation_of_the_settings():
    image = np.random.default_rng(0).normal(size=(40, 40, 4)).astype(np.float32)
    whole = Augmentation(min_crop_area=1)
    turned = augment(image, 24, np.random.default_rng(2), dataclasses.replace(whole, interpolation="bicubic"))
    other = augment(image, 24, np.random.default_rng(2), whole)
    assert not np.allclose(turned, other)


def test_streamed_numbers_are_those_in_memory(data, images):
    kept, streamed = load_images(data, images, NUMBERS), StreamedImages(data, images, NUMBERS)
    assert (kept.dtype, streamed.dtype, kept.shape) == (np.float32, np.float32, streamed.shape)
    assert np.isnan(kept).any()
    steps = np.array([[0, 5, 3], [7, 1, 0]])
    for mine, theirs in zip(
        *(views_of_steps(part, steps, SIDE, Augmentation(), 0, 0) for part in (kept, streamed)), strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)
        assert mine.dtype == np.float32
        # Holes stay holes; they do not become numbers beside them.
        assert np.nanmax(np.abs((mine - NUMBERS.mean) / NUMBERS.std)) < 6


def test_numbers_need_four_times_the_memory_of_pictures(monkeypatch):
    monkeypatch.setattr(loading, "available_memory_mb", lambda: 2 * 100 * SIDE * SIDE * 3 / 2**20)
    pictures = Preprocessing(Rendering((1, 2, 3)), SIDE, SIDE)
    numbers = dataclasses.replace(pictures, rendering=Rendering((1, 2, 3), values="raw"), mean=(), std=())
    assert (fits_in_memory(100, pictures), fits_in_memory(101, pictures)) == (True, False)
    assert (fits_in_memory(25, numbers), fits_in_memory(26, numbers)) == (True, False)


def test_missing_pixels_become_the_mean():
    pixels = np.random.default_rng(0).normal(size=(2, SIDE, SIDE, BANDS)).astype(np.float32)
    pixels = (pixels * NUMBERS.std + NUMBERS.mean).astype(np.float32)
    expected = np.moveaxis((pixels.astype(np.float64) - NUMBERS.mean) / NUMBERS.std, -1, 1)
    pixels[0, 3, 4], pixels[1, 5, 6, 2], pixels[1, 7, 7] = np.nan, np.inf, -np.inf
    missing = ~np.isfinite(np.moveaxis(pixels, -1, 1))
    got = Normaliser(NUMBERS, torch.device("cpu"))(pixels)
    assert got.is_contiguous(memory_format=torch.channels_last)
    np.testing.assert_allclose(got.numpy(), np.where(missing, 0, expected), atol=1e-5)


@pytest.mark.parametrize("orientations", [1, 8])
def test_the_code_of_numbers_does_not_depend_on_the_batch(data, images, orientations):
    model = model_of(dataclasses.replace(NUMBERS, orientations=orientations))
    pixels = load_images(data, images, NUMBERS)
    together = model.encode_prepared(pixels)
    assert len(np.unique(together, axis=0)) > 1
    for size in (1, 3, 16):
        np.testing.assert_array_equal(model.encode_prepared(pixels, batch_size=size), together)
    np.testing.assert_array_equal(model.encode_files([data / image.path for image in images]), together)
    with pytest.raises(InputError, match=r"prepared images are float32 \[N, 32, 32, 5\], got uint8"):
        model.encode_prepared(np.zeros(pixels.shape, np.uint8))


def test_a_model_of_numbers_needs_statistics():
    with pytest.raises(InputError, match="values=raw needs the mean and the standard deviation of each of the 5 bands"):
        model_of(dataclasses.replace(NUMBERS, mean=(), std=()))


def test_settings_of_numbers_from_text():
    settings = ["values=reflectance", "bands=[B02, B03, B04, B08]", "band_scale=1e-4", "band_offset=[0, 0, 0, -0.1]"]
    config = load_config(TrainConfig, None, [*settings, "band_mean=0.2", "band_std=[1, 1, 1, 2]"])
    preprocessing = config.preprocessing()
    assert preprocessing.rendering == Rendering(
        ("B02", "B03", "B04", "B08"), values="reflectance", band_scale=(1e-4,), band_offset=(0, 0, 0, -0.1)
    )
    assert (preprocessing.mean, preprocessing.std) == ((0.2,) * 4, (1, 1, 1, 2))
    assert load_config(TrainConfig, **config.model_dump()) == config


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"values": "raw", "colour_jitter": 0.4},
            "grayscale 0.0 change pictures, and values is raw; set both to 0",
        ),
        ({"values": "radiance"}, "values is 'radiance': input should be 'picture', 'raw'"),
        ({"band_scale": 2}, "band_scale given, and values is picture; set values to raw"),
        ({"values": "raw", "band_scale": 0}, "band_scale is [0.0]; finite numbers other than 0 are allowed"),
        ({"values": "raw", "bands": (1, 2), "band_offset": (1, 2, 3)}, "band_offset has 3 numbers; 1 or 2"),
        ({"values": "raw", "band_mean": 1}, "mean (1.0, 1.0, 1.0) and std (); 3 numbers each are required"),
        ({"values": "raw", "band_mean": 1, "band_std": 0}, "the std above 0"),
        ({"band_mean": "a"}, "band_mean.0 is 'a'"),
        ({"second_values": "raw", "second_band_scale": 0}, "band_scale is [0.0]"),
    ],
)
def test_wrong_settings_of_numbers_are_refused(settings, message):
    from orbithash.trainers.methods import get_method

    kind = get_method("mrhash").Config if any(key.startswith("second") for key in settings) else TrainConfig
    with pytest.raises(InputError) as caught:
        load_config(kind, **settings)
    assert message in str(caught.value)


def test_given_statistics_are_kept_and_missing_ones_computed(data):
    settings = {"bands": (1, 2, 3, 4, 5), "values": "raw", "batch_size": 4, "image_size": SIDE}
    run = make_run("classifier", data, **settings)
    np.testing.assert_allclose(run.config.band_mean, NUMBERS.mean, rtol=0.2)
    assert make_run("classifier", data, **settings).config == run.config
    given = make_run("classifier", data, band_mean=(1, 2, 3, 4, 5), band_std=2, **settings)
    assert (given.preprocessing().mean, given.preprocessing().std) == ((1, 2, 3, 4, 5), (2,) * 5)
    pictures = make_run("classifier", data, **settings | {"values": "picture"})
    assert pictures.config.band_mean == ()


def test_views_of_colours_need_pictures(data, images):
    extractor = FeatureExtractor(model_of(dataclasses.replace(NUMBERS)).network, NUMBERS)
    with pytest.raises(InputError, match="the view 'jitter' changes pictures, and values is raw; set values=picture"):
        extractor(data, images, augmentation="jitter")


def test_pretrained_filters_of_rgb_stay_on_red_green_and_blue(tmp_path):
    torch.manual_seed(3)
    source = torchvision.models.get_model("mobilenet_v3_small").state_dict()
    save_file(source, tmp_path / "w.safetensors")
    bands = ("B01", "B02", "B03", "B04", "B08", "B11")
    config = load_config(
        TrainConfig,
        backbone="mobilenet_v3_small",
        weights=str(tmp_path / "w.safetensors"),
        bands=bands,
        values="reflectance",
    )
    network = config.build_network(HeadSpec(16))
    first = next(module for module in network.backbone.modules() if isinstance(module, torch.nn.Conv2d)).weight
    rgb = source["features.0.0.weight"]
    torch.testing.assert_close(first[:, [3, 2, 1]], rgb)
    torch.testing.assert_close(first[:, [0, 4, 5]], (rgb.mean(dim=1, keepdim=True) / 3).expand(-1, 3, -1, -1))
