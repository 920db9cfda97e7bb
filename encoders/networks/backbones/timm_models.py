"""Backbones of timm: `timm:NAME`, or `timm:NAME.TAG` for one of several sets of published weights."""

import difflib
import sys
from pathlib import Path
from typing import Any

from torch import nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import ModelBackbone, Request, Source
from orbithash.encoders.networks.backbones.layers import adapt_first_convolution, drop_nothing, set_norm
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.weights import load_state, origin_of_file, read_safetensors
from orbithash.encoders.networks.card import RANDOM_WEIGHTS, BackboneSpec
from orbithash.encoders.networks.hub import hub_file

__all__ = ["SOURCE"]

# Pooling here: timm's name of it. "own" is that of the published network.
_POOLINGS = {"avg": "avg", "mean": "avg", "max": "max", "avg+max": "avgmax", "cls": "token"}

# Arguments with which transformers take images of any size.
_ANY_SIZE = {"dynamic_img_size": True, "dynamic_img_pad": True}


def _build(request: Request) -> ModelBackbone:
    published = _published(request.name)
    arguments = _arguments(request, published)
    model = _create(request.name, arguments)
    origin, has_weights = RANDOM_WEIGHTS, request.weights is not None
    if request.weights == "pretrained":
        origin = published.hf_hub_id or ""
        if request.read_weights:
            if not origin:
                raise InputError(
                    f"timm:{request.name}: its weights are not on the Hugging Face hub as safetensors; download them "
                    "and use `orbithash convert`, then give the file as weights"
                )
            _load(model, hub_file(origin, "model.safetensors"), request.name, published)
    elif request.weights is not None:
        origin = origin_of_file(request.weights)
        if request.read_weights:
            _load(model, Path(request.weights), request.name, published)
    pooling = _set_pooling(model, request.pooling, request.name)
    if request.channels != 3:
        adapt_first_convolution(model, request.channels, request.rgb, is_pretrained=has_weights)
    norm = set_norm(model, request.norm)
    drop_nothing(model)
    spec = BackboneSpec(
        source="timm",
        name=request.name,
        config=arguments,
        pooling=pooling,
        norm=norm,
        channels=request.channels,
        num_features=int(model.head_hidden_size),  # type: ignore[arg-type]
        origin=origin,
        licence=(published.license or "") if has_weights else "",
    )
    return ModelBackbone(model, spec, arguments.get("img_size"))


def _rebuild(spec: BackboneSpec) -> ModelBackbone:
    _published(spec.name)
    model = _create(spec.name, spec.config)
    _set_pooling(model, spec.pooling, spec.name)
    if spec.channels != 3:
        adapt_first_convolution(model, spec.channels, None, is_pretrained=False)
    set_norm(model, spec.norm)
    drop_nothing(model)
    return ModelBackbone(model, spec, spec.config.get("img_size"))


def _defaults(name: str, weights: str | None) -> InputDefaults:
    from timm.data import resolve_data_config

    found = resolve_data_config(pretrained_cfg=_published(name).to_dict())
    interpolation = "bicubic" if found["interpolation"] == "bicubic" else "bilinear"
    return InputDefaults(int(found["input_size"][1]), tuple(found["mean"]), tuple(found["std"]), interpolation)


SOURCE = Source(_build, _rebuild, _defaults)


def _published(name: str) -> Any:
    """Return timm's description of published weights; `InputError` for an unknown network or tag.

    A network that another package has registered may have no description; then timm's defaults hold.
    """
    import timm

    architecture, _, tag = name.partition(".")
    if not timm.is_model(architecture):
        near = difflib.get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(near)}? " if near else "timm.list_models() lists all. "
        raise InputError(
            f"timm has no network {architecture!r}; {hint}If another package registers it, import that package first"
        )
    try:
        return timm.models.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
    except RuntimeError as err:
        tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{architecture}.*")]
        raise InputError(
            f"timm has no weights {tag!r} of {architecture}; there are {', '.join(tags) or 'none'}"
        ) from err


def _arguments(request: Request, published: Any) -> dict[str, Any]:
    """Return arguments for `timm.create_model` with which the network takes images of the requested size."""
    if not published.fixed_input_size:
        return {}
    if _accepts(request.name, _ANY_SIZE):
        return dict(_ANY_SIZE)
    size = request.image_size or int(published.input_size[1])
    return {"img_size": size}


def _accepts(name: str, arguments: dict[str, Any]) -> bool:
    import torch

    try:
        with torch.device("meta"):
            _create(name, arguments)
    except (TypeError, NotImplementedError):
        return False
    return True


def _create(name: str, arguments: dict[str, Any]) -> Any:
    import timm

    return timm.create_model(name, pretrained=False, num_classes=0, in_chans=3, **arguments)


def _set_pooling(model: Any, pooling: str, name: str) -> str:
    """Set the pooling and return its name for the description."""
    if pooling in ("auto", "own"):
        return "own"
    if pooling not in _POOLINGS:
        raise InputError(f"pooling is {pooling!r}; for timm auto, {', '.join(_POOLINGS)} are allowed")
    try:
        model.reset_classifier(0, _POOLINGS[pooling])
    except (AssertionError, TypeError, ValueError, RuntimeError) as err:
        raise InputError(f"pooling is {pooling!r}, which timm:{name} does not have; use pooling=auto") from err
    return pooling


def _load(model: nn.Module, path: Path, name: str, published: Any) -> None:
    """Load a safetensors file of timm's weights, or of the weights as their authors published them."""
    state = read_safetensors(path)
    if not state.keys() >= model.state_dict().keys():
        # Renames tensors of the authors' files and resizes position embeddings.
        convert = getattr(sys.modules[type(model).__module__], "checkpoint_filter_fn", None)
        if convert is not None:
            try:
                state = convert(state, model)
            except (KeyError, RuntimeError, AssertionError, ValueError, IndexError, AttributeError) as err:
                raise InputError(f"{path}: not the weights of backbone timm:{name} ({err})") from err
    classifier = published.classifier or ()
    ignored = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    load_state(model, state, str(path), f"timm:{name}", tuple(f"{layer}." for layer in ignored))
