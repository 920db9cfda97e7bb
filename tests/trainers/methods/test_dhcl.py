"""DHCL: its losses against double loops over images and classes in Python floats, its settings and its batches."""

import math

import numpy as np
import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.methods import METHODS, Batch, get_method
from orbithash.trainers.methods.dhcl import (
    Dhcl,
    DhclConfig,
    circle_proxy_loss,
    proxy_anchor_loss,
)
from orbithash.trainers.methods.losses import quantisation_loss

# Relative, for all dtypes: the losses compute in float32, and the oracle reads the already rounded inputs.
TOLERANCE = 1e-4
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
LOSSES = ["circle", "anchor"]


def cosine(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def log_one_plus_sum(exponents):
    """Return log(1 + sum of exp(x)) without overflow."""
    largest = max([0.0, *exponents])
    return largest + math.log(math.exp(-largest) + sum(math.exp(x - largest) for x in exponents))


def oracle(hashes, labels, proxies, pull_exponent, push_exponent):
    pulls, pushes = [], []
    for c, proxy in enumerate(proxies):
        own = [pull_exponent(cosine(h, proxy)) for h, y in zip(hashes, labels, strict=True) if y == c]
        others = [push_exponent(cosine(h, proxy)) for h, y in zip(hashes, labels, strict=True) if y != c]
        if own:
            pulls.append(log_one_plus_sum(own))
        pushes.append(log_one_plus_sum(others))
    return (sum(pulls) / len(pulls) if pulls else 0.0) + sum(pushes) / len(pushes)


def circle_oracle(hashes, labels, proxies, m, g):
    return oracle(
        hashes,
        labels,
        proxies,
        lambda s: -g * max(0.0, 1 + m - s) * (s - (1 - m)),
        lambda s: g * max(0.0, s + m) * (s - m),
    )


def anchor_oracle(hashes, labels, proxies, delta, g):
    return oracle(hashes, labels, proxies, lambda s: -g * (s - delta), lambda s: g * (s + delta))


def inputs(num, num_classes, bits=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    hashes = torch.tanh(torch.randn(num, bits, generator=generator)).to(dtype)
    labels = torch.randint(num_classes, (num,), generator=generator)
    return hashes, labels, torch.randn(num_classes, bits, generator=generator).to(dtype)


def value(loss, hashes, labels, proxies, scale=32.0):
    if loss == "circle":
        return circle_proxy_loss(hashes, labels, proxies, 0.25, scale)
    return proxy_anchor_loss(hashes, labels, proxies, 0.1, scale)


def expected(loss, hashes, labels, proxies, scale=32.0):
    numbers = hashes.double().tolist(), labels.tolist(), proxies.double().tolist()
    return circle_oracle(*numbers, 0.25, scale) if loss == "circle" else anchor_oracle(*numbers, 0.1, scale)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("num", "num_classes"), [(1, 1), (1, 4), (2, 2), (9, 3), (20, 21)])
def test_proxy_losses_match_a_double_loop(loss, dtype, num, num_classes):
    for seed in range(3):
        x = inputs(num, num_classes, seed=seed, dtype=dtype)
        found = value(loss, *x)
        assert found.dtype == torch.float32
        assert found.shape == ()
        assert float(found) == pytest.approx(expected(loss, *x), rel=TOLERANCE, abs=1e-5)


@pytest.mark.parametrize("scale", [1.0, 8.0, 256.0])
@pytest.mark.parametrize("loss", LOSSES)
def test_losses_match_a_double_loop_at_every_scale(loss, scale):
    x = inputs(10, 4)
    assert float(value(loss, *x, scale)) == pytest.approx(expected(loss, *x, scale), rel=1e-4)


@pytest.mark.parametrize("margin", [0.05, 0.4, 0.9])
def test_losses_match_a_double_loop_at_every_margin(margin):
    hashes, labels, proxies = inputs(10, 4)
    found = circle_proxy_loss(hashes, labels, proxies, margin, 32.0)
    numbers = hashes.double().tolist(), labels.tolist(), proxies.double().tolist()
    assert float(found) == pytest.approx(circle_oracle(*numbers, margin, 32.0), rel=1e-4)


@pytest.mark.parametrize("loss", LOSSES)
def test_a_batch_of_one_class(loss):
    hashes, _, proxies = inputs(6, 4)
    labels = torch.full((6,), 2)
    assert float(value(loss, hashes, labels, proxies)) == pytest.approx(
        expected(loss, hashes, labels, proxies), rel=1e-4
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("loss", LOSSES)
def test_loss_of_an_empty_batch_is_zero_and_has_gradients(loss, dtype):
    hashes = torch.zeros(0, 8, dtype=dtype, requires_grad=True)
    proxies = torch.randn(3, 8).to(dtype).requires_grad_()
    found = value(loss, hashes, torch.zeros(0, dtype=torch.int64), proxies) + quantisation_loss(hashes)
    found.backward()
    assert float(found.detach()) == 0
    assert hashes.grad.shape == (0, 8)
    assert not proxies.grad.any()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scale", [32.0, 256.0])
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("size", ["zero", "one zero", "tiny", "huge", "on the proxy", "against the proxy"])
def test_extreme_hashes_do_not_overflow(loss, scale, dtype, size):
    hashes, labels, proxies = inputs(6, 3, dtype=dtype)
    if size == "zero":
        hashes = torch.zeros_like(hashes)
    elif size == "one zero":
        hashes[2] = 0
    elif size == "tiny":
        hashes = hashes * torch.finfo(dtype).tiny
    elif size == "huge":
        hashes = hashes * (6e4 if dtype == torch.float16 else 1e15)
    else:
        hashes = proxies[labels].clone() if size == "on the proxy" else -proxies[labels]
    hashes.requires_grad_()
    proxies.requires_grad_()
    found = value(loss, hashes, labels, proxies, scale)
    found.backward()
    assert math.isfinite(found.detach())
    assert proxies.grad.isfinite().all()
    # The gradient of a cosine grows as its vector shrinks and overflows half precision; the network uses float32.
    if dtype in (torch.float32, torch.float64):
        assert hashes.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_pulls_an_image_to_its_own_proxy_and_away_from_the_others(loss):
    # The image lies between three orthogonal proxies, nearest to one of another class.
    proxies = torch.eye(3, 8)
    hashes = torch.tensor([[0.4, 0.6, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1]], requires_grad=True)
    value(loss, hashes, torch.tensor([0]), proxies).backward()
    before = torch.cosine_similarity(hashes, proxies)
    after = torch.cosine_similarity(hashes - 1e-3 * hashes.grad, proxies)
    assert after[0] > before[0]
    assert after[1] < before[1]
    assert after[2] < before[2]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_step_pulls_a_proxy_to_its_own_images_and_away_from_the_others(loss):
    hashes = torch.eye(2, 8)
    proxies = torch.tensor([[0.5, 0.6, 0.3, 0, 0, 0, 0, 0], [0.6, 0.5, 0.3, 0, 0, 0, 0, 0]], requires_grad=True)
    value(loss, hashes, torch.tensor([0, 1]), proxies).backward()
    with torch.no_grad():
        moved = proxies - 1e-3 * proxies.grad
        for c in (0, 1):
            before, after = (torch.cosine_similarity(p[c : c + 1], hashes) for p in (proxies, moved))
            assert after[c] > before[c]
            assert after[1 - c] < before[1 - c]


@pytest.mark.parametrize("loss", LOSSES)
def test_training_on_the_loss_alone_separates_the_classes(loss):
    hashes, labels, proxies = inputs(12, 3)
    x = torch.atanh(hashes * 0.9).requires_grad_()
    proxies.requires_grad_()
    optimizer = torch.optim.Adam([x, proxies], lr=0.05)
    for _ in range(100):
        optimizer.zero_grad()
        value(loss, torch.tanh(x), labels, proxies).backward()
        optimizer.step()
    cosines = torch.nn.functional.normalize(torch.tanh(x), dim=1) @ torch.nn.functional.normalize(proxies, dim=1).T
    is_own = torch.nn.functional.one_hot(labels, 3).bool()
    assert cosines[is_own].min() > cosines[~is_own].max() + 0.2


def circle_slopes(hashes, labels, proxies, m, g):
    """Return the loss's derivative by each cosine, with the weights a+ and a- constant, as a list [N][C]."""
    num, num_classes = len(hashes), len(proxies)
    slopes = [[0.0] * num_classes for _ in range(num)]
    num_present = len(set(labels))
    for c, proxy in enumerate(proxies):
        s = [cosine(h, proxy) for h in hashes]
        pace = [max(0.0, 1 + m - s[i]) if labels[i] == c else max(0.0, s[i] + m) for i in range(num)]
        exponents = [
            -g * pace[i] * (s[i] - (1 - m)) if labels[i] == c else g * pace[i] * (s[i] - m) for i in range(num)
        ]
        for own in (True, False):
            rows = [i for i in range(num) if (labels[i] == c) == own]
            total = 1 + sum(math.exp(exponents[i]) for i in rows)
            for i in rows:
                share = math.exp(exponents[i]) / total
                slopes[i][c] = -g * pace[i] * share / num_present if own else g * pace[i] * share / num_classes
    return slopes


def test_the_weights_of_the_circle_form_carry_no_gradient():
    hashes, labels, proxies = inputs(7, 3, bits=5)
    slopes = circle_slopes(hashes.double().tolist(), labels.tolist(), proxies.double().tolist(), 0.25, 8.0)
    hashes.requires_grad_()
    circle_proxy_loss(hashes, labels, proxies, 0.25, 8.0).backward()
    # Torch differentiates the cosines; the derivatives of the loss by the cosines are computed above.
    again = hashes.detach().double().requires_grad_()
    cosines = torch.cosine_similarity(again[:, None], proxies.double()[None], dim=2)
    cosines.backward(torch.tensor(slopes, dtype=torch.float64))
    assert torch.allclose(hashes.grad.double(), again.grad, rtol=1e-4, atol=1e-6)


def test_an_image_beyond_the_margin_is_not_repelled():
    """A cosine below -m has weight 0, hence exponent 0 and no gradient."""
    proxies = torch.tensor([[1.0, 0.0], [-1.0, 0.1]])
    hashes = torch.tensor([[1.0, 0.0]], requires_grad=True)
    found = circle_proxy_loss(hashes, torch.tensor([0]), proxies, 0.25, 32.0)
    s = cosine([1.0, 0.0], [-1.0, 0.1])
    assert s < -0.25
    assert float(found.detach()) == pytest.approx(
        math.log(1 + math.exp(-32 * 0.25 * 0.25)) + (math.log(1 + math.exp(0)) + math.log(1)) / 2, rel=1e-5
    )
    found.backward()
    assert hashes.grad.abs().max() < 1e-5


# The method.


def make(num_classes=3, **settings):
    torch.manual_seed(0)
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, **settings}
    return Dhcl(load_config(DhclConfig, **given), num_classes, 10)


def make_batch(images, labels):
    return Batch(torch.arange(len(labels)), labels, images, {}, 0)


EMPTY_PART = Part(None, np.empty(0, np.int64), [])


def cross_entropy_oracle(logits, label, smoothing):
    """Return the cross-entropy with the fraction `smoothing` of the target spread evenly over all classes."""
    log_sum = math.log(sum(math.exp(x) for x in logits))
    own, spread = log_sum - logits[label], sum(log_sum - x for x in logits) / len(logits)
    return (1 - smoothing) * own + smoothing * spread


@pytest.mark.parametrize("proxy_loss", ["circle", "proxy-anchor"])
def test_the_loss_is_the_weighted_sum_of_its_parts(proxy_loss):
    settings = {"classification_weight": 0.3, "quantisation_weight": 7.0, "scale": 8, "margin": 0.2}
    method = make(proxy_loss=proxy_loss, label_smoothing=0.25, **settings).eval()
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 1, 1])
    with torch.no_grad():
        found = method(make_batch(images, labels))
        hashes, logits = method.network(images)
    numbers = hashes.double().tolist(), labels.tolist(), method.proxies.detach().double().tolist()
    proxy = circle_oracle(*numbers, 0.2, 8) if proxy_loss == "circle" else anchor_oracle(*numbers, 0.1, 8)
    cross_entropy = 0.0
    for row, label in zip(logits.double().tolist(), labels.tolist(), strict=True):
        cross_entropy += cross_entropy_oracle(row, label, 0.25) / 5
    distance = sum((abs(h) - 1) ** 2 for row in numbers[0] for h in row) / (5 * 16)
    assert float(found["proxy"]) == pytest.approx(proxy, rel=1e-4)
    assert float(found["classification"]) == pytest.approx(cross_entropy, rel=1e-4)
    assert float(found["quantisation"]) == pytest.approx(distance, rel=1e-4)
    assert float(found["loss"]) == pytest.approx(proxy + 0.3 * cross_entropy + 7 * distance, rel=1e-4)


