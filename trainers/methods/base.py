"""The interface between a method and the training loop, and the orders of training images that methods share."""

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from orbithash.encoders.codes import Codes
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.dealing import Dealing
from orbithash.trainers.distributed import gather_rows, gather_with_gradient, rank
from orbithash.trainers.features.features import Table
from orbithash.trainers.metrics.average_precision import Definition, average_precision
from orbithash.trainers.metrics.rankings import rank_histograms
from orbithash.trainers.metrics.retrieval import Labels, Retrieval, labelled, num_labels, with_label

__all__ = ["Batch", "Method", "Supervision", "balanced", "encode_part", "mean_scores", "shuffled"]

# The labels that training needs: none, exactly one class per image, or one or more classes per image.
Supervision = Literal["none", "one class", "classes"]

# Number of images decoded together if the part is not in memory.
BLOCK_SIZE = 256


class Batch(NamedTuple):
    """This rank's share of a batch, or of a micro-batch. Shares may differ by one group of rows.

    Attributes:
        rows: int64 [B], positions in the training part.
        labels: as in `Part`: int64 [B], or bool [B, C] if an image of the dataset has several classes.
        images: float32 [B, C, S, S], augmented and normalised; None for a method that trains on features.
        features: the rows of each of the method's tables, float32 [B, ...].
        seed: the seed of the step, the same on all ranks.
        dealing: the shares of all ranks; None: this rank has all of the batch.
        draws: what `Method.draw` returns for the batch, by name.
    """

    rows: Tensor
    labels: Tensor
    images: Tensor | None
    features: dict[str, Tensor]
    seed: int
    dealing: Dealing | None = None
    draws: Mapping[str, Tensor] = MappingProxyType({})

    @property
    def weight(self) -> float:
        """The factor with which the mean over ranks of means over their rows is the mean over all rows.

        1 if all ranks have as many rows.
        """
        if self.dealing is None:
            return 1.0
        return len(self.dealing.of_ranks) * len(self.rows) / self.dealing.num_rows

    def gather(self, values: Tensor) -> Tensor:
        """Return the values [N, ...] of all ranks' rows, with gradient, from those of this rank's rows [B, ...].

        The order is that of the ranks, see `gathered_positions`.
        """
        return values if self.dealing is None else gather_with_gradient(values, self.dealing.of_ranks)

    @property
    def num_rows(self) -> int:
        """The number N of rows of all ranks."""
        return len(self.rows) if self.dealing is None else self.dealing.num_rows

    @property
    def positions(self) -> Tensor:
        """The positions in the batch of this rank's rows, int64 [B] on the CPU.

        What is drawn for the N rows of the batch and taken by position does not depend on the number of ranks.
        """
        if self.dealing is None:
            return torch.arange(len(self.rows))
        return torch.from_numpy(self.dealing.positions(rank()))

    @property
    def gathered_positions(self) -> Tensor:
        """The positions in the batch of the rows that `gather` returns, int64 [N] on the CPU."""
        if self.dealing is None:
            return self.positions
        ranks = range(len(self.dealing.of_ranks))
        return torch.from_numpy(np.concatenate([self.dealing.positions(number) for number in ranks]))


