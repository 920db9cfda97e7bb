"""Base of the methods that train a new head together with a pretrained backbone, or on features of a frozen one.

It provides sampling, optimizer, learning-rate schedules and warm-up.
"""

import math
from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator
from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashNetwork, NetworkOutput
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method, balanced
from orbithash.trainers.methods.tuning import add_adapters, check_blocks, freeze, merge_adapters, rates
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.search_space import Choice, Linear, Log, When

__all__ = ["FineTuned", "FineTuningConfig"]


class FineTuningConfig(TrainConfig):
    """Settings of fine-tuning. The defaults suit pretrained weights, several thousand images and 15 to 20 epochs."""

    tune: Annotated[Literal["all", "last", "lora", "none"], Choice(("all", "last", "none"))] = Field(
        "all",
        description="what trains besides the head: all of the backbone, its last blocks, low-rank adapters of its "
        "attention, or none of it, on cached features without augmentation",
    )
    tune_blocks: Annotated[int, Choice((1, 2, 4)), When("tune", ("last",))] = Field(
        2, ge=1, le=1000, description="number of last blocks that train with tune=last"
    )
    lora_rank: Annotated[int, Choice((4, 8, 16, 32)), When("tune", ("lora",))] = Field(
        8, ge=1, le=1024, description="rank of the adapters of tune=lora"
    )
    lora_alpha: Annotated[float, Log(4, 64), When("tune", ("lora",))] = Field(
        16.0, gt=0, le=4096, description="scale of the adapters of tune=lora, which are multiplied by lora_alpha / rank"
    )
    layer_decay: Annotated[float, Linear(0.6, 1), When("tune", ("all", "last", "lora"))] = Field(
        1.0, gt=0, le=1, description="factor on the learning rate from each block of the backbone to the one before it"
    )
    checkpoint_gradients: bool = Field(
        False, description="whether the blocks of the backbone are computed again in the backward pass, to save memory"
    )
    augment_on: Literal["cpu", "device"] = Field(
        "cpu",
        description="where random views are made; device: the one that trains, from images uploaded whole, which frees "
        "CPUs; the views are the same",
    )
    compile: bool = Field(
        False,
        description="whether torch.compile speeds up the backbone in training, after about a minute; losses differ by "
        "rounding, codes come from the network as it is",
    )
    shard: bool = Field(
        False,
        description="whether each worker holds only its share of weights, gradients and optimizer state (FSDP); for "
        "backbones that do not fit a GPU together with their gradients and optimizer state",
    )
    optimizer: Literal["adamw", "sgd"] = Field("adamw", description="optimizer; sgd has Nesterov momentum 0.9")
    lr: Annotated[float, Log(2e-5, 1e-3)] = Field(
        2e-4, gt=0, le=1, description="learning rate of the backbone; for sgd try 0.01"
    )
    head_lr_factor: Annotated[float, Log(1, 100)] = Field(
        10.0, gt=0, le=1000, description="factor on lr for the hash layer and the classifier"
    )
    weight_decay: Annotated[float, Log(1e-6, 1e-2)] = Field(1e-4, ge=0, le=1, description="weight decay")
    schedule: Literal["cosine", "cosine-by-step", "step"] = Field(
        "cosine",
        description="schedule of all learning rates; cosine changes with each epoch and falls to almost 0 in the last "
        "one, cosine-by-step with each step, after the linear warm-up",
    )
    warm_up_share: Annotated[float, Linear(0, 0.2)] = Field(
        0.0,
        ge=0,
        le=0.5,
        description="share of the run's steps in which all learning rates rise linearly from 0",
    )
    lr_decay: float = Field(0.5, gt=0, le=1, description="factor of schedule=step, applied every lr_decay_epochs")
    lr_decay_epochs: int = Field(5, ge=1, description="number of epochs between two decays of schedule=step")
    warm_up_epochs: Annotated[int, Choice((0, 1, 2, 3))] = Field(
        1, ge=0, description="number of first epochs in which the backbone is frozen"
    )
    images_per_class: int = Field(
        0, ge=0, description="images of each class in a batch, for balanced sampling; 0: plain shuffling"
    )

    @model_validator(mode="after")
    def _check_tuning(self) -> Self:
        if self.augment_on == "device" and self.tune == "none":
            raise ValueError("augment_on is device, and tune is none: frozen features have no views; omit augment_on")
        if self.compile and self.tune == "none":
            raise ValueError("compile is true, and tune is none: no backbone runs in training; omit compile")
        if self.shard and self.tune == "none":
            raise ValueError("shard is true, and tune is none: no backbone runs in training; omit shard")
        if self.shard and self.compile:
            raise ValueError("shard and compile are true: a sharded backbone is not compiled; omit one of them")
        if self.compile and self.norm == "batch":
            raise ValueError(
                "compile is true, and norm is batch: batch norm over workers is not compiled; use norm=frozen-batch or "
                "norm=group, or omit compile"
            )
        return self


