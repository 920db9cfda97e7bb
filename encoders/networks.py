"""The networks that make codes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from orbithash.encoders.backbones import build_backbone
from orbithash.encoders.card import NetworkSpec

__all__ = ["HashNetwork", "NetworkOutput"]


class NetworkOutput(NamedTuple):
    """`hashes` float [N, K] in (-1, 1); `logits` float [N, C], or None without a classifier."""

    hashes: Tensor
    logits: Tensor | None


class HashNetwork(nn.Module):
    """Backbone, pooling, layer norm, one linear layer to K outputs, tanh; a linear classifier on those where asked for.

    `forward` takes normalised images float [N, 3, H, W].
    """

    def __init__(self, spec: NetworkSpec, weights: str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_backbone(spec.backbone, spec.norm, weights)
        num_features = _num_features(self.backbone)
        # With the fan-in initialisation the layer norm starts the hashes at unit variance before tanh. Pooled features
        # are large and of one sign; without it tanh saturates at the first step and passes no gradient.
        self.norm = nn.LayerNorm(num_features)
        self.hash_layer = nn.Linear(num_features, spec.bits)
        nn.init.kaiming_normal_(self.hash_layer.weight, nonlinearity="linear")
        nn.init.zeros_(self.hash_layer.bias)
        self.classifier = nn.Linear(spec.bits, spec.num_classes) if spec.num_classes else None

    def forward(self, images: Tensor) -> NetworkOutput:
        """See the class."""
        hashes = torch.tanh(self.hash_layer(self.norm(self._pool(self.backbone(images)))))
        return NetworkOutput(hashes, None if self.classifier is None else self.classifier(hashes))

    def _pool(self, maps: Tensor) -> Tensor:
        pooled = []
        if "avg" in self.spec.pooling:
            pooled.append(maps.mean(dim=(2, 3)))
        if "max" in self.spec.pooling:
            pooled.append(maps.amax(dim=(2, 3)))
        return torch.stack(pooled).sum(dim=0)


def _num_features(backbone: nn.Module) -> int:
    was_training = backbone.training
    with torch.no_grad():
        num_features = backbone.eval()(torch.zeros(1, 3, 64, 64)).shape[1]
    backbone.train(was_training)
    return int(num_features)
