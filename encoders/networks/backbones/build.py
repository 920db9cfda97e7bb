"""Backbones by name or by description."""

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import Backbone
from orbithash.encoders.networks.backbones.embedding import EmbeddingInput, parse_embedding
from orbithash.encoders.networks.backbones.names import split_name
from orbithash.encoders.networks.backbones.rgb import DEFAULT_RGB
from orbithash.encoders.networks.backbones.torchvision_models import build_torchvision, rebuild_torchvision
from orbithash.encoders.networks.card import BackboneSpec

__all__ = ["build_backbone", "rebuild_backbone"]


def build_backbone(
    name: str,
    weights: str | None = None,
    *,
    norm: str = "auto",
    pooling: str = "avg",
    channels: int = 3,
    rgb: tuple[int, int, int] | None = DEFAULT_RGB,
    read_weights: bool = True,
) -> Backbone:
    """Build a backbone by its name, with the given or random weights; `InputError` says what is wrong.

    Args:
        name: see `names`.
        weights: name of published weights (downloaded once), path of a safetensors file, or None for random weights.
        norm: frozen-batch, group, batch, or auto. With frozen batch norm, which belongs to pretrained weights, and
            group norm, for training from scratch, the features of an image do not depend on the other images of the
            batch or on the number of ranks. "batch" trains batch norm on the statistics of the whole batch, over all
            ranks. "auto" is frozen-batch with weights and group without.
        pooling: how a feature map becomes features, see `BackboneSpec`.
        channels: number of bands of an image.
        rgb: channels of red, green and blue, which keep the pretrained filters if there are more than three channels;
            None for bands without RGB. See `rgb_channels`.
        read_weights: False leaves random weights in a network whose description names `weights`, for a caller that
            has trained ones.
    """
    source, own_name = split_name(name)
    if source == "embedding":
        return EmbeddingInput(parse_embedding(own_name, channels))
    return build_torchvision(own_name, weights, norm, pooling, channels, rgb, read_weights)


def rebuild_backbone(spec: BackboneSpec) -> Backbone:
    """Build the layers of a backbone from its description, with random weights and without a model hub."""
    if spec.source == "embedding":
        return EmbeddingInput(spec)
    if spec.source != "torchvision":
        raise InputError(f"the source of the backbone is {spec.source!r}; torchvision and embedding are allowed")
    return rebuild_torchvision(spec)
