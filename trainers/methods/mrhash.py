"""MrHash: multisource reconstruction based unsupervised hashing (Sun et al., TGRS 2022, 10.1109/TGRS.2022.3231215).

No label is used. An autoencoder learns to tell two sources of a place from frozen features of the first alone. Its
latents are softly assigned to clusters, and the hash network learns codes that give, through a linear bridge, the same
assignment. Of a new place only the first source is needed.

Deviations from the authors' code, beside the settings below:

- the frozen features are those of the hash network's own backbone as training begins, and by default only the head on
  them is trained. The code has ResNet-50's (`feature_backbone`) and trains an AlexNet with its two wide layers:
  backbone=alexnet, hidden=[4096,4096], fine_tune, of which the wide ones begin at random here;
- which epoch's autoencoder is kept is told by its error on training images held out; the code takes the one with the
  best retrieval on labelled test images;
- beyond the paper, optional losses: both sources told from the codes themselves, quantisation, balance of each bit.
"""

import math
from typing import Annotated, Literal, Self, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn
from torch.optim import Adam

from orbithash.encoders.codes import unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.backbones import BACKBONES, MIN_SIDE_PX, build_backbone, num_features
from orbithash.encoders.networks.card import HeadSpec, NetworkSpec
from orbithash.encoders.networks.hash_network import HashNetwork, Standardise
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.config import PathOrName, TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import gather_objects, gather_with_gradient, rank, sum_over_ranks, world_size
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.autoencoder import (
    CHUNK_ROWS,
    Autoencoder,
    PreTraining,
    cluster_centres,
    pre_train,
    soft_assignment,
    target_distribution,
)
from orbithash.trainers.methods.base import Batch, Method, encode_part
from orbithash.trainers.methods.losses import bit_balance_loss, quantisation_loss
from orbithash.trainers.metrics.retrieval import labelled
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["MrHash", "MrHashConfig", "cluster_entropy", "kl_divergence"]


# A table of a part, or a batch's rows of it.
Rows = TypeVar("Rows", npt.NDArray[np.float32], Tensor)


