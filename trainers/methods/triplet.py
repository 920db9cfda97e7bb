"""The triplet baseline: a triplet network (Schroff et al., CVPR 2015) on tanh hashes whose signs are the codes.

The distance of two hashes is their mean squared difference divided by 4; for codes of -1 and 1, that is the share of
bits that differ. For each image of a step, one positive and one negative are chosen from all ranks' images: at random,
or the hardest ones ("batch hard", Hermans et al. 2017). A positive shares a class with its anchor, a negative shares
none; for images with several classes, that is our generalisation, the relevance of the evaluation.
"""

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from orbithash.encoders.networks.card import HeadSpec
from orbithash.trainers.methods.base import Batch
from orbithash.trainers.methods.fine_tuning import FineTuned, FineTuningConfig
from orbithash.trainers.methods.losses import quantisation_loss
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["Triplet", "TripletConfig", "anchors_with_both", "draw_triplets", "triplet_loss"]


class TripletConfig(FineTuningConfig):
    """Settings of the triplet baseline."""

    mining: Annotated[Literal["hard", "random"], Choice(("hard", "random"))] = Field(
        "hard", description="which positives and negatives are chosen"
    )
    margin: Annotated[float, Linear(0.05, 0.6)] = Field(
        0.25, gt=0, le=1, description="minimum additional distance of negatives, as a share of the bits"
    )
    quantisation_weight: Annotated[float, Log(1e-3, 10)] = Field(
        0.1, ge=0, le=1000, description="weight of the mean squared distance of a hash to its sign"
    )
    images_per_class: int = Field(
        4, ge=0, description="images of each class in a batch, for balanced sampling; 0: plain shuffling"
    )


def _distances(hashes: Tensor) -> Tensor:
    """Return the distances float32 [N, N] of hashes [N, K]: mean squared differences divided by 4."""
    hashes = hashes.float()
    squares = hashes.square().mean(1)
    # Clamped, because rounding can make the distance of equal hashes negative.
    return (squares[:, None] + squares - 2 * hashes @ hashes.T / hashes.shape[1]).clamp(min=0) / 4


def _candidates(labels: Tensor, rows: Tensor) -> Tensor:
    """Return which images are positives and which are negatives of each image, bool [2, N, N]."""
    same = labels[:, None] == labels if labels.dtype != torch.bool else (labels[:, None] & labels).any(dim=2)
    return torch.stack([same & (rows[:, None] != rows), ~same])


def anchors_with_both(labels: Tensor, rows: Tensor) -> Tensor:
    """Return the positions int64 [M] of the images that have a positive and a negative; see `draw_triplets`."""
    return _candidates(labels, rows).any(dim=2).all(dim=0).nonzero()[:, 0]


def draw_triplets(labels: Tensor, rows: Tensor, scores: Tensor, anchors: Tensor) -> Tensor:
    """Return positions int64 [M, 3] of anchors, positives and negatives among N images.

    Args:
        labels: int64 [N] or bool [N, C].
        rows: int64 [N], rows of the training part. Another view of the anchor's own row is not a positive.
        scores: [2, N, N]. The positive of anchor i has the highest score in `scores[0, i]`, the negative in
            `scores[1, i]`.
        anchors: `anchors_with_both`.
    """
    if not len(anchors):
        return anchors.new_zeros(0, 3)
    chosen = scores.masked_fill(~_candidates(labels, rows), -torch.inf).argmax(dim=2)
    return torch.stack([anchors, *chosen[:, anchors]], dim=1)


def triplet_loss(distances: Tensor, triplets: Tensor, margin: float) -> Tensor:
    """Return the mean of max(0, margin + d(a, p) - d(a, n)) over triplets [M, 3]; 0 without triplets.

    Triplets are positions in `distances` [N, N].
    """
    anchors, positives, negatives = triplets.T
    losses = (margin + distances[anchors, positives] - distances[anchors, negatives]).clamp(min=0)
    return losses.sum() / max(1, len(triplets))


class Triplet(FineTuned):
    """The hash network, without a classifier."""

    name = "triplet"
    learns_from = "class labels, one or several per image"
    paper = "baseline: Schroff, Kalenichenko, Philbin: FaceNet, CVPR 2015 (arXiv 1503.03832)"
    Config = TripletConfig
    supervision = "classes"

    def __init__(self, config: TripletConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config: TripletConfig = config
        self.network = self.build_network(HeadSpec(config.bits))

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the "anchors" int64 [M], or random "triplets" int64 [M, 3], the same on all ranks; see `Method`."""
        anchors = anchors_with_both(labels, rows)
        if self.config.mining == "hard":
            return {"anchors": anchors}
        scores = torch.rand(2, len(rows), len(rows), generator=torch.Generator().manual_seed(batch.seed))
        return {"triplets": draw_triplets(labels, rows, scores, anchors)}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`. Every rank computes the triplet loss on all ranks' hashes."""
        hashes, _ = self.outputs(batch)
        distances = _distances(batch.gather(hashes))
        if self.config.mining == "hard":
            scores = torch.stack([distances, -distances]).detach()
            labels, rows = batch.gather(batch.labels), batch.gather(batch.rows)
            triplets = draw_triplets(labels, rows, scores, batch.draws["anchors"])
        else:
            triplets = batch.draws["triplets"]
        triplet = triplet_loss(distances, triplets, self.config.margin)
        quantisation = batch.weight * quantisation_loss(hashes)
        return {
            "loss": triplet + self.config.quantisation_weight * quantisation,
            "triplet": triplet,
            "quantisation": quantisation,
        }
