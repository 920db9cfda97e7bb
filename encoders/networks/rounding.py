"""Rounding of outputs to int8, and which rows a rounding error of the network could change."""

import torch
from torch import Tensor

from orbithash.encoders.codes import MAX_OUTPUT

__all__ = ["is_near_half", "scaled_outputs"]


def scaled_outputs(differences: Tensor, errors: Tensor) -> tuple[Tensor, Tensor]:
    """Return the outputs of `Encoded`, int8 [N, K], and bool [N]: rows that errors of the outputs could change.

    `differences` are outputs minus thresholds, float [N, K]; `errors` bound the errors of each, float [N, K].
    """
    if not differences.shape[1]:
        return differences.to(torch.int8), torch.zeros(len(differences), dtype=torch.bool, device=differences.device)
    largest = differences.abs().amax(dim=1, keepdim=True).clamp(min=torch.finfo(differences.dtype).tiny)
    scaled = differences / largest
    # Errors of the numerator and of the denominator, which is one of the outputs.
    scaled_errors = (errors + scaled.abs() * errors.amax(dim=1, keepdim=True)) / largest
    values = MAX_OUTPUT * scaled
    return values.round().to(torch.int8), is_near_half(values, MAX_OUTPUT * scaled_errors)


def is_near_half(values: Tensor, errors: Tensor | float) -> Tensor:
    """Return bool [N]: rows of `values` float [N, K] with a value that rounds to another integer within its error."""
    return ((values - values.floor() - 0.5).abs() <= errors).any(dim=1)
