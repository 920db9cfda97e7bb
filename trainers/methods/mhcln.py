"""MHCLN (Roy, Sangineto, Demir, Sebe, IGARSS 2018) in the form of its journal version MiLaN (GRSL, arXiv 1904.01258).

A small network on frozen, cached features of a pretrained backbone, with sigmoid outputs f in (0, 1). Three losses: a
triplet loss on L2-normalised outputs, a push of outputs towards 0 or 1, and a balance that asks each code to have as
many ones as zeros. Batches come from pairs of classes: anchors and positives of one, negatives of the other.

Deviations from the authors' code:

- features are standardised on the training part (an option; on UC Merced's MobileNetV2 features it is worth 6 points);
- the classes of a step may be more than one pair, and the number of triplets a pair is capped by half of the smaller
  class, so that small splits work; every rank takes its part of one global list of triplets;
- an optional loss on the mean of each bit over the batch, which is what the code's comment on the balance loss means;
- hidden layers start as torch's linear layers do, not with the code's uniform weights of variance 4 / (in + out).
"""

from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Adam

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec, NetworkSpec
from orbithash.encoders.networks.hash_network import HashNetwork, Standardise
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import gather_with_gradient
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.losses import bit_balance_loss
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["Mhcln", "MhclnConfig", "class_pairs", "code_balance_loss", "normalised_triplet_loss", "push_loss"]


class MhclnConfig(TrainConfig):
    """Settings of MHCLN. An epoch is `steps_per_epoch` batches, whatever the size of the training part."""

    bits: int = Field(32, ge=8, le=512, description="length of a code")
    epochs: int = Field(20, ge=1, le=10_000, description="rounds of steps_per_epoch batches; code: 10,000 steps in all")
    steps_per_epoch: int = Field(500, ge=1, description="batches in an epoch")
    batch_size: Annotated[int, Choice((90, 180, 360))] = Field(
        90, ge=6, le=65_536, description="rows of a step over all workers, in thirds: anchors, positives, negatives"
    )
    class_pairs: Annotated[int, Choice((1, 2, 3))] = Field(
        1, ge=1, le=1024, description="pairs of classes in a step; W, with batch_size=90*W: one for each of W workers"
    )
    hidden: Annotated[tuple[int, ...], Choice(((1024, 512), (512, 256), (2048, 1024)))] = Field(
        (1024, 512), description="widths of the hidden layers"
    )
    standardise: bool = Field(True, description="whether features are standardised; code: no")
    margin: Annotated[float, Linear(0.05, 1)] = Field(
        0.2, gt=0, le=2, description="alpha of the triplet loss, on squared distances in [0, 2]"
    )
    push_weight: Annotated[float, Log(1e-5, 0.1)] = Field(0.001, ge=0, le=10, description="beta")
    balance_weight: Annotated[float, Log(1e-3, 10)] = Field(1.0, ge=0, le=100, description="gamma")
    bit_balance_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="of the balance of each bit over the batch; code: 0"
    )
    lr: Annotated[float, Log(1e-5, 1e-3)] = Field(1e-4, gt=0, le=1, description="Adam's learning rate")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's first decay")

    @model_validator(mode="after")
    def _check_thirds(self) -> Self:
        if self.batch_size % (3 * self.class_pairs):
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of 3 * class_pairs = {3 * self.class_pairs}"
            )
        return self


def normalised_triplet_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Mean of max(0, |a - p|^2 - |a - n|^2 + margin) over triplets of normalised outputs [M, K]; 0 for no triplets."""
    a, p, n = (_normalised(rows) for rows in (anchors, positives, negatives))
    distances = (a - p).square().sum(1) - (a - n).square().sum(1)
    return (distances + margin).clamp(min=0).sum() / max(1, len(a))


def push_loss(outputs: Tensor) -> Tensor:
    """The mean over rows and bits of -(f - 1/2)^2 of outputs [N, K]: between -1/4 and 0; 0 for no rows."""
    return -(outputs.float() - 0.5).square().sum() / max(1, outputs.numel())


def code_balance_loss(outputs: Tensor) -> Tensor:
    """The mean over rows of (mean over bits of f - 1/2)^2: each code's own balance; 0 for no rows."""
    return (outputs.float().mean(1) - 0.5).square().sum() / max(1, len(outputs))


