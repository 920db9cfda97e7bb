"""Settings of DUCH."""

import dataclasses
from typing import Annotated, Literal

from pydantic import Field

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.trainers.captions import TRANSLATORS
from orbithash.trainers.config import PathOrName, TrainConfig
from orbithash.trainers.data.views import CROP_SHARE
from orbithash.trainers.methods.losses import NearAs
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["MAX_TEMPERATURE", "MIN_TEMPERATURE", "DuchConfig"]

# Range of a learned temperature.
MIN_TEMPERATURE, MAX_TEMPERATURE = 0.01, 2.0


class DuchConfig(TrainConfig):
    """Settings of DUCH. "Code" is the value of the authors' released code where it differs from the default here."""

    image_size: int = Field(224, ge=32, le=1024, description="side of the network's input, pixels")
    epochs: int = Field(100, ge=1, le=10_000, description="passes over the training part")
    batch_size: Annotated[int, Choice((64, 128, 256, 512))] = Field(
        256, ge=2, le=65_536, description="pairs per step over all workers together"
    )
    validate_every: int = Field(10, ge=1, description="epochs between two evaluations on the validation part")

    text_encoder: PathOrName | None = Field(None, description="a Hugging Face text model by name or folder; needed")
    text_pooling: Literal["mean", "cls", "last4", "last4-padded"] = Field(
        "mean", description="of the text model's outputs; code: last4-padded"
    )
    text_normalise: bool = Field(False, description="captions in lower case, without . , ! and ?; code: yes")
    hidden: Annotated[int, Choice((512, 1024, 2048, 4096, 8192))] = Field(
        4096, ge=1, le=65_536, description="width of each head's hidden layer"
    )
    standardisation: Literal["per-dimension", "scalar"] = Field(
        "per-dimension", description="of the features, by the training part's moments; code: scalar"
    )

    original_view: Literal["whole", "center-crop"] = Field(
        "whole", description="what is seen of an image, in training and ever after; code: center-crop"
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
    ] = Field("blur-rotate-center", description="how the second image view is made, once")
    text_augmentation: Literal["none", "rule", "translate", "translate-chain"] = Field(
        "none", description="how the second text view is worded; none: another caption of the image; code: rule"
    )
    translators: PathOrName = Field(
        TRANSLATORS, description="where opus-mt-en-es and the like are: a folder, or an organisation of the HF hub"
    )
    glove: PathOrName | None = Field(
        None, description="a GloVe text file with the rule's word vectors; none: the text model's own; code: GloVe"
    )
    captions: Literal["fixed", "random", "all"] = Field(
        "random",
        description="one caption an image in all, one an epoch, or each as a positive in its turn; code: fixed",
    )

    temperature: Annotated[float, Log(0.05, 1)] = Field(
        0.3, ge=MIN_TEMPERATURE, le=MAX_TEMPERATURE, description="of the contrastive losses; code: 1"
    )
    learn_temperature: bool = Field(False, description="whether training changes the temperature")
    temperature_lr: float = Field(1e-2, gt=0, le=1, description="Adam's learning rate of the temperature's logarithm")
    contrast: Annotated[Literal["full", "cross-only"], Choice(("full", "cross-only"))] = Field(
        "full", description="negatives of a row: both views' rows, or the other view's only"
    )
    inter_weight: Annotated[float, Linear(0.3, 3)] = Field(
        1.0, ge=0, description="of the contrast between images and captions"
    )
    image_weight: Annotated[float, Linear(0, 3)] = Field(
        1.0, ge=0, description="of the contrast between the two image views"
    )
    text_weight: Annotated[float, Linear(0, 3)] = Field(
        1.0, ge=0, description="of the contrast between the two text views"
    )
    near_as: NearAs = Field("negatives", description="what pairs with nearly the same captions are to each other")
    near_cosine: float = Field(
        0.7, gt=0, le=1, description="least cosine of two images' mean standardised caption features to be near"
    )

    adversarial_weight: Annotated[float, Log(1e-4, 1)] = Field(
        0.01, ge=0, description="of the adversarial loss; 0: no discriminator"
    )
    quantisation_weight: Annotated[float, Log(1e-5, 0.1)] = Field(
        0.001, ge=0, description="of the distance to the pairs' common codes"
    )
    balance_weight: Annotated[float, Log(1e-5, 0.1)] = Field(0.01, ge=0, description="of the bit balance")
    bb_axis: Literal["column", "row"] = Field(
        "column", description="balance each bit over the batch, or the bits of each code; code: row"
    )

    lr: Annotated[float, Log(1e-5, 1e-3)] = Field(1e-4, gt=0, le=1, description="Adam's learning rate of both heads")
    weight_decay: Annotated[float, Log(1e-6, 1e-2)] = Field(5e-4, ge=0, le=1, description="of both heads")
    lr_decay: float = Field(0.8, gt=0, le=1, description="on every rate, each lr_decay_epochs")
    lr_decay_epochs: int = Field(50, ge=1, description="epochs between two decays; code: also after the first epoch")
    critic_lr: float = Field(1e-4, gt=0, le=1, description="Adam's learning rate of the discriminator")
    critic_weight_decay: float = Field(1e-4, ge=0, le=1, description="of the discriminator")
    gradient_penalty: float = Field(10.0, ge=0, description="weight in the discriminator's loss")
    batch_norm_critic: bool = Field(False, description="batch norm in the discriminator; code: yes")

    compat_txt_view: bool = Field(False, description="the second text view is the first, as in the code")
    compat_adv_text_only: bool = Field(False, description="the adversarial loss is on captions, as in the code")

    def preprocessing(self) -> Preprocessing:
        """See `TrainConfig`."""
        whole = super().preprocessing()
        if self.original_view == "whole":
            return whole
        return dataclasses.replace(whole, resize=round(whole.crop / CROP_SHARE))
