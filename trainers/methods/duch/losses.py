"""Losses of DUCH, and its discriminator."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from orbithash.trainers.methods.losses import at_least_float32

__all__ = [
    "Discriminator",
    "balance_loss",
    "consensus_loss",
    "consensus_of",
    "discriminator_loss",
    "fooling_loss",
    "gradient_penalty",
]

# Pairs in a batch of the released code. Its weights belong to sums over such a batch.
REFERENCE_BATCH = 256


class Discriminator(nn.Module):
    """Classifies hashes float [N, K] by modality: logits [N], positive for captions."""

    def __init__(self, bits: int, batch_norm: bool = False) -> None:
        super().__init__()
        self.hidden = nn.Linear(bits, 2 * bits)
        self.output = nn.Linear(2 * bits, 1)
        # Without running statistics, because the discriminator is used in training only.
        self.scale = nn.Parameter(torch.ones(2 * bits)) if batch_norm else None
        self.shift = nn.Parameter(torch.zeros(2 * bits)) if batch_norm else None

    def forward(self, hashes: Tensor) -> Tensor:
        """Return the logits [N]."""
        outputs = self.hidden(hashes)
        if self.scale is not None:
            outputs = F.batch_norm(outputs, None, None, self.scale, self.shift, training=True)
        logits: Tensor = self.output(F.relu(outputs))
        return logits[:, 0]


def gradient_penalty(discriminator: nn.Module, points: Tensor) -> Tensor:
    """Return the mean over points [N, K] of (norm of the logit's gradient - 1)^2."""
    points = points.detach().requires_grad_()
    (gradients,) = torch.autograd.grad(discriminator(points).sum(), points, create_graph=True)
    norms: Tensor = gradients.norm(dim=1)
    return (norms - 1).square().sum() / max(1, len(points))


def discriminator_loss(
    discriminator: nn.Module, texts: Tensor, images: Tensor, shares: Tensor, penalty_weight: float
) -> Tensor:
    """Return the discriminator's loss, -log D(text) - log(1 - D(image)) plus the gradient penalty, each a mean.

    Texts, images and `shares` are [N, K]. The penalty is taken at shares * text + (1 - shares) * image.
    """
    texts, images = at_least_float32(texts.detach()), at_least_float32(images.detach())
    points = shares * texts + (1 - shares) * images
    wrong = F.softplus(-discriminator(texts)).sum() + F.softplus(discriminator(images)).sum()
    return wrong / max(1, len(texts)) + penalty_weight * gradient_penalty(discriminator, points)


def fooling_loss(discriminator: nn.Module, hashes: Tensor) -> Tensor:
    """Return the mean of -log D over hashes [N, K], small if the discriminator takes them for captions; 0 for none."""
    return F.softplus(-discriminator(at_least_float32(hashes))).sum() / max(1, len(hashes))


def consensus_of(images: Tensor, texts: Tensor) -> Tensor:
    """Return the common code int8 [N, K], -1 or 1, of image views [N, V, K] and text views [N, T, K].

    It is the sign of the mean of both modalities' means; the sign of 0 is 1.
    """
    mean = at_least_float32(images).mean(dim=1) + at_least_float32(texts).mean(dim=1)
    return torch.where(mean >= 0, 1, -1).to(torch.int8)


def consensus_loss(hashes: Tensor, consensus: Tensor) -> Tensor:
    """Return the mean of (h - b)^2 over views h [N, V, K] of pairs with common codes b [N, K]; 0 for none."""
    hashes = at_least_float32(hashes)
    return (hashes - consensus[:, None].to(hashes.dtype)).square().sum() / max(1, hashes.numel())


def balance_loss(hashes: Tensor, axis: Literal["column", "row"]) -> Tensor:
    """Return the bit imbalance of views [N, V, K]; 0 if the bits are balanced, and for an empty batch.

    "row": mean over codes of (sum over bits)^2. "column": sum over bits of (mean over the batch)^2, mean over views,
    times `REFERENCE_BATCH`: the sum over a batch of that size, per pair.
    """
    hashes = at_least_float32(hashes)
    if not hashes.numel():
        return hashes.sum()
    if axis == "row":
        return hashes.sum(dim=2).square().mean()
    return REFERENCE_BATCH * hashes.mean(dim=0).square().sum(dim=1).mean()
