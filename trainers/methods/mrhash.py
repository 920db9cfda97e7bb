"""MrHash: multisource reconstruction based unsupervised hashing (Sun et al., TGRS 2022, 10.1109/TGRS.2022.3231215).

No labels are used. An autoencoder learns to reconstruct the features of two sources of a place from those of the first.
Its latents are softly assigned to clusters, and the hash network learns codes that give the same assignment through a
linear layer, the bridge. To encode a new place, only the first source is needed.

Deviations from the authors' code, in addition to the settings below:

- The default adds a loss that is not in the paper, with weight 5: the error of both sources reconstructed from the
  codes (code_reconstruction_weight=0 removes it). Optional further losses are quantisation and bit balance.
- The frozen features are those of the hash network's own backbone before training, and by default only the head is
  trained. The code uses features of ResNet-50 (`feature_backbone`) and trains an AlexNet with its two wide layers:
  backbone=alexnet, hidden=[4096,4096], fine_tune. Here the wide layers start from random weights.
- The autoencoder's epoch is selected by the error on held-out training images (in the code: by retrieval on labelled
  test images).
"""

from typing import Annotated, Any, Literal, Self, TypeVar

import numpy as np
import torch
from pydantic import Field, ValidationInfo, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import Adam

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering, Values
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.backbones.names import MIN_SIDE_PX, check_backbone_name
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import Standardise
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import BandNumbers, PathOrName, TrainConfig
from orbithash.trainers.data.feature_table import FeatureRows
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import gather_objects, meet, rank, sum_over_ranks
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.autoencoder import (
    CHUNK_ROWS,
    Autoencoder,
    PreTraining,
    cluster_centres,
    cluster_entropy,
    pre_train,
    soft_assignment,
    target_distribution,
)
from orbithash.trainers.methods.base import Batch, Method, encode_part
from orbithash.trainers.methods.losses import bit_balance_loss, quantisation_loss
from orbithash.trainers.metrics.retrieval import labelled
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["MrHash", "MrHashConfig", "kl_divergence"]

# A feature table of a part, or the rows of a batch.
Rows = TypeVar("Rows", FeatureRows, Tensor)


