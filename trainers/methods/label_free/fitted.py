"""Methods that are fitted to a sample of frozen features in one go: itq, pca-sign, lsh, sign.

Features are scaled to unit length and centred with the mean of the sample. The bits of a code are the signs of the
centred features in the directions that a method chooses. The head of the network is one linear layer after the scaling:
its weight holds the directions, its bias the mean; so encoding and serving do not differ from those of trained methods.

A backbone that is a dual encoder gives codes to sentences too: its text tower is followed by a head of the same
directions, whose bias holds the mean of sentences, because images and sentences lie around means of their own. That is
the mean of the captions of the training images (`--captions`), else of built-in sentences about overhead images
(`sentences.py`).

A prefix of the code of `pca-sign`, `lsh` or `sign` is the code of the same method with fewer bits, so these have
`nested_bits`. `itq` has not: its rotation mixes all components (UC Merced, MobileNetV2, validation `ap_min@20`: 0.579
with 32 bits, 0.510 with the first 32 of 64), and rotating the components of each prefix among themselves costs the
whole code more (64 bits: 0.611, in blocks of 16, 16 and 32: 0.495). Fit it once for each length; that takes seconds.
"""

from abc import abstractmethod
from typing import ClassVar, Literal, Self

import numpy as np
import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.optim import Optimizer

from orbithash.encoders.codes import MAX_BITS, MIN_BITS
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.backbones.backbone import NoTextTower
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashHead
from orbithash.encoders.networks.text_towers import TextTower, text_tower
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.label_free.projections import (
    Matrix,
    Rows,
    first_features,
    itq_rotation,
    mean_row,
    principal_directions,
    random_directions,
    unit,
)
from orbithash.trainers.methods.label_free.sentences import neutral_sentences

__all__ = ["Fitted", "FittedConfig", "Itq", "ItqConfig", "Lsh", "PcaSign", "PrefixConfig", "Sign", "SignConfig"]


class FittedConfig(TrainConfig):
    """Settings of a fitted method."""

    samples_images = True
    unused: ClassVar[tuple[str, ...]] = (
        "epochs",
        "batch_size",
        "accumulate",
        "precision",
        "clip_value",
        "clip_norm",
        "min_crop_area",
        "colour_jitter",
        "grayscale",
        "validate_every",
        "checkpoint_every",
    )

    epochs: int = Field(1, description="always 1")
    seed: int = Field(
        0, ge=0, lt=2**31, description="seed of random directions and rotations, of the sample and of random weights"
    )
    max_rows: int = Field(
        100_000, ge=2, description="maximum number of training images that are used; of more, a sample is drawn"
    )

    sentences: Literal["auto", "none"] = Field(
        "auto", description="codes of sentences: auto, if the backbone is a dual encoder, or none"
    )


class PrefixConfig(FittedConfig):
    """Settings of a fitted method that gives each prefix of its code a use of its own."""

    nested_bits: tuple[int, ...] = Field((), description="shorter code lengths: prefixes of the code")

    @model_validator(mode="after")
    def _check_nested(self) -> Self:
        if any(not MIN_BITS <= bits < self.bits for bits in self.nested_bits):
            raise ValueError(f"nested_bits {list(self.nested_bits)}: {MIN_BITS} to {self.bits - 1} are allowed")
        return self


