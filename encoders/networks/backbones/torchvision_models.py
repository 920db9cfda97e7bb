"""Convolutional backbones from torchvision, without their classifiers, and their pretrained weights."""

from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import torchvision
from torch import Tensor, nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import IMAGENET_MEAN, IMAGENET_STD, OTHER_MEAN, OTHER_STD
from orbithash.encoders.networks.backbones.backbone import Backbone, Request, Source
from orbithash.encoders.networks.backbones.layers import (
    adapt_first_convolution,
    drop_nothing,
    freeze_batch_norm,
    group_norm,
)
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.resnet8 import resnet8
from orbithash.encoders.networks.backbones.weights import is_file_name, load_state, origin_of_file, read_safetensors
from orbithash.encoders.networks.card import RANDOM_WEIGHTS, BackboneSpec

__all__ = ["SOURCE", "TorchvisionBackbone"]

# Names of the classifier's layers, and name prefixes of the auxiliary classifiers in torchvision's weights.
_CLASSIFIERS = ("avgpool", "dropout", "fc")
_SECOND_CLASSIFIERS = ("AuxLogits.", "aux1.", "aux2.")


# The layers before the classifier, for each family of networks; the output is a feature map [N, D, h, w].
def _features(model: nn.Module) -> nn.Module:
    body: nn.Module = model.get_submodule("features")
    return body


def _stages(model: nn.Module) -> nn.Module:
    return nn.Sequential(*(stage for name, stage in model.named_children() if name not in _CLASSIFIERS))


_BODIES: dict[str, Callable[[nn.Module], nn.Module]] = {
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

_POOLINGS = ("avg", "max", "avg+max")
_NORMS = ("frozen-batch", "group", "batch")

# Groups of group norm. Few for resnet8, whose narrow layers would otherwise have one channel per group and lose each
# channel's mean.
_GROUPS, _GROUPS_RESNET8 = 32, 8


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


class TorchvisionBackbone(Backbone):
    """A convolutional network without its classifier, and the pooling of its last feature map."""

    def __init__(self, body: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.body, self.spec = body, spec

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, see `Backbone`."""
        maps = self.body(images)
        if maps.dtype == torch.bfloat16:
            maps = maps.float()
        pooled = []
        if "avg" in self.spec.pooling:
            pooled.append(maps.mean(dim=(2, 3)))
        if "max" in self.spec.pooling:
            pooled.append(maps.amax(dim=(2, 3)))
        return torch.stack(pooled).sum(dim=0)

    def blocks(self) -> list[nn.Module]:
        """Return the stages, see `Backbone`."""
        body = self.body[1] if self.spec.name in _INCEPTIONS else self.body  # type: ignore[index] # a Sequential
        return list(body.children())


def _build(request: Request) -> TorchvisionBackbone:
    name, weights, norm = request.name, request.weights, request.norm
    if norm == "auto":
        norm = "group" if weights is None else "frozen-batch"
    pooling = "avg" if request.pooling == "auto" else request.pooling
    _check(name, norm, pooling)
    if weights is not None and norm == "group":
        raise InputError(
            f"the weights {weights!r} were trained with batch norm, but norm is group; use frozen-batch or no weights"
        )
    body = _body(name, weights if request.read_weights else None, norm, request.channels, request.rgb)
    origin = RANDOM_WEIGHTS
    if weights is not None:
        origin = origin_of_file(weights) if is_file_name(weights) else f"torchvision {name} {weights}"
    spec = BackboneSpec(
        source="torchvision",
        name=name,
        config={},
        pooling=pooling,
        norm=norm,
        channels=request.channels,
        num_features=_num_features(body, request.channels),
        origin=origin,
    )
    return TorchvisionBackbone(body, spec)


def _rebuild(spec: BackboneSpec) -> TorchvisionBackbone:
    _check(spec.name, spec.norm, spec.pooling)
    return TorchvisionBackbone(_body(spec.name, None, spec.norm, spec.channels, None), spec)


# Smaller than the images of torchvision's weights: objects in overhead images are small, and training is faster.
SOURCE = Source(_build, _rebuild, lambda name, weights: InputDefaults(160))


def _check(name: str, norm: str, pooling: str) -> None:
    for what, value, allowed in (
        ("backbone", name, tuple(_BODIES)),
        ("norm", norm, _NORMS),
        ("pooling", pooling, _POOLINGS),
    ):
        if value not in allowed:
            raise InputError(f"{what} is {value!r}; {', '.join(allowed)} are allowed")


def _body(name: str, weights: str | None, norm: str, channels: int, rgb: tuple[int, int, int] | None) -> nn.Module:
    """Return the layers before the classifier: images float [N, channels, H, W] to a feature map [N, D, h, w]."""
    options = {"aux_logits": False, "init_weights": True} if name in _INCEPTIONS else {}
    model = resnet8() if name == "resnet8" else torchvision.models.get_model(name, weights=None, **options)
    if weights is not None:
        _load_weights(model, name, weights)
    body = _BODIES[name](model)
    if channels != 3:
        adapt_first_convolution(body, channels, rgb, is_pretrained=weights is not None)
    if name in _INCEPTIONS:
        body = nn.Sequential(_PlusMinusOne(channels), body)
    if norm == "frozen-batch":
        freeze_batch_norm(body)
    elif norm == "group":
        group_norm(body, _GROUPS_RESNET8 if name == "resnet8" else _GROUPS)
    drop_nothing(body)
    return body


def _num_features(body: nn.Module, channels: int) -> int:
    """Return D of the feature map [N, D, h, w]."""
    was_training = body.training
    with torch.no_grad():
        maps = body.eval()(torch.zeros(1, channels, 96, 96))
    body.train(was_training)
    return int(maps.shape[1])


def _load_weights(model: nn.Module, name: str, weights: str) -> None:
    """Load the weights of torchvision model `name` from a safetensors file or by the name of torchvision weights."""
    state = read_safetensors(Path(weights)) if is_file_name(weights) else _download(name, weights)
    load_state(model, state, weights, name, _SECOND_CLASSIFIERS)


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
