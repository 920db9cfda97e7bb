"""Stored vectors: the input of a head, projected to a few dimensions and rounded to int8."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from orbithash.encoders.networks.card import ProjectionSpec

__all__ = ["MAX_COMPONENT", "Projection", "rounded"]

# Largest magnitude of a component of a stored vector. -128 is not used, so that negation is possible.
MAX_COMPONENT = 127


class Projection(nn.Module):
    """Map the inputs of a head, float [N, D], to stored vectors int8 [N, d].

    Features of unit length are projected onto the d uncentred principal directions of a sample. The dot product of two
    stored vectors, times the square of `spec.scale`, approximates the cosine of the features. A discrete cosine
    transform within the d directions distributes the first one, which is much larger than the others, over all
    dimensions: rounding with one scale for all dimensions then loses less.
    """

    directions: Tensor

    def __init__(self, spec: ProjectionSpec) -> None:
        super().__init__()
        self.spec = spec
        self.register_buffer("directions", torch.zeros(spec.dims, spec.num_features))

    @classmethod
    def fit(cls, features: Tensor, dims: int) -> "Projection":
        """Return the projection of a sample of features float [N, D] to min(dims, D, N) dimensions.

        The scale is chosen so that the largest component of the sample becomes 127; larger components of other features
        are clipped. Computed in float64.
        """
        units = _unit_length(features.double())
        dims = min(dims, *units.shape)
        if units.shape[0] < units.shape[1]:
            # The directions are combinations of the few features: an eigenproblem of N x N instead of D x D.
            principal = torch.linalg.svd(units, full_matrices=False).Vh[:dims]
        else:
            principal = torch.linalg.eigh(units.T @ units).eigenvectors[:, -dims:].flip(1).T
        # The sign of an eigenvector is arbitrary.
        largest = principal.gather(1, principal.abs().argmax(dim=1, keepdim=True))
        directions = _cosine_transform(dims) @ (principal * largest.sign())
        largest_component = float((units @ directions.T).abs().max())
        scale = largest_component / MAX_COMPONENT or 1 / MAX_COMPONENT
        projection = cls(ProjectionSpec(features.shape[1], dims, scale))
        projection.directions.copy_(directions)
        return projection

    def forward(self, features: Tensor) -> Tensor:
        """Return the components float [N, d] before rounding, in units of the scale."""
        return F.linear(_unit_length(features), self.directions) / self.spec.scale

    def quantise(self, features: Tensor) -> Tensor:
        """Return the stored vectors int8 [N, d] of features float [N, D]."""
        return rounded(self(features))

    def is_near_rounding(self, components: Tensor, margin: float) -> Tensor:
        """Return for which items the rounding of a component is unsure, bool [N].

        `components` are the result of `forward`; `margin` is the largest error of features of length 1. A component has
        at most this error, and usually much less: scaling to unit length does not enlarge it, and it is distributed
        over all directions.
        """
        magnitudes = components.abs()
        distances = (magnitudes - magnitudes.floor() - 0.5).abs()
        is_near = (distances < margin / self.spec.scale) & (magnitudes < MAX_COMPONENT)
        return torch.any(is_near, dim=1)


def rounded(components: Tensor) -> Tensor:
    """Return components float [N, d] as int8, clipped to -127..127."""
    return torch.clamp(components.round(), -MAX_COMPONENT, MAX_COMPONENT).to(torch.int8)


def _unit_length(features: Tensor) -> Tensor:
    units: Tensor = F.normalize(features, dim=1, eps=torch.finfo(features.dtype).tiny)
    return units


def _cosine_transform(size: int) -> Tensor:
    """Return the orthonormal matrix float64 [size, size] of the discrete cosine transform; its first column is flat."""
    positions, frequencies = torch.arange(size, dtype=torch.float64)[:, None] + 0.5, torch.arange(size)[None]
    matrix: Tensor = torch.cos(torch.pi * positions * frequencies / size) * (2 / size) ** 0.5
    matrix[:, 0] /= 2**0.5
    return matrix
