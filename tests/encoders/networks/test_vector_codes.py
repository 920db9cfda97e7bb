"""Codes and stored vectors of vectors do not depend on the batch, also where many are near a threshold."""

import numpy as np
import pytest
import torch

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.backbones.embedding import embedding_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection

BITS, DIMS, COUNT = 32, 64, 600


@pytest.fixture(scope="module")
def vectors():
    return np.random.default_rng(0).standard_normal((COUNT, DIMS)).astype(np.float32)


@pytest.fixture(scope="module", params=["unit", "layer", "standardise"])
def model(request, vectors):
    """A model whose thresholds are outputs of the first vectors."""
    torch.manual_seed(0)
    network = HashNetwork(
        build_backbone(embedding_backbone("dino", DIMS, "")), HeadSpec(BITS, norm=request.param, activation="none")
    ).eval()
    with torch.inference_mode():
        outputs = network.hash(torch.from_numpy(vectors[:BITS])).hashes.diagonal().tolist()
    projection = Projection.fit(torch.from_numpy(vectors), 48)
    card = ModelCard(
        method="lsh",
        network=network.spec,
        thresholds=tuple(outputs),
        label_code="none",
        label_weight=1,
        preprocessing=Preprocessing(Rendering(), resize=32, crop=32),
        classes=(),
        dataset={},
        metrics={},
        projection=projection.spec,
    )
    return HashModel(card, network, projection=projection)


def test_the_same_for_every_batch_size(model, vectors):
    whole = model.encode_items("vector", vectors, with_outputs=True)
    for size in (1, 7, 256):
        other = model.encode_items("vector", vectors, with_outputs=True, batch_size=size)
        for part, of_other in zip(whole, other, strict=True):
            np.testing.assert_array_equal(part, of_other)
    np.testing.assert_array_equal(model.encode_features(vectors, batch_size=13), whole.codes)
    order = np.random.default_rng(1).permutation(COUNT)
    np.testing.assert_array_equal(model.encode_items("vector", vectors[order]).vectors, whole.vectors[order])


def test_few_passes_of_the_head(model, vectors, monkeypatch):
    passes, forward = [], HashHead.forward
    monkeypatch.setattr(HashHead, "forward", lambda self, x: passes.append(len(x)) or forward(self, x))
    model.encode_items("vector", vectors)
    assert len(passes) < 20


def test_weights_that_train_are_used_at_once(model, vectors):
    before = model.encode_items("vector", vectors)
    with torch.no_grad():
        model.network.head.output.weight.neg_()
    changed = model.encode_items("vector", vectors)
    with torch.no_grad():
        model.network.head.output.weight.neg_()
    one_by_one = model.encode_items("vector", vectors, batch_size=1)
    assert not np.array_equal(changed.codes, before.codes)
    np.testing.assert_array_equal(one_by_one.codes, before.codes)