def test_every_parameter_is_in_one_group_and_gets_a_gradient():
    method = make()
    optimizer = method.build_optimizer()
    grouped = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in method.parameters())
    method(make_batch(torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])))["loss"].backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in method.parameters())
    assert method.proxies.grad.any()
    assert method.network.classifier.weight.grad.any()


def test_learning_rates_of_the_groups():
    method = make(lr=0.001, head_lr_factor=10, proxy_lr_factor=50)
    rates = {id(p): group["lr"] for group in method.build_optimizer().param_groups for p in group["params"]}
    assert rates[id(method.proxies)] == pytest.approx(0.05)
    assert rates[id(method.network.classifier.weight)] == pytest.approx(0.01)
    assert rates[id(method.network.head.output.weight)] == pytest.approx(0.01)
    assert all(rates[id(p)] == 0.001 for p in method.network.backbone.parameters())


def test_the_warm_up_freezes_only_the_backbone():
    method = make(warm_up_epochs=2)
    for epoch, expected_training in ((0, False), (1, False), (2, True), (3, True)):
        method.start_epoch(epoch, EMPTY_PART)
        backbone = {p.requires_grad for p in method.network.backbone.parameters()}
        rest = {p.requires_grad for name, p in method.named_parameters() if not name.startswith("network.backbone.")}
        assert (backbone, rest) == ({expected_training}, {True})


