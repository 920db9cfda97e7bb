"""Convolutional backbones from torchvision, cut before their classifier, and where their weights come from."""

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OTHER_MEAN, OTHER_STD
from orbithash.encoders.networks.resnet8 import resnet8

__all__ = ["BACKBONES", "MIN_SIDE_PX", "NORMS", "build_backbone", "load_weights", "num_features"]

# Their own ending, and the second classifiers that help them to train, which torchvision's weights have too.
_CLASSIFIERS = ("avgpool", "dropout", "fc")
_SECOND_CLASSIFIERS = ("AuxLogits.", "aux1.", "aux2.")


# What lies before the classifier, by family; all end in a feature map [N, D, h, w].
def _features(model: nn.Module) -> nn.Module:
    body: nn.Module = model.get_submodule("features")
    return body


def _stages(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(stage for name, stage in model.named_children() if name not in _CLASSIFIERS))


BACKBONES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "mobilenet_v2": _features,
    "mobilenet_v3_small": _features,
    "mobilenet_v3_large": _features,
    "efficientnet_b0": _features,
    "alexnet": _features,
    "googlenet": _stages,
    "inception_v3": _stages,
    "resnet18": _stages,
    "resnet34": _stages,
    "resnet50": _stages,
    "resnet101": _stages,
    # Ours, for training from random weights on small images.
    "resnet8": lambda model: model,
}

# Trained elsewhere, with pixels from -1 to 1.
_INCEPTIONS = ("googlenet", "inception_v3")

# Of those whose layers leave nothing of a smaller image, or too little to normalise.
MIN_SIDE_PX = {"alexnet": 63, "googlenet": 47, "inception_v3": 75}

NORMS = ("frozen-batch", "group", "batch")

# Groups of group norm. Few for resnet8, whose narrow layers would otherwise have one channel per group and lose each
# channel's mean.
_GROUPS, _GROUPS_RESNET8 = 32, 8


class _PlusMinusOne(nn.Module):
    """Images [N, C, H, W] as `Preprocessing` normalises them to pixels from -1 to 1."""

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean = torch.tensor(IMAGENET_MEAN if channels == 3 else (OTHER_MEAN,) * channels)
        std = torch.tensor(IMAGENET_STD if channels == 3 else (OTHER_STD,) * channels)
        self.register_buffer("scale", (2 * std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (2 * mean - 1).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """See the class."""
        return images * self.scale + self.shift


def _frozen_batch_norm(like: nn.BatchNorm2d) -> nn.Module:
    frozen: nn.Module = FrozenBatchNorm2d(like.num_features, like.eps)
    frozen.load_state_dict(like.state_dict())
    return frozen


def _group_norm(like: nn.BatchNorm2d, max_groups: int) -> nn.Module:
    norm = nn.GroupNorm(math.gcd(max_groups, like.num_features), like.num_features)
    norm.load_state_dict({"weight": like.weight, "bias": like.bias})
    return norm


def _replace_batch_norm(module: nn.Module, make: Callable[[nn.BatchNorm2d], nn.Module]) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.BatchNorm2d):
            setattr(module, name, make(child))
        else:
            _replace_batch_norm(child, make)


def _drop_nothing(module: nn.Module) -> None:
    """Whole branches left out at random would make a resumed run, and other numbers of ranks, train differently."""
    for child in module.modules():
        if isinstance(child, StochasticDepth):
            child.p = 0.0


def _replace_first_convolution(body: nn.Module, channels: int, is_pretrained: bool) -> None:
    """Makes the first convolution take `channels` bands.

    The kernel of pretrained weights is averaged over its three bands, given to each of the C bands and scaled by 3/C:
    an image of C equal bands has the features of the grey image. (CDNE's authors start it at random.)
    """
    path, first = next((path, module) for path, module in body.named_modules() if isinstance(module, nn.Conv2d))
    made = nn.Conv2d(
        channels,
        first.out_channels,
        first.kernel_size,  # type: ignore[arg-type] # a pair, as Conv2d keeps it
        first.stride,  # type: ignore[arg-type]
        first.padding,  # type: ignore[arg-type]
        bias=first.bias is not None,
    )
    nn.init.kaiming_normal_(made.weight, mode="fan_out", nonlinearity="relu")
    with torch.no_grad():
        if is_pretrained:
            made.weight.copy_(first.weight.mean(dim=1, keepdim=True) * 3 / channels)
        if made.bias is not None and first.bias is not None:
            made.bias.copy_(first.bias)
    parent, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent), name, made)