class FineTuned(Method):
    """Base class of a method that trains `network`. Subclasses add their own parameters to the optimizer.

    With `tune=none`, batches have features instead of images. With `tune=lora`, the exported network has the adapters
    in its weights.

    With `shard`, `build_optimizer`, `start_epoch`, `after_step` and `end_epoch` see parameters that are shared out over
    the ranks (DTensors); the pass of a network gathers its weights.
    """

    config: FineTuningConfig

    def build_network(self, head: HeadSpec, num_classes: int = 0) -> HashNetwork:
        """Return the network to train, with its adapters.

        Raises:
            InputError: the backbone cannot be tuned in this way.
        """
        config = self.config
        network = config.build_network(head, num_classes)
        if config.tune == "last":
            check_blocks(network.backbone, config.tune_blocks)
        if config.checkpoint_gradients:
            network.backbone.enable_checkpointing()
        if config.tune == "lora":
            if config.shard and any(isinstance(module, nn.MultiheadAttention) for module in network.modules()):
                # peft keeps its weights where FSDP does not find them.
                raise InputError(
                    f"shard is true, and tune is lora: {config.backbone} has torch's attention layer, whose adapters "
                    "cannot be sharded; use tune=last or all, or omit shard"
                )
            add_adapters(network.backbone, config.lora_rank, config.lora_alpha)
        return network

    def finish(self) -> None:
        """Merge the adapters into the weights, see `Method`."""
        merge_adapters(self.network.backbone)

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
        """Return the optimizer, see `Method`: a group for each rate of the backbone, one for the other layers."""
        config, network = self.config, self.network
        tuned: dict[float, list[nn.Parameter]] = {}
        for parameter, factor in self._tuned():
            tuned.setdefault(factor, []).append(parameter)
        groups = [{"params": tuned[factor], "lr": config.lr * factor} for factor in sorted(tuned, reverse=True)]
        head = [p for name, p in network.named_parameters() if not name.startswith("backbone.")]
        groups.append({"params": head, "lr": config.lr * config.head_lr_factor})
        if config.optimizer == "sgd":
            return SGD(groups, momentum=0.9, nesterov=True, weight_decay=config.weight_decay)
        return AdamW(groups, weight_decay=config.weight_decay)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Freeze the backbone during the warm-up and return the factor on the learning rates, see `Method`."""
        config = self.config
        self.network.backbone.requires_grad_(False)
        if epoch >= config.warm_up_epochs:
            for parameter, _ in self._tuned():
                parameter.requires_grad_()
        if config.schedule == "step":
            return float(config.lr_decay ** (epoch // config.lr_decay_epochs))
        return _cosine(epoch / config.epochs) if config.schedule == "cosine" else 1.0

    def step_factor(self, step: int, num_steps: int) -> float:
        """Return the factor of the warm-up and of the schedule by step, see `Method`."""
        config = self.config
        num_warm = round(config.warm_up_share * num_steps)
        if step < num_warm:
            return (step + 1) / num_warm
        return _cosine((step - num_warm) / (num_steps - num_warm)) if config.schedule == "cosine-by-step" else 1.0

    def train(self, mode: bool = True) -> Self:
        """Set the mode of all layers; frozen blocks stay in evaluation mode."""
        super().train(mode)
        if mode and self.config.tune == "last":
            freeze(self.network.backbone, self.config.tune_blocks)
        return self

    def _tuned(self) -> list[tuple[nn.Parameter, float]]:
        """Return the parameters of the backbone that train, with the factor on the learning rate of each."""
        config = self.config
        if config.tune == "none":
            return []
        return rates(self.network.backbone, config.tune_blocks if config.tune == "last" else None, config.layer_decay)


def _cosine(share: float) -> float:
    """Return the factor after this share of the run, from 1 to 0."""
    return (1 + math.cos(math.pi * share)) / 2
