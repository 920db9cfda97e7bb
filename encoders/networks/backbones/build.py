"""Backbones by name or by description."""

from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones import (
    embedding,
    open_clip_models,
    timm_models,
    torchgeo_models,
    torchvision_models,
    transformers_models,
)
from orbithash.encoders.networks.backbones.backbone import Backbone, NoTextTower, Request, Source, TextSide
from orbithash.encoders.networks.backbones.names import InputDefaults, split_name
from orbithash.encoders.networks.backbones.rgb import DEFAULT_RGB
from orbithash.encoders.networks.card import BackboneSpec

__all__ = [
    "SOURCES",
    "build_backbone",
    "default_preprocessing",
    "rebuild_backbone",
    "rebuild_text_side",
    "text_side",
]

# The sources by name. Each module imports its library only when it is used.
SOURCES: dict[str, Source] = {
    "torchvision": torchvision_models.SOURCE,
    "timm": timm_models.SOURCE,
    "hf": transformers_models.SOURCE,
    "open_clip": open_clip_models.SOURCE,
    "torchgeo": torchgeo_models.SOURCE,
    "embedding": embedding.SOURCE,
}


def build_backbone(
    name: str,
    weights: str | None = None,
    *,
    norm: str = "auto",
    pooling: str = "auto",
    channels: int = 3,
    rgb: tuple[int, int, int] | None = DEFAULT_RGB,
    image_size: int | None = None,
    read_weights: bool = True,
) -> Backbone:
    """Build a backbone by its name, with the given or random weights; `InputError` says what is wrong.

    Args:
        name: a name of torchvision, or one of `names.SPELLINGS`.
        weights: path of a safetensors file, published weights (downloaded once), or None. Published are, for
            torchvision, the names that it gives them; for timm, `pretrained`. None is random weights for torchvision,
            timm and `open_clip:NAME`, and the own weights of the others, whose names are those of weights.
        norm: frozen-batch, group, batch, or auto. With frozen batch norm, which belongs to pretrained weights, and
            group norm, for training from scratch, the features of an image do not depend on the other images of the
            batch or on the number of ranks. "batch" trains batch norm on the statistics of the whole batch, over all
            ranks. "auto" is group for random weights of torchvision, else frozen-batch.
        pooling: how a feature map or the features of tokens become features: avg, max, avg+max, cls, mean, pooler, as
            far as the backbone has it; auto is avg for torchvision, else that of the published network.
        channels: number of bands of an image.
        rgb: channels of red, green and blue, which keep the pretrained filters if there are more than three channels;
            None for bands without RGB. See `rgb_channels`.
        image_size: side of the images in pixels, for networks that are built for one size.
        read_weights: False leaves random weights in a network whose description names `weights`, for a caller that
            has trained ones.
    """
    source, own_name = split_name(name)
    return SOURCES[source].build(Request(own_name, weights, norm, pooling, channels, rgb, image_size, read_weights))


def rebuild_backbone(spec: BackboneSpec) -> Backbone:
    """Build the layers of a backbone from its description, with random weights and without a model hub."""
    if spec.source not in SOURCES:
        raise InputError(f"the source of the backbone is {spec.source!r}; {', '.join(SOURCES)} are allowed")
    return SOURCES[spec.source].rebuild(spec)


def text_side(name: str, weights: str | None = None) -> TextSide:
    """Return the text tower of a dual encoder; `InputError` if the backbone has none. The arguments are as above."""
    source, own_name = split_name(name)
    text = SOURCES[source].text
    if text is None:
        raise NoTextTower(
            f"backbone {name} has no text tower, so it cannot encode sentences; give a dual encoder, such as "
            "open_clip:NAME/TAG, or hf:FOLDER with CLIP or SigLIP"
        )
    return text(own_name, weights)


def rebuild_text_side(source: str, config: dict[str, Any], folder: Path) -> TextSide:
    """Build a text tower from `TextSide.config`, with random weights and the tokenizer that is saved in a folder."""
    rebuild = SOURCES[source].rebuild_text if source in SOURCES else None
    if rebuild is None:
        raise InputError(f"{folder}: {source!r} has no text towers")
    return rebuild(config, folder)


def default_preprocessing(name: str, weights: str | None = None) -> InputDefaults:
    """Return the images that a backbone was trained on, without reading its weights."""
    source, own_name = split_name(name)
    return SOURCES[source].defaults(own_name, weights)
