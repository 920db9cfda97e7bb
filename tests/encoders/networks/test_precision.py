"""Codes of transformers and of backbones in bfloat16 do not depend on the batch; the card states the precision."""

import dataclasses

import numpy as np
import pytest
import torch

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks import binarizer
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel

BITS, SIDE, NUM = 16, 32, 40

# Relative rounding of a network in which the batch size decides about the order of sums: a few units of the type.
ROUNDING = {"float32": 2e-7, "bfloat16": 4e-3}


class Rounding(torch.nn.Module):
    """A backbone whose features differ with the size of the batch as they do on a GPU."""

    def __init__(self, backbone, precision):
        super().__init__()
        self.backbone, self.spec, self.relative = backbone, backbone.spec, ROUNDING[precision]
        self.num_features, self.batches, self.dtypes = backbone.num_features, [], set()
        linear = next(module for module in backbone.modules() if isinstance(module, torch.nn.Linear))
        linear.register_forward_hook(lambda module, inputs, output: self.dtypes.add(output.dtype))

    def forward(self, images):
        self.batches.append(len(images))
        features = self.backbone(images)
        if len(images) == 1:
            return features
        generator = torch.Generator().manual_seed(len(images))
        return features * (1 + self.relative * torch.randn(features.shape, generator=generator))


def make_model(backbone, precision, scale, norm="unit"):
    torch.manual_seed(0)
    network = HashNetwork(build_backbone(**backbone), HeadSpec(BITS, norm=norm, activation="none"))
    with torch.no_grad():
        network.head.output.weight *= scale
    network.backbone = Rounding(network.backbone, precision)
    card = ModelCard(
        method="itq",
        network=network.spec,
        thresholds=(0.0,) * BITS,
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), SIDE, SIDE),
        classes=(),
        dataset={},
        metrics={},
        precision=precision,
    )
    model = HashModel(card, network)
    with torch.no_grad():
        outputs = network.hash(torch.from_numpy(model.features(images(), batch_size=1))).hashes
    # Outputs of some images lie on thresholds.
    thresholds = tuple(float(outputs[2 * bit, bit]) for bit in range(BITS))
    network.backbone.batches.clear()
    return HashModel(dataclasses.replace(card, thresholds=thresholds), network)


def images():
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (NUM, 4, 4, 3)).repeat(SIDE // 4, 1).repeat(SIDE // 4, 2)
    return np.clip(coarse + rng.integers(-20, 20, coarse.shape), 0, 255).astype(np.uint8)


def name_backbone(source, tiny_backbones):
    return {"name": tiny_backbones[source]["backbone"], "weights": tiny_backbones[source].get("weights")}


@pytest.mark.parametrize("scale", [1, 1000])
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
@pytest.mark.parametrize("source", ["hf", "hf dual", "open_clip"])
def test_a_transformer_gives_the_same_code_in_any_batch(tiny_backbones, source, precision, scale):
    model = make_model(name_backbone(source, tiny_backbones), precision, scale)
    pixels = images()
    alone = np.concatenate([model.encode_prepared(image[None]) for image in pixels])
    for size in (2, 7, NUM):
        assert np.array_equal(model.encode_prepared(pixels, batch_size=size), alone)
    assert np.array_equal(model.encode_features(model.features(pixels, batch_size=1)), alone)
    assert len(np.unique(alone, axis=0)) > NUM / 2


def test_it_is_the_margin_that_makes_them_the_same(tiny_backbones, monkeypatch):
    """The test above can fail."""
    monkeypatch.setattr(binarizer, "MARGIN", 0.0)
    model, pixels = make_model(name_backbone("hf", tiny_backbones), "float32", 1000), images()
    alone = np.concatenate([model.encode_prepared(image[None]) for image in pixels])
    assert unpack(model.encode_prepared(pixels, batch_size=NUM) ^ alone, BITS).any()


def test_in_bfloat16_each_image_is_computed_alone_from_the_start(tiny_backbones):
    model = make_model(name_backbone("hf", tiny_backbones), "bfloat16", 1)
    seen = model.network.backbone
    seen.dtypes.clear()
    features = model.features(images()[:5], batch_size=4)
    assert features.dtype == np.float32
    assert seen.batches == [1] * 5
    assert seen.dtypes == {torch.bfloat16}
    exact = make_model(name_backbone("hf", tiny_backbones), "float32", 1)
    relative = np.linalg.norm(features - exact.features(images()[:5]), axis=1) / np.linalg.norm(features, axis=1)
    assert 1e-5 < relative.max() < 0.05
    assert exact.network.backbone.dtypes == {torch.float32}


def test_the_card_states_the_precision(tiny_backbones, tmp_path):
    model = make_model(name_backbone("hf", tiny_backbones), "bfloat16", 1)
    network = HashNetwork(model.network.backbone.backbone, model.network.head.spec)
    ids = {}
    for precision in ("float32", "bfloat16"):
        card = dataclasses.replace(model.card, precision=precision)
        ids[precision] = HashModel(card, network).save(tmp_path / precision)
        assert HashModel.load(tmp_path / precision).card.precision == precision
    # It decides codes.
    assert ids["float32"] != ids["bfloat16"]
    with pytest.raises(InputError, match="precision is 'float16'; float32, bfloat16 are allowed"):
        dataclasses.replace(model.card, precision="float16")
