"""The classifier baseline: its loss against the formula, and its trained parameters."""

import math

import pytest
import torch

from orbithash.trainers.config import load_config
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.classifier import Classifier, ClassifierConfig


def make(**settings):
    torch.manual_seed(0)
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, **settings}
    return Classifier(load_config(ClassifierConfig, **given), 3, 10)


def make_batch(num=5, side=32):
    images = torch.randn(num, 3, side, side, generator=torch.Generator().manual_seed(0))
    return Batch(torch.arange(num), torch.arange(num) % 3, images, {}, 0)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    method, batch = make(quantisation_weight=3).eval(), make_batch()
    with torch.no_grad():
        found = method(batch)
        hashes, logits = method.network(batch.images)
    cross_entropy = 0.0
    for row, label in zip(logits.double().tolist(), batch.labels.tolist(), strict=True):
        cross_entropy += (math.log(sum(math.exp(x) for x in row)) - row[label]) / 5
    distance = sum((abs(h) - 1) ** 2 for row in hashes.double().tolist() for h in row) / (5 * 16)
    assert float(found["classification"]) == pytest.approx(cross_entropy, rel=1e-4)
    assert float(found["quantisation"]) == pytest.approx(distance, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(cross_entropy + 3 * distance, rel=1e-4)


def test_large_logits_stay_finite():
    method = make()
    torch.nn.init.constant_(method.network.classifier.bias, 0)
    method.network.classifier.weight.data.mul_(1e4)
    loss = method(make_batch())["loss"]
    loss.backward()
    assert loss.isfinite()
    assert all(p.grad.isfinite().all() for p in method.parameters())


def test_every_parameter_is_in_one_group_and_gets_a_gradient():
    method = make()
    grouped = [id(p) for group in method.build_optimizer().param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    method(make_batch(side=64))["loss"].backward()
    assert all(p.grad is not None for p in method.parameters())
    assert method.network.classifier.weight.grad.any()