class MrHashConfig(TrainConfig):
    """Settings of MrHash. "Code" is the value of the authors' released code where it differs from the default here."""

    epochs: int = Field(51, ge=1, le=10_000, description="passes over the training part")
    batch_size: int = Field(128, ge=2, le=65_536, description="images per step over all workers together")
    hidden: tuple[int, ...] = Field((1024,), description="widths of the head's hidden layers; code: 4096, 4096")
    dropout: Annotated[float, Linear(0, 0.7)] = Field(
        0.5, ge=0, lt=1, description="share of features that the head trains without; code: within its layers"
    )
    fine_tune: bool = Field(False, description="train the backbone, too, on augmented images; code: yes")
    sources: Literal["both", "first"] = Field("both", description="what the autoencoder tells; first: no second source")
    second_bands: tuple[int | str, ...] = Field((), description="numbers or names of the second source's; none: RGB")
    second_stretch: str = Field("percentile:2:98", description="of the second source's data, as stretch is")
    feature_backbone: str | None = Field(
        None, description="whose features the autoencoder tells; none: the hash network's as it begins; code: resnet50"
    )
    feature_weights: PathOrName | None = Field(
        None, description="its weights: torchvision's by name, or a safetensors file; none: random"
    )
    standardise: bool = Field(True, description="whether the autoencoder's features are standardised; code: no")
    num_latents: Annotated[int, Choice((16, 32, 64, 128))] = Field(
        64, ge=2, le=1024, description="width of the autoencoder's latents"
    )
    num_clusters: Annotated[int, Choice((8, 16, 32, 64))] = Field(16, ge=2, le=4096, description="M, the centres")
    alpha: Annotated[float, Log(0.5, 5)] = Field(
        1.0, gt=0, le=100, description="degrees of freedom of the Student-t assignment"
    )
    autoencoder_epochs: int = Field(200, ge=1, le=10_000, description="of the autoencoder's own training")
    autoencoder_lr: float = Field(1e-3, gt=0, le=1, description="Adam's learning rate there")
    autoencoder_halve_epochs: int = Field(40, ge=1, description="epochs between two halvings of that rate")
    autoencoder_batch_size: int = Field(512, ge=1, le=65_536, description="rows per step there")
    autoencoder_held_out: float = Field(0.1, gt=0, le=0.5, description="share of rows that choose the epoch there")
    first_source_weight: Annotated[float, Log(0.01, 1)] = Field(
        0.1, gt=0, le=100, description="l1, on the first source's error there"
    )
    kl_reduction: Literal["mean", "batchmean"] = Field(
        "mean", description="of divergences: over rows and clusters, or rows alone, which is M times as much"
    )
    reconstruction_weight: Annotated[float, Log(0.1, 200)] = Field(
        5.0, ge=0, le=10_000, description="l0, in the unit of kl_reduction: 5 with mean and M = 16 is 80 with batchmean"
    )
    latent_divergence: bool = Field(True, description="whether the target also teaches autoencoder and centres")
    hard_targets: bool = Field(False, description="whether each image belongs to its nearest centre alone")
    target_epochs: int = Field(1, ge=0, description="epochs from one target to the next; 0: the first one stays")
    code_reconstruction_weight: Annotated[float, Log(0.1, 50)] = Field(
        5.0, ge=0, le=10_000, description="of the error of the sources told from the hashes; code: 0"
    )
    quantisation_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="of the squared distance to the nearest sign"
    )
    bit_balance_weight: Annotated[float, Linear(0, 1)] = Field(
        0.0, ge=0, le=100, description="of each bit's squared mean over the batch; code: 0"
    )
    lr: Annotated[float, Log(1e-4, 3e-3)] = Field(
        1e-3, gt=0, le=1, description="Adam's learning rate of all but the backbone"
    )
    backbone_lr_factor: float = Field(0.01, ge=0, le=1, description="on lr, for the backbone where it is fine-tuned")
    lr_decay: float = Field(0.7, gt=0, le=1, description="on every rate, each lr_decay_epochs")
    lr_decay_epochs: int = Field(10, ge=1, description="epochs between two decays")

    def second_preprocessing(self) -> Preprocessing:
        """What an image of the second source goes through."""
        rendering = Rendering(self.second_bands or None, self.second_stretch)
        return Preprocessing(rendering, self.image_size, self.image_size, orientations=self.orientations)

    @field_validator("second_bands")
    @classmethod
    def _check_second_bands(cls, bands: tuple[int | str, ...]) -> tuple[int | str, ...]:
        Rendering(bands or None)
        return bands

    @field_validator("second_stretch")
    @classmethod
    def _check_second_stretch(cls, stretch: str) -> str:
        Rendering(stretch=stretch)
        return stretch

    @field_validator("feature_backbone")
    @classmethod
    def _check_feature_backbone(cls, backbone: str | None) -> str | None:
        if backbone is not None and backbone not in BACKBONES:
            raise ValueError(f"no such backbone; there are {', '.join(BACKBONES)}")
        return backbone

    @model_validator(mode="after")
    def _check_features(self) -> Self:
        if self.feature_backbone is None and self.feature_weights is not None:
            raise ValueError(
                f"feature_weights is {self.feature_weights!r} without a feature_backbone; name the one they belong to"
            )
        least = MIN_SIDE_PX.get(self.feature_backbone or "", 0)
        if self.image_size < least:
            raise ValueError(f"image_size is {self.image_size}: {self.feature_backbone} needs at least {least} pixels")
        return self


def kl_divergence(target: Tensor, shares: Tensor, reduction: str) -> Tensor:
    """KL(p || q) float32 of target p [N, M] and shares q [N, M], a mean over rows; 0 for no rows.

    `reduction` "batchmean" is that; "mean" divides by M as well.
    """
    target, shares = target.float(), shares.float()
    divergence = torch.xlogy(target, target) - target * shares.clamp(min=1e-12).log()
    return divergence.sum() / max(1, len(target)) / (target.shape[1] if reduction == "mean" else 1)


def cluster_entropy(shares: Tensor) -> Tensor:
    """Of the clusters' sizes, each row of shares [N, M] in its greatest: 1 for equal sizes, 0 for one cluster alone."""
    sizes = torch.bincount(shares.argmax(dim=1), minlength=shares.shape[1]) / max(1, len(shares))
    return -torch.xlogy(sizes, sizes).sum() / math.log(shares.shape[1])


