"""The losses that methods share, against double loops over rows and bits."""

import math

import pytest
import torch

from orbithash.trainers.methods.losses import bit_balance_loss, nt_xent, quantisation_loss

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
# Relative. The losses compute in float32 or wider, and the oracle reads the rounded inputs.
TOLERANCE = 1e-4


def views(num, bits=12, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.tanh(torch.randn(num, bits, generator=generator)).to(dtype) for _ in range(2)]


def near_pairs(num):
    """Return a bool [num, num] that marks the pairs 0-2, 1-2 and 3-4 as near; its diagonal is False."""
    near = torch.zeros(num, num, dtype=torch.bool)
    for i, j in ((0, 2), (1, 2), (3, 4)):
        near[i, j] = near[j, i] = True
    return near


def cosine(one, other):
    dot = sum(a * b for a, b in zip(one, other, strict=True))
    return dot / math.sqrt(sum(a * a for a in one)) / math.sqrt(sum(b * b for b in other))


def nt_xent_oracle(first, second, temperature, cross_only, near, near_as):
    rows = first.double().tolist() + second.double().tolist()
    num, losses = len(first), []
    for i, row in enumerate(rows):
        columns = []
        for j in range(2 * num):
            other_view, same_item = (i < num) != (j < num), i % num == j % num
            if j == i or (cross_only and not other_view):
                continue
            is_near = bool(near[i % num, j % num]) and not same_item
            if is_near and near_as == "ignored":
                continue
            columns.append((j, same_item or (is_near and near_as == "positives")))
        exponents = [cosine(row, rows[j]) / temperature for j, _ in columns]
        largest = max(exponents)
        log_sum = largest + math.log(sum(math.exp(x - largest) for x in exponents))
        own = [log_sum - x for x, (_, positive) in zip(exponents, columns, strict=True) if positive]
        losses.append(sum(own) / len(own))
    return sum(losses) / len(losses)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("near_as", ["negatives", "ignored", "positives"])
@pytest.mark.parametrize("cross_only", [False, True])
@pytest.mark.parametrize("temperature", [1.0, 0.1])
def test_nt_xent_matches_a_double_loop(temperature, cross_only, near_as, dtype):
    first, second = views(7, dtype=dtype)
    near = near_pairs(7)
    found = nt_xent(first, second, temperature, cross_only, near, near_as)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = nt_xent_oracle(first, second, temperature, cross_only, near, near_as)
    assert float(found) == pytest.approx(expected, rel=TOLERANCE)


def test_near_as_has_no_effect_without_near_pairs():
    first, second = views(5)
    plain = nt_xent(first, second, 0.5)
    for near_as in ("ignored", "positives"):
        assert float(nt_xent(first, second, 0.5, near=torch.eye(5, dtype=torch.bool), near_as=near_as)) == float(plain)


@pytest.mark.parametrize("num", [0, 1])
@pytest.mark.parametrize("near_as", ["negatives", "ignored", "positives"])
def test_nt_xent_without_negatives_is_zero(num, near_as):
    first, second = (view.requires_grad_() for view in views(num))
    loss = nt_xent(first, second, 0.1, near=torch.ones(num, num, dtype=torch.bool), near_as=near_as)
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-6)
    assert first.grad.shape == (num, 12)
    assert not first.grad.isnan().any()


@pytest.mark.parametrize("near_as", ["negatives", "ignored", "positives"])
@pytest.mark.parametrize("cross_only", [False, True])
def test_all_pairs_near_and_large_hashes_do_not_overflow(cross_only, near_as):
    first, second = ((1e4 * view).to(torch.float16).requires_grad_() for view in views(6))
    near = torch.ones(6, 6, dtype=torch.bool)
    loss = nt_xent(first, second, 0.01, cross_only, near, near_as)
    loss.backward()
    assert math.isfinite(float(loss.detach()))
    assert first.grad.isfinite().all()
    assert second.grad.isfinite().all()


def test_a_zero_hash_has_a_finite_gradient():
    first, second = views(4)
    first[0] = 0
    first.requires_grad_()
    nt_xent(first, second, 0.1).backward()
    assert first.grad.isfinite().all()


@pytest.mark.parametrize("near_as", ["negatives", "ignored", "positives"])
def test_a_step_down_pulls_pairs_together_and_pushes_others_away(near_as):
    first, second = (view.double().requires_grad_() for view in views(6))
    near = near_pairs(6)
    # Only the gradient of the second view is taken; the first view stays as it is.
    loss = nt_xent(first, second, 0.5, cross_only=True, near=near, near_as=near_as)
    (gradient,) = torch.autograd.grad(loss, second)

    def change(i):
        moved = torch.nn.functional.normalize(second - 1e-3 * gradient, dim=1)
        before = torch.nn.functional.normalize(second, dim=1)
        anchors = torch.nn.functional.normalize(first, dim=1)
        return float(((moved - before) @ anchors.T).diagonal()[i].detach())

    assert all(change(i) > 0 for i in range(6))


# Quantisation.


@pytest.mark.parametrize("dtype", DTYPES)
def test_quantisation_matches_a_double_loop(dtype):
    hashes = views(9, dtype=dtype)[0]
    total = sum((h - (1 if h >= 0 else -1)) ** 2 for row in hashes.double().tolist() for h in row)
    found = quantisation_loss(hashes)
    assert found.dtype == torch.float32
    # Half precision rounds the difference before it is squared.
    tolerance = {torch.float16: 2e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5)
    assert float(found) == pytest.approx(total / hashes.numel(), rel=tolerance)


def test_quantisation_treats_zero_as_one_and_pulls_outwards():
    hashes = torch.tensor([[0.0, -0.0, 0.5, -0.5, 1.0, -1.0]], requires_grad=True)
    found = quantisation_loss(hashes)
    found.backward()
    assert float(found.detach()) == pytest.approx((1 + 1 + 0.25 + 0.25) / 6)
    assert hashes.grad[0].tolist() == pytest.approx([-2 / 6, -2 / 6, -1 / 6, 1 / 6, 0, 0])


# Bit balance.


@pytest.mark.parametrize("centre", [0.0, 0.5])
@pytest.mark.parametrize("dtype", DTYPES)
def test_bit_balance_matches_a_double_loop(dtype, centre):
    outputs = views(9, dtype=dtype)[0]
    rows = outputs.double().tolist()
    squares = [(sum(row[k] for row in rows) / 9 - centre) ** 2 for k in range(12)]
    assert float(bit_balance_loss(outputs, centre)) == pytest.approx(sum(squares) / 12, rel=TOLERANCE)


def test_shared_losses_of_an_empty_batch_are_zero():
    empty = torch.empty(0, 12, requires_grad=True)
    loss = quantisation_loss(empty) + bit_balance_loss(empty, 0.5)
    loss.backward()
    assert float(loss.detach()) == 0
    assert empty.grad.shape == (0, 12)
