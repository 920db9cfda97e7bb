"""The classifier baseline: a linear classifier on tanh hashes whose signs are the codes.

The loss is the cross-entropy, or the binary cross-entropy for images with several classes, plus quantisation.
"""

from typing import Annotated

from pydantic import Field
from torch import Tensor

from orbithash.encoders.networks.card import HeadSpec
from orbithash.trainers.methods.base import Batch
from orbithash.trainers.methods.fine_tuning import FineTuned, FineTuningConfig
from orbithash.trainers.methods.losses import classification_loss, quantisation_loss
from orbithash.trainers.search_space import Log

__all__ = ["Classifier", "ClassifierConfig"]


class ClassifierConfig(FineTuningConfig):
    """Settings of the classifier baseline."""

    quantisation_weight: Annotated[float, Log(1e-3, 10)] = Field(
        0.1, ge=0, le=1000, description="weight of the mean squared distance of a hash to its sign"
    )


class Classifier(FineTuned):
    """The hash network with its classifier."""

    name = "classifier"
    learns_from = "class labels, one or several per image"
    paper = "baseline without a paper"
    Config = ClassifierConfig
    supervision = "classes"

    def __init__(self, config: ClassifierConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config: ClassifierConfig = config
        head = HeadSpec(config.bits)
        self.network = self.build_network(head, num_classes)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`. Both are means over this rank's images."""
        hashes, logits = self.outputs(batch)
        assert logits is not None
        classification = batch.weight * classification_loss(logits, batch.labels)
        quantisation = batch.weight * quantisation_loss(hashes)
        return {
            "loss": classification + self.config.quantisation_weight * quantisation,
            "classification": classification,
            "quantisation": quantisation,
        }