class Fitted(Method):
    """A frozen backbone and a linear head. The loop calls `fit` in place of training; the only epoch has no steps."""

    learns_from = "images without labels, in one pass"
    Config = FittedConfig
    selection_metric = None
    supervision = "none"

    # Whether a bit needs a feature of its own.
    is_limited_by_features: ClassVar[bool] = True

    def __init__(self, config: FittedConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        head = HeadSpec(config.bits, norm="unit", activation="none")
        self.network = config.build_network(head).requires_grad_(False)
        num_features = self.network.head.num_features
        if self.is_limited_by_features and config.bits > num_features:
            raise InputError(
                f"bits is {config.bits}: {self.name} takes at most one bit for each feature, and {config.backbone} has "
                f"{num_features}; give --bits {num_features} or fewer, or use lsh"
            )
        self._text_encoders: dict[str, TextTower | None] = {}
        if (tower := self.text_encoder()) is not None:
            self.text_head = HashHead(tower.num_features, head).requires_grad_(False)

    @property
    def trains_on_images(self) -> bool:
        """False: the directions are fitted to features, see `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: TrainConfig) -> dict[str, Table]:
        """Return the table of image features, see `Method`."""
        return {"image": Table("image")}

    @property
    def tables(self) -> dict[str, Table]:
        """The table of image features; with a text side, also that of captions, if there are any."""
        tables = self.tables_of(self.config)
        if self.text_head is not None:
            tables["text"] = Table("caption", training_only=True, optional=True)
        return tables

    def text_encoder(self, device: str = "cpu") -> TextTower | None:
        """Return the text tower of the backbone, see `Method`; it is loaded once per device."""
        if device not in self._text_encoders:
            self._text_encoders[device] = self._load_text_tower(device)
        return self._text_encoders[device]

    def _load_text_tower(self, device: str) -> TextTower | None:
        config = self.config
        if config.sentences == "none" or config.is_of_embeddings:
            return None
        # Random weights must be the same at every call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            try:
                return text_tower(config.backbone, config.weights, device)
            except NoTextTower:
                return None

    @property
    def has_joint_features(self) -> bool:
        """True: the text side is the other tower of a dual encoder, see `Method`."""
        return True

    @property
    def nested_bits(self) -> tuple[int, ...]:
        """See `Method`."""
        return self.config.nested_bits if isinstance(self.config, PrefixConfig) else ()

    @abstractmethod
    def directions(self, rows: Rows) -> Matrix:
        """Return the directions float64 [K, D] for centred rows [N, D]; `InputError` if there are fewer than K."""

    def fit(self, training: Part) -> dict[str, float]:
        """Set the head to the directions for the training part and return metrics of the fit.

        Called on the first rank only; the other ranks receive the resulting state. `sign_cosine` is the mean cosine of
        an item's outputs and their signs; 1: nothing is lost by taking signs.
        """
        rows = unit(np.asarray(training.features["image"]))
        mean = mean_row(rows)
        rows -= mean.astype(np.float32)
        directions = self.directions(rows)
        _set_output(self.network.head, directions, mean)
        if self.text_head is not None:
            _set_output(self.text_head, directions, mean_row(unit(self._sentences(training))))
        outputs = rows @ directions.T.astype(np.float32)
        lengths = np.maximum(np.linalg.norm(outputs, axis=1), np.finfo(np.float32).tiny)
        cosines = np.abs(outputs).sum(axis=1) / lengths / self.config.bits**0.5
        return {"rows": len(rows), "sign_cosine": float(cosines.mean())}

    def _sentences(self, training: Part) -> Rows:
        """Return features of sentences [N, D]: of the captions of the training part, else of neutral sentences."""
        if "text" in training.features:
            captions = np.asarray(training.features["text"])
            return captions.reshape(-1, captions.shape[-1])
        tower = self.text_encoder()
        assert tower is not None, "a text head has a tower"
        return tower.encode(neutral_sentences())

    def build_optimizer(self) -> Optimizer:
        """Not called, see `start_epoch`."""
        raise AssertionError("a fitted method has no steps")

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Not called, as are `build_optimizer` and `forward`: the loop calls `fit` instead."""
        raise AssertionError("a fitted method has no steps")

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Not called, see `start_epoch`."""
        raise AssertionError("a fitted method has no steps")

    def _principal_directions(self, rows: Rows) -> Matrix:
        directions = principal_directions(rows, self.config.bits)
        if len(directions) < self.config.bits:
            raise InputError(
                f"bits is {self.config.bits}, but the features of the {len(rows)} training images vary in "
                f"{len(directions)} directions only; give --bits {len(directions)} or fewer, more images, or use lsh"
            )
        return directions


def _set_output(head: HashHead, directions: Matrix, mean: Matrix) -> None:
    """Make a head compute the projections of rows of unit length, minus `mean`, onto `directions`."""
    with torch.no_grad():
        head.output.weight.copy_(torch.from_numpy(directions))
        head.output.bias.copy_(torch.from_numpy(-directions @ mean))


class ItqConfig(FittedConfig):
    """Settings of ITQ."""

    iterations: int = Field(50, ge=1, le=10_000, description="iterations of the rotation")


class Itq(Fitted):
    """Principal directions after the rotation with the smallest quantisation error."""

    name = "itq"
    paper = "Gong and Lazebnik: Iterative Quantization, CVPR 2011 (doi 10.1109/CVPR.2011.5995432)"
    Config = ItqConfig
    config: ItqConfig

    def directions(self, rows: Rows) -> Matrix:
        """Return the rotated principal directions, see `Fitted`."""
        principal = self._principal_directions(rows)
        components = rows @ principal.T.astype(np.float32)
        rotated: Matrix = itq_rotation(components, self.config.seed, self.config.iterations).T @ principal
        return rotated


class PcaSign(Fitted):
    """Principal directions."""

    name = "pca-sign"
    paper = "signs of principal components; the baseline of Gong and Lazebnik, CVPR 2011"
    Config = PrefixConfig

    def directions(self, rows: Rows) -> Matrix:
        """Return the principal directions, see `Fitted`."""
        return self._principal_directions(rows)


class Lsh(Fitted):
    """Random directions; the bits may be more than the features."""

    name = "lsh"
    paper = "Charikar: Similarity Estimation Techniques from Rounding Algorithms, STOC 2002"
    Config = PrefixConfig
    is_limited_by_features = False

    def directions(self, rows: Rows) -> Matrix:
        """Return the random directions, see `Fitted`."""
        return random_directions(self.config.bits, rows.shape[1], self.config.seed)


class SignConfig(PrefixConfig):
    """Settings of the signs of features."""

    bits: int = Field(512, ge=MIN_BITS, le=MAX_BITS, description="length of a code: the number of first features used")


class Sign(Fitted):
    """The first features themselves."""

    name = "sign"
    paper = "signs of centred features; for foundation models: Blumenstiel et al., IGARSS 2024"
    Config = SignConfig

    def directions(self, rows: Rows) -> Matrix:
        """Return the directions of the first features, see `Fitted`."""
        return first_features(self.config.bits, rows.shape[1])
