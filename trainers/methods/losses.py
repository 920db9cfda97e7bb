"""Losses that several methods use."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "NearAs",
    "at_least_float32",
    "bit_balance_loss",
    "class_matrix",
    "classification_loss",
    "nt_xent",
    "quantisation_loss",
]

# How the contrastive loss treats nearly identical items: as negatives, not at all, or as additional positives.
NearAs = Literal["negatives", "ignored", "positives"]


def at_least_float32(values: Tensor) -> Tensor:
    """Return the values as float32, or as float64 if they are: sums and exponentials overflow in half precision."""
    return values.to(torch.promote_types(values.dtype, torch.float32))


def class_matrix(labels: Tensor, num_classes: int) -> Tensor:
    """Return which classes each image has, bool [N, C], from labels int64 [N] or bool [N, C]."""
    return labels if labels.dtype == torch.bool else F.one_hot(labels, num_classes).bool()


def classification_loss(logits: Tensor, labels: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Return the classification loss of logits [N, C], a scalar.

    Labels int64 [N]: the mean over images of the cross-entropy. Labels bool [N, C]: the mean over images and classes of
    the binary cross-entropy; label smoothing e makes its targets e/2 and 1 - e/2.
    """
    logits = at_least_float32(logits)
    if labels.dtype != torch.bool:
        return F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
    targets = labels.to(logits) * (1 - label_smoothing) + label_smoothing / 2
    return F.binary_cross_entropy_with_logits(logits, targets)


def quantisation_loss(hashes: Tensor) -> Tensor:
    """Return the mean of (h - sgn h)^2 over hashes [N, K], a float32 scalar; 0 for an empty batch.

    sgn 0 = 1; sgn has no gradient.
    """
    signs = torch.where(hashes >= 0, 1.0, -1.0).to(hashes.dtype)
    return (hashes - signs).float().square().sum() / max(1, hashes.numel())


def bit_balance_loss(outputs: Tensor, centre: float) -> Tensor:
    """Return the mean over bits of (mean over rows - centre)^2 of outputs [N, K]; 0 for an empty batch.

    `centre` is the threshold between 0 and 1 bits. The loss is 0 if every bit is balanced over the batch.
    """
    if not len(outputs):
        return at_least_float32(outputs).sum()
    return (at_least_float32(outputs).mean(dim=0) - centre).square().mean()


def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: Tensor | float,
    cross_only: bool = False,
    near: Tensor | None = None,
    near_as: NearAs = "negatives",
) -> Tensor:
    """Return the NT-Xent loss (Chen et al., ICML 2020) of two views of N items, the mean over all 2N rows.

    Args:
        first: the first view of each item, [N, K].
        second: the second view of each item, [N, K].
        temperature: divides the cosines.
        cross_only: take negatives only from the other view. By default, all other rows of both views are negatives.
        near: bool [N, N], which items are nearly identical.
        near_as: how those are treated. "ignored": they are left out of the denominator. "positives": the loss of a row
            is the mean over them and its own positive, the item's other view.

    Returns:
        A float32 or float64 scalar; 0 for an empty batch.
    """
    num_items = len(first)
    rows = F.normalize(torch.cat([at_least_float32(first), at_least_float32(second)]), dim=1, eps=1e-6)
    logits = rows @ rows.T / temperature
    same = torch.eye(num_items, dtype=torch.bool, device=rows.device)
    excluded = torch.eye(2 * num_items, dtype=torch.bool, device=rows.device)
    if cross_only:
        view = torch.arange(2, device=rows.device).repeat_interleave(num_items)
        excluded = view[:, None] == view[None, :]
    positive = same if near is None or near_as == "negatives" else near | same
    if near_as == "ignored":
        excluded = excluded | (positive & ~same).repeat(2, 2)
        positive = same
    # The lowest finite number, because the gradient at minus infinity is undefined.
    logits = logits.masked_fill(excluded, torch.finfo(logits.dtype).min)
    log_shares = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    is_positive = positive.repeat(2, 2) & ~excluded
    row_losses = -log_shares.masked_fill(~is_positive, 0.0).sum(dim=1) / is_positive.sum(dim=1).clamp(min=1)
    return row_losses.sum() / max(1, 2 * num_items)
