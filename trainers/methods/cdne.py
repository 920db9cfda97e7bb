"""CDNE: class-discriminated neighborhood embedding (Kang, Fernandez-Beltran, Ye, Tong, Plaza, IEEE JSTARS 2020).

The hash layer has no activation: f are its outputs, the bits are their signs, e = f / |f| is the embedding. There are
three losses. Scalable neighbourhood component analysis (SNCA; Wu, Efros, Yu, ECCV 2018) raises the probability, under a
softmax over the cosines with all other training images, of images of the same class. The others are the cross-entropy
of a classifier on f and the quantisation of f. The other images' embeddings come from a memory with one row m per
training image:

- "memory-bank": after each step, m becomes mu * m + (1 - mu) * e, scaled to unit length, with the e of that step.
- "momentum": m becomes the embedding by a second network, the moving average of the trained one.
- "in-batch": without a memory. The softmax is over the images of the step, and gradients flow to both sides.

Images with several classes (our generalisation; the paper has one class per image): with the weight
w_ij = |Y_i & Y_j| / |Y_i | Y_j| of the classes Y of two images (Jaccard), the SNCA loss of image i is

    -log(sum_j w_ij exp((e_i m_j - d w_ij) / T) / sum_j exp((e_i m_j - d w_ij) / T)),  j != i,

where d is the margin and T the temperature. With one class per image, w_ij is 1 or 0 and the loss is the paper's. The
cross-entropy becomes the binary cross-entropy, a mean over images and classes.

Deviations from the authors' code:

- Probabilities are computed as logarithms, so none is 0. As in the code, an image that is the only one of its class
  adds 0 to a mean over the whole batch.
- The memory is written after the optimizer's step (in the code: in the backward pass). By default it starts with
  embeddings by the initial network (in the code: with noise).
- The moving average forgets faster in runs shorter than the code's, see `encoder_momentum`. The code shuffles images
  before the second network because of batch norm. Here the statistics of batch norm are those of all ranks' images
  (norm=batch) or frozen, so the order has no effect. The second network's batch norm layers are in training mode.
- mu changes at the same fractions of the run as in the code, which has 130 epochs.
- A layer norm before the hash layer, by default, as for DHCL.
- AdamW with smaller learning rates and a warm-up of the hash layer by default. The code has SGD: optimizer=sgd lr=0.1
  head_lr_factor=1 warm_up_epochs=0 schedule=step lr_decay=0.5 lr_decay_epochs=30.
"""

import copy
from typing import Annotated, Literal, NamedTuple, Self

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn

from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.reading import Normaliser
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import gather_with_gradient
from orbithash.trainers.methods.base import Batch
from orbithash.trainers.methods.fine_tuning import FineTuned, FineTuningConfig
from orbithash.trainers.methods.losses import at_least_float32, classification_loss, quantisation_loss
from orbithash.trainers.methods.memory import NORM_FLOOR, Memory
from orbithash.trainers.search_space import Linear, Log

__all__ = ["Cdne", "CdneConfig", "Embedded", "neighbour_log_sums", "snca_loss"]

# (fraction of the run, mu from there on), as in the code.
MU_OF_SHARE = ((0.0, 0.5), (80 / 130, 0.8), (120 / 130, 0.9))

# The code's rate of the moving average is 0.001, in runs of about 10,000 steps. In shorter runs, the rate is larger, so
# that the average covers at most a tenth of the run.
MIN_RATE, MEMORY_SHARE = 0.001, 0.1

# Number of images per pass of the network when the memory is filled.
FILL_BATCH = 32


class CdneConfig(FineTuningConfig):
    """Settings of CDNE. "code: X" in a description is the value in the authors' released code if it differs."""

    variant: Literal["memory-bank", "momentum", "in-batch"] = Field(
        "memory-bank", description="source of the other images' embeddings"
    )
    temperature: Annotated[float, Log(0.02, 0.2)] = Field(
        0.05, ge=0.005, le=1, description="temperature T of the softmax over cosines"
    )
    margin: Annotated[float, Linear(0, 0.3)] = Field(
        0.0, ge=0, le=1, description="margin d, subtracted from the cosines with images of the same class"
    )
    snca_weight: Annotated[float, Log(0.1, 10)] = Field(
        1.0, ge=0, le=1000, description="weight lambda of the SNCA loss"
    )
    classification_weight: Annotated[float, Log(0.1, 10)] = Field(
        1.0, ge=0, le=1000, description="weight of the cross-entropy"
    )
    quantisation_weight: Annotated[float, Log(1e-2, 10)] = Field(
        1.0, ge=0, le=1000, description="weight of the mean of (|f| - 1)^2"
    )
    memory_momentum: float | None = Field(
        None,
        ge=0,
        lt=1,
        description="mu of the memory bank; null: 0.5, then 0.8 in the last 5/13 and 0.9 in the last 1/13 of the run",
    )
    encoder_momentum: float | None = Field(
        None,
        ge=0,
        le=1,
        description="momentum of the moving average; null: 1 - max(0.001, 10 / number of steps of the run)",
    )
    memory_start: Literal["forward", "random"] = Field(
        "forward", description="initial memory: embeddings by the initial network, or random; code: random"
    )
    sharded_memory: bool = Field(False, description="whether each worker holds only its share of the memory")
    head_norm: Literal["layer", "none"] = Field("layer", description="normalisation before the hash layer; code: none")

    @model_validator(mode="after")
    def _check_sampling(self) -> Self:
        if self.images_per_class and self.variant != "in-batch":
            raise ValueError(
                f"images_per_class is {self.images_per_class} with variant={self.variant}: the memory has images of "
                "all classes; set images_per_class=0"
            )
        return self


