"""MHCLN (Roy, Sangineto, Demir, Sebe, IGARSS 2018) in the form of its journal version MiLaN (GRSL, arXiv 1904.01258).

A small network on frozen, cached features of a pretrained backbone, with sigmoid outputs f in (0, 1). There are three
losses: a triplet loss on L2-normalised outputs, a push of the outputs towards 0 or 1, and a balance between the ones
and zeros of each code. Batches are drawn from pairs of classes: anchors and positives from one, negatives from the
other.

Deviations from the authors' code:

- Features are standardised with the moments of the training part (an option; it adds 6 points on UC Merced's
  MobileNetV2 features).
- A step may have several pairs of classes. The triplets of a pair repeat if half of its first class, or its second
  class, has too few images, so that small splits work. Every rank takes its part of one global list of triplets.
- An optional loss balances each bit over the batch, as the code's comment on the balance loss describes.
- Hidden layers are initialised as torch's linear layers (in the code: uniform weights of variance 4 / (in + out)).
"""

from typing import Annotated, Self

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Adam

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import Standardise
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.losses import bit_balance_loss
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["Mhcln", "MhclnConfig", "class_pairs", "code_balance_loss", "normalised_triplet_loss", "push_loss"]


class MhclnConfig(TrainConfig):
    """Settings of MHCLN. An epoch has `steps_per_epoch` batches, independent of the number of training images."""

    bits: int = Field(32, ge=8, le=512, description="length of a code")
    epochs: int = Field(20, ge=1, le=10_000, description="number of epochs; code: 10,000 steps in total")
    steps_per_epoch: int = Field(500, ge=1, description="batches per epoch")
    batch_size: Annotated[int, Choice((90, 180, 360))] = Field(
        90, ge=6, le=65_536, description="rows per step over all workers: a third each of anchors, positives, negatives"
    )
    class_pairs: Annotated[int, Choice((1, 2, 3))] = Field(
        1,
        ge=1,
        le=1024,
        description="pairs of classes per step; W, with batch_size=90*W, gives each of W workers one pair",
    )
    hidden: Annotated[tuple[int, ...], Choice(((1024, 512), (512, 256), (2048, 1024)))] = Field(
        (1024, 512), description="widths of the hidden layers"
    )
    standardise: bool = Field(True, description="whether features are standardised; code: false")
    margin: Annotated[float, Linear(0.05, 1)] = Field(
        0.2, gt=0, le=2, description="alpha of the triplet loss, on squared distances in [0, 2]"
    )
    push_weight: Annotated[float, Log(1e-5, 0.1)] = Field(
        0.001, ge=0, le=10, description="weight beta of the push towards 0 or 1"
    )
    balance_weight: Annotated[float, Log(1e-3, 10)] = Field(
        1.0, ge=0, le=100, description="weight gamma of the balance of each code"
    )
    bit_balance_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="weight of the balance of each bit over the batch; code: 0"
    )
    lr: Annotated[float, Log(1e-5, 1e-3)] = Field(1e-4, gt=0, le=1, description="Adam's learning rate")
    beta1: float = Field(0.5, ge=0, lt=1, description="Adam's decay rate of the first moment")

    @model_validator(mode="after")
    def _check_thirds(self) -> Self:
        if self.batch_size % (3 * self.class_pairs):
            raise ValueError(
                f"batch_size is {self.batch_size}: it must be a multiple of 3 * class_pairs = {3 * self.class_pairs}"
            )
        return self


def normalised_triplet_loss(anchors: Tensor, positives: Tensor, negatives: Tensor, margin: float) -> Tensor:
    """Return the mean of max(0, |a - p|^2 - |a - n|^2 + margin) over triplets of outputs [M, K]; 0 without triplets.

    The outputs are scaled to unit length first.
    """
    a, p, n = (_normalised(rows) for rows in (anchors, positives, negatives))
    distances = (a - p).square().sum(1) - (a - n).square().sum(1)
    return (distances + margin).clamp(min=0).sum() / max(1, len(a))


