"""The interface of all backbones, and of the libraries that they come from."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.names import InputDefaults
from orbithash.encoders.networks.backbones.rgb import DEFAULT_RGB
from orbithash.encoders.networks.backbones.structure import attention_linears, find_blocks
from orbithash.encoders.networks.card import BackboneSpec

__all__ = ["Backbone", "ModelBackbone", "NoTextTower", "Request", "Source", "TextSide"]


class NoTextTower(InputError):
    """A backbone that encodes images only."""


class Backbone(nn.Module):
    """A network that maps normalised images float32 [N, C, H, W] to features float32 [N, num_features].

    Pooling is part of it. `spec` describes the layers; `build.rebuild_backbone` makes the same layers from it.
    """

    spec: BackboneSpec

    @property
    def num_features(self) -> int:
        """Number of features of an image."""
        return self.spec.num_features

    @abstractmethod
    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images."""

    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order from input to output: transformer blocks, or stages of convolutions."""
        return find_blocks(self)

    @property
    def attention_linears(self) -> tuple[str, ...]:
        """Names of the linear layers of attention, which low-rank adapters extend; empty without attention."""
        return attention_linears(self)

    def enable_checkpointing(self) -> None:
        """Keep only the inputs of each block for the backward pass and compute the rest again, to save memory."""
        for block in self.blocks():
            # Layers without parameters have little to save, and may change their inputs in place.
            if not any(True for _ in block.parameters()):
                continue
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class ModelBackbone(Backbone):
    """A network of another library that maps images to features by itself.

    `side` is the side of the images in pixels of a network that is built for one size.
    """

    def __init__(self, model: nn.Module, spec: BackboneSpec, side: int | None = None) -> None:
        super().__init__()
        self.model, self.spec, self.side = model, spec, side

    def forward(self, images: Tensor) -> Tensor:
        """Return the features of images, see `Backbone`; `InputError` for images of another size than `side`."""
        if self.side is not None and images.shape[-1] != self.side:
            raise InputError(
                f"{self.spec.source}:{self.spec.name} is built for images of {self.side} pixels, got "
                f"{images.shape[-1]}; set image_size to the size of all images, and no encoding_sizes"
            )
        features: Tensor = self.model(images)
        return features.float() if features.dtype == torch.bfloat16 else features


@dataclass(frozen=True)
class Request:
    """The arguments of `build.build_backbone`, with the name of the backbone in its source."""

    name: str
    weights: str | None = None
    norm: str = "auto"
    pooling: str = "auto"
    channels: int = 3
    rgb: tuple[int, int, int] | None = DEFAULT_RGB
    image_size: int | None = None
    read_weights: bool = True


@dataclass(frozen=True)
class TextSide:
    """The text tower of a dual encoder.

    Attributes:
        network: token ids int64 [N, T] to features float32 [N, D] in the space of the image tower.
        tokenise: sentences to their token ids, with padding where the network was trained with it.
        save_tokenizer: writes the tokenizer into a folder.
        config: what the library needs to build the network and to find the tokenizer in that folder.
    """

    network: nn.Module
    tokenise: Callable[[Sequence[str]], list[list[int]]]
    save_tokenizer: Callable[[Path], None]
    config: dict[str, Any]


@dataclass(frozen=True)
class Source:
    """A library of backbones.

    Attributes:
        build: a backbone by its name, with the given, its own or random weights.
        rebuild: the layers of a backbone from its description, with random weights.
        defaults: from the name and the weights, the images that a backbone was trained on; reads no weights.
        text: the text tower of a dual encoder by its name; None for a library without dual encoders.
        rebuild_text: the text tower of `TextSide.config`, with random weights, and the tokenizer in a folder.
    """

    build: Callable[[Request], Backbone]
    rebuild: Callable[[BackboneSpec], Backbone]
    defaults: Callable[[str, str | None], InputDefaults]
    text: Callable[[str, str | None], TextSide] | None = None
    rebuild_text: Callable[[dict[str, Any], Path], TextSide] | None = None
