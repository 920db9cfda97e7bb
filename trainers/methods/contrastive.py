"""The contrastive loss between two views of the same items."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["NearAs", "nt_xent", "wide"]

# What an item that is nearly the same counts as: like every other one, left out of the negatives, or one more positive.
NearAs = Literal["negatives", "ignored", "positives"]


def wide(values: Tensor) -> Tensor:
    """In float32 at least: what is half as wide overflows in sums and exponentials."""
    return values if values.dtype == torch.float64 else values.float()


def nt_xent(
    first: Tensor,
    second: Tensor,
    temperature: Tensor | float,
    cross_only: bool = False,
    near: Tensor | None = None,
    near_as: NearAs = "negatives",
) -> Tensor:
    """NT-Xent (Chen et al., ICML 2020) of two views [N, K] of N items, a scalar: the mean over the 2N rows.

    A row's positive is its item's other view, its negatives are all other rows of both views, or of the other view
    only with `cross_only`; logits are cosines over `temperature`. `near` bool [N, N] says which items are nearly the
    same. Such rows leave the denominator where `near_as` is "ignored"; where it is "positives" the row's loss is the
    mean over them and the own positive. Zero for an empty batch.
    """
    num = len(first)
    rows = F.normalize(torch.cat([wide(first), wide(second)]), dim=1, eps=1e-6)
    logits = rows @ rows.T / temperature
    same = torch.eye(num, dtype=torch.bool, device=rows.device)
    is_self = torch.eye(2 * num, dtype=torch.bool, device=rows.device)
    left_out = is_self
    if cross_only:
        view = torch.arange(2, device=rows.device).repeat_interleave(num)
        left_out = view[:, None] == view[None, :]
    is_near = same if near is None or near_as == "negatives" else near | same
    if near_as == "ignored":
        left_out = left_out | (is_near & ~same).repeat(2, 2)
        is_near = same
    # The least number in place of minus infinity: its gradient is 0, not undefined.
    logits = logits.masked_fill(left_out, torch.finfo(logits.dtype).min)
    log_shares = logits - torch.logsumexp(logits, dim=1, keepdim=True)
    is_positive = is_near.repeat(2, 2) & ~left_out
    of_rows = -log_shares.masked_fill(~is_positive, 0.0).sum(dim=1) / is_positive.sum(dim=1).clamp(min=1)
    return of_rows.sum() / max(1, 2 * num)
