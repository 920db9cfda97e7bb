"""Training on images with more or fewer bands than three, from settings to codes."""

import dataclasses
import math
import warnings

import numpy as np
import pytest
import rasterio
import torch
import torchvision
from method_parts import trained
from PIL import Image
from safetensors.torch import save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.backbones.rgb import rgb_channels
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import TrainConfig, load_config
from orbithash.trainers.data.augmentation import augment
from orbithash.trainers.data.loading import load_images
from orbithash.trainers.datasets import Images, make_manifest
from orbithash.trainers.datasets.hashes import hash_files
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.tables import load_tables
from orbithash.trainers.methods import get_method
from orbithash.trainers.methods.dhcl import DhclConfig

ALL = tuple(range(1, 14))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of 13 bands; only the tenth distinguishes the two classes."""
    root = tmp_path_factory.mktemp("eurosat")
    rng = np.random.default_rng(0)
    for name, level in (("Forest", 200), ("River", 3000)):
        (root / name).mkdir()
        for number in range(10):
            values = rng.integers(0, 4000, (13, 32, 32)).astype(np.uint16)
            values[9] = level + rng.integers(0, 200, (32, 32))
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                with rasterio.open(
                    root / name / f"{name}_{number}.tif",
                    "w",
                    driver="GTiff",
                    count=13,
                    height=32,
                    width=32,
                    dtype="uint16",
                ) as dataset:
                    dataset.write(values)
    return root


def make_run(root, method, **settings):
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 1, **settings}
    config = load_config(get_method(method).Config, bands=ALL, stretch="range:0:4000", **given)
    return Run(method, config, make_manifest(root, protocol="random"), root)


@pytest.mark.parametrize(
    ("method", "settings"),
    [("dhcl", {}), ("cdne", {}), ("mhcln", {"batch_size": 12, "steps_per_epoch": 1, "hidden": (12,)})],
)
def test_a_run_on_13_bands_ends_in_a_model_that_encodes_them(data, tmp_path, method, settings):
    run = make_run(data, method, **settings)
    recorder = trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    assert loaded.preprocessing == run.preprocessing()
    assert (loaded.preprocessing.channels, loaded.card.network.channels) == (13, 13)
    assert loaded.preprocessing.rendering == Rendering(ALL, "range:0:4000")
    images = run.manifest.part("test")
    read = [read_image(data / image.path, loaded.preprocessing.rendering) for image in images]
    prepared = load_images(data, images, run.preprocessing())
    assert prepared.shape[1:] == (32, 32, 13)
    np.testing.assert_array_equal(loaded.encode(read), model.encode_prepared(prepared))
    assert len(recorder.history) == 1


def test_three_bands_train_as_they_did(data):
    """Settings for bands do not change a run that does not use them."""
    config = load_config(DhclConfig, image_size=32)
    assert (config.bands, config.channels) == ((), 3)
    assert config.preprocessing().to_json() == {
        "rendering": {
            "bands": None,
            "stretch": "percentile:2:98",
            "values": "picture",
            "band_scale": [],
            "band_offset": [],
        },
        "resize": 32,
        "crop": 32,
        "mean": [0.485, 0.456, 0.406],
        "std": [0.229, 0.224, 0.225],
        "orientations": 1,
        "interpolation": "bilinear",
        "smaller": [],
    }


def test_a_view_of_many_bands_is_the_same_view_of_each():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 13), np.uint8)
    for seed in range(8):
        view = augment(image, 24, np.random.default_rng(seed))
        assert view.shape == (24, 24, 13)
        for band in range(13):
            grey = np.ascontiguousarray(np.repeat(image[..., band : band + 1], 3, axis=2))
            np.testing.assert_array_equal(view[..., band], augment(grey, 24, np.random.default_rng(seed))[..., 0])


def test_a_view_of_three_bands_is_one_resize_of_pillow():
    image = np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)
    for seed in range(8):
        rng = np.random.default_rng(seed)
        area, aspect = rng.uniform(0.4, 1), math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
        width, height = min(40, 40 * math.sqrt(area * aspect)), min(40, 40 * math.sqrt(area / aspect))
        left, top = rng.uniform(0, 40 - width), rng.uniform(0, 40 - height)
        box = (left, top, left + width, top + height)
        cut = np.asarray(Image.fromarray(image).resize((24, 24), Image.Resampling.BILINEAR, box=box))
        turns = int(rng.integers(8))
        cut = np.rot90(cut, turns % 4)
        np.testing.assert_array_equal(
            augment(image, 24, np.random.default_rng(seed)), cut[:, ::-1] if turns >= 4 else cut
        )


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bands": (1, 2, 3, 4), "colour_jitter": 0.4}, "need images of three bands, and bands has 4; set both to 0"),
        ({"bands": (1, 2), "grayscale": 0.2}, "need images of three bands, and bands has 2"),
        ({"bands": (0, 1)}, "bands is (0, 1); numbers counted from 1"),
        ({"bands": (1, "B02")}, "bands is (1, 'B02'); numbers counted from 1"),
        ({"bands": 4}, "bands is 4: input should be a valid tuple"),
        ({"stretch": "gamma:2"}, "stretch is 'gamma:2'; allowed are percentile:LO:HI and range:LO:HI"),
        ({"second_bands": (0, 1)}, "second_bands is (0, 1): "),
        ({"second_stretch": "gamma:2"}, "second_stretch is 'gamma:2': "),
    ],
)
def test_wrong_settings_are_refused(settings, message):
    kind = get_method("mrhash").Config if any(key.startswith("second") for key in settings) else TrainConfig
    with pytest.raises(InputError) as caught:
        load_config(kind, **settings)
    assert message in str(caught.value)


def test_settings_from_text():
    config = load_config(TrainConfig, None, ["bands=[B04, B08, B8A, B11]", "stretch=range:0:10000"])
    assert config.bands == ("B04", "B08", "B8A", "B11")
    assert load_config(TrainConfig, None, ["bands=[2]", "colour_jitter=0.5"]).channels == 3
    assert load_config(TrainConfig, **config.model_dump()) == config


def test_images_without_the_bands_are_all_named(data):
    run = make_run(data, "dhcl")
    config = run.config.model_copy(update={"bands": (14, 1)})
    with pytest.raises(InputError, match=r"Forest_\d.tif: no band 14; the image has 13") as caught:
        load_images(data, run.manifest.images, config.preprocessing())
    assert str(caught.value).count("band 14") == 20


def features_of(root, paths, spec, rendering, weights=None, side=64):
    """Features of each file or folder, by a network built here."""
    torch.manual_seed(0)
    backbone = build_backbone(
        spec.backbone.name, weights, channels=rendering.channels, rgb=rgb_channels(rendering.bands)
    )
    network = HashNetwork(backbone, spec.head).eval()
    preprocessing = Preprocessing(rendering, side, side)
    rows = []
    for path in paths:
        pixels = preprocessing.prepare(read_image(root / path, rendering)).astype(np.float64) / 255
        inputs = torch.from_numpy((pixels - preprocessing.mean) / preprocessing.std).float()
        with torch.no_grad():
            rows.append(network.features(inputs.permute(2, 0, 1)[None])[0].numpy())
    return np.stack(rows)


def test_real_patches_of_two_sources(shared, tmp_path):
    """Sentinel-2 in six bands and Sentinel-1 in two, each with its own stretch: tables, training, codes."""
    root = shared / "data" / "bigearthnet_sample"
    bands, radar = ("B02", "B03", "B04", "B08", "B05", "B11"), Rendering(("VV", "VH"), "range:-30:0")
    manifest = make_manifest(root, protocol="random")
    config = load_config(
        get_method("mrhash").Config,
        None,
        ["second_bands=[VV, VH]", "second_stretch=range:-30:0", "stretch=range:0:3000"],
        bands=bands,
        backbone="mobilenet_v3_small",
        image_size=64,
        bits=16,
        num_clusters=2,
        num_latents=3,
        autoencoder_epochs=2,
        hidden=(8,),
        batch_size=2,
        epochs=1,
    )
    run = Run("mrhash", config, manifest, root)
    images = manifest.images
    method = run.build()
    tables = load_tables(root, images, method, run.preprocessing())
    spec = method.network.spec
    own = Rendering(bands, "range:0:3000")
    for name, rendering, paths in (
        ("image", own, [image.path for image in images]),
        ("second", radar, [image.second for image in images]),
    ):
        expected = features_of(root, paths, spec, rendering)
        np.testing.assert_allclose(tables[name], expected, rtol=1e-3, atol=1e-3)
        # No image is black: images of one source differ.
        assert (np.asarray(tables[name]).std(axis=0) > 0).mean() > 0.5
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    # The second source is no longer needed.
    assert model.preprocessing.rendering == own
    assert model.encode([read_image(root / image.path, own) for image in images]).shape == (6, 2)


def test_thirteen_bands_and_a_companion_of_three(data, tmp_path):
    """Both with the same weights; the first adapts them to its number of bands."""
    rng = np.random.default_rng(1)
    for name in ("Forest", "River"):
        (tmp_path / "second" / name).mkdir(parents=True)
    run = make_run(data, "dhcl")
    images = []
    for image in run.manifest.images:
        second = (tmp_path / "second" / image.path).with_suffix(".png")
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), np.uint8)).save(second)
        (sha256,) = hash_files(second.parent, [second.name])
        images.append(dataclasses.replace(image, second=str(second), second_sha256=sha256.hex()))
    torch.manual_seed(5)
    weights = tmp_path / "w.safetensors"
    save_file(torchvision.models.get_model("mobilenet_v3_small").state_dict(), weights)
    config = make_run(data, "mrhash", num_clusters=2, weights=str(weights)).config
    method = get_method("mrhash")(config, 2, len(images))
    tables = load_tables(data, Images.of(images), method, config.preprocessing())
    assert method.network.spec.channels == 13
    expected = features_of(
        data, [image.second for image in images], method.network.spec, Rendering(), str(weights), side=32
    )
    np.testing.assert_allclose(tables["second"], expected, rtol=1e-3, atol=1e-2 * expected.std())


def test_views_of_colours_need_colours(data):
    from orbithash.trainers.features.features import FeatureExtractor

    run = make_run(data, "dhcl")
    network = run.build().network
    extractor = FeatureExtractor(network, run.preprocessing())
    images = run.manifest.part("test")
    found = extractor(data, images)
    assert found.shape == (len(images), network.head.num_features)
    with pytest.raises(InputError, match="the view 'jitter' needs images of three bands, and bands has 13"):
        extractor(data, images, augmentation="jitter")
