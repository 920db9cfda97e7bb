"""Backbones of torchgeo: `torchgeo:ENUM.MEMBER`, a set of weights such as ResNet18_Weights.SENTINEL2_ALL_MOCO.

Bands, statistics and size of the images come from the description of the weights. The layers are those of timm.
"""

import difflib
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import ModelBackbone, Request, Source
from orbithash.encoders.networks.backbones.layers import drop_nothing, set_norm
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.pickles import read_pickle
from orbithash.encoders.networks.backbones.weights import load_state, origin_of_file, read_safetensors
from orbithash.encoders.networks.card import BackboneSpec

__all__ = ["SOURCE"]

# Networks whose builders in torchgeo are those of timm; others take more than images, such as wavelengths.
_NETWORKS = ("resnet", "vit_")

# Layers that these networks lack here, or that some weights contain.
_CLASSIFIERS = ("fc.", "head.", "norm.", "fc_norm.")

# Integers of Sentinel-2 are reflectance times this.
_REFLECTANCE_SCALE = 10_000.0


def _build(request: Request) -> ModelBackbone:
    network, weights = _find(request.name)
    channels = int(weights.meta["in_chans"])
    if request.channels != channels:
        bands = ", ".join(_bands(weights) or ())
        raise InputError(
            f"torchgeo:{request.name} takes {channels} bands ({bands or 'red, green, blue'}), and there are "
            f"{request.channels}; set bands to them"
        )
    if request.pooling not in ("auto", "own"):
        raise InputError(f"pooling is {request.pooling!r}; networks of torchgeo have their own: use pooling=auto")
    config = {"network": network, "arguments": _arguments(network, weights)}
    model = _create(config, channels)
    if request.weights in (None, "pretrained"):
        origin = str(weights.url)
        if request.read_weights:
            load_state(model, _download(weights, request.name), origin, f"torchgeo:{request.name}", _CLASSIFIERS)
    else:
        path = str(request.weights)
        origin = origin_of_file(path)
        if request.read_weights:
            load_state(model, read_safetensors(Path(path)), path, f"torchgeo:{request.name}", _CLASSIFIERS)
    norm = set_norm(model, request.norm)
    drop_nothing(model)
    spec = BackboneSpec(
        source="torchgeo",
        name=request.name,
        config=config,
        pooling="own",
        norm=norm,
        channels=channels,
        num_features=int(model.head_hidden_size),
        origin=origin,
        licence=str(weights.meta.get("license", "")),
    )
    return ModelBackbone(model, spec)


def _rebuild(spec: BackboneSpec) -> ModelBackbone:
    model = _create(spec.config, spec.channels)
    set_norm(model, spec.norm)
    drop_nothing(model)
    return ModelBackbone(model, spec)


def _defaults(name: str, weights: str | None) -> InputDefaults:
    found = _find(name)[1]
    steps = list(found.transforms) if isinstance(found.transforms, nn.Sequential) else []
    sizes: list[Any] = [step.size for step in steps if hasattr(step, "size")]
    size = sizes[-1] if sizes else 224
    size = int(size[0] if isinstance(size, list | tuple) else size)
    moments = [
        tuple(torch.tensor(moment, dtype=torch.float64) for moment in (step.mean, step.std))
        for step in steps
        if hasattr(step, "mean") and hasattr(step, "std")
    ]
    bands, values, scale = _bands(found), "picture", 255.0
    if bands and set(bands) <= {"VV", "VH"}:
        values, scale = "decibel", 1.0
    if not moments:
        return InputDefaults(size, bands=bands, values=values)
    mean, std = moments[0]
    for own_mean, own_std in moments[1:]:
        # One normalisation after another.
        mean, std = mean + std * own_mean, std * own_std
    if values == "picture" and float(std.max()) > scale:
        values, scale = "reflectance", _REFLECTANCE_SCALE
    numbers = [tuple(float(number) for number in moment / scale) for moment in (mean, std)]
    return InputDefaults(size, numbers[0], numbers[1], bands=bands, values=values)


SOURCE = Source(_build, _rebuild, _defaults)


def _find(name: str) -> tuple[str, Any]:
    """Return network and description of weights; `InputError` for unknown weights or another kind of network."""
    from torchgeo.models import get_model_weights, list_models

    found: dict[str, tuple[str, Any]] = {}
    for network in list_models():
        # Some networks have no published weights.
        with suppress(KeyError):
            found |= {str(weights): (network, weights) for weights in get_model_weights(network)}
    if name not in found:
        near = difflib.get_close_matches(name, found, n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "torchgeo.models lists all"
        raise InputError(f"torchgeo has no weights {name!r}; {hint}")
    network, weights = found[name]
    if not network.startswith(_NETWORKS):
        raise InputError(f"torchgeo:{name}: networks of the kind {network} are not supported; ResNet and ViT are")
    return network, weights


def _bands(weights: Any) -> tuple[str, ...] | None:
    bands = weights.meta.get("bands")
    if bands is None:
        return None
    if "SENTINEL2" in str(weights):
        # As the files of Sentinel-2 name them: B01, B8A.
        return tuple(f"B{band[1:].upper():0>2}" for band in bands)
    return tuple(bands)


def _arguments(network: str, weights: Any) -> dict[str, Any]:
    if not network.startswith("vit_"):
        return {}
    size = {"img_size": int(weights.meta["img_size"])} if "img_size" in weights.meta else {}
    return {**size, "dynamic_img_size": True, "dynamic_img_pad": True}


def _create(config: dict[str, Any], channels: int) -> Any:
    import timm

    return timm.create_model(config["network"], num_classes=0, in_chans=channels, **config["arguments"])


def _download(weights: Any, name: str) -> dict[str, Tensor]:
    """Return the published tensors; the file is kept in torch's cache."""
    file = Path(torch.hub.get_dir()) / "checkpoints" / str(weights.url).rpartition("/")[2]
    if not file.is_file():
        file.parent.mkdir(parents=True, exist_ok=True)
        try:
            torch.hub.download_url_to_file(weights.url, str(file), progress=False)
        except (OSError, RuntimeError) as err:
            raise InputError(
                f"torchgeo:{name}: the download failed ({err}); give a local file as weights, converted by "
                "`orbithash convert`"
            ) from err
    return read_pickle(file)