class Method(nn.Module):
    """Networks, and the loss of a batch. DDP wraps the whole module.

    All state that a resumed run needs is a parameter, a buffer or in the optimizer. All randomness follows from the
    batch's seed or from torch's generator, which the loop seeds at the start of each epoch.
    """

    name: ClassVar[str]
    Config: ClassVar[type[TrainConfig]]

    # The training data that the method needs, and its publication; `orbithash methods` prints both.
    learns_from: ClassVar[str]
    paper: ClassVar[str]

    # The metric of `validate` that selects the epoch of the exported model; None: the last epoch.
    selection_metric: ClassVar[str | None] = "ap_min@20"

    # The metric of `validate` that `tune` maximises.
    tuning_metric: ClassVar[str] = "ap_min@20"

    # Whether `validate` returns metrics only where validation images have labels.
    validates_by_labels: ClassVar[bool] = True

    # The labels that training needs.
    supervision: ClassVar[Supervision] = "one class"

    # Whether `before_step` or `after_step` uses draws, so that a batch in several parts has some of its own.
    draws_for_whole_steps: ClassVar[bool] = False

    # Number of consecutive rows of a step that belong together. It divides the batch, and a rank has whole groups.
    group_size: ClassVar[int] = 1

    network: HashNetwork
    text_head: HashHead | None

    @abstractmethod
    def __init__(self, config: Any, num_classes: int, num_rows: int) -> None:
        """Build the networks for `num_rows` training images of `num_classes` classes."""
        super().__init__()
        # An attribute of the class would hide a submodule of the same name.
        self.text_head = None

    @property
    def trains_on_images(self) -> bool:
        """Whether batches have images."""
        return True

    @classmethod
    def tables_of(cls, config: Any) -> dict[str, Table]:
        """Return the tables of frozen features that batches contain, by name.

        The codes of a method that does not train on images are computed from the table "image".
        """
        return {}

    @property
    def tables(self) -> dict[str, Table]:
        """The tables of this method's own config."""
        return self.tables_of(self.config)

    @property
    def label_code(self) -> tuple[str, int]:
        """Kind and weight of the label bits appended to the hash bits."""
        return "none", 1

    @property
    def nested_bits(self) -> tuple[int, ...]:
        """Shorter code lengths whose prefix of the code is trained as a code of its own."""
        return ()

    @property
    def has_joint_features(self) -> bool:
        """Whether features of images and of sentences are in one space, as those of a dual encoder are."""
        return False

    def text_encoder(self, device: str = "cpu") -> TextEncoder | None:
        """Return the encoder of sentences, for a method with a text side."""
        return None

    @abstractmethod
    def build_optimizer(self) -> Optimizer:
        """Return the optimizer over all parameters, with the learning rates of epoch 0."""

    def begin(self, training: Part) -> None:
        """Prepare a new run. Called on the first rank only; the other ranks receive the resulting state."""

    @abstractmethod
    def start_epoch(self, epoch: int, training: Part) -> float:
        """Set which parameters train in this epoch (from 0) and return the factor on all learning rates.

        Called on every rank with the whole training part.
        """

    def step_factor(self, step: int, num_steps: int) -> float:
        """Return the factor on all learning rates in a step, besides that of its epoch.

        Steps count from 0 over the whole run, which has `num_steps`.
        """
        return 1.0

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's batches over all ranks, rows int64 [steps, batch]; see `Dealing` for the ranks' shares.

        Raises:
            InputError: no batch can be drawn from these labels.
        """
        config: TrainConfig = self.config  # type: ignore[assignment]
        return shuffled(len(labels), config.batch_size, config.seed, epoch)

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return random numbers and positions that follow from the seed, the rows and the labels of a batch, by name.

        Called for each micro-batch, and for a whole batch as `draws_for_whole_steps` says, before it is uploaded, while
        an earlier step runs; `Batch.draws` has the tensors on the device. A step that copies from the CPU itself would
        make the CPU wait for the GPU.

        Args:
            batch: this rank's share, on the CPU and without draws.
            rows: rows int64 [N] of all ranks, in the order of `Batch.gather`.
            labels: labels of these rows, as in `Batch`.
        """
        return {}

    def before_step(self, batch: Batch, optimizer: Optimizer) -> dict[str, Tensor]:
        """Run before each step, outside DDP, for example to train a discriminator. Return losses to record."""
        return {}

    @abstractmethod
    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return scalar losses by name for this rank's share; `loss` is minimised.

        The mean over ranks of the gradient of `loss` equals the gradient of one process with the whole batch: a mean
        over this rank's rows is multiplied by `batch.weight`; a loss on the rows of all ranks is not.
        """

    def after_step(self, batch: Batch) -> None:
        """Run after each optimizer step, for example to update a memory or a momentum encoder."""

    def end_epoch(self) -> None:
        """Run after the epoch's last step, before its checkpoint is written."""

    def finish(self) -> None:
        """Make `network` the network that is exported. Called once, after the trained weights are loaded."""

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """Return metrics of the validation part; higher is better.

        `reference` is the training part, without augmentation; of large parts both are samples. Each rank has its share
        of both, dealt round robin. By default: the expected `ap_min@20` of validation queries in the training part;
        nothing if no query has a label.
        """
        queries, database = encode_part(encoder, validation), encode_part(encoder, reference)
        found = mean_scores(queries, database, validation.labels, reference.labels, encoder.bits)
        return {} if found is None else {"ap_min@20": found[0]}


