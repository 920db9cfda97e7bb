"""Contrastive: a linear head on frozen features, trained to give the views of an image one code, without labels.

The features of each training image and of `num_views` augmented views are computed once. The head starts from a closed
form: features of unit length are whitened by the covariance between the views of an image, which removes what crops and
turns change, and ITQ is fitted to the result. Then the NT-Xent loss (Chen et al., ICML 2020) of two views drawn in each
step, bit balance and quantisation train all its weights.

NT-Xent on relaxed codes is the loss of CIBHash (Qiu et al., IJCAI 2021, with a term of the information bottleneck) and,
for remote sensing, of DCSH (Tan et al., Remote Sensing 2022, which trains the backbone). Here the backbone is frozen,
the head is linear, and the start decides most of the result. UC Merced, MobileNetV2 of ImageNet, 64 bits, `ap_min@20`
of files 64-79 in 00-63: 0.611 by ITQ, 0.695 by the start, 0.722 after training; 0.664 if training starts from ITQ
itself, 0.507 from random weights. The defaults were chosen by these validation metrics, which need labels; training
uses none.
"""

import math
from typing import Annotated, ClassVar, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor
from torch.optim import Adam

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.label_free.projections import (
    itq_rotation,
    mean_row,
    principal_directions,
    unit,
    whitening,
)
from orbithash.trainers.methods.losses import bit_balance_loss, nt_xent, quantisation_loss
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["Contrastive", "ContrastiveConfig"]


class ContrastiveConfig(TrainConfig):
    """Settings of contrastive training."""

    samples_images = True
    unused: ClassVar[tuple[str, ...]] = ("precision", "min_crop_area", "colour_jitter", "grayscale")

    epochs: int = Field(40, ge=1, le=10_000, description="passes over the training part")
    batch_size: Annotated[int, Choice((128, 256, 512))] = Field(
        256, ge=2, le=65_536, description="images per step over all workers together"
    )
    max_rows: int = Field(
        100_000, ge=2, description="maximum number of training images that are used; of more, a sample is drawn"
    )
    num_views: int = Field(
        4, ge=1, le=64, description="augmented views of each image, besides the image itself; each is encoded once"
    )
    start: Literal["whitened", "itq"] = Field(
        "whitened", description="initial head: ITQ on features whitened by the differences between views, or plain ITQ"
    )
    shrinkage: float = Field(
        0.1, gt=0, le=1, description="share of equal variances in the covariance that whitens; 1: no whitening"
    )
    temperature: Annotated[float, Log(0.2, 2)] = Field(
        0.5, ge=0.01, le=10, description="temperature of the contrastive loss"
    )
    quantisation_weight: Annotated[float, Linear(0, 1)] = Field(
        0.1, ge=0, le=100, description="weight of the mean squared distance of a hash to its sign"
    )
    bit_balance_weight: Annotated[float, Linear(0, 10)] = Field(
        1.0, ge=0, le=100, description="weight of each bit's squared mean over the batch"
    )
    lr: Annotated[float, Log(1e-3, 3e-2)] = Field(
        0.01, gt=0, le=1, description="Adam's initial learning rate; falls to almost 0 by a cosine"
    )
    validate_every: int = Field(10, ge=1, description="epochs between two validations")
    checkpoint_every: int = Field(
        10, ge=1, description="epochs between two checkpoints; the last and every validated epoch is always saved"
    )


class Contrastive(Method):
    """A frozen backbone and a linear head."""

    name = "contrastive"
    learns_from = "images without labels, and random crops and turns of them"
    paper = "NT-Xent on relaxed codes, as Qiu et al.: CIBHash, IJCAI 2021, and Tan et al.: DCSH, Remote Sensing 2022"
    Config = ContrastiveConfig
    # The last epoch: no label may choose one.
    selection_metric = None
    supervision = "none"

    def __init__(self, config: ContrastiveConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        self.network = config.build_network(HeadSpec(config.bits, norm="unit"))
        self.network.backbone.requires_grad_(False)
        num_features = self.network.head.num_features
        if config.bits > min(num_features, num_rows - 1):
            raise InputError(
                f"bits is {config.bits}: contrastive takes at most one bit for each feature and each training image "
                f"but one; {config.backbone} has {num_features} features, and there are {num_rows} training images"
            )

    @property
    def trains_on_images(self) -> bool:
        """False: batches have features, see `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: ContrastiveConfig) -> dict[str, Table]:
        """Return the tables of image features and of the features of each view, see `Method`."""
        views = {
            f"view{draw}": Table("image", augmentation="crop-turn", draw=draw, training_only=True)
            for draw in range(1, config.num_views + 1)
        }
        return {"image": Table("image"), **views}

    def begin(self, training: Part) -> None:
        """Set the head to its start, with outputs of variance 1, see `Method`."""
        config = self.config
        views = [unit(np.asarray(table)) for table in training.features.values()]
        mean = np.mean([mean_row(view) for view in views], axis=0)
        whitener = whitening(views, config.shrinkage) if config.start == "whitened" else np.eye(len(mean))
        rows = ((sum(views) / len(views) - mean) @ whitener).astype(np.float32)
        principal = principal_directions(rows, config.bits)
        if len(principal) < config.bits:
            raise InputError(
                f"bits is {config.bits}, but the features of the {len(rows)} training images vary in {len(principal)} "
                f"directions only; give --bits {len(principal)} or fewer, or more images"
            )
        components = rows @ principal.T.astype(np.float32)
        directions = itq_rotation(components, config.seed).T @ principal @ whitener
        outputs = np.concatenate([(view - mean.astype(np.float32)) @ directions.T for view in views])
        directions /= outputs.std()
        output = self.network.head.output
        with torch.no_grad():
            output.weight.copy_(torch.from_numpy(directions))
            output.bias.copy_(torch.from_numpy(-directions @ mean))

    def build_optimizer(self) -> Adam:
        """Return the optimizer over the head, see `Method`."""
        return Adam(self.network.head.parameters(), lr=self.config.lr)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Return the factor on the learning rate, a cosine, see `Method`."""
        return (1 + math.cos(math.pi * epoch / self.config.epochs)) / 2

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the numbers of the two "views" of each image, int64 [B, 2], see `Method`."""
        draw = torch.Generator().manual_seed(batch.seed)
        order = torch.rand(batch.num_rows, len(batch.features), generator=draw).argsort(dim=1)
        return {"views": order[batch.positions, :2]}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses on the hashes of all ranks, see `Method`."""
        config = self.config
        views, chosen = torch.stack(list(batch.features.values()), dim=1), batch.draws["views"]
        rows = torch.arange(len(views), device=views.device)
        hashes = self.network.head(torch.cat([views[rows, chosen[:, 0]], views[rows, chosen[:, 1]]]))
        first, second = (batch.gather(half) for half in hashes.chunk(2))
        both = torch.cat([first, second])
        losses = {
            "contrastive": nt_xent(first, second, config.temperature),
            "quantisation": quantisation_loss(both),
            "bit_balance": bit_balance_loss(both, centre=0.0),
        }
        loss = losses["contrastive"] + config.quantisation_weight * losses["quantisation"]
        return {"loss": loss + config.bit_balance_weight * losses["bit_balance"], **losses}
