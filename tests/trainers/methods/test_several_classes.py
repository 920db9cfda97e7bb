"""Images with several classes: the losses against loops over images and classes, and the case of one class each."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.methods.base import balanced
from orbithash.trainers.methods.cdne import Embedded, neighbour_log_sums, snca_loss
from orbithash.trainers.methods.dhcl import Dhcl, DhclConfig, circle_proxy_loss, proxy_anchor_loss
from orbithash.trainers.methods.losses import classification_loss
from orbithash.trainers.methods.triplet import anchors_with_both, draw_triplets

NUM_CLASSES = 4


def inputs(num=9, bits=6, seed=0):
    """Return hashes [N, K] and labels bool [N, C] with one to three classes per image."""
    rng = np.random.default_rng(seed)
    labels = np.zeros((num, NUM_CLASSES), np.bool_)
    for row in labels:
        row[rng.permutation(NUM_CLASSES)[: rng.integers(1, 4)]] = True
    return torch.from_numpy(np.tanh(rng.normal(size=(num, bits)))).float(), torch.from_numpy(labels)


def one_class():
    """Return labels int64 [9], and the same labels as bool [9, C]."""
    labels = torch.arange(9) % NUM_CLASSES
    return labels, F.one_hot(labels, NUM_CLASSES).bool()


def cosine(one, other):
    return float(sum(a * b for a, b in zip(one, other, strict=True))) / math.hypot(*one) / math.hypot(*other)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_classification_matches_a_loop_over_images_and_classes(smoothing):
    logits, labels = torch.randn(9, NUM_CLASSES, generator=torch.Generator().manual_seed(0)), inputs()[1]
    total = 0.0
    for row, classes in zip(logits.double().tolist(), labels.tolist(), strict=True):
        for logit, has_class in zip(row, classes, strict=True):
            share = 1 / (1 + math.exp(-logit))
            target = smoothing / 2 + (1 - smoothing) * has_class
            total -= target * math.log(share) + (1 - target) * math.log(1 - share)
    found = classification_loss(logits, labels, smoothing)
    assert float(found) == pytest.approx(total / 9 / NUM_CLASSES, rel=1e-5)


@pytest.mark.parametrize("loss", ["circle", "anchor"])
def test_an_image_is_pulled_to_all_of_its_proxies(loss):
    hashes, labels = inputs()
    proxies = torch.randn(NUM_CLASSES, 6, generator=torch.Generator().manual_seed(1))
    m, g = 0.25, 8.0
    if loss == "circle":
        found = circle_proxy_loss(hashes, labels, proxies, m, g)
    else:
        found = proxy_anchor_loss(hashes, labels, proxies, 0.1, g)
    pulls, pushes = [], []
    for c, proxy in enumerate(proxies.double().tolist()):
        pull = push = 0.0
        for h, classes in zip(hashes.double().tolist(), labels.tolist(), strict=True):
            s = cosine(h, proxy)
            if classes[c]:
                pull += math.exp(-g * (max(0.0, 1 + m - s) * (s - (1 - m)) if loss == "circle" else s - 0.1))
            else:
                push += math.exp(g * (max(0.0, s + m) * (s - m) if loss == "circle" else s + 0.1))
        if any(labels[:, c]):
            pulls.append(math.log(1 + pull))
        pushes.append(math.log(1 + push))
    assert float(found) == pytest.approx(sum(pulls) / len(pulls) + sum(pushes) / len(pushes), rel=1e-4)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_neighbours_are_weighted_by_the_agreement_of_classes(margin):
    hashes, labels = inputs()
    embeddings, rows, temperature = F.normalize(hashes, dim=1), torch.arange(9), 0.2
    images = Embedded(embeddings, labels, rows)
    found = snca_loss(neighbour_log_sums(images, images, temperature, margin))
    sets = [{c for c in range(NUM_CLASSES) if row[c]} for row in labels.tolist()]
    total = 0.0
    for i, e in enumerate(embeddings.double().tolist()):
        weighted = everything = 0.0
        for j, other in enumerate(embeddings.double().tolist()):
            if i != j:
                weight = len(sets[i] & sets[j]) / len(sets[i] | sets[j])
                term = math.exp((sum(a * b for a, b in zip(e, other, strict=True)) - margin * weight) / temperature)
                weighted, everything = weighted + weight * term, everything + term
        total -= math.log(weighted / everything) if weighted else 0
    assert float(found) == pytest.approx(total / 9, rel=1e-4)


def test_an_image_that_shares_no_class_adds_nothing():
    labels = torch.tensor([[1, 1, 0, 0], [0, 1, 0, 0], [0, 0, 1, 1]]).bool()
    embeddings = F.normalize(inputs(3)[0], dim=1).requires_grad_()
    images = Embedded(embeddings, labels, torch.arange(3))
    keys = images._replace(embeddings=embeddings.detach())
    snca_loss(neighbour_log_sums(images, keys, 0.05, 0.1)).backward()
    assert embeddings.grad.isfinite().all()
    assert (embeddings.grad.abs().sum(dim=1) > 0).tolist() == [True, True, False]


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_one_class_each_gives_the_losses_of_single_labels(margin):
    """Of all losses but the classification, which is another one: a softmax becomes independent sigmoids."""
    hashes, _ = inputs()
    labels, matrix = one_class()
    proxies, rows = torch.randn(NUM_CLASSES, 6, generator=torch.Generator().manual_seed(1)), torch.arange(9)
    for loss in (
        lambda y: circle_proxy_loss(hashes, y, proxies, 0.25, 32),
        lambda y: proxy_anchor_loss(hashes, y, proxies),
    ):
        assert torch.equal(loss(labels), loss(matrix))
    single, several = (Embedded(F.normalize(hashes, dim=1), y, rows) for y in (labels, matrix))
    assert torch.equal(
        neighbour_log_sums(single, single, 0.05, margin), neighbour_log_sums(several, several, 0.05, margin)
    )
    scores = torch.rand(2, 9, 9, generator=torch.Generator().manual_seed(2))
    of_labels, of_both = (draw_triplets(y, rows, scores, anchors_with_both(y, rows)) for y in (labels, matrix))
    assert torch.equal(of_labels, of_both)
    drawn, of_matrix = (balanced(y.numpy(), 6, 3, seed=0, epoch=1) for y in (labels, matrix))
    assert (drawn == of_matrix).all()


def test_positives_share_a_class_and_negatives_share_none():
    _, labels = inputs(20, seed=3)
    scores = torch.rand(2, 20, 20, generator=torch.Generator().manual_seed(0))
    rows = torch.arange(20)
    triplets = draw_triplets(labels, rows, scores, anchors_with_both(labels, rows))
    assert len(triplets) > 5
    for anchor, positive, negative in triplets.tolist():
        assert anchor != positive
        assert (labels[anchor] & labels[positive]).any()
        assert not (labels[anchor] & labels[negative]).any()


def test_balanced_batches_draw_images_of_each_class():
    labels = np.array([[1, 0, 0, 0], [1, 1, 0, 0], [0, 1, 1, 0], [0, 0, 1, 0]] * 3, np.bool_)
    for rows in balanced(labels, 6, 2, seed=0, epoch=0):
        assert all(labels[rows][:, c].sum() >= 2 for c in (0, 1, 2))


def test_label_bits_of_several_classes_are_refused():
    config = load_config(DhclConfig, backbone="resnet8", image_size=32, bits=16, label_code="binary", batch_size=3)
    method = Dhcl(config, NUM_CLASSES, 9)
    with pytest.raises(InputError, match="label_code=binary appends the predicted class, but some images have several"):
        method.order(inputs()[1].numpy(), 0)
    assert method.order(one_class()[0].numpy(), 0).shape == (3, 3)