def push_loss(outputs: Tensor) -> Tensor:
    """Return the mean over rows and bits of -(f - 1/2)^2 of outputs [N, K], from -1/4 to 0; 0 for an empty batch."""
    return -(outputs.float() - 0.5).square().sum() / max(1, outputs.numel())


def code_balance_loss(outputs: Tensor) -> Tensor:
    """Return the mean over rows of (mean over bits - 1/2)^2 of outputs [N, K]; 0 for an empty batch."""
    return (outputs.float().mean(1) - 0.5).square().sum() / max(1, len(outputs))


def _normalised(rows: Tensor) -> Tensor:
    rows = rows.float()
    # Clamped inside the root, as in the code, so that a row of zeros has a gradient.
    return rows * torch.rsqrt(rows.square().sum(1, keepdim=True).clamp(min=1e-10))


def class_pairs(labels: Labels, num_triplets: int, num_pairs: int, rng: np.random.Generator) -> npt.NDArray[np.int64]:
    """Return the rows of one step, int64 [3 * num_triplets], in the order anchor, positive, negative, anchor, ...

    The triplets are shared equally among `num_pairs` ordered pairs of distinct classes. Anchors and positives of a pair
    are disjoint. The triplets of a pair repeat if half of its first class, or its second class, has too few images.
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
    """The hash head, trained on frozen features."""

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
        self.network = config.build_network(head)
        self.network.backbone.requires_grad_(False)

    @property
    def trains_on_images(self) -> bool:
        """False: batches have features, see `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: MhclnConfig) -> dict[str, Table]:
        """Return the table of image features, see `Method`."""
        return {"image": Table("image")}

    def begin(self, training: Part) -> None:
        """Fit the standardisation, see `Method`."""
        if isinstance(self.network.head.norm, Standardise):
            self.network.head.norm.fit(torch.from_numpy(np.asarray(training.features["image"])))

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's triplets, see `Method`."""
        config = self.config
        counts = np.bincount(labels)
        if np.count_nonzero(counts) < 2:
            raise InputError("mhcln needs training images of at least 2 classes; all are of one class")
        if (counts[counts > 0] < 2).any():
            alone = int(np.flatnonzero(counts == 1)[0])
            raise InputError(f"mhcln needs at least 2 training images of each class; class number {alone} has 1")
        rng = np.random.default_rng([config.seed, epoch])
        steps = [
            class_pairs(labels, config.batch_size // 3, config.class_pairs, rng) for _ in range(config.steps_per_epoch)
        ]
        return np.array(steps)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`. All but the bit balance are means over this rank's triplets or rows."""
        config = self.config
        outputs = self.network.head(batch.features["image"])
        triplet = batch.weight * normalised_triplet_loss(outputs[0::3], outputs[1::3], outputs[2::3], config.margin)
        push, balance = batch.weight * push_loss(outputs), batch.weight * code_balance_loss(outputs)
        losses = {"triplet": triplet, "push": push, "balance": balance}
        loss = triplet + config.push_weight * push + config.balance_weight * balance
        if config.bit_balance_weight:
            losses["bit_balance"] = bit_balance_loss(batch.gather(outputs), centre=0.5)
            loss = loss + config.bit_balance_weight * losses["bit_balance"]
        return {"loss": loss, **losses}

    def build_optimizer(self) -> Adam:
        """Return a fused Adam over the head's parameters, see `Method`."""
        # The update of the weights dominates a step here, and `fused` makes it one pass. It is wrong for convolutions:
        # it reads weights and state in memory order, and a checkpoint does not keep `channels_last`.
        return Adam(self.network.head.parameters(), lr=self.config.lr, betas=(self.config.beta1, 0.999), fused=True)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Return 1: the learning rate is constant."""
        return 1.0
