"""Networks whose thresholded outputs are the bits of a code."""

from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbithash.encoders.networks.backbones.backbone import Backbone
from orbithash.encoders.networks.backbones.build import rebuild_backbone
from orbithash.encoders.networks.card import HeadSpec, NetworkSpec

__all__ = ["HashHead", "HashNetwork", "NetworkOutput", "Standardise", "UnitLength"]

# Used by MHCLN only.
LEAKY_SLOPE = 0.2


class NetworkOutput(NamedTuple):
    """Outputs of the head and of the classifier: `hashes` float [N, K]; `logits` float [N, C] or None."""

    hashes: Tensor
    logits: Tensor | None


class Standardise(nn.Module):
    """Subtract the mean of the features and divide by their standard deviation; `fit` sets both."""

    mean: Tensor
    std: Tensor

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(num_features))
        self.register_buffer("std", torch.ones(num_features))

    def fit(self, features: Tensor, per_dimension: bool = True) -> None:
        """Compute the moments of training features [N, D], per dimension or over the whole matrix.

        A constant dimension is centred but not scaled.
        """
        features = features.double()
        std, mean = torch.std_mean(features, dim=0 if per_dimension else None, correction=0)
        self.mean.copy_(mean.expand_as(self.mean))
        self.std.copy_(torch.where(std > 0, std, 1.0).expand_as(self.std))

    def forward(self, features: Tensor) -> Tensor:
        """Return standardised features [N, D]."""
        return (features - self.mean) / self.std


class UnitLength(nn.Module):
    """Scale the features of each item to unit length; a row of zeros is unchanged."""

    def forward(self, features: Tensor) -> Tensor:
        """Return features [N, D] of length 1."""
        return F.normalize(features, dim=1, eps=torch.finfo(features.dtype).tiny)


class HashHead(nn.Module):
    """Map features float [N, D] to hashes float [N, K]; `HeadSpec` lists the layers."""

    def __init__(self, num_features: int, spec: HeadSpec) -> None:
        super().__init__()
        self.spec = spec
        self.num_features = num_features
        if spec.norm == "layer":
            # Pooled features are large and positive. Without layer norm, tanh saturates at the first step and passes no
            # gradient; with it and the fan-in initialisation below, its inputs start at unit variance.
            self.norm: nn.Module = nn.LayerNorm(num_features)
        else:
            self.norm = Standardise(num_features) if spec.norm == "standardise" else nn.Identity()
            if spec.norm == "unit":
                self.norm = UnitLength()
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
        """Return hashes [N, K]."""
        outputs: Tensor = self.output(self.hidden(self.norm(features)))
        if self.spec.activation == "tanh":
            return torch.tanh(outputs)
        return torch.sigmoid(outputs) if self.spec.activation == "sigmoid" else outputs

    def error_scale(self, features: Tensor) -> Tensor:
        """Return the size of the terms that each output sums up before the activation, float [N, K].

        The rounding error of a hash is proportional to it: the sum of the absolute terms of the last layer, times the
        factor by which the normalisation enlarges relative errors of the features.
        """
        normalised = self.norm(features)
        if isinstance(self.norm, nn.LayerNorm):
            mean, std = features.mean(dim=1, keepdim=True), features.std(dim=1, keepdim=True, correction=0)
            subtracted, remaining = features.abs() + mean.abs(), std * features.shape[1] ** 0.5
        elif isinstance(self.norm, Standardise):
            subtracted, remaining = (features.abs() + self.norm.mean.abs()) / self.norm.std, normalised
        elif isinstance(self.norm, UnitLength):
            # The errors of a feature and of the length by which it is divided add up.
            subtracted, remaining = 2 * features, features
        else:
            subtracted, remaining = features, features
        tiny = torch.finfo(features.dtype).tiny
        gain = subtracted.norm(dim=1, keepdim=True) / remaining.norm(dim=1, keepdim=True).clamp(min=tiny)
        inputs = self.hidden(normalised)
        scale: Tensor = gain * F.linear(inputs.abs(), self.output.weight.abs(), self.output.bias.abs())
        return scale


class HashNetwork(nn.Module):
    """A backbone, a hash head and, if `num_classes` is above 0, a linear classifier on the hashes.

    `forward` takes normalised images float [N, C, H, W].
    """

    def __init__(self, backbone: Backbone, head: HeadSpec, num_classes: int = 0) -> None:
        """Add a new head and classifier to a backbone."""
        super().__init__()
        self.spec = NetworkSpec(backbone.spec, head, num_classes)
        self.backbone = backbone
        self.head = HashHead(backbone.num_features, head)
        self.classifier = nn.Linear(head.bits, num_classes) if num_classes else None

    @classmethod
    def from_spec(cls, spec: NetworkSpec) -> Self:
        """Build the layers of a network with random weights."""
        return cls(rebuild_backbone(spec.backbone), spec.head, spec.num_classes)

    def forward(self, images: Tensor) -> NetworkOutput:
        """Return hashes and logits of normalised images."""
        return self.hash(self.features(images))

    def features(self, images: Tensor) -> Tensor:
        """Return the backbone's features float [N, D] of normalised images."""
        features: Tensor = self.backbone(images)
        return features

    def hash(self, features: Tensor) -> NetworkOutput:
        """Return hashes and, with a classifier, logits of features [N, D]."""
        hashes = self.head(features)
        return NetworkOutput(hashes, None if self.classifier is None else self.classifier(hashes))

    def error_scale(self, features: Tensor) -> NetworkOutput:
        """Return the sizes of the terms that `hash` sums up for each hash and logit; see `HashHead.error_scale`."""
        scale = self.head.error_scale(features)
        if self.classifier is None:
            return NetworkOutput(scale, None)
        # No activation has a slope above 1: a hash has at most the error of its output before the activation.
        inputs = scale + self.head(features).abs()
        return NetworkOutput(scale, F.linear(inputs, self.classifier.weight.abs(), self.classifier.bias.abs()))
