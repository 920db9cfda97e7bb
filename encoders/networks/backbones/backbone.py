"""The interface of all backbones."""

from abc import abstractmethod
from functools import partial

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from orbithash.encoders.networks.card import BackboneSpec

__all__ = ["Backbone"]


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

    @abstractmethod
    def blocks(self) -> list[nn.Module]:
        """Return the blocks in order from input to output: transformer blocks, or stages of convolutions."""

    @property
    def attention_linears(self) -> tuple[str, ...]:
        """Names of the linear layers of attention, which low-rank adapters extend; empty without attention."""
        return ()

    def enable_checkpointing(self) -> None:
        """Keep only the inputs of each block for the backward pass and compute the rest again, to save memory."""
        for block in self.blocks():
            # Layers without parameters have little to save, and may change their inputs in place.
            if not any(True for _ in block.parameters()):
                continue
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
