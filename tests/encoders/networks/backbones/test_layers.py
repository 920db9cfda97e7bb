"""Frozen batch norm in bfloat16: in training it stays bfloat16, in evaluation and in float32 nothing changes."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.backbones.layers import freeze_batch_norm, keep_bfloat16_in_training


def frozen_norms(kind):
    """A frozen norm with random statistics, as built and as in training in bfloat16, and the layer it was made of."""
    torch.manual_seed(0)
    norm = kind(6)
    for tensor in (norm.weight.data, norm.running_var):
        tensor.uniform_(0.5, 2)
    for tensor in (norm.bias.data, norm.running_mean):
        tensor.uniform_(-1, 1)
    body = nn.Sequential(copy.deepcopy(norm))
    freeze_batch_norm(body)
    kept = copy.deepcopy(body)
    keep_bfloat16_in_training(kept)
    return body.train(), kept.train(), norm.eval()


def maps():
    return torch.randn(3, 6, 5, 5, generator=torch.Generator().manual_seed(1)) * 3


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_frozen_norm_in_bfloat16(kind):
    built, kept, original = frozen_norms(kind)
    assert kept.state_dict().keys() == built.state_dict().keys()
    inputs = maps().to(torch.bfloat16)
    # The norm itself in float64, then its activation.
    expected = original.double()(inputs.double())
    assert built(inputs).dtype == torch.float32
    assert kept(inputs).dtype == torch.bfloat16
    # The result is rounded to the 8 bits of bfloat16 once.
    torch.testing.assert_close(kept(inputs).double(), expected, rtol=2**-8, atol=1e-5)
    torch.testing.assert_close(built(inputs).double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_frozen_norm_elsewhere_is_unchanged_bit_for_bit(kind):
    built, kept, _ = frozen_norms(kind)
    assert torch.equal(kept(maps()), built(maps()))
    inputs = maps().to(torch.bfloat16)
    evaluated = kept.eval()(inputs)
    assert evaluated.dtype == torch.float32
    assert torch.equal(evaluated, built.eval()(inputs))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_all_activations_of_a_backbone_are_bfloat16_in_training(name):
    torch.manual_seed(0)
    backbone = build_backbone(name, norm="frozen-batch").train()
    exact = copy.deepcopy(backbone)
    keep_bfloat16_in_training(backbone)
    dtypes = set()
    for module in backbone.body.modules():
        if not any(True for _ in module.children()):
            module.register_forward_hook(lambda module, inputs, output: dtypes.add(output.dtype))
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.autocast("cpu", torch.bfloat16):
        narrow = backbone(images)
    assert dtypes == {torch.bfloat16}
    # Gradients pass the norms.
    (narrow.float() ** 2).sum().backward()
    wide = exact(images)
    (wide**2).sum().backward()
    assert (narrow.float() - wide).norm() < 0.05 * wide.norm()
    gradients = [torch.cat([p.grad.double().flatten() for p in each.parameters()]) for each in (backbone, exact)]
    first, second = (gradient / gradient.norm() for gradient in gradients)
    assert first @ second > 0.95
    # In evaluation mode the codes of models in bfloat16 stay what they are.
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(backbone.eval()(images), exact.eval()(images))