class MrHash(Method):
    """The hash network, the bridge from its hashes to latents, and the autoencoder with the centres of its latents."""

    name = "mrhash"
    learns_from = "images of one or two sources, without labels"
    paper = "Sun et al.: MrHash, IEEE TGRS 2022 (doi 10.1109/TGRS.2022.3231215)"
    Config = MrHashConfig
    # As published. What could choose without labels, the error of reconstruction, hardly moves after the beginning.
    selection_metric = None
    # Without labels, as all of the method.
    tuning_metric = "code_reconstructed_variance"
    needs_labels = False

    target: Tensor
    entropy: Tensor

    def __init__(self, config: MrHashConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        if config.num_clusters > num_rows:
            raise InputError(f"num_clusters is {config.num_clusters}: at most the {num_rows} training images")
        head = HeadSpec(config.bits, norm="standardise", hidden=config.hidden)
        spec = NetworkSpec(config.backbone, config.norm, config.pooling, head, channels=config.channels)
        self.network = HashNetwork(spec, config.weights, config.rgb)
        self.network.backbone.requires_grad_(config.fine_tune)
        self.bridge = nn.Linear(config.bits, config.num_latents, bias=False)
        num_sources = 1 + (config.sources == "both")
        width = self.network.head.num_features
        if config.feature_backbone is not None:
            # Its weights make features elsewhere; the exported model does without them.
            width = num_features(build_backbone(config.feature_backbone, "group"))
        self.autoencoder = Autoencoder(width, config.num_latents, num_sources)
        self.centres = nn.Parameter(torch.zeros(config.num_clusters, config.num_latents))
        self.register_buffer("target", torch.zeros(num_rows, config.num_clusters))
        self.register_buffer("entropy", torch.zeros(()))

    @property
    def trains_on_images(self) -> bool:
        """See `Method`."""
        return self.config.fine_tune

    @classmethod
    def tables_of(cls, config: MrHashConfig) -> dict[str, Table]:
        """See `Method`. "image" is of the hash network as it begins, which fine-tuning leaves as it is.

        "first" and "second" are the autoencoder's; without `feature_backbone` "image" serves as "first".
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
        """The autoencoder's tables, the first source's and, where there is one, the second's."""
        first = features["image" if self.config.feature_backbone is None else "first"]
        return [first, features["second"]] if self.config.sources == "both" else [first]

    def begin(self, training: Part) -> None:
        """See `Method`. Trains the autoencoder and finds the centres."""
        config, autoencoder = self.config, self.autoencoder
        sources = self._sources(training.features)
        assert isinstance(self.network.head.norm, Standardise)
        self.network.head.norm.fit(torch.from_numpy(training.features["image"]))
        if config.standardise:
            for norm, source in zip(autoencoder.norms, sources, strict=True):
                assert isinstance(norm, Standardise)
                norm.fit(torch.from_numpy(source))
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
        """See `Method`. The target of all rows, of the autoencoder and the centres as they are, by the first rank."""
        config, reconstructs = self.config, self.config.reconstruction_weight > 0
        # What no loss reaches: DDP waits for the gradient of all else.
        self.autoencoder.encoder.requires_grad_(reconstructs or config.latent_divergence)
        self.autoencoder.decoders.requires_grad_(reconstructs or config.code_reconstruction_weight > 0)
        target, entropy = torch.zeros_like(self.target), torch.zeros_like(self.entropy)
        if rank() == 0:
            latents = self.autoencoder.latents(self._sources(training.features)[0])
            shares = torch.cat(
                [soft_assignment(some, self.centres, config.alpha) for some in torch.split(latents, CHUNK_ROWS)]
            )
            target.copy_(target_distribution(shares, config.hard_targets))
            entropy.copy_(cluster_entropy(shares))
        if epoch == 0 or (config.target_epochs and epoch % config.target_epochs == 0):
            self.target.copy_(sum_over_ranks(target))
        self.entropy.copy_(sum_over_ranks(entropy))
        return float(config.lr_decay ** (epoch // config.lr_decay_epochs))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See `Method`. All but the balance of bits are means over this rank's rows."""
        config, autoencoder = self.config, self.autoencoder
        features = batch.features["image"] if batch.images is None else self.network.features(batch.images)
        hashes = self.network.head(self._dropped(features, batch.seed) if self.training else features)
        sources = autoencoder.standardise(self._sources(batch.features))
        target, bridged = self.target[batch.rows], self.bridge(hashes)

        def divergence(latents: Tensor) -> Tensor:
            shares = soft_assignment(latents, self.centres, config.alpha)
            return kl_divergence(target, shares, config.kl_reduction)

        losses = {"divergence": divergence(bridged)}
        loss = losses["divergence"]
        if config.latent_divergence or config.reconstruction_weight:
            latents = autoencoder.encoder(sources[0])
        if config.latent_divergence:
            losses["latent_divergence"] = divergence(latents)
            loss = loss + losses["latent_divergence"]
        if config.reconstruction_weight:
            losses["reconstruction"] = torch.stack(autoencoder.errors(latents, sources)).sum()
            loss = loss + config.reconstruction_weight * losses["reconstruction"]
        if config.code_reconstruction_weight:
            losses["code_reconstruction"] = torch.stack(autoencoder.errors(bridged, sources)).sum()
            loss = loss + config.code_reconstruction_weight * losses["code_reconstruction"]
        if config.quantisation_weight:
            losses["quantisation"] = quantisation_loss(hashes)
            loss = loss + config.quantisation_weight * losses["quantisation"]
        if config.bit_balance_weight:
            losses["bit_balance"] = bit_balance_loss(gather_with_gradient(hashes), centre=0.0)
            loss = loss + config.bit_balance_weight * losses["bit_balance"]
        return {"loss": loss, **losses, "cluster_entropy": self.entropy}

    def _dropped(self, features: Tensor, seed: int) -> Tensor:
        """Features [B, D] with some of them at the training part's mean and the others as much further from it."""
        norm = self.network.head.norm
        assert isinstance(norm, Standardise)
        rate, mean = self.config.dropout, norm.mean
        rows = len(features)
        # Drawn for all ranks' rows, of which these are a piece.
        drawn = torch.rand(world_size() * rows, features.shape[1], generator=torch.Generator().manual_seed(seed))
        kept = drawn[rank() * rows : (rank() + 1) * rows] >= rate
        return mean + (features - mean) * kept.to(features) / (1 - rate)

    def build_optimizer(self) -> Adam:
        """See `Method`."""
        config = self.config
        rest = [p for name, p in self.named_parameters() if not name.startswith("network.backbone.")]
        groups = [{"name": "rest", "params": rest, "lr": config.lr}]
        if config.fine_tune:
            backbone = list(self.network.backbone.parameters())
            groups.append({"name": "backbone", "params": backbone, "lr": config.lr * config.backbone_lr_factor})
        return Adam(groups)

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """See `Method`. The share of the sources' variance that latents, and codes, tell; the rest only with labels."""
        latents = self.autoencoder.latents(self._sources(validation.features)[0])
        metrics = {"reconstructed_variance": self._told(latents, validation)}
        if self.config.code_reconstruction_weight:
            signs = 2.0 * unpack(encode_part(encoder, validation), self.config.bits) - 1
            metrics["code_reconstructed_variance"] = self._told(
                self.bridge(torch.from_numpy(signs).to(latents)), validation
            )
        if all(gather_objects(bool(labelled(validation.labels).all()))):
            metrics |= super().validate(encoder, reference, validation)
        return metrics

    @torch.no_grad()
    def _told(self, latents: Tensor, part: Part) -> float:
        """How much of the variance of a part's sources, over all ranks, these latents tell: 1 is all of it."""
        sources = [torch.from_numpy(source).to(latents) for source in self._sources(part.features)]
        unexplained, total = 0.0, 0.0
        for source, decoder in zip(self.autoencoder.standardise(sources), self.autoencoder.decoders, strict=True):
            source = source.double()
            error = (decoder(latents).double() - source).square().sum()
            count = torch.full_like(error, len(source))
            sums = sum_over_ranks(torch.cat([source.sum(dim=0), torch.stack([source.square().sum(), error, count])]))
            unexplained += float(sums[-2])
            total += float(sums[-3] - sums[:-3].square().sum() / sums[-1])
        return 1 - unexplained / total if total else 0.0
