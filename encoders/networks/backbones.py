"""Convolutional backbones from torchvision, without their classifiers, and their pretrained weights."""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d, StochasticDepth

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OTHER_MEAN, OTHER_STD
from orbithash.encoders.networks.resnet8 import resnet8

__all__ = [
    "BACKBONES",
    "DEFAULT_RGB",
    "MIN_SIDE_PX",
    "NORMS",
    "build_backbone",
    "load_weights",
    "num_features",
    "rgb_channels",
]

# Names of the classifier's layers, and name prefixes of the auxiliary classifiers in torchvision's weights.
_CLASSIFIERS = ("avgpool", "dropout", "fc")
_SECOND_CLASSIFIERS = ("AuxLogits.", "aux1.", "aux2.")


# The layers before the classifier, for each family of networks; the output is a feature map [N, D, h, w].
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

# Their weights were trained in TensorFlow, on pixels from -1 to 1.
_INCEPTIONS = ("googlenet", "inception_v3")

# Smallest image side of backbones whose layers would shrink a smaller image to nothing.
MIN_SIDE_PX = {"alexnet": 63, "googlenet": 47, "inception_v3": 75}

NORMS = ("frozen-batch", "group", "batch")

# Groups of group norm. Few for resnet8, whose narrow layers would otherwise have one channel per group and lose each
# channel's mean.
_GROUPS, _GROUPS_RESNET8 = 32, 8

# Channels of red, green and blue where band names do not say otherwise.
DEFAULT_RGB = (0, 1, 2)

# Names of red, green and blue bands, in lower case without zeros after the letter; the first is Sentinel-2's.
_COLOUR_NAMES = (("b4", "b3", "b2"), ("red", "green", "blue"), ("r", "g", "b"), ("sr_b4", "sr_b3", "sr_b2"))


class _PlusMinusOne(nn.Module):
    """Rescale images [N, C, H, W] from the normalisation of `Preprocessing` to pixels from -1 to 1."""

    scale: Tensor
    shift: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        mean = torch.tensor(IMAGENET_MEAN if channels == 3 else (OTHER_MEAN,) * channels)
        std = torch.tensor(IMAGENET_STD if channels == 3 else (OTHER_STD,) * channels)
        self.register_buffer("scale", (2 * std).view(-1, 1, 1), persistent=False)
        self.register_buffer("shift", (2 * mean - 1).view(-1, 1, 1), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return images with pixels from -1 to 1."""
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
    """Switch off stochastic depth: a resumed run or another number of ranks would drop other branches."""
    for child in module.modules():
        if isinstance(child, StochasticDepth):
            child.p = 0.0


def rgb_channels(bands: Sequence[int | str] | None) -> tuple[int, int, int] | None:
    """Return the channels of red, green and blue among the bands of an image, None if names show no RGB.

    `bands` are those of `Rendering`: names such as B04, B03, B02 or red, green, blue, or numbers counted from 1, of
    which 1, 2, 3 are red, green and blue. Numbers without these three are taken to begin with RGB, as for pictures.
    """
    if bands is None or not all(isinstance(band, str) for band in bands):
        positions = {band: channel for channel, band in enumerate(bands or ())}
        return (positions[1], positions[2], positions[3]) if {1, 2, 3} <= positions.keys() else DEFAULT_RGB
    found = {re.sub(r"^b0+(?=\d)", "b", str(band).lower()): channel for channel, band in enumerate(bands)}
    for red, green, blue in _COLOUR_NAMES:
        if {red, green, blue} <= found.keys():
            return found[red], found[green], found[blue]
    return None


def _replace_first_convolution(
    body: nn.Module, channels: int, rgb: tuple[int, int, int] | None, is_pretrained: bool
) -> None:
    """Replace the first convolution by one of `channels` bands.

    Of pretrained weights, the channels `rgb` keep their filters, and E extra channels get the mean filter divided by E:
    colours keep their meaning, and all extra bands together weigh as much as one colour. Without RGB, each of C
    channels gets the mean filter times 3 / C, so an image of C equal bands has the features of the grey image. (CDNE's
    authors start the filters at random.)
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
            mean = first.weight.mean(dim=1, keepdim=True)
            if rgb is not None and channels > 3:
                made.weight.copy_(mean / (channels - 3))
                made.weight[:, list(rgb)] = first.weight
            else:
                made.weight.copy_(mean * 3 / channels)
        if made.bias is not None and first.bias is not None:
            made.bias.copy_(first.bias)
    parent, _, name = path.rpartition(".")
    setattr(body.get_submodule(parent), name, made)


def build_backbone(
    name: str,
    norm: str,
    weights: str | None = None,
    channels: int = 3,
    rgb: tuple[int, int, int] | None = DEFAULT_RGB,
) -> nn.Module:
    """Build a backbone: images float [N, channels, H, W] to a feature map [N, D, h, w].

    Args:
        name: one of `BACKBONES`.
        norm: one of `NORMS`. With frozen batch norm, which belongs to pretrained weights, and group norm, for training
            from scratch, the features of an image do not depend on the other images of the batch or on the number of
            ranks. "batch" trains batch norm on the statistics of the whole batch, over all ranks.
        weights: name of torchvision weights (downloaded once), path of a safetensors file with the state of the whole
            torchvision model, or None for random weights.
        channels: number of bands of an image.
        rgb: channels of red, green and blue, which keep the pretrained filters if there are more than three channels;
            None for bands without RGB. See `rgb_channels`.
    """
    if name not in BACKBONES:
        raise InputError(f"backbone is {name!r}; allowed are {', '.join(BACKBONES)}")
    if norm not in NORMS:
        raise InputError(f"norm is {norm!r}; allowed are {', '.join(NORMS)}")
    if weights is not None and norm == "group":
        raise InputError(
            f"the weights {weights!r} were trained with batch norm, but norm is group; use frozen-batch or no weights"
        )
    options = {"aux_logits": False, "init_weights": True} if name in _INCEPTIONS else {}
    model = resnet8() if name == "resnet8" else torchvision.models.get_model(name, weights=None, **options)
    if weights is not None:
        load_weights(model, name, weights)
    body = BACKBONES[name](model)
    if channels != 3:
        _replace_first_convolution(body, channels, rgb, is_pretrained=weights is not None)
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
    """Return D of the feature map [N, D, h, w] of a backbone for images of `channels` bands."""
    was_training = backbone.training
    with torch.no_grad():
        features = backbone.eval()(torch.zeros(1, channels, 96, 96))
    backbone.train(was_training)
    return int(features.shape[1])


def load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Load the weights of torchvision model `name` from a safetensors file or by the name of torchvision weights."""
    path = Path(weights)
    if path.suffix == ".safetensors" or path.exists():
        state: Mapping[str, torch.Tensor] = _read_safetensors(path)
    else:
        state = _download(name, weights)
    expected = {key: value.shape for key, value in model.state_dict().items()}
    # num_batches_tracked is missing in converted files, and nothing here reads it.
    missing = [key for key in expected if key not in state and not key.endswith("num_batches_tracked")]
    unknown = [key for key in state if key not in expected and not key.startswith(_SECOND_CLASSIFIERS)]
    misfit = [key for key in expected if key in state and state[key].shape != expected[key]]
    if missing or unknown or misfit:
        example = (missing + unknown + misfit)[0]
        raise InputError(
            f"{weights}: not the weights of backbone {name}: {len(missing)} tensors missing, {len(unknown)} unknown, "
            f"{len(misfit)} of another shape (first: {example}); give the weights of this backbone"
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
