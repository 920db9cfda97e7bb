"""Passes of one fixed size, as on a GPU, on the CPU: with backbones whose features change with the pass."""

import dataclasses

import numpy as np
import pytest
import torch

from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks import image_features
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.image_features import gpu_pass
from orbithash.encoders.networks.model import HashModel

BITS, SIDE, NUM, PASS = 16, 32, 21, 4


class Rounding(torch.nn.Module):
    """A backbone whose features differ with the number of images, and with the place if `by_place`."""

    def __init__(self, backbone, by_place):
        super().__init__()
        self.backbone, self.spec, self.by_place = backbone, backbone.spec, by_place
        self.num_features, self.batches = backbone.num_features, []

    def forward(self, images):
        self.batches.append(len(images))
        # One by one: the features of the network itself do not depend on the batch.
        features = torch.cat([self.backbone(image[None]) for image in images])
        generator = torch.Generator().manual_seed(len(images))
        shape = features.shape if self.by_place else features.shape[1:]
        return features * (1 + 4e-3 * torch.randn(shape, generator=generator))


@pytest.fixture
def filled(monkeypatch):
    """Passes on the CPU as on a GPU."""
    monkeypatch.setattr(image_features, "FILLED", ("cpu",))
    monkeypatch.setattr(image_features, "_MAX_PASS", PASS)


def make_model(precision, *, by_place=False, orientations=1):
    torch.manual_seed(0)
    network = HashNetwork(build_backbone("resnet8"), HeadSpec(BITS, activation="none"))
    network.backbone = Rounding(network.backbone, by_place)
    preprocessing = Preprocessing(Rendering(), SIDE, SIDE, orientations=orientations)
    card = ModelCard("itq", network.spec, (0.0,) * BITS, "none", 1, preprocessing, (), {}, {}, precision=precision)
    with torch.inference_mode():
        model = HashModel(card, network)
        outputs = network.hash(torch.from_numpy(model.features(images()))).hashes
    # Outputs of some images lie on thresholds.
    thresholds = tuple(float(outputs[bit, bit]) for bit in range(BITS))
    network.backbone.batches.clear()
    return HashModel(dataclasses.replace(card, thresholds=thresholds), network)


def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (NUM, 4, 4, 3)).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return np.clip(coarse + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_all_passes_have_one_size_and_codes_do_not_depend_on_the_batch(filled, precision):
    model, pixels = make_model(precision), images()
    passes = model.network.backbone.batches
    alone = [model.encode_items("image", image[None], with_outputs=True) for image in pixels]
    # One pass decides whether places are equal; images near a threshold need no other pass.
    assert passes == [PASS] * (1 + NUM)
    passes.clear()
    features = np.concatenate([model.features(image[None]) for image in pixels])
    for size in (1, 3, PASS, PASS + 1, 1000):
        passes.clear()
        found = model.encode_items("image", pixels, with_outputs=True, batch_size=size)
        assert passes == [PASS] * -(-NUM // PASS)
        np.testing.assert_array_equal(found.codes, np.concatenate([each.codes for each in alone]))
        np.testing.assert_array_equal(found.outputs, np.concatenate([each.outputs for each in alone]))
        np.testing.assert_array_equal(model.features(pixels, batch_size=size), features)
    assert len(np.unique(found.codes, axis=0)) > NUM / 2


@pytest.mark.parametrize(("precision", "size"), [("float32", 7), ("bfloat16", 1)])
def test_without_equal_places_passes_are_those_of_a_cpu(filled, precision, size):
    model, pixels = make_model(precision, by_place=True), images()[:7]
    passes = model.network.backbone.batches
    model.features(pixels, batch_size=7)
    assert passes == [PASS] + [size] * (7 // size)


def test_features_are_those_of_unfilled_passes(filled, monkeypatch):
    model = make_model("float32", orientations=8)
    model.network.backbone = model.network.backbone.backbone
    found = model.features(images())
    monkeypatch.setattr(image_features, "FILLED", ())
    expected = HashModel(model.card, model.network).features(images())
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def test_no_images(filled):
    assert make_model("bfloat16").encode_prepared(images()[:0]).shape == (0, BITS // 8)


@pytest.mark.parametrize(("side", "size"), [(32, 64), (160, 64), (161, 32), (224, 32), (512, 4), (1280, 1), (5000, 1)])
def test_images_of_a_pass_on_a_gpu(side, size):
    assert gpu_pass(side) == size
