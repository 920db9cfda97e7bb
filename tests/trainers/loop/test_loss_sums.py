"""Sums of losses, checked in each step or once in several steps."""

import math

import pytest
import torch

from orbithash.encoders.errors import InputError
from orbithash.trainers.loop import losses
from orbithash.trainers.loop.losses import LossSums

CPU = torch.device("cpu")


def step_losses(*values):
    return [{"other": torch.tensor(3.0), "loss": torch.tensor(value, requires_grad=True)} for value in values]


def test_sums_are_those_of_python_floats_bit_for_bit():
    values = torch.rand(1000, generator=torch.Generator().manual_seed(0))
    sums = LossSums(1, CPU)
    total = 0.0
    for step, value in enumerate(values, start=1):
        sums.add(step, {"other": 3 * value, "loss": value})
        total += float(value)
    assert sums.names == ["other", "loss"]
    assert sums.totals()[1].item() == total
    assert not sums.totals().requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_on_a_cpu_the_step_itself_is_refused(value):
    sums = LossSums(3, CPU)
    first, second = step_losses(1.0, value)
    sums.add(1, first)
    with pytest.raises(InputError, match=f"the loss is {value} in epoch 3, step 2; try a smaller lr or scale"):
        sums.add(2, second)


@pytest.mark.parametrize("num_steps", [5, 8])
def test_on_a_gpu_the_first_bad_step_is_named_later(monkeypatch, num_steps):
    sums = LossSums(1, CPU)
    monkeypatch.setattr(sums, "_interval", 4)
    given = step_losses(*[1.0] * 4, math.inf, math.nan, 1.0, math.nan)[:num_steps]
    for step, each in enumerate(given[:7], start=1):
        sums.add(step, each)
    # Step 5 is found by the check of step 8, or at the end.
    with pytest.raises(InputError, match="the loss is inf in epoch 1, step 5"):
        sums.totals() if num_steps == 5 else sums.add(8, given[7])


def test_other_losses_may_be_infinite():
    sums = LossSums(1, CPU)
    sums.add(1, {"other": torch.tensor(math.inf), "loss": torch.tensor(1.0)})
    assert sums.totals().tolist() == [math.inf, 1.0]
    assert losses.GPU_INTERVAL > 1