def mean_scores(
    queries: Codes,
    database: Codes,
    query_labels: Labels,
    database_labels: Labels,
    bits: int,
    definitions: Sequence[Definition] = ("ap_min",),
) -> list[float] | None:
    """Return the mean of the expected average precision within rank 20 by each definition; None without a label.

    Each rank has its share of the queries and of the database, dealt round robin, and scores its queries. The mean is
    that of one process.

    Args:
        queries: codes uint8 [Q, B].
        database: codes uint8 [N, B].
        query_labels: labels of the queries; queries without a label do not count.
        database_labels: labels of the database.
        bits: length of a code.
        definitions: definitions of average precision.
    """
    database, database_labels = gather_rows(database), gather_rows(database_labels)
    known = labelled(query_labels)
    scores = np.zeros((len(queries), len(definitions)))
    if known.any():
        histograms = rank_histograms(Retrieval(queries[known], database, query_labels[known], database_labels, bits))
        scores[known] = np.stack([average_precision(histograms, 20, name) for name in definitions], axis=1)
    known, scores = gather_rows(known), gather_rows(scores)
    return [float(scores[known, column].mean()) for column in range(len(definitions))] if known.any() else None


def encode_part(encoder: HashModel, part: Part) -> npt.NDArray[np.uint8]:
    """Return the codes uint8 [N, ceil(K/8)] of a part's images, computed from features if the part has no images."""
    images = part.images
    if images is not None:
        # In blocks, because the images may be decoded from disk.
        starts = range(0, max(1, len(images)), BLOCK_SIZE)
        return np.concatenate([encoder.encode_prepared(images[start : start + BLOCK_SIZE]) for start in starts])
    return encoder.encode_features(part.features["image"])


def shuffled(num_rows: int, batch_size: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return all rows once in random order, int64 [steps, batch_size]; an incomplete last batch is dropped."""
    order = np.random.default_rng([seed, epoch]).permutation(num_rows)
    return order[: len(order) // batch_size * batch_size].reshape(-1, batch_size)


def balanced(labels: Labels, batch_size: int, images_per_class: int, seed: int, epoch: int) -> npt.NDArray[np.int64]:
    """Return class-balanced batches int64 [steps, batch_size], as many as `shuffled` returns.

    For each class of a batch, `images_per_class` of its images are drawn. Classes are drawn without replacement until
    all were drawn, images with replacement. If `images_per_class` does not divide `batch_size`, the last class has
    fewer. An image with several classes is drawn for each of them.
    """
    rng = np.random.default_rng([seed, epoch])
    members = [rows for label in range(num_labels(labels)) if len(rows := np.flatnonzero(with_label(labels, label)))]
    groups = -(-batch_size // images_per_class)
    steps = []
    for _ in range(len(labels) // batch_size):
        rounds = [rng.permutation(len(members)) for _ in range(-(-groups // len(members)))]
        drawn = [rng.choice(members[number], images_per_class) for number in np.concatenate(rounds)[:groups]]
        # Ranks take consecutive parts of the batch. Shuffled, each part has images of many classes.
        steps.append(rng.permutation(np.concatenate(drawn)[:batch_size]))
    return np.array(steps, np.int64).reshape(-1, batch_size)
