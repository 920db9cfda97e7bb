"""The networks that make codes."""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from orbithash.encoders.networks.backbones import build_backbone, num_features
from orbithash.encoders.networks.card import HeadSpec, NetworkSpec

__all__ = ["HashHead", "HashNetwork", "NetworkOutput", "Standardise"]

# MHCLN's; the other methods use none.
LEAKY_SLOPE = 0.2


class NetworkOutput(NamedTuple):
    """`hashes` float [N, K]; `logits` float [N, C], or None without a classifier."""

    hashes: Tensor
    logits: Tensor | None


class Standardise(nn.Module):
    """Features less their mean, over their standard deviation, both fixed by `fit`."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def fit(self, features: Tensor, per_dimension: bool = True) -> None:
        """Takes the moments of training features [N, D]: of each dimension, or one pair for the whole matrix.

        A dimension that never changes is only centred.
        """
        features = features.double()
        std, mean = torch.std_mean(features, dim=0 if per_dimension else None, correction=0)
        self.mean.copy_(mean.expand_as(self.mean))
        self.std.copy_(torch.where(std > 0, std, 1.0).expand_as(self.std))

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        return (features - self.mean) / self.std


class HashHead(nn.Module):
    """Features float [N, D] to hashes float [N, K]: see `HeadSpec`."""

    def __init__(self, num_features: int, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_features = num_features
        if spec.norm == "layer":
            # With the fan-in initialisation below, hashes start at unit variance before tanh. Pooled features are large
            # and of one sign; without it tanh saturates at the first step and passes no gradient.
            self.norm: nn.Module = nn.LayerNorm(num_features)
        else:
            self.norm = Standardise(num_features) if spec.norm == "standardise" else nn.Identity()
        hidden: list[nn.Module] = []
        width = num_features
        for next_width in spec.hidden:
            hidden.append(nn.Linear(width, next_width))
            if spec.batch_norm:
                hidden.append(nn.BatchNorm1d(next_width))
            hidden.append(nn.LeakyReLU(LEAKY_SLOPE) if spec.hidden_activation == "leaky-relu" else nn.ReLU())
            width = next_width
        self.hidden = nn.Sequential(*hidden)
        self.output = nn.Linear(width, spec.bits)
        nn.init.kaiming_normal_(self.output.weight, nonlinearity="linear")
        nn.init.zeros_(self.output.bias)

    def forward(self, features: Tensor) -> Tensor:
        """See the class."""
        outputs: Tensor = self.output(self.hidden(self.norm(features)))
        if self.spec.activation == "tanh":
            return torch.tanh(outputs)
        return torch.sigmoid(outputs) if self.spec.activation == "sigmoid" else outputs


class HashNetwork(nn.Module):
    """Backbone, pooling, hash head; a linear classifier on the hashes where asked for.

    `forward` takes normalised images float [N, C, H, W].
    """

    def __init__(self, spec: NetworkSpec, weights: str | None = None) -> None:
        super().__init__()
        self.spec = spec
        self.backbone = build_backbone(spec.backbone, spec.norm, weights, spec.channels)
        self.head = HashHead(num_features(self.backbone, spec.channels), spec.head)
        self.classifier = nn.Linear(spec.bits, spec.num_classes) if spec.num_classes else None

    def forward(self, images: Tensor) -> NetworkOutput:
        """See the class."""
        return self.hash(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Pooled features float [N, D] of normalised images."""
        maps = self.backbone(images)
        pooled = []
        if "avg" in self.spec.pooling:
            pooled.append(maps.mean(dim=(2, 3)))
        if "max" in self.spec.pooling:
            pooled.append(maps.amax(dim=(2, 3)))
        return torch.stack(pooled).sum(dim=0)

    def hash(self, features: Tensor) -> NetworkOutput:
        """Hashes, and logits where there is a classifier, of features [N, D]."""
        hashes = self.head(features)
        return NetworkOutput(hashes, None if self.classifier is None else self.classifier(hashes))