class MrHashConfig(TrainConfig):
    """Settings of MrHash. "code: X" in a description is the value in the authors' released code if it differs."""

    epochs: int = Field(51, ge=1, le=10_000, description="passes over the training part")
    batch_size: int = Field(128, ge=2, le=65_536, description="images per step over all workers together")
    hidden: tuple[int, ...] = Field((1024,), description="widths of the head's hidden layers; code: 4096, 4096")
    dropout: Annotated[float, Linear(0, 0.7)] = Field(
        0.5, ge=0, lt=1, description="dropout rate of the head's input features; code: within the head's layers"
    )
    fine_tune: bool = Field(False, description="also train the backbone, on augmented images; code: true")
    sources: Literal["both", "first"] = Field(
        "both", description="sources that the autoencoder reconstructs; first: no second source is needed"
    )
    second_bands: tuple[int | str, ...] = Field(
        (), description="band numbers or names of the second source; empty: RGB"
    )
    second_values: Values = Field("picture", description="as `values`, for the second source")
    second_stretch: str = Field("percentile:2:98", description="as `stretch`, for the second source")
    second_band_scale: BandNumbers = Field((), description="as `band_scale`, for the second source")
    second_band_offset: BandNumbers = Field((), description="as `band_offset`, for the second source")
    second_band_mean: BandNumbers = Field((), description="as `band_mean`, for the second source")
    second_band_std: BandNumbers = Field((), description="as `band_std`, for the second source")
    feature_backbone: str | None = Field(
        None,
        description="backbone of the features that the autoencoder reconstructs; null: the hash network's, before "
        "training; code: resnet50",
    )
    feature_weights: PathOrName | None = Field(
        None, description="weights of feature_backbone: torchvision weights by name or a safetensors file; null: random"
    )
    standardise: bool = Field(True, description="whether the autoencoder's features are standardised; code: false")
    num_latents: Annotated[int, Choice((16, 32, 64, 128))] = Field(
        64, ge=2, le=1024, description="width of the autoencoder's latents"
    )
    num_clusters: Annotated[int, Choice((8, 16, 32, 64))] = Field(16, ge=2, le=4096, description="number M of clusters")
    alpha: Annotated[float, Log(0.5, 5)] = Field(
        1.0, gt=0, le=100, description="degrees of freedom of the Student-t assignment"
    )
    autoencoder_epochs: int = Field(200, ge=1, le=10_000, description="epochs of the autoencoder's training")
    autoencoder_lr: float = Field(1e-3, gt=0, le=1, description="Adam's learning rate for the autoencoder")
    autoencoder_halve_epochs: int = Field(40, ge=1, description="number of epochs between two halvings of that rate")
    autoencoder_batch_size: int = Field(512, ge=1, le=65_536, description="rows per step of the autoencoder's training")
    autoencoder_held_out: float = Field(
        0.1, gt=0, le=0.5, description="fraction of the rows that select the autoencoder's epoch"
    )
    first_source_weight: Annotated[float, Log(0.01, 1)] = Field(
        0.1, gt=0, le=100, description="weight l1 of the first source's error in the autoencoder's training"
    )
    kl_reduction: Literal["mean", "batchmean"] = Field(
        "mean",
        description="reduction of the KL divergences: mean over rows and clusters, or over rows only (M times larger)",
    )
    reconstruction_weight: Annotated[float, Log(0.1, 200)] = Field(
        5.0,
        ge=0,
        le=10_000,
        description="weight l0 of the reconstruction error; 5 with kl_reduction=mean and M = 16 corresponds to 80 with "
        "batchmean",
    )
    latent_divergence: bool = Field(True, description="whether the target also trains the autoencoder and the centres")
    hard_targets: bool = Field(False, description="whether each image is assigned to its nearest centre only")
    target_epochs: int = Field(
        1, ge=0, description="number of epochs between two updates of the target; 0: the first target stays"
    )
    code_reconstruction_weight: Annotated[float, Log(0.1, 50)] = Field(
        5.0,
        ge=0,
        le=10_000,
        description="weight of the error of the sources reconstructed from the hashes, not in the paper; code: 0",
    )
    quantisation_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="weight of the mean squared distance of a hash to its sign"
    )
    bit_balance_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="weight of each bit's squared mean over the batch; code: 0"
    )
    lr: Annotated[float, Log(1e-4, 3e-3)] = Field(
        1e-3, gt=0, le=1, description="Adam's learning rate of all but the backbone"
    )
    backbone_lr_factor: float = Field(
        0.01, ge=0, le=1, description="factor on lr for the backbone, if it is fine-tuned"
    )
    lr_decay: float = Field(0.7, gt=0, le=1, description="factor on all learning rates, applied every lr_decay_epochs")
    lr_decay_epochs: int = Field(10, ge=1, description="number of epochs between two decays")

    def second_preprocessing(self) -> Preprocessing:
        """Return the preprocessing of the second source's images."""
        rendering = Rendering(
            self.second_bands or None,
            self.second_stretch,
            self.second_values,
            self.second_band_scale,
            self.second_band_offset,
        )
        return self._preprocessing_of(rendering, self.second_band_mean, self.second_band_std)

    def preprocessings(self) -> dict[tuple[Literal["image", "second"], str], Preprocessing]:
        """Return the preprocessing of each source, see `TrainConfig`."""
        first = super().preprocessings()
        return first if self.sources == "first" else {**first, ("second", "second_"): self.second_preprocessing()}

    @field_validator("second_bands", "second_stretch")
    @classmethod
    def _check_second(cls, value: Any, info: ValidationInfo) -> Any:
        if value != ():
            Rendering(**{str(info.field_name).removeprefix("second_"): value})
        return value

    @field_validator("feature_backbone")
    @classmethod
    def _check_feature_backbone(cls, backbone: str | None) -> str | None:
        return None if backbone is None else check_backbone_name(backbone)

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        self.second_preprocessing()
        if self.feature_backbone is None and self.feature_weights is not None:
            raise ValueError(
                f"feature_weights is {self.feature_weights!r}, but feature_backbone is not set; set it to the backbone "
                "of these weights"
            )
        least = MIN_SIDE_PX.get(self.feature_backbone or "", 0)
        if self.image_size < least:
            raise ValueError(f"image_size is {self.image_size}: {self.feature_backbone} needs at least {least} pixels")
        return self


def kl_divergence(target: Tensor, shares: Tensor, reduction: str) -> Tensor:
    """Return KL(p || q) of target p [N, M] and shares q [N, M], a float32 scalar; 0 for an empty batch.

    `reduction` "batchmean" is the mean over rows; "mean" also divides by M.
    """
    target, shares = target.float(), shares.float()
    divergence = torch.xlogy(target, target) - target * shares.clamp(min=1e-12).log()
    return divergence.sum() / max(1, len(target)) / (target.shape[1] if reduction == "mean" else 1)


