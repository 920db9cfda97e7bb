"""MHCLN: its losses against double loops in Python floats, and drawing of batches."""

import math

import numpy as np
import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.losses import bit_balance_loss
from orbithash.trainers.methods.mhcln import (
    Mhcln,
    MhclnConfig,
    class_pairs,
    code_balance_loss,
    normalised_triplet_loss,
    push_loss,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def outputs(num, bits=10, seed=0, dtype=torch.float32):
    return torch.sigmoid(2 * torch.randn(num, bits, generator=torch.Generator().manual_seed(seed))).to(dtype)


def unit(row):
    length = math.sqrt(max(1e-10, sum(x * x for x in row)))
    return [x / length for x in row]


def squared_distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num", [0, 1, 7])
def test_losses_match_loops(dtype, num):
    a, p, n = (outputs(num, seed=seed, dtype=dtype) for seed in range(3))
    expected = 0.0
    for x, y, z in zip(*(rows.double().tolist() for rows in (a, p, n)), strict=True):
        x, y, z = unit(x), unit(y), unit(z)
        expected += max(0.0, squared_distance(x, y) - squared_distance(x, z) + 0.2) / num
    rows = a.double().tolist()
    push = -sum((f - 0.5) ** 2 for row in rows for f in row) / max(1, 10 * num)
    balance = sum((sum(row) / 10 - 0.5) ** 2 for row in rows) / max(1, num)
    for found, value in (
        (normalised_triplet_loss(a, p, n, 0.2), expected),
        (push_loss(a), push),
        (code_balance_loss(a), balance),
    ):
        assert found.dtype == torch.float32
        assert float(found) == pytest.approx(value, rel=1e-4, abs=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [0.0, 1.0, 1e4])
def test_equal_huge_and_zero_rows_have_finite_losses_and_gradients(dtype, value):
    rows = torch.full((4, 8), value, dtype=dtype, requires_grad=True)
    loss = (
        normalised_triplet_loss(rows, rows, rows, 0.2)
        + push_loss(rows)
        + code_balance_loss(rows)
        + bit_balance_loss(rows, 0.5)
    )
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert rows.grad.isfinite().all()


def test_losses_of_an_empty_batch_have_gradients():
    rows = torch.zeros(0, 8, requires_grad=True)
    (
        normalised_triplet_loss(rows, rows, rows, 0.2)
        + push_loss(rows)
        + code_balance_loss(rows)
        + bit_balance_loss(rows, 0.5)
    ).backward()
    assert rows.grad.shape == (0, 8)


def test_gradients_attract_positives_saturate_and_balance():
    a, p, n = (outputs(5, seed=seed).requires_grad_() for seed in range(3))
    normalised_triplet_loss(a, p, n, 2.0).backward()
    with torch.no_grad():
        before = (torch.cosine_similarity(a, p) - torch.cosine_similarity(a, n)).sum()
        after = torch.cosine_similarity(a - 0.1 * a.grad, p) - torch.cosine_similarity(a - 0.1 * a.grad, n)
    assert after.sum() > before
    f = torch.tensor([[0.4, 0.7, 0.9]], requires_grad=True)
    push_loss(f).backward()
    assert (-f.grad).sign().tolist() == [[-1, 1, 1]]
    f = torch.tensor([[0.4, 0.7, 0.9]], requires_grad=True)
    code_balance_loss(f).backward()
    assert (-f.grad < 0).all()


def test_balance_is_computed_by_row_and_bit_balance_by_column():
    rows = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert float(code_balance_loss(rows)) == 0
    assert float(bit_balance_loss(rows, 0.5)) == 0.25


@pytest.mark.parametrize("num_pairs", [1, 2, 5])
def test_a_batch_holds_whole_triplets_of_class_pairs(num_pairs):
    labels = np.repeat(np.arange(4), 20)
    rng = np.random.default_rng(0)
    for _ in range(20):
        rows = class_pairs(labels, 10, num_pairs, rng).reshape(num_pairs, -1, 3)
        for pair in rows:
            own, positive, other = (set(labels[column].tolist()) for column in pair.T)
            assert own == positive
            assert len(own) == len(other) == 1
            assert own != other
            anchors, positives, negatives = (column.tolist() for column in pair.T)
            assert len(set(anchors + positives)) == 2 * len(anchors)
            assert len(set(negatives)) == len(negatives)


def test_every_class_serves_as_positive_and_as_negative():
    labels = np.repeat(np.arange(3), 4)
    rng = np.random.default_rng(0)
    seen = {tuple(labels[class_pairs(labels, 2, 1, rng)[[0, 2]]].tolist()) for _ in range(200)}
    assert seen == {(a, b) for a in range(3) for b in range(3) if a != b}


def test_a_small_class_repeats_its_triplets():
    labels = np.array([0, 0, 0, 1, 1, 1])
    rows = class_pairs(labels, 4, 1, np.random.default_rng(0)).reshape(-1, 3)
    assert rows.shape == (4, 3)
    assert len({tuple(row) for row in rows.tolist()}) == 1


# The method.


def make(num_classes=3, **settings):
    torch.manual_seed(0)
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "hidden": (12,), **settings}
    return Mhcln(load_config(MhclnConfig, **given), num_classes, 10)


def batch_of(features):
    rows = torch.arange(len(features))
    return Batch(rows, rows, None, {"image": features}, 0)


def test_the_loss_is_the_weighted_sum_of_its_parts():
    method = make(push_weight=0.3, balance_weight=0.7, bit_balance_weight=0.9, margin=0.5)
    features = torch.randn(6, method.network.head.num_features)
    found = method(batch_of(features))
    f = method.network.head(features)
    expected = (
        normalised_triplet_loss(f[[0, 3]], f[[1, 4]], f[[2, 5]], 0.5)
        + 0.3 * push_loss(f)
        + 0.7 * code_balance_loss(f)
        + 0.9 * bit_balance_loss(f, 0.5)
    )
    assert float(found["loss"]) == pytest.approx(float(expected), rel=1e-5)
    assert found.keys() == {"loss", "triplet", "push", "balance", "bit_balance"}


def test_standardisation_is_fitted_on_the_training_part():
    method = make()
    features = np.random.default_rng(0).normal(3, 2, (10, method.network.head.num_features)).astype(np.float32)
    method.begin(Part(None, np.zeros(10, np.int64), [""] * 10, {"image": features}))
    assert np.allclose(method.network.head.norm.mean, features.mean(0), atol=1e-5)
    assert np.allclose(method.network.head.norm.std, features.std(0), atol=1e-5)
    assert not hasattr(make(standardise=False).network.head.norm, "mean")


def test_only_the_head_trains():
    method = make()
    trained = {id(p) for group in method.build_optimizer().param_groups for p in group["params"]}
    assert trained == {id(p) for p in method.network.head.parameters()}
    assert not any(p.requires_grad for p in method.network.backbone.parameters())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 10}, r"batch_size is 10: it must be a multiple of 3 \* class_pairs = 3"),
        ({"batch_size": 15, "class_pairs": 2}, "= 6"),
    ],
)
def test_batch_sizes_that_split_triplets_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_classes_without_pairs_are_refused():
    with pytest.raises(InputError, match="at least 2 classes; all are of one class"):
        make().order(np.array([1, 1, 1]), 0)
    with pytest.raises(InputError, match="class number 2 has 1"):
        make().order(np.array([0, 0, 1, 1, 2]), 0)