def _embed(hashes: Tensor) -> Tensor:
    """Return hashes [N, K] scaled to unit length, float32 or wider."""
    return F.normalize(at_least_float32(hashes), dim=1, eps=NORM_FLOOR)


class Embedded(NamedTuple):
    """Images as unit `embeddings` [N, K], with their labels, as in `Batch`, and their rows of the training part."""

    embeddings: Tensor
    labels: Tensor
    rows: Tensor

    def gather(self, batch: Batch) -> "Embedded":
        """Return the images of all ranks; these are the batch's."""
        return Embedded(*(batch.gather(values) for values in self))


def _agreement(labels: Tensor, other_labels: Tensor) -> Tensor:
    """Return the weights [B, N] of pairs of images: 1 for one and the same class, else the Jaccard index of classes."""
    if labels.dtype != torch.bool:
        return (labels[:, None] == other_labels).float()
    ours, theirs = labels.float(), other_labels.float()
    shared = ours @ theirs.T
    return shared / (ours.sum(dim=1)[:, None] + theirs.sum(dim=1) - shared).clamp(min=1)


def neighbour_log_sums(anchors: Embedded, keys: Embedded, temperature: float, margin: float) -> Tensor:
    """Return the logarithms [2, B] of two sums of exp(cosine / T) for each anchor: over keys of its class, and all.

    For images with several classes, the first sum is weighted by the agreement of classes. The key of the anchor's own
    row is excluded. The margin, times the agreement, is subtracted from the cosines in both sums. The logarithm of an
    empty sum is about the lowest number of its type. Sums over parts of the keys can be joined by logsumexp.
    """
    embeddings = at_least_float32(anchors.embeddings)
    is_other = anchors.rows[:, None] != keys.rows
    agreement = _agreement(anchors.labels, keys.labels).to(embeddings) * is_other
    exponents = (embeddings @ keys.embeddings.to(embeddings.dtype).T - margin * agreement) / temperature
    lowest = torch.finfo(exponents.dtype).min
    weighted = (exponents + agreement.log()).masked_fill(agreement == 0, lowest)
    sums = [torch.logsumexp(terms, dim=1) for terms in (weighted, exponents.masked_fill(~is_other, lowest))]
    return torch.stack(sums)


def snca_loss(log_sums: Tensor) -> Tensor:
    """Return the mean over anchors of -log(sum over the class / sum over all), from `neighbour_log_sums` [2, B].

    An anchor that shares a class with no other image adds 0. The loss is 0 for an empty batch.
    """
    same, all_keys = log_sums
    has_same = same > torch.finfo(same.dtype).min / 2
    return torch.where(has_same, all_keys - same, 0).sum() / max(1, len(same))