class MrHash(Method):
    """The hash network, the bridge from hashes to latents, and the autoencoder with the centres of its latents."""

    name = "mrhash"
    learns_from = "images of one or two sources, without labels"
    paper = "Sun et al.: MrHash, IEEE TGRS 2022 (doi 10.1109/TGRS.2022.3231215)"
    Config = MrHashConfig
    # The last epoch, as published. The one criterion without labels, the reconstruction error, soon stops changing.
    selection_metric = None
    # Computed without labels.
    tuning_metric = "code_reconstructed_variance"
    validates_by_labels = False
    supervision = "none"

    target: Tensor
    entropy: Tensor

    def __init__(self, config: MrHashConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        if config.num_clusters > num_rows:
            raise InputError(
                f"num_clusters is {config.num_clusters}: at most the number of training images, {num_rows}, is allowed"
            )
        head = HeadSpec(config.bits, norm="standardise", hidden=config.hidden)
        self.network = config.build_network(head)
        self.network.backbone.requires_grad_(config.fine_tune)
        self.bridge = nn.Linear(config.bits, config.num_latents, bias=False)
        num_sources = 1 + (config.sources == "both")
        width = self.network.head.num_features
        if config.feature_backbone is not None:
            # Only its width is needed here; `load_tables` builds it with its weights.
            width = build_backbone(config.feature_backbone).num_features
        self.autoencoder = Autoencoder(width, config.num_latents, num_sources)
        self.centres = nn.Parameter(torch.zeros(config.num_clusters, config.num_latents))
        self.register_buffer("target", torch.zeros(num_rows, config.num_clusters))
        self.register_buffer("entropy", torch.zeros(()))

    @property
    def trains_on_images(self) -> bool:
        """Whether the backbone is fine-tuned, see `Method`."""
        return self.config.fine_tune

    @classmethod
    def tables_of(cls, config: MrHashConfig) -> dict[str, Table]:
        """Return the feature tables, see `Method`.

        "image": features of the hash network before training. "first" and "second": sources of the autoencoder;
        without `feature_backbone`, "image" is also the first source.
        """
        backbone, weights = config.feature_backbone, config.feature_weights
        tables = {"image": Table("image")}
        if backbone is not None:
            tables["first"] = Table("image", backbone=backbone, weights=weights)
        if config.sources == "both":
            second = config.second_preprocessing()
            tables["second"] = Table("second", preprocessing=second, backbone=backbone, weights=weights)
        return tables

    def _sources(self, features: dict[str, Rows]) -> list[Rows]:
        """Return the tables of the autoencoder's sources, the first source first."""
        first = features["image" if self.config.feature_backbone is None else "first"]
        return [first, features["second"]] if self.config.sources == "both" else [first]

    def begin(self, training: Part) -> None:
        """Train the autoencoder and compute the centres, see `Method`."""
        config, autoencoder = self.config, self.autoencoder
        sources = self._sources(training.features)
        assert isinstance(self.network.head.norm, Standardise)
        self.network.head.norm.fit(torch.from_numpy(np.asarray(training.features["image"])))
        if config.standardise:
            for norm, source in zip(autoencoder.norms, sources, strict=True):
                assert isinstance(norm, Standardise)
                norm.fit(torch.from_numpy(np.asarray(source)))
        settings = PreTraining(
            epochs=config.autoencoder_epochs,
            batch_size=config.autoencoder_batch_size,
            lr=config.autoencoder_lr,
            halve_epochs=config.autoencoder_halve_epochs,
            held_out=config.autoencoder_held_out,
            first_weight=config.first_source_weight,
            seed=config.seed,
        )
        pre_train(autoencoder, sources, settings)
        centres = cluster_centres(autoencoder.latents(sources[0]), config.num_clusters, config.seed)
        with torch.no_grad():
            self.centres.copy_(centres)

    @torch.no_grad()
    def start_epoch(self, epoch: int, training: Part) -> float:
        """Update the target of all rows on the first rank and share it, see `Method`."""
        config, reconstructs = self.config, self.config.reconstruction_weight > 0
        # Frozen if no loss reaches them, because DDP expects a gradient of every trainable parameter.
        self.autoencoder.encoder.requires_grad_(reconstructs or config.latent_divergence)
        self.autoencoder.decoders.requires_grad_(reconstructs or config.code_reconstruction_weight > 0)
        target, entropy = torch.zeros_like(self.target), torch.zeros_like(self.entropy)
        if rank() == 0:
            latents = self.autoencoder.latents(self._sources(training.features)[0])
            shares = torch.cat(
                [soft_assignment(chunk, self.centres, config.alpha) for chunk in torch.split(latents, CHUNK_ROWS)]
            )
            target.copy_(target_distribution(shares, config.hard_targets))
            entropy.copy_(cluster_entropy(shares))
        meet()
        if epoch == 0 or (config.target_epochs and epoch % config.target_epochs == 0):
            self.target.copy_(sum_over_ranks(target))
        self.entropy.copy_(sum_over_ranks(entropy))
        return float(config.lr_decay ** (epoch // config.lr_decay_epochs))

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return which features are "kept" by dropout, bool [B, D], see `Method`."""
        draw = torch.Generator().manual_seed(batch.seed)
        drawn = torch.rand(batch.num_rows, self.network.head.num_features, generator=draw)
        return {"kept": drawn[batch.positions] >= self.config.dropout}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`. All but the bit balance are means over this rank's rows."""
        config, autoencoder = self.config, self.autoencoder
        features = batch.features["image"] if batch.images is None else self.network.features(batch.images)
        hashes = self.network.head(self._dropped(features, batch.draws["kept"]) if self.training else features)
        sources = autoencoder.standardise(self._sources(batch.features))
        target, bridged = self.target[batch.rows], self.bridge(hashes)

        def divergence(latents: Tensor) -> Tensor:
            shares = soft_assignment(latents, self.centres, config.alpha)
            return batch.weight * kl_divergence(target, shares, config.kl_reduction)

        def errors(latents: Tensor) -> Tensor:
            return batch.weight * torch.stack(autoencoder.errors(latents, sources)).sum()

        losses = {"divergence": divergence(bridged)}
        loss = losses["divergence"]
        if config.latent_divergence or config.reconstruction_weight:
            latents = autoencoder.encoder(sources[0])
        if config.latent_divergence:
            losses["latent_divergence"] = divergence(latents)
            loss = loss + losses["latent_divergence"]
        if config.reconstruction_weight:
            losses["reconstruction"] = errors(latents)
            loss = loss + config.reconstruction_weight * losses["reconstruction"]
        if config.code_reconstruction_weight:
            losses["code_reconstruction"] = errors(bridged)
            loss = loss + config.code_reconstruction_weight * losses["code_reconstruction"]
        if config.quantisation_weight:
            losses["quantisation"] = batch.weight * quantisation_loss(hashes)
            loss = loss + config.quantisation_weight * losses["quantisation"]
        if config.bit_balance_weight:
            losses["bit_balance"] = bit_balance_loss(batch.gather(hashes), centre=0.0)
            loss = loss + config.bit_balance_weight * losses["bit_balance"]
        return {"loss": loss, **losses, "cluster_entropy": self.entropy}

    def _dropped(self, features: Tensor, kept: Tensor) -> Tensor:
        """Return features [B, D] after dropout: dropped features are set to their training mean, others scaled up."""
        norm = self.network.head.norm
        assert isinstance(norm, Standardise)
        return norm.mean + (features - norm.mean) * kept.to(features) / (1 - self.config.dropout)

    def build_optimizer(self) -> Adam:
        """Return the optimizer, see `Method`: one group for the backbone if it is fine-tuned, one for the rest."""
        config = self.config
        rest = [p for name, p in self.named_parameters() if not name.startswith("network.backbone.")]
        groups = [{"name": "rest", "params": rest, "lr": config.lr}]
        if config.fine_tune:
            backbone = list(self.network.backbone.parameters())
            groups.append({"name": "backbone", "params": backbone, "lr": config.lr * config.backbone_lr_factor})
        return Adam(groups)

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """Return the fractions of the sources' variance reconstructed from latents and from codes, see `Method`.

        If all validation images have labels, the metrics of `Method.validate` as well.
        """
        latents = self.autoencoder.latents(self._sources(validation.features)[0])
        metrics = {"reconstructed_variance": self._explained_variance(latents, validation)}
        if self.config.code_reconstruction_weight:
            signs = 2.0 * unpack(encode_part(encoder, validation), self.config.bits) - 1
            metrics["code_reconstructed_variance"] = self._explained_variance(
                self.bridge(torch.from_numpy(signs).to(latents)), validation
            )
        if all(gather_objects(bool(labelled(validation.labels).all()))):
            metrics |= super().validate(encoder, reference, validation)
        return metrics

    @torch.no_grad()
    def _explained_variance(self, latents: Tensor, part: Part) -> float:
        """Return the fraction of the variance of a part's sources, over all ranks, that these latents explain."""
        sources = [torch.from_numpy(np.asarray(source)).to(latents) for source in self._sources(part.features)]
        meet()
        unexplained, total = 0.0, 0.0
        for source, decoder in zip(self.autoencoder.standardise(sources), self.autoencoder.decoders, strict=True):
            source = source.double()
            error = (decoder(latents).double() - source).square().sum()
            count = torch.full_like(error, len(source))
            sums = sum_over_ranks(torch.cat([source.sum(dim=0), torch.stack([source.square().sum(), error, count])]))
            unexplained += float(sums[-2])
            total += float(sums[-3] - sums[:-3].square().sum() / sums[-1])
        return 1 - unexplained / total if total else 0.0
