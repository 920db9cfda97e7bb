"""Changes of layers that backbones share: normalisation, stochastic depth, the number of bands."""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from orbithash.encoders.errors import InputError

__all__ = [
    "adapt_first_convolution",
    "drop_nothing",
    "freeze_batch_norm",
    "group_norm",
    "keep_bfloat16_in_training",
    "set_norm",
]


def _replace_batch_norm(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            _replace_batch_norm(child, make)


def freeze_batch_norm(module: nn.Module) -> None:
    """Replace batch norm by layers that keep the given statistics and parameters."""

    def frozen(like: nn.BatchNorm2d) -> nn.Module:
        if type(like) is not nn.BatchNorm2d:
            # timm's, which contains an activation, too.
            from timm.layers import freeze_batch_norm_2d

            also_activates: nn.Module = freeze_batch_norm_2d(like)
            return also_activates
        norm: nn.Module = FrozenBatchNorm2d(like.num_features, like.eps)
        norm.load_state_dict(like.state_dict())
        return norm

    _replace_batch_norm(module, frozen)


def keep_bfloat16_in_training(module: nn.Module) -> None:
    """Let frozen batch norms return bfloat16 for bfloat16 in training mode.

    Those of torchvision and timm multiply by float32, so that every activation after them takes twice the memory and
    is cast again by the next convolution. In evaluation mode nothing changes: codes stay what they are.
    """
    for child in module.modules():
        # timm's contains dropout and an activation, too.
        if isinstance(child, FrozenBatchNorm2d) or type(child).__name__ == "FrozenBatchNormAct2d":
            # On the object: a wrapping module would change the names of the weights.
            child.forward = partial(_frozen_batch_norm, child)


def _frozen_batch_norm(norm: Any, inputs: Tensor) -> Tensor:
    if not (norm.training and inputs.dtype == torch.bfloat16):
        unchanged: Tensor = type(norm).forward(norm, inputs)
        return unchanged
    # One kernel, which computes in float32.
    outputs = F.batch_norm(inputs, norm.running_mean, norm.running_var, norm.weight, norm.bias, eps=norm.eps)
    for name in ("drop", "act"):
        if hasattr(norm, name):
            outputs = getattr(norm, name)(outputs)
    return outputs


def group_norm(module: nn.Module, max_groups: int) -> None:
    """Replace batch norm by group norm of at most `max_groups` groups."""

    def group(like: nn.BatchNorm2d) -> nn.Module:
        norm = nn.GroupNorm(math.gcd(max_groups, like.num_features), like.num_features)
        norm.load_state_dict({"weight": like.weight, "bias": like.bias})
        return norm

    _replace_batch_norm(module, group)


def set_norm(module: nn.Module, norm: str) -> str:
    """Freeze batch norm, or leave it with norm "batch"; return the norm for the description of a backbone.

    For the networks of other libraries than torchvision, whose weights belong to their own norm.
    """
    if not any(isinstance(child, nn.BatchNorm2d) for child in module.modules()):
        return "own"
    if norm == "group":
        raise InputError("norm is group, which is for networks of torchvision; use norm=auto, frozen-batch or batch")
    if norm != "batch":
        freeze_batch_norm(module)
        return "frozen-batch"
    return norm


def drop_nothing(module: nn.Module) -> None:
    """Switch off dropout and stochastic depth: a resumed run or another number of ranks would drop other branches."""
    for child in module.modules():
        if isinstance(child, StochasticDepth):
            child.p = 0.0
        elif hasattr(child, "drop_prob"):
            # DropPath of timm and of transformers.
            child.drop_prob = 0.0  # type: ignore[assignment] # a number, not a submodule
        elif isinstance(child, nn.Dropout):
            child.p = 0.0
        elif type(child).__name__ == "PatchDropout":
            # Of open_clip and timm.
            child.prob = 0.0  # type: ignore[assignment] # a number, not a submodule


def adapt_first_convolution(
    body: nn.Module, channels: int, rgb: tuple[int, int, int] | None, is_pretrained: bool
) -> None:
    """Let the first convolution, which takes three bands, take `channels` bands.

    Of pretrained weights, the channels `rgb` keep their filters, and E extra channels get the mean filter divided by E:
    colours keep their meaning, and all extra bands together weigh as much as one colour. Without RGB, each of C
    channels gets the mean filter times 3 / C, so an image of C equal bands has the features of the grey image. (CDNE's
    authors start the filters at random.) The convolution may be that of the patches of a transformer.
    """
    first = next((module for module in body.modules() if isinstance(module, nn.Conv2d)), None)
    if first is None or first.in_channels != 3 or first.groups != 1:
        raise InputError(
            f"this backbone takes images of three bands only, and there are {channels}; choose three bands"
        )
    weight = first.weight.new_empty(first.out_channels, channels, *first.kernel_size)
    if is_pretrained:
        with torch.no_grad():
            mean = first.weight.mean(dim=1, keepdim=True)
            if rgb is not None and channels > 3:
                weight.copy_(mean / (channels - 3))
                weight[:, list(rgb)] = first.weight
            else:
                weight.copy_(mean * 3 / channels)
    else:
        nn.init.kaiming_normal_(weight, mode="fan_out", nonlinearity="relu")
    # Changed in place, so that a subclass of Conv2d with a computed padding stays one.
    first.in_channels, first.weight = channels, nn.Parameter(weight)