class Cdne(FineTuned):
    """The hash network with its classifier, the memory, and the moving average of the network."""

    name = "cdne"
    learns_from = "class labels, one or several per image"
    paper = "Kang, Fernandez-Beltran, Ye, Tong, Plaza: CDNE, IEEE JSTARS 2020 (doi 10.1109/JSTARS.2020.3027954)"
    Config = CdneConfig
    supervision = "classes"
    draws_for_whole_steps = True

    def __init__(self, config: CdneConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config: CdneConfig = config
        head = HeadSpec(config.bits, norm=config.head_norm, activation="none")
        self.network = self.build_network(head, num_classes)
        self._embeddings: list[Tensor] = []
        self.memory: Memory | None = None
        if config.variant != "in-batch":
            self.memory = Memory(num_rows, config.bits, config.sharded_memory)
            if config.memory_start == "random":
                bound = (3 / config.bits) ** 0.5
                self.memory.whole.uniform_(-bound, bound)
        self.average: HashNetwork | None = None
        if config.variant == "momentum":
            self.average = copy.deepcopy(self.network).requires_grad_(False)
            self.average.classifier = None
            if not self.trains_on_images:
                self.average.backbone = nn.Identity()  # type: ignore[assignment] # not called: batches have features
        num_steps = config.epochs * (num_rows // config.batch_size)
        rate = min(1.0, max(MIN_RATE, 1 / (MEMORY_SHARE * max(1, num_steps))))
        self.encoder_momentum = 1 - rate if config.encoder_momentum is None else config.encoder_momentum

    @torch.no_grad()
    def begin(self, training: Part) -> None:
        """Fill the memory with embeddings of the images without augmentation, see `Method`."""
        if self.memory is None or self.config.memory_start == "random":
            return
        self.eval()
        if training.images is None:
            for start in range(0, len(training.labels), FILL_BATCH):
                features = torch.from_numpy(training.features["image"][start : start + FILL_BATCH])
                hashes = self.network.head(features.to(self.memory.whole.device))
                self.memory.whole[start : start + FILL_BATCH] = _embed(hashes)
            return
        preprocessing = self.config.preprocessing()
        device = self.memory.whole.device
        normaliser = Normaliser(preprocessing, device)
        for start in range(0, len(training.images), FILL_BATCH):
            prepared = np.stack([preprocessing.prepare(image) for image in training.images[start : start + FILL_BATCH]])
            hashes = self.network(normaliser(prepared)).hashes
            self.memory.whole[start : start + FILL_BATCH] = _embed(hashes)

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Open the memory and set mu, see `Method`."""
        if self.memory is not None:
            self.memory.open()
            self._labels = torch.from_numpy(training.labels).to(self.memory.whole.device)
        self._mu = self.config.memory_momentum
        if self._mu is None:
            self._mu = [mu for share, mu in MU_OF_SHARE if epoch >= share * self.config.epochs][-1]
        return super().start_epoch(epoch, training)

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the positions "own" int64 [n] of the rows in this rank's share of the memory, see `Method`."""
        memory = self.memory
        return {"own": memory.own(rows)} if memory is not None and memory.sharded else {}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`."""
        config = self.config
        hashes, logits = self.outputs(batch)
        assert logits is not None
        embeddings = _embed(hashes)
        # One tensor per micro-batch; the memory bank is written with them after the step.
        self._embeddings.append(embeddings.detach())
        snca = self._snca(embeddings, batch)
        classification = batch.weight * classification_loss(logits, batch.labels)
        quantisation = batch.weight * quantisation_loss(hashes)
        return {
            "loss": config.snca_weight * snca
            + config.classification_weight * classification
            + config.quantisation_weight * quantisation,
            "snca": snca,
            "classification": classification,
            "quantisation": quantisation,
        }

    def _snca(self, embeddings: Tensor, batch: Batch) -> Tensor:
        """Return the SNCA loss of this rank's anchors over the whole memory, or over all ranks' images."""
        config, memory = self.config, self.memory
        anchors = Embedded(embeddings, batch.labels, batch.rows)
        if memory is None:
            keys = anchors.gather(batch)
        else:
            keys = Embedded(memory.share, self._labels[memory.numbers], memory.numbers)
        if memory is None or not memory.sharded:
            return batch.weight * snca_loss(neighbour_log_sums(anchors, keys, config.temperature, config.margin))
        # Every rank sums over its share for the anchors of all ranks; the mean over ranks' losses is unchanged.
        partial = neighbour_log_sums(anchors.gather(batch), keys, config.temperature, config.margin)
        return snca_loss(torch.logsumexp(gather_with_gradient(partial[None]), dim=0))

    @torch.no_grad()
    def after_step(self, batch: Batch) -> None:
        """Write the memory, then update the moving average, see `Method`."""
        embeddings_of_step, self._embeddings = self._embeddings, []
        if self.memory is None:
            return
        own = batch.draws["own"] if self.memory.sharded else None
        if self.average is None:
            assert self._mu is not None
            # Only the last rows are of this step: `forward` may have been called before it.
            embeddings = torch.cat(embeddings_of_step)[-len(batch.rows) :]
            self.memory.write(batch.gather(batch.rows), batch.gather(embeddings), self._mu, own)
            return
        embeddings = _embed(self.outputs(batch, self.average).hashes)
        self.memory.write(batch.gather(batch.rows), batch.gather(embeddings), 0.0, own)
        current = dict(self.network.named_parameters())
        for name, parameter in self.average.named_parameters():
            parameter.lerp_(current[name], 1 - self.encoder_momentum)

    def end_epoch(self) -> None:
        """Close the memory, so that the checkpoint has all of it, see `Method`."""
        if self.memory is not None:
            self.memory.close()
