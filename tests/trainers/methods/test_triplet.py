"""The triplet baseline: its loss against loops over all triplets, drawing of triplets and batches."""

import numpy as np
import pytest
import torch
from method_parts import with_draws

from orbithash.trainers.config import load_config
from orbithash.trainers.methods import Batch
from orbithash.trainers.methods.triplet import (
    Triplet,
    TripletConfig,
    _distances,
    anchors_with_both,
    draw_triplets,
    triplet_loss,
)

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def distance(one, other):
    return sum((a - b) ** 2 for a, b in zip(one, other, strict=True)) / len(one) / 4


def hardest_oracle(hashes, labels, rows, margin):
    losses = []
    for a, (y, row) in enumerate(zip(labels, rows, strict=True)):
        positive = [distance(hashes[a], hashes[p]) for p, z in enumerate(labels) if z == y and rows[p] != row]
        negative = [distance(hashes[a], hashes[n]) for n, z in enumerate(labels) if z != y]
        if positive and negative:
            losses.append(max(0.0, margin + max(positive) - min(negative)))
    return sum(losses) / max(1, len(losses))


def inputs(num, num_classes, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hashes = torch.tanh(torch.randn(num, 12, generator=generator)).to(dtype)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return hashes, labels, torch.randint(num, (num,), generator=generator)


def hardest(hashes, labels, rows, margin=0.25):
    distances = _distances(hashes)
    scores, anchors = torch.stack([distances, -distances]).detach(), anchors_with_both(labels, rows)
    triplets = draw_triplets(labels, rows, scores, anchors)
    return triplet_loss(distances, triplets, margin)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num", "num_classes"), [(2, 1), (3, 2), (12, 3), (20, 10)])
def test_hardest_triplets_match_a_loop_over_all(dtype, num, num_classes):
    for seed in range(4):
        hashes, labels, rows = inputs(num, num_classes, seed, dtype)
        found = hardest(hashes, labels, rows)
        assert found.dtype == torch.float32
        expected = hardest_oracle(hashes.double().tolist(), labels.tolist(), rows.tolist(), 0.25)
        assert float(found) == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_distances_of_signs_are_normalised_hamming_distances():
    codes = torch.tensor([[1.0, 1, 1, 1], [1, 1, 1, -1], [-1, -1, -1, -1]])
    assert _distances(codes).tolist() == [[0, 0.25, 1], [0.25, 0, 0.75], [1, 0.75, 0]]


def test_random_triplets_are_valid_and_follow_the_scores():
    _, labels, rows = inputs(30, 4)
    drawn = []
    for seed in range(20):
        scores = torch.rand(2, 30, 30, generator=torch.Generator().manual_seed(seed))
        triplets = draw_triplets(labels, rows, scores, anchors_with_both(labels, rows))
        assert len(triplets) > 20
        for a, p, n in triplets.tolist():
            assert labels[a] == labels[p] != labels[n]
            assert rows[a] != rows[p]
        drawn.append(triplets)
    partners = {(a, p) for triplets in drawn for a, p, _ in triplets.tolist()}
    possible = {(a, p) for a in range(30) for p in range(30) if labels[a] == labels[p] and rows[a] != rows[p]}
    assert len(partners) > 0.8 * len(possible)


@pytest.mark.parametrize(
    ("labels", "rows"),
    [([], []), ([1], [0]), ([1, 1, 1], [0, 1, 2]), ([0, 1, 2], [0, 1, 2]), ([0, 0, 1], [5, 5, 6])],
)
def test_loss_without_triplets_is_zero_and_has_gradients(labels, rows):
    hashes = torch.randn(len(labels), 8, requires_grad=True)
    found = hardest(hashes, torch.tensor(labels, dtype=torch.int64), torch.tensor(rows, dtype=torch.int64))
    found.backward()
    assert float(found.detach()) == 0
    assert not hashes.grad.any()


def test_the_gradient_pulls_the_positive_and_pushes_the_negative():
    hashes = torch.tensor([[0.0, 0.0], [0.6, 0.0], [0.0, 0.2]], requires_grad=True)
    distances = _distances(hashes)
    triplet_loss(distances, torch.tensor([[0, 1, 2]]), 0.25).backward()
    # A gradient descent step moves the positive nearer to the anchor at 0 and the negative away from it.
    assert hashes.grad[1, 0] > 0 > hashes.grad[2, 1]


def test_large_and_equal_hashes_stay_finite():
    for hashes in (torch.full((6, 8), 1e4), 1e4 * torch.randn(6, 8), torch.zeros(6, 8)):
        rows = hashes.requires_grad_()
        found = hardest(rows, torch.tensor([0, 0, 1, 1, 2, 2]), torch.arange(6))
        found.backward()
        assert found.isfinite()
        assert rows.grad.isfinite().all()


def make(**settings):
    torch.manual_seed(0)
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "batch_size": 8, **settings}
    return Triplet(load_config(TripletConfig, **given), 3, 10)


@pytest.mark.parametrize("mining", ["hard", "random"])
def test_the_loss_is_the_weighted_sum_and_reproducible_by_seed(mining):
    method = make(mining=mining, quantisation_weight=3).eval()
    labels = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
    images = torch.randn(8, 3, 32, 32)
    with torch.no_grad():
        batches = [Batch(torch.arange(8), labels, images, {}, seed) for seed in (1, 1, 2)]
        found = [method(with_draws(method, batch)) for batch in batches]
        hashes = method.network(images).hashes
    assert float(found[0]["loss"]) == pytest.approx(float(found[0]["triplet"] + 3 * found[0]["quantisation"]), rel=1e-5)
    assert found[0] == found[1]
    if mining == "hard":
        expected = hardest_oracle(hashes.tolist(), labels.tolist(), list(range(8)), 0.25)
        assert float(found[0]["triplet"]) == pytest.approx(expected, rel=1e-4)
    else:
        assert found[0]["triplet"] != found[2]["triplet"]


def test_batches_hold_groups_of_images_of_one_class():
    labels = np.repeat(np.arange(5), 8)
    steps = make(images_per_class=4).order(labels, 0)
    assert steps.shape == (5, 8)
    assert all(np.unique(labels[rows], return_counts=True)[1].tolist() == [4, 4] for rows in steps)
    assert sorted(make(images_per_class=0).order(labels, 0).reshape(-1).tolist()) == list(range(40))


def test_every_parameter_gets_a_gradient():
    method = make()
    assert method.network.classifier is None
    batch = Batch(torch.arange(4), torch.tensor([0, 1, 0, 1]), torch.randn(4, 3, 64, 64), {}, 0)
    method(with_draws(method, batch))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
