"""Base of the methods that train a new head together with a pretrained backbone, or on features of a frozen one.

It provides sampling, optimizer, learning-rate schedules and warm-up.
"""

import math
from typing import Annotated, Literal

import numpy as np
import numpy.typing as npt
from pydantic import Field
from torch.optim import SGD, AdamW, Optimizer

from orbithash.encoders.networks.hash_network import HashNetwork, NetworkOutput
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method, balanced
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.search_space import Choice, Log

__all__ = ["FineTuned", "FineTuningConfig"]


class FineTuningConfig(TrainConfig):
    """Settings of fine-tuning. The defaults suit pretrained weights, several thousand images and 15 to 20 epochs."""

    tune: Annotated[Literal["all", "none"], Choice(("all", "none"))] = Field(
        "all", description="what trains besides the head: all of the backbone, or none of it (features are cached)"
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimizer; sgd has Nesterov momentum 0.9")
    lr: Annotated[float, Log(2e-5, 1e-3)] = Field(
        2e-4, gt=0, le=1, description="learning rate of the backbone; for sgd try 0.01"
    )
    head_lr_factor: Annotated[float, Log(1, 100)] = Field(
        10.0, gt=0, le=1000, description="factor on lr for the hash layer and the classifier"
    )
    weight_decay: Annotated[float, Log(1e-6, 1e-2)] = Field(1e-4, ge=0, le=1, description="weight decay")
    schedule: Literal["cosine", "step"] = Field(
        "cosine", description="schedule of all learning rates; cosine falls to almost 0 in the last epoch"
    )
    lr_decay: float = Field(0.5, gt=0, le=1, description="factor of schedule=step, applied every lr_decay_epochs")
    lr_decay_epochs: int = Field(5, ge=1, description="number of epochs between two decays of schedule=step")
    warm_up_epochs: Annotated[int, Choice((0, 1, 2, 3))] = Field(
        1, ge=0, description="number of first epochs in which the backbone is frozen"
    )
    images_per_class: int = Field(
        0, ge=0, description="images of each class in a batch, for balanced sampling; 0: plain shuffling"
    )


class FineTuned(Method):
    """Base class of a method that trains `network`. Subclasses add their own parameters to the optimizer.

    With `tune=none`, batches have features instead of images. Features are of images without augmentation.
    """

    config: FineTuningConfig

    @property
    def trains_on_images(self) -> bool:
        """Whether some of the backbone trains, see `Method`."""
        return self.config.tune != "none"

    @classmethod
    def tables_of(cls, config: FineTuningConfig) -> dict[str, Table]:
        """Return the table of image features if the backbone is frozen, see `Method`."""
        return {"image": Table("image")} if config.tune == "none" else {}

    def outputs(self, batch: Batch, network: HashNetwork | None = None) -> NetworkOutput:
        """Return the hashes and logits of this rank's images by `network`, by default the trained one."""
        network = network or self.network
        if batch.images is None:
            return network.hash(batch.features["image"])
        output: NetworkOutput = network(batch.images)
        return output

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's batches, see `Method`; class-balanced if `images_per_class` is set."""
        config = self.config
        if not config.images_per_class:
            return super().order(labels, epoch)
        return balanced(labels, config.batch_size, config.images_per_class, config.seed, epoch)

    def build_optimizer(self) -> Optimizer:
        """Return the optimizer, see `Method`: one group for the backbone if it trains, one for the other layers."""
        config, network = self.config, self.network
        head = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
        groups = [{"params": head, "lr": config.lr * config.head_lr_factor}]
        if config.tune == "all":
            groups.insert(0, {"params": list(network.backbone.parameters()), "lr": config.lr})
        if config.optimizer == "sgd":
            return SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
        return AdamW(groups, weight_decay=config.weight_decay)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Freeze the backbone during the warm-up and return the factor on the learning rates, see `Method`."""
        config = self.config
        self.network.backbone.requires_grad_(config.tune == "all" and epoch >= config.warm_up_epochs)
        if config.schedule == "step":
            return float(config.lr_decay ** (epoch // config.lr_decay_epochs))
        return (1 + math.cos(math.pi * epoch / config.epochs)) / 2
