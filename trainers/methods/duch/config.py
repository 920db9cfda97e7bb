"""Settings of DUCH."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field, field_validator

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.names import check_backbone_name
from orbithash.trainers.captions import TRANSLATORS
from orbithash.trainers.config import PathOrName, TrainConfig
from orbithash.trainers.data.views import CROP_SHARE
from orbithash.trainers.methods.losses import NearAs
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["MAX_TEMPERATURE", "MIN_TEMPERATURE", "DuchConfig", "is_dual_encoder"]

# Range of a learned temperature.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


def is_dual_encoder(text_encoder: str) -> bool:
    """Return whether the setting `text_encoder` is written as a backbone."""
    return text_encoder.startswith(("hf:", "open_clip:"))


class DuchConfig(TrainConfig):
    """Settings of DUCH. "code: X" in a description is the value in the authors' released code if it differs."""

    image_size: int = Field(224, ge=32, le=1024, description="side of the network's input, in pixels")
    epochs: int = Field(100, ge=1, le=10_000, description="passes over the training part")
    batch_size: Annotated[int, Choice((64, 128, 256, 512))] = Field(
        256, ge=2, le=65_536, description="pairs per step over all workers together"
    )
    validate_every: int = Field(10, ge=1, description="number of epochs between two validations")

    text_encoder: PathOrName | None = Field(
        None,
        description="Hugging Face text model, by name or folder, or a dual encoder, written as a backbone; null: the "
        "text tower of the backbone",
    )
    text_pooling: Literal["mean", "cls", "last4", "last4-padded"] = Field(
        "mean", description="pooling of the text model's outputs, unless it is a text tower; code: last4-padded"
    )
    text_normalise: bool = Field(
        False, description="whether captions are put in lower case, without . , ! and ?; code: true"
    )
    hidden: Annotated[int, Choice((512, 1024, 2048, 4096, 8192))] = Field(
        4096, ge=1, le=65_536, description="width of each head's hidden layer"
    )
    standardisation: Literal["per-dimension", "scalar"] = Field(
        "per-dimension", description="standardisation of features with the training part's moments; code: scalar"
    )

    original_view: Literal["whole", "center-crop"] = Field(
        "whole", description="part of the image that is encoded, in training and later; code: center-crop"
    )
    image_augmentation: Literal[
        "center-crop",
        "random-crop",
        "blur-rotate-center",
        "blur-rotate-random",
        "rotate",
        "blur",
        "jitter",
        "one-of-three",
    ] = Field("blur-rotate-center", description="augmentation of the second image view, computed once")
    text_augmentation: Literal["none", "rule", "translate", "translate-chain"] = Field(
        "none", description="rewording of the second text view; none: another caption of the image; code: rule"
    )
    translators: PathOrName = Field(
        TRANSLATORS,
        description="folder, or organisation on the Hugging Face hub, of the translation models such as opus-mt-en-es",
    )
    glove: PathOrName | None = Field(
        None,
        description="GloVe text file with word vectors for text_augmentation=rule; null: the text model's; code: GloVe",
    )
    captions: Literal["fixed", "random", "all"] = Field(
        "random",
        description="captions used of each image: always the same one, a random one per epoch, or all as positives; "
        "code: fixed",
    )

    temperature: Annotated[float, Log(0.05, 1)] = Field(
        0.3, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="temperature of the contrastive losses; code: 1"
    )
    learn_temperature: bool = Field(False, description="whether the temperature is trained")
    temperature_lr: float = Field(1e-2, gt=0, le=1, description="Adam's learning rate of the temperature's logarithm")
    contrast: Annotated[Literal["full", "cross-only"], Choice(("full", "cross-only"))] = Field(
        "full", description="negatives of a row: rows of both views, or of the other view only"
    )
    inter_weight: Annotated[float, Linear(0.3, 3)] = Field(
        1.0, ge=0, description="weight of the contrastive loss between images and captions"
    )
    image_weight: Annotated[float, Linear(0, 3)] = Field(
        1.0, ge=0, description="weight of the contrastive loss between the two image views"
    )
    text_weight: Annotated[float, Linear(0, 3)] = Field(
        1.0, ge=0, description="weight of the contrastive loss between the two text views"
    )
    near_as: NearAs = Field("negatives", description="how pairs with nearly the same captions are treated")
    near_cosine: float = Field(
        0.7,
        gt=0,
        le=1,
        description="minimum cosine of the mean standardised caption features of two images with nearly the same "
        "captions",
    )

    adversarial_weight: Annotated[float, Log(1e-4, 1)] = Field(
        0.01, ge=0, description="weight of the adversarial loss; 0: no discriminator"
    )
    quantisation_weight: Annotated[float, Log(1e-5, 0.1)] = Field(
        0.001, ge=0, description="weight of the distance to the pairs' common codes"
    )
    balance_weight: Annotated[float, Log(1e-5, 0.1)] = Field(0.01, ge=0, description="weight of the bit balance")
    bb_axis: Literal["column", "row"] = Field(
        "column", description="balance of each bit over the batch, or of the bits of each code; code: row"
    )

    lr: Annotated[float, Log(1e-5, 1e-3)] = Field(1e-4, gt=0, le=1, description="Adam's learning rate of both heads")
    weight_decay: Annotated[float, Log(1e-6, 1e-2)] = Field(5e-4, ge=0, le=1, description="weight decay of both heads")
    lr_decay: float = Field(0.8, gt=0, le=1, description="factor on all learning rates, applied every lr_decay_epochs")
    lr_decay_epochs: int = Field(
        50, ge=1, description="number of epochs between two decays; code: also after the first epoch"
    )
    critic_lr: float = Field(1e-4, gt=0, le=1, description="Adam's learning rate of the discriminator")
    critic_weight_decay: float = Field(1e-4, ge=0, le=1, description="weight decay of the discriminator")
    gradient_penalty: float = Field(
        10.0, ge=0, description="weight of the gradient penalty in the discriminator's loss"
    )
    batch_norm_critic: bool = Field(False, description="whether the discriminator has batch norm; code: true")

    compat_txt_view: bool = Field(
        False, description="whether the second text view equals the first, as in the released code"
    )
    compat_adv_text_only: bool = Field(
        False, description="whether the adversarial loss acts on captions, as in the released code"
    )

    @field_validator("text_encoder")
    @classmethod
    def _check_text_encoder(cls, source: str | None) -> str | None:
        return check_backbone_name(source) if source is not None and is_dual_encoder(source) else source

    def preprocessing(self) -> Preprocessing:
        """Return the preprocessing, see `TrainConfig`; with `original_view` center-crop, of the middle of an image."""
        whole = super().preprocessing()
        if self.original_view == "whole":
            return whole
        return dataclasses.replace(whole, resize=round(whole.crop / CROP_SHARE))
