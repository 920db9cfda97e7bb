"""What the training loop needs to know of a method."""

from abc import abstractmethod
from typing import Any, ClassVar, NamedTuple

import numpy as np
import numpy.typing as npt
from torch import Tensor, nn
from torch.optim import Optimizer

from orbithash.encoders.networks.hash_network import HashHead, HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import gather_rows
from orbithash.trainers.features.features import Table
from orbithash.trainers.metrics.metrics import mean_average_precision
from orbithash.trainers.metrics.retrieval import Labels

__all__ = ["Batch", "Method", "balanced", "encode_part", "shuffled"]


# Images that are decoded together where they are not in memory.
BLOCK_SIZE = 256


class Batch(NamedTuple):
    """This rank's share of a step, or of a piece of one.

    `rows` int64 [B] are places in the training part, `labels` those of `Part`: int64 [B] for a method that needs them;
    `images` float32 [B, C, S, S] are augmented and normalised, absent for a method that trains on features; `features`
    holds the rows of each of the method's tables, float32 [B, ...]. `seed` is the step's own, the same on all ranks.
    """

    rows: Tensor
    labels: Tensor
    images: Tensor | None
    features: dict[str, Tensor]
    seed: int


class Method(nn.Module):
    """Networks and how a batch becomes a loss. DDP wraps the whole of it, proxies and the like included.

    All that has to survive an interruption is a parameter, a buffer or in the optimizer. What is random follows from
    the batch's seed or from torch's generator, which the loop seeds at the start of each epoch.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]]

    # The training data that the method needs, and its publication, for people.
    learns_from: ClassVar[str]
    paper: ClassVar[str]

    # The metric of `validate` whose best epoch becomes the model; None: the last epoch does.
    selection_metric: ClassVar[str | None] = "ap_min@20"

    # The metric of `validate` by which settings are compared.
    tuning_metric: ClassVar[str] = "ap_min@20"

    # Whether training needs the class of every image, one each.
    needs_labels: ClassVar[bool] = True

    # Consecutive rows of a step that belong together: every rank's share is a multiple of so many.
    group_size: ClassVar[int] = 1

    network: HashNetwork
    text_head: HashHead | None

    @abstractmethod
    def __init__(self, config: Any, num_classes: int, num_rows: int) -> None:
        """`num_rows`: images of the training part."""
        super().__init__()
        # Not at the class, where it would hide a module of that name.
        self.text_head = None

    @property
    def trains_on_images(self) -> bool:
        """Whether batches hold images."""
        return True

    @classmethod
    def tables_of(cls, config: Any) -> dict[str, Table]:
        """The frozen features that batches hold, by name; "image" is what a code is made of without `images`."""
        return {}

    @property
    def tables(self) -> dict[str, Table]:
        """Those of its own config."""
        return self.tables_of(self.config)

    @property
    def label_code(self) -> tuple[str, int]:
        """Kind and weight of the label bits that follow the hash bits."""
        return "none", 1

    @property
    def nested_bits(self) -> tuple[int, ...]:
        """Lengths below the full one whose prefix of the code was trained to be used alone."""
        return ()

    def text_encoder(self, device: str = "cpu") -> TextEncoder | None:
        """What makes features of sentences, for a method with a text side."""
        return None

    @abstractmethod
    def build_optimizer(self) -> Optimizer:
        """The optimizer over all parameters, with the learning rates of epoch 0."""

    def begin(self, training: Part) -> None:
        """Before the first epoch of a new run, on the first rank; the others receive the state it leaves."""

    @abstractmethod
    def start_epoch(self, epoch: int, training: Part) -> float:
        """Sets what trains in this epoch (from 0) and returns the factor on all learning rates.

        Every rank calls it with the whole training part.
        """

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """The epoch's batches over all ranks: rows int64 [steps, batch]. Rank r takes the r-th piece of each.

        `InputError` when these labels allow no batches.
        """
        config: TrainConfig = self.config  # type: ignore[assignment]
        return shuffled(len(labels), config.batch_size, config.seed, epoch)

    def before_step(self, batch: Batch, optimizer: Optimizer) -> dict[str, Tensor]:
        """Before the step, outside DDP: the place of a second player. Returns losses to record."""
        return {}

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Scalar losses by name for this rank's share; `loss` is minimised.

        Averaged over ranks, the gradient of `loss` is that of one process with all ranks' shares in its batch.
        """

    def after_step(self, batch: Batch) -> None:
        """After the optimizer's step: the place of memories and momentum encoders."""

    def end_epoch(self) -> None:
        """After the epoch's last step, before its checkpoint."""

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """Metrics of the validation part, higher is better; `reference` is the training part as it is encoded.

        Each rank holds its share, dealt round robin, of both. Here: expected `ap_min@20` of validation queries in the
        training part.
        """
        codes = [gather_rows(encode_part(encoder, part)) for part in (validation, reference)]
        labels = [gather_rows(part.labels) for part in (validation, reference)]
        return {"ap_min@20": mean_average_precision(codes[0], codes[1], labels[0], labels[1], encoder.bits, k=20)}


def encode_part(encoder: HashModel, part: Part) -> npt.NDArray[np.uint8]:
    """Codes of a part's images, from their features where it holds no images."""
    images = part.images
    if images is not None:
        # What is not in memory is decoded a block at a time.
        starts = range(0, max(1, len(images)), BLOCK_SIZE)
        return np.concatenate([encoder.encode_prepared(images[start : start + BLOCK_SIZE]) for start in starts])
    return encoder.encode_features(part.features["image"])


def shuffled(num_rows: int, batch_size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """All rows once in random order, int64 [steps, batch_size]; the ragged last batch is dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


def balanced(labels: Labels, batch_size: int, images_per_class: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """As many batches as `shuffled` makes, each of whole classes: int64 [steps, batch_size].

    The classes of a batch are drawn without replacement while they last, the images of each with replacement. A batch
    of which `images_per_class` is no divisor ends with a smaller group.
    """
    rng = np.random.default_rng([seed, epoch])
    members = [np.flatnonzero(labels == label) for label in np.unique(labels)]
    groups = -(-batch_size // images_per_class)
    steps = []
    for _ in range(len(labels) // batch_size):
        rounds = [rng.permutation(len(members)) for _ in range(-(-groups // len(members)))]
        drawn = [rng.choice(members[place], images_per_class) for place in np.concatenate(rounds)[:groups]]
        # Ranks take consecutive pieces: shuffled, each has a fair share of the classes.
        steps.append(rng.permutation(np.concatenate(drawn)[:batch_size]))
    return np.array(steps, np.int64).reshape(-1, batch_size)