def _normalised(rows: Tensor) -> Tensor:
    rows = rows.float()
    # Inside the root, as in the code: a row of zeros has a gradient.
    return rows * torch.rsqrt(rows.square().sum(1, keepdim=True).clamp(min=1e-10))


def class_pairs(labels: Labels, num_triplets: int, num_pairs: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """The rows of one step, int64 [3 * num_triplets]: anchor, positive, negative, anchor, ...

    Each of `num_pairs` ordered pairs of distinct classes gives as many triplets. Anchors and positives of a pair are
    disjoint; where half of the class, or the other class, is too small, its triplets repeat.
    """
    members = {int(label): np.flatnonzero(labels == label) for label in np.unique(labels)}
    share = num_triplets // num_pairs
    triplets = []
    for _ in range(num_pairs):
        own, other = rng.choice(list(members), 2, replace=False)
        ours, theirs = rng.permutation(members[int(own)]), rng.permutation(members[int(other)])
        count = min(share, len(ours) // 2, len(theirs))
        drawn = np.stack([ours[:count], ours[count : 2 * count], theirs[:count]], axis=1)
        triplets.append(drawn[np.arange(share) % count])
    return np.concatenate(triplets).reshape(-1)


class Mhcln(Method):
    """The hash head on frozen features."""

    name = "mhcln"
    learns_from = "class labels"
    paper = "Roy, Sangineto, Demir, Sebe: MHCLN, IGARSS 2018, and MiLaN, IEEE GRSL 2021 (arXiv 1904.01258)"
    Config = MhclnConfig
    group_size = 3

    def __init__(self, config: MhclnConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        head = HeadSpec(
            config.bits,
            norm="standardise" if config.standardise else "none",
            hidden=config.hidden,
            hidden_activation="leaky-relu",
            activation="sigmoid",
        )
        spec = NetworkSpec(config.backbone, config.norm, config.pooling, head, channels=config.channels)
        self.network = HashNetwork(spec, config.weights, config.rgb)
        self.network.backbone.requires_grad_(False)

    @property
    def trains_on_images(self) -> bool:
        """See `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: MhclnConfig) -> dict[str, Table]:
        """See `Method`."""
        return {"image": Table("image")}

    def begin(self, training: Part) -> None:
        """See `Method`. Fits the standardisation."""
        if isinstance(self.network.head.norm, Standardise):
            self.network.head.norm.fit(torch.from_numpy(training.features["image"]))

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """See `Method`."""
        config = self.config
        counts = np.bincount(labels)
        if np.count_nonzero(counts) < 2:
            raise InputError("mhcln draws pairs of classes; all training images are of one")
        if (counts[counts > 0] < 2).any():
            alone = int(np.flatnonzero(counts == 1)[0])
            raise InputError(f"mhcln needs 2 training images of each class; class number {alone} has 1")
        rng = np.random.default_rng([config.seed, epoch])
        steps = [
            class_pairs(labels, config.batch_size // 3, config.class_pairs, rng) for _ in range(config.steps_per_epoch)
        ]
        return np.array(steps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See `Method`. All but the balance of bits are means over this rank's triplets or rows."""
        config = self.config
        outputs = self.network.head(batch.features["image"])
        triplet = normalised_triplet_loss(outputs[0::3], outputs[1::3], outputs[2::3], config.margin)
        push, balance = push_loss(outputs), code_balance_loss(outputs)
        losses = {"triplet": triplet, "push": push, "balance": balance}
        loss = triplet + config.push_weight * push + config.balance_weight * balance
        if config.bit_balance_weight:
            losses["bit_balance"] = bit_balance_loss(gather_with_gradient(outputs), centre=0.5)
            loss = loss + config.bit_balance_weight * losses["bit_balance"]
        return {"loss": loss, **losses}

    def build_optimizer(self) -> Adam:
        """See `Method`."""
        # One pass over the weights, which are most of a step here. Not for convolutions: the fused step takes weights
        # and its state in the order of their memory, and a checkpoint does not keep `channels_last`.
        return Adam(self.network.head.parameters(), lr=self.config.lr, betas=(self.config.beta1, 0.999), fused=True)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """See `Method`. The rate is constant."""
        return 1.0