def test_counted_label_bits_shorten_the_hash():
    method = make(num_classes=21, bits=16, label_code="binary", count_label_bits=True)
    assert method.network.spec.bits == 11
    assert method.proxies.shape == (21, 11)
    assert method.label_code == ("binary", 1)


def test_methods_by_name():
    assert METHODS["dhcl"] is get_method("dhcl") is Dhcl
    with pytest.raises(InputError, match=r"'dhlc'; there are .*dhcl"):
        get_method("dhlc")


def test_nested_lengths_average_the_losses_of_the_prefixes():
    method = make(nested_bits=(8, 12), scale=8).eval()
    images, labels = torch.randn(5, 3, 32, 32), torch.tensor([0, 1, 2, 1, 1])
    with torch.no_grad():
        found = method(make_batch(images, labels))
        hashes = method.network(images).hashes
    proxy = cross_entropy = 0.0
    weight, bias = (p.detach().double().tolist() for p in method.network.classifier.parameters())
    for k in (8, 12, 16):
        rows = hashes[:, :k].double().tolist()
        proxy += circle_oracle(rows, labels.tolist(), method.proxies[:, :k].detach().double().tolist(), 0.25, 8) / 3
        for row, label in zip(rows, labels.tolist(), strict=True):
            logits = [
                sum(h * w for h, w in zip(row, ws[:k], strict=True)) + b for ws, b in zip(weight, bias, strict=True)
            ]
            cross_entropy += cross_entropy_oracle(logits, label, 0.1) / 5 / 3
    assert float(found["proxy"]) == pytest.approx(proxy, rel=1e-4)
    assert float(found["classification"]) == pytest.approx(cross_entropy, rel=1e-4)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"nested_bits": (16,)}, r"nested_bits \[16\]: 8 to 15 are allowed"),
        ({"nested_bits": (4,)}, r"nested_bits \[4\]"),
        ({"nested_bits": (8,), "label_code": "gray"}, "would lack the label bits"),
    ],
)
def test_invalid_nested_lengths_are_refused(settings, message):
    with pytest.raises(InputError, match=message):
        make(**settings)


def test_balanced_batches_hold_equally_many_images_of_each_class():
    labels = np.repeat(np.arange(5), (9, 9, 9, 9, 2))
    method = make(num_classes=5, images_per_class=3, batch_size=9)
    steps = method.order(labels, 0)
    assert steps.shape == (4, 9)
    for rows in steps:
        classes, counts = np.unique(labels[rows], return_counts=True)
        assert (len(classes), counts.tolist()) == (3, [3, 3, 3])
    assert (steps == method.order(labels, 0)).all()
    assert (steps != method.order(labels, 1)).any()
