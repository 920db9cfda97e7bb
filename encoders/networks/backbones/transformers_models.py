"""Backbones of transformers: `hf:FOLDER`, or `hf:ORG/NAME[@REVISION]` on the Hugging Face hub.

Of a dual encoder, such as CLIP or SigLIP, the image tower and its projection into the space of both towers.
"""

import dataclasses
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone, NoTextTower, Request, Source, TextSide
from orbithash.encoders.networks.backbones.layers import adapt_first_convolution, drop_nothing, set_norm
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.weights import load_state, origin_of_file, read_safetensors
from orbithash.encoders.networks.card import BackboneSpec
from orbithash.encoders.networks.hub import (
    licence,
    model_folder,
    one_line,
    pretrained,
    pretrained_tokenizer,
    quiet_transformers,
    read_json,
)

__all__ = ["SOURCE"]

_POOLINGS = ("cls", "mean", "pooler")
# The pooling of dual encoders: the projection into the space of both towers.
_PROJECTION = "projection"

# Fields of a configuration that depend on the machine or the library, not on the layers.
_NOT_LAYERS = ("_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "_attn_implementation")

# Parts of a dual encoder that belong to one tower only, or to none.
_IMAGE_PARTS = ("vision_model", "visual_projection", "logit_scale", "logit_bias")
_TEXT_PARTS = ("text_model", "text_projection", "logit_scale", "logit_bias")

_WHAT = "image model"


class TransformersBackbone(Backbone):
    """A vision model of transformers and the pooling of its output."""

    def __init__(self, model: nn.Module, spec: BackboneSpec) -> None:
        super().__init__()
        self.model, self.spec = model, spec
        function: Any = self._function
        takes = inspect.signature(function if spec.pooling == _PROJECTION else function.forward).parameters
        # For images of another size than those that the model was trained on.
        self._arguments = {"interpolate_pos_encoding": True} if "interpolate_pos_encoding" in takes else {}

    @property
    def _function(self) -> Any:
        return self.model.get_image_features if self.spec.pooling == _PROJECTION else self.model

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, see `Backbone`."""
        features = _pooled(self._function(pixel_values=images, **self._arguments), self.spec.pooling)
        return features.float() if features.dtype == torch.bfloat16 else features


def _pooled(output: Any, pooling: str) -> Tensor:
    """Return features [N, D] from the output of a vision model."""
    if pooling in ("pooler", _PROJECTION):
        features: Tensor = output.pooler_output
        return features.flatten(1)
    last: Tensor = output.last_hidden_state
    if last.ndim == 4:
        return last.mean(dim=(2, 3))
    return last[:, 0] if pooling == "cls" else last.mean(dim=1)


def _build(request: Request) -> TransformersBackbone:
    folder, channels = model_folder(request.name, _WHAT), request.channels
    model, missing, origin = _read(folder, request.name, request.weights, request.read_weights)
    size = _images_of(folder).size
    pooling = _resolved_pooling(model, request.pooling, request.name, size)
    # A missing pooler is an extra layer for classifiers.
    if missing := [key for key in missing if "pooler" not in key or pooling == "pooler"]:
        raise InputError(
            f"{folder}: {len(missing)} weights are missing (first: {missing[0]}); give a complete model, or pooling=cls"
        )
    fields = _fields_of(model.config)
    _trim(model, pooling)
    if channels != 3:
        adapt_first_convolution(model, channels, request.rgb, is_pretrained=True)
        _set_channels(model, channels)
    norm = set_norm(model, request.norm)
    drop_nothing(model)
    spec = BackboneSpec(
        source="hf",
        name=folder.name if Path(request.name).is_dir() else request.name,
        config=fields,
        pooling=pooling,
        norm=norm,
        channels=channels,
        num_features=1,
        origin=origin,
        licence=licence(folder),
    )
    return _measured(TransformersBackbone(model, spec), request.name, size)


def _read(folder: Path, name: str, weights: str | None, read_weights: bool = True) -> tuple[Any, list[str], str]:
    """Return a model, the names of the tensors that its file lacks, and the origin of its weights."""
    from transformers import AutoConfig, AutoModel

    config = pretrained(AutoConfig, folder, _WHAT)
    _drop_nothing(config)
    if weights is None or weights == "pretrained":
        origin = f"folder {folder.name}" if Path(name).is_dir() else name
        if not read_weights:
            return _model_of(config), [], origin
        model, missing = pretrained(AutoModel, folder, _WHAT, config=config)
        return model, missing, origin
    model = _model_of(config)
    if read_weights:
        load_state(model, read_safetensors(Path(weights)), weights, f"hf:{name}")
    return model, [], origin_of_file(weights)


def _rebuild(spec: BackboneSpec) -> TransformersBackbone:
    model = _model_of(_config_of(spec.config))
    _trim(model, spec.pooling)
    if spec.channels != 3:
        adapt_first_convolution(model, spec.channels, None, is_pretrained=False)
        _set_channels(model, spec.channels)
    set_norm(model, spec.norm)
    drop_nothing(model)
    return TransformersBackbone(model, spec)


class _TextNetwork(nn.Module):
    """The text tower of a dual encoder: token ids int64 [N, T] to features float32 [N, D]."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        for part in _IMAGE_PARTS:
            if hasattr(model, part):
                delattr(model, part)
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features of sentences. There is no mask: padding is absent, or part of what was trained."""
        features: Tensor = self.model.get_text_features(input_ids=ids).pooler_output
        return features


def _text(name: str, weights: str | None) -> TextSide:
    folder = model_folder(name, _WHAT)
    model, missing, _ = _read(folder, name, weights)
    if not _is_dual_encoder(model):
        raise NoTextTower(f"hf:{name}: not a dual encoder, so it has no text tower; give one such as CLIP or SigLIP")
    if missing:
        raise InputError(f"{folder}: {len(missing)} weights are missing (first: {missing[0]}); give a complete model")
    return _text_side(model, pretrained_tokenizer(folder))


def _rebuild_text(config: dict[str, Any], folder: Path) -> TextSide:
    return _text_side(_model_of(_config_of(config)), pretrained_tokenizer(folder))


def _text_side(model: Any, tokenizer: Any) -> TextSide:
    config = model.config
    limit = getattr(config.text_config, "max_position_embeddings", tokenizer.model_max_length)
    # SigLIP is trained on sentences that are padded to full length, and pools the last position.
    padding = "max_length" if str(config.model_type).startswith("siglip") else False

    def tokenise(sentences: Sequence[str]) -> list[list[int]]:
        tokens = tokenizer(list(sentences), truncation=True, max_length=limit, padding=padding)
        ids: list[list[int]] = tokens["input_ids"]
        return ids

    def save_tokenizer(folder: Path) -> None:
        tokenizer.save_pretrained(folder)

    return TextSide(_TextNetwork(model), tokenise, save_tokenizer, _fields_of(config))


def _defaults(name: str, weights: str | None) -> InputDefaults:
    return _images_of(model_folder(name, _WHAT))


SOURCE = Source(_build, _rebuild, _defaults, _text, _rebuild_text)


def _images_of(folder: Path) -> InputDefaults:
    """Return size, statistics and interpolation of the image processor, and of the model where it states none."""
    processor, config = read_json(folder / "preprocessor_config.json"), read_json(folder / "config.json")
    size = processor.get("crop_size") or processor.get("size") or {}
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    size = size or config.get("image_size") or (config.get("vision_config") or {}).get("image_size") or 224
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()
    if processor.get("do_normalize", True) and processor.get("image_mean") and processor.get("image_std"):
        mean, std = tuple(processor["image_mean"]), tuple(processor["image_std"])
    elif processor:
        # The processor leaves pixels from 0 to 1.
        mean, std = (0.0,) * 3, (1.0,) * 3
    # Numbers of Pillow's filters: 3 is bicubic.
    interpolation = "bicubic" if processor.get("resample") == 3 else "bilinear"
    return InputDefaults(int(size[0] if isinstance(size, list) else size), mean, std, interpolation)


def _fields_of(config: Any) -> dict[str, Any]:
    """Return the fields of a configuration that decide the layers, as JSON values."""
    fields: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {key: value for key, value in fields.items() if key not in _NOT_LAYERS}


def _config_of(fields: dict[str, Any]) -> Any:
    """Return the configuration that `_fields_of` wrote; `InputError` if it is invalid."""
    from transformers import AutoConfig

    try:
        return AutoConfig.for_model(**fields)
    except (TypeError, ValueError, KeyError, AttributeError) as err:
        raise InputError(f"the configuration of the model is not one of transformers ({one_line(err)})") from err


def _model_of(config: Any) -> Any:
    """Return a float32 model with random weights."""
    from transformers import AutoModel

    with quiet_transformers():
        return AutoModel.from_config(config, dtype=torch.float32, trust_remote_code=False)


def _is_dual_encoder(model: Any) -> bool:
    return hasattr(model, "get_image_features") and hasattr(model, "get_text_features")


def _resolved_pooling(model: Any, pooling: str, name: str, size: int) -> str:
    if _is_dual_encoder(model):
        if pooling not in ("auto", _PROJECTION):
            raise InputError(f"pooling is {pooling!r}; hf:{name} is a dual encoder and has its own: use pooling=auto")
        return _PROJECTION
    if getattr(model, "main_input_name", "") != "pixel_values":
        raise InputError(f"hf:{name}: not a model of images (its input is {model.main_input_name})")
    if pooling not in ("auto", *_POOLINGS):
        raise InputError(f"pooling is {pooling!r}; for hf auto, {', '.join(_POOLINGS)} are allowed")
    with torch.no_grad():
        output = _run(lambda: model.eval()(pixel_values=torch.zeros(1, 3, size, size)), name)
    has_pooler = getattr(output, "pooler_output", None) is not None
    if pooling == "auto":
        has_cls = any(key.endswith("cls_token") for key, _ in model.named_parameters())
        return "cls" if has_cls else "pooler" if has_pooler else "mean"
    if pooling == "pooler" and not has_pooler:
        raise InputError(f"pooling is 'pooler', which hf:{name} does not have; use cls, mean or auto")
    return pooling


def _run(call: Callable[[], Any], name: str) -> Any:
    try:
        return call()
    except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as err:
        raise InputError(f"hf:{name}: not a model of images to features ({one_line(err)})") from err


def _trim(model: Any, pooling: str) -> None:
    """Remove the layers whose output is not used."""
    if pooling == _PROJECTION:
        for part in _TEXT_PARTS:
            if hasattr(model, part):
                delattr(model, part)
    elif pooling != "pooler" and isinstance(getattr(model, "pooler", None), nn.Module):
        model.pooler = None


def _set_channels(model: nn.Module, channels: int) -> None:
    """Let patch embeddings accept `channels` bands: they compare the number with that of their configuration."""
    for module in model.modules():
        if getattr(module, "num_channels", None) == 3:
            module.num_channels = channels  # type: ignore[assignment] # a number, not a submodule


def _drop_nothing(config: Any) -> None:
    """Switch off dropout and stochastic depth, which differ between ranks and in a resumed run."""
    for part in (config, getattr(config, "vision_config", None)):
        for field, value in () if part is None else list(vars(part).items()):
            names_a_share = field.endswith(("dropout", "dropout_prob", "dropout_rate", "drop_path_rate", "drop_prob"))
            if names_a_share and isinstance(value, int | float):
                setattr(part, field, type(value)(0))
            elif field in ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale"):
                # DINOv3 draws its position embedding in training.
                setattr(part, field, None)


def _measured(backbone: TransformersBackbone, name: str, size: int) -> TransformersBackbone:
    """Return the backbone with its number of features; `InputError` if its features are no function of the image."""
    images = torch.rand(1, backbone.spec.channels, size, size, generator=torch.Generator().manual_seed(0))
    backbone.eval()
    with torch.no_grad():
        features, again = (_run(lambda: backbone(images), name) for _ in range(2))
    if features.ndim != 2 or not torch.equal(features, again):
        raise InputError(
            f"hf:{name}: the features of an image differ between two calls, as with random masking; give another model"
        )
    backbone.spec = dataclasses.replace(backbone.spec, num_features=features.shape[1])
    return backbone.train()
