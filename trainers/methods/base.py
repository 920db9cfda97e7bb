"""What the training loop needs to know of a method."""

from abc import abstractmethod
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import Optimizer

from orbithash.encoders.networks import HashNetwork
from orbithash.trainers.config import TrainConfig

__all__ = ["Method"]


class Method(nn.Module):
    """A network and how a batch becomes a loss. DDP wraps the whole of it, proxies and the like included."""

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]]

    network: HashNetwork

    @abstractmethod
    def __init__(self, config: Any, num_classes: int) -> None:
        super().__init__()

    @abstractmethod
    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Scalar losses by name for this rank's images float [B, 3, H, W] and labels int64 [B]; `loss` is minimised.

        Averaged over ranks, the gradient of `loss` is that of one process with all ranks' images in its batch.
        """

    @abstractmethod
    def build_optimizer(self) -> Optimizer:
        """The optimizer over all parameters, with the learning rates of epoch 0."""

    @abstractmethod
    def start_epoch(self, epoch: int) -> float:
        """Sets which parameters train in this epoch (from 0) and returns the factor on the learning rates."""

    @property
    @abstractmethod
    def label_code(self) -> tuple[str, int]:
        """Kind and weight of the label bits that follow the hash bits."""