def build_backbone(name: str, norm: str, weights: str | None = None, channels: int = 3) -> nn.Module:
    """Builds backbone `name` from images [N, channels, H, W] to a feature map [N, D, h, w].

    `norm` is one of `NORMS`. The first two give an image the same features in any batch and on any number of ranks:
    frozen batch norm belongs to pretrained weights, group norm to training from scratch. "batch" trains batch norm on
    the statistics of the whole batch, all ranks' images included. `weights` is the name of torchvision weights
    (downloaded once), the path of a safetensors file that holds the state of the whole torchvision model, or None for a
    random start.
    """
    if name not in BACKBONES:
        raise InputError(f"unknown backbone {name!r}; there are {', '.join(BACKBONES)}")
    if norm not in NORMS:
        raise InputError(f"unknown norm {norm!r}; there are {', '.join(NORMS)}")
    if weights is not None and norm == "group":
        raise InputError(f"the weights {weights!r} were trained with batch norm; norm=group takes no weights")
    options = {"aux_logits": False, "init_weights": True} if name in _INCEPTIONS else {}
    model = resnet8() if name == "resnet8" else torchvision.models.get_model(name, weights=None, **options)
    if weights is not None:
        load_weights(model, name, weights)
    body = BACKBONES[name](model)
    if channels != 3:
        _replace_first_convolution(body, channels, is_pretrained=weights is not None)
    if name in _INCEPTIONS:
        body = nn.Sequential(_PlusMinusOne(channels), body)
    if norm == "frozen-batch":
        _replace_batch_norm(body, _frozen_batch_norm)
    elif norm == "group":
        max_groups = _GROUPS_RESNET8 if name == "resnet8" else _GROUPS
        _replace_batch_norm(body, lambda like: _group_norm(like, max_groups))
    _drop_nothing(body)
    return body


def num_features(backbone: nn.Module, channels: int = 3) -> int:
    """D of the feature map that a backbone makes of images of so many bands."""
    was_training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, channels, 96, 96))
    backbone.train(was_training)
    return int(features.shape[1])


def load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Fills torchvision model `name` from a safetensors file or from torchvision's weights of that name."""
    path = Path(weights)
    if path.suffix == ".safetensors" or path.exists():
        state: Mapping[str, torch.Tensor] = _read_safetensors(path)
    else:
        state = _download(name, weights)
    wanted = {key: value.shape for key, value in model.state_dict().items()}
    # A counter of training steps; converted files leave it out and nothing here reads it.
    missing = [key for key in wanted if key not in state and not key.endswith("num_batches_tracked")]
    foreign = [key for key in state if key not in wanted and not key.startswith(_SECOND_CLASSIFIERS)]
    misfit = [key for key in wanted if key in state and state[key].shape != wanted[key]]
    if missing or foreign or misfit:
        example = (missing + foreign + misfit)[0]
        raise InputError(
            f"{weights}: not the weights of backbone {name}: {len(missing)} tensors missing, {len(foreign)} unknown, "
            f"{len(misfit)} of another shape (first: {example}); give the backbone that the weights belong to"
        )
    model.load_state_dict(dict(state), strict=False)


def _read_safetensors(path: Path) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    if not path.is_file():
        raise InputError(f"{path}: no such weights file; give a safetensors file or the name of torchvision weights")
    try:
        state: dict[str, torch.Tensor] = load_file(path)
    except (SafetensorError, OSError) as err:
        raise InputError(f"{path}: not a readable safetensors file ({err})") from err
    return state


def _download(name: str, weights: str) -> Mapping[str, torch.Tensor]:
    if name == "resnet8":
        raise InputError(
            f"weights {weights!r}: no such file, and nobody publishes weights of resnet8; give a safetensors file, "
            "or omit --weights to train from random weights"
        )
    kinds = torchvision.models.get_model_weights(name)
    if weights not in kinds.__members__:
        raise InputError(
            f"weights {weights!r}: neither a file nor torchvision weights of {name}, which are "
            f"{', '.join(kinds.__members__)}"
        )
    try:
        state: Mapping[str, torch.Tensor] = kinds[weights].get_state_dict(check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as err:
        raise InputError(f"weights {weights!r} of {name}: the download failed ({err}); give a local file") from err
    return state
