"""DUCH: deep unsupervised cross-modal contrastive hashing (Mikriukov, Ravanbakhsh, Demir, ICASSP 2022).

Images and sentences get comparable codes, learned from pairs alone; labels are used only to report validation metrics.
Both backbones are frozen, and a small network follows each. There are four losses on the hashes of an image, an
augmented image, a caption and another wording of it: contrastive (between images and captions, and within each of
them), adversarial (a discriminator shall take images for captions), quantisation against the pair's common code, and
bit balance.

Losses and settings are those of the authors' released code, with these deviations:

- The second text view is used (the code compares the first with itself), and the adversarial loss acts on images (in
  the code: on captions, the discriminator's real class). `compat_txt_view` and `compat_adv_text_only` restore the code.
- The backbone is in evaluation mode. In the code, it normalises with the statistics of batches of about 500 images, so
  that an image has no features of its own; there is no setting for that.
- Captions are not normalised, and only their own tokens are averaged (`text_normalise` and text_pooling=last4-padded
  restore the code). The whole image is used, not only its middle (`original_view`).
- Without rewording, the second text view is another caption of the image; the code uses one caption in total.
- Losses are means, scaled to the code's sums over 256 pairs with two rows each, so that the weights do not depend on
  the batch size. The remaining constant factor has no effect under Adam. An incomplete last batch is dropped.
- The contrastive loss masks the similarity of a row to itself. The code subtracts it, which is correct only for
  temperature 1.
- Each bit is balanced over the batch, not the bits of each code (`bb_axis`).
- Features are standardised per dimension, with moments of the training part without augmentation, stored with the model
  (`standardisation`; the code uses one mean and one deviation over all splits).
- The discriminator has no batch norm, because then the gradient penalty would not be one of single points
  (`batch_norm_critic`).
- Both views of a modality share their batch norm statistics, as in encoding.
- The learning rate falls after epoch 50 only; in the code also after the first epoch.
- The temperature is 0.3 (on UC Merced, 64 bits, 60 epochs, validation `ap_first_k@20` of images to captions and back:
  0.883 and 0.966 with the code's 1, 0.939 and 0.990 with 0.3).

Extensions: the towers of a dual encoder in place of two separate networks, contrast across modalities only, a learned
temperature, all captions of an image, and pairs with nearly the same captions excluded from the negatives. The recipe
`duch-plus` uses the last two (0.947 and 0.991 with the same split; one split and one seed each).
"""

import contextlib
from collections.abc import Iterator
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Adam

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashHead, Standardise
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text import TextEncoder
from orbithash.encoders.networks.text_towers import text_tower
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.distributed import sum_over_ranks, world_size
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method, mean_scores
from orbithash.trainers.methods.duch.config import MAX_TEMPERATURE, MIN_TEMPERATURE, DuchConfig, is_dual_encoder
from orbithash.trainers.methods.duch.losses import (
    Discriminator,
    balance_loss,
    consensus_loss,
    consensus_of,
    discriminator_loss,
    fooling_loss,
)
from orbithash.trainers.methods.losses import at_least_float32, nt_xent
from orbithash.trainers.metrics.average_precision import Definition

__all__ = ["Duch"]


class Duch(Method):
    """A head on the features of images and one on those of captions, and the discriminator between their hashes."""

    name = "duch"
    learns_from = "pairs of images and captions"
    paper = "Mikriukov, Ravanbakhsh, Demir: DUCH, ICASSP 2022 (arXiv 2204.08707)"
    Config = DuchConfig
    # The last epoch, as published: validation metrics need labels, which the method does not require.
    selection_metric: ClassVar[str | None] = None
    tuning_metric = "t2i_ap_first_k@20"
    supervision = "none"
    draws_for_whole_steps = True

    text_head: HashHead
    consensus: Tensor

    def __init__(self, config: DuchConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        self._text_encoders: dict[str, TextEncoder] = {}
        head = HeadSpec(config.bits, norm="standardise", hidden=(config.hidden,), batch_norm=True)
        self.network = config.build_network(head)
        self.network.backbone.requires_grad_(False)
        self.text_head = HashHead(self.text_encoder().num_features, head)
        self.discriminator = None
        if config.adversarial_weight:
            # Trained in `before_step` only, and frozen otherwise, so that DDP ignores it.
            self.discriminator = Discriminator(config.bits, config.batch_norm_critic).requires_grad_(False)
        self.log_temperature = None
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(float(np.log(config.temperature))))
        draw = torch.Generator().manual_seed(config.seed)
        signs = torch.randint(0, 2, (num_rows, config.bits), generator=draw, dtype=torch.int8) * 2 - 1
        self.register_buffer("consensus", signs)
        # For each training row, the indices of the captions of its two text views; drawn in `start_epoch`.
        self._chosen = torch.zeros(num_rows, 2, dtype=torch.int64)

    @property
    def trains_on_images(self) -> bool:
        """False: batches have features, see `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: DuchConfig) -> dict[str, Table]:
        """Return the feature tables, see `Method`. "text" and "text_augmented" have all captions, [N, C, D]."""
        tables = {
            "image": Table("image"),
            # The whole image, because the augmentation itself crops.
            "image_augmented": Table(
                "image",
                augmentation=config.image_augmentation,
                training_only=True,
                preprocessing=TrainConfig.preprocessing(config),
            ),
            "text": Table("caption"),
        }
        if config.text_augmentation != "none":
            tables["text_augmented"] = Table(
                "caption",
                augmentation=config.text_augmentation,
                training_only=True,
                translators=config.translators,
                glove=config.glove,
            )
        return tables

    def text_encoder(self, device: str = "cpu") -> TextEncoder:
        """Return the text encoder, see `Method`; it is loaded once per device."""
        if device not in self._text_encoders:
            self._text_encoders[device] = self._load_text_encoder(device)
        return self._text_encoders[device]

    def _load_text_encoder(self, device: str) -> TextEncoder:
        config = self.config
        if config.text_encoder is not None and not is_dual_encoder(config.text_encoder):
            return TextEncoder(config.text_encoder, config.text_pooling, device, normalise=config.text_normalise)
        if config.text_pooling != "mean" or config.text_normalise:
            raise InputError(
                f"text_pooling={config.text_pooling} and text_normalise={config.text_normalise} are settings of a text "
                "model; the text tower of a dual encoder has its own: leave them out"
            )
        # Random weights must be the same at every call.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            if config.text_encoder is not None:
                return text_tower(config.text_encoder, None, device)
            try:
                return text_tower(config.backbone, config.weights, device)
            except InputError as error:
                raise InputError(
                    f"text_encoder is not set, and {error}; or set text_encoder to the name or folder of a text model"
                ) from error

    @property
    def has_joint_features(self) -> bool:
        """True for both towers of one dual encoder, see `Method`."""
        return self.config.text_encoder is None

    def build_optimizer(self) -> Adam:
        """Return one optimizer over all parameters, see `Method`.

        A step updates only parameters with a gradient: the discriminator's, or all others.
        """
        config = self.config
        heads = [*self.network.head.parameters(), *self.text_head.parameters()]
        groups: list[dict[str, Any]] = [{"params": heads, "lr": config.lr, "weight_decay": config.weight_decay}]
        if self.log_temperature is not None:
            groups.append({"params": [self.log_temperature], "lr": config.temperature_lr})
        if self.discriminator is not None:
            groups.append(
                {
                    "params": list(self.discriminator.parameters()),
                    "lr": config.critic_lr,
                    "betas": (0.5, 0.9),
                    "weight_decay": config.critic_weight_decay,
                }
            )
        return Adam(groups)

    def begin(self, training: Part) -> None:
        """Fit the standardisation of features, see `Method`."""
        for head, name in ((self.network.head, "image"), (self.text_head, "text")):
            features = torch.from_numpy(np.asarray(training.features[name])).flatten(0, -2)
            assert isinstance(head.norm, Standardise)
            head.norm.fit(features, per_dimension=self.config.standardisation == "per-dimension")

    def start_epoch(self, epoch: int, training: Part) -> float:
        """Draw two captions of each pair, different ones if there are two, see `Method`."""
        config = self.config
        num_captions = training.features["text"].shape[1]
        rng = np.random.default_rng([config.seed, epoch] if config.captions == "random" else config.seed)
        first = rng.integers(num_captions, size=len(training.ids))
        step = rng.integers(1, max(2, num_captions), size=len(training.ids))
        second = first if config.text_augmentation != "none" else (first + step) % num_captions
        self._chosen = torch.from_numpy(np.stack([first, second], axis=1)).to(self.consensus.device)
        return float(config.lr_decay ** (epoch // config.lr_decay_epochs))

    def draw(self, batch: Batch, rows: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return the "shares" of `discriminator_loss`, float64 [2, N, T, K] for both text views, see `Method`."""
        if self.discriminator is None:
            return {}
        draw = torch.Generator().manual_seed(batch.seed)
        num_texts = batch.features["text"].shape[1] if self.config.captions == "all" else 1
        shape = (batch.num_rows, num_texts, self.config.bits)
        # Drawn for each pair in the order of the batch, whatever the order of the ranks.
        drawn = [torch.rand(shape, generator=draw, dtype=torch.float64) for _ in range(2)]
        return {"shares": torch.stack(drawn)[:, batch.gathered_positions]}

    def before_step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """Train the discriminator for one step, see `Method`."""
        discriminator, config = self.discriminator, self.config
        if discriminator is None:
            return {}
        with torch.no_grad(), _statistics_kept(self.network.head), _statistics_kept(self.text_head):
            images, *texts = self._hashes(batch)
        optimizer.zero_grad(set_to_none=True)
        discriminator.requires_grad_(True)
        parameters = list(discriminator.parameters())
        loss = images.new_zeros(())
        for view, text in enumerate(texts):
            text = text.flatten(0, 1)
            image = images[:, view].repeat_interleave(len(text) // max(1, len(images)), dim=0)
            shares = batch.draws["shares"][view].flatten(0, 1).to(at_least_float32(text))
            loss = loss + discriminator_loss(discriminator, text, image, shares, config.gradient_penalty)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = sum_over_ranks(gradient) / world_size()
        discriminator.requires_grad_(False)
        optimizer.step()
        return {"discriminator": loss.detach()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`.

        No loss is a plain mean over pairs, so every rank computes all losses on all ranks' hashes.
        """
        config = self.config
        images, texts, others = self._hashes(batch)
        rows = batch.gather(batch.rows)
        contrastive = self._contrastive(images, texts, others, self._near(batch))
        # Each caption once: with captions=all, the second views are the first ones in another order.
        second = others if config.captions != "all" or config.text_augmentation != "none" else others[:, :0]
        views = torch.cat([images, texts, second], dim=1)
        quantisation = consensus_loss(views, self.consensus[rows])
        balance = balance_loss(views, config.bb_axis)
        losses = {"contrastive": contrastive, "quantisation": quantisation, "balance": balance}
        loss = contrastive + 2 * config.quantisation_weight * config.bits * quantisation
        loss = loss + 2 * config.balance_weight * balance
        if self.discriminator is not None:
            fakes = torch.cat([texts, others], dim=1) if config.compat_adv_text_only else images
            losses["adversarial"] = fooling_loss(self.discriminator, fakes.flatten(0, 1))
            loss = loss + config.adversarial_weight * losses["adversarial"]
        with torch.no_grad():
            # Each row occurs once per epoch, so this is read in the next epoch.
            self.consensus[rows] = consensus_of(images, torch.cat([texts, others], dim=1))
        if self.log_temperature is not None:
            losses["temperature"] = self.log_temperature.detach().exp()
        return {"loss": loss, **losses}

    def _hashes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Return hashes of all ranks' pairs: of both image views [N, 2, K], of first and second text views [N, T, K].

        T is 1, or the number of captions with captions=all. Then the second view of a caption is the next caption,
        unless captions are reworded.
        """
        config, features = self.config, batch.features
        images = _hash_views(self.network.head, torch.stack([features["image"], features["image_augmented"]], dim=1))
        first = features["text"]
        second = features.get("text_augmented", first)
        if config.captions != "all":
            pairs = torch.arange(len(first), device=first.device)
            chosen = self._chosen[batch.rows]
            first, second = first[pairs, chosen[:, 0]][:, None], second[pairs, chosen[:, 1]][:, None]
        elif config.text_augmentation == "none":
            hashes = batch.gather(_hash_views(self.text_head, first))
            return batch.gather(images), hashes, hashes if config.compat_txt_view else hashes.roll(-1, 1)
        if config.compat_txt_view:
            second = first
        texts = _hash_views(self.text_head, torch.cat([first, second], dim=1))
        one, other = batch.gather(texts).chunk(2, dim=1)
        return batch.gather(images), one, other

    def _contrastive(self, images: Tensor, texts: Tensor, others: Tensor, near: Tensor | None) -> Tensor:
        """Return the weighted sum of the contrastive losses, means over the text views."""
        config = self.config

        def contrast(one: Tensor, other: Tensor) -> Tensor:
            return nt_xent(one, other, self._temperature(), config.contrast == "cross-only", near, config.near_as)

        num_texts = texts.shape[1]
        inter = torch.stack([contrast(images[:, 0], texts[:, t]) for t in range(num_texts)]).mean()
        within_texts = torch.stack([contrast(texts[:, t], others[:, t]) for t in range(num_texts)]).mean()
        within_images = contrast(images[:, 0], images[:, 1])
        return config.inter_weight * inter + config.image_weight * within_images + config.text_weight * within_texts

    def _temperature(self) -> Tensor | float:
        if self.log_temperature is None:
            return self.config.temperature
        return self.log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def _near(self, batch: Batch) -> Tensor | None:
        """Return which of all ranks' pairs have nearly the same captions, bool [N, N]; None if it does not matter."""
        if self.config.near_as == "negatives":
            return None
        captions = F.normalize(self.text_head.norm(batch.features["text"]), dim=2).mean(dim=1)
        captions = batch.gather(F.normalize(captions, dim=1))
        return captions @ captions.T >= self.config.near_cosine

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """See `Method`. Expected `ap_first_k@20` and `ap_min@20` of validation queries in the training part.

        From images to captions (i2t) and back (t2i), with one caption an image; nothing where no query has a label.
        """
        codes = []
        for part in (validation, reference):
            captions = part.features["text"]
            of_images = encoder.encode_features(part.features["image"])
            of_texts = encoder.encode_text_features(captions[np.arange(len(captions)), part.drawn_captions])
            codes.append((of_images, of_texts))
        definitions: tuple[Definition, ...] = ("ap_first_k", "ap_min")
        metrics: dict[str, float] = {}
        for name, query, database in (("i2t", 0, 1), ("t2i", 1, 0)):
            found = mean_scores(
                codes[0][query], codes[1][database], validation.labels, reference.labels, encoder.bits, definitions
            )
            if found is None:
                return {}
            metrics |= {f"{name}_{definition}@20": mean for definition, mean in zip(definitions, found, strict=True)}
        return metrics


def _hash_views(head: HashHead, features: Tensor) -> Tensor:
    """Return hashes [B, V, K] of features [B, V, D]."""
    hashes: Tensor = head(features.flatten(0, 1))
    return hashes.reshape(*features.shape[:2], hashes.shape[1])


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Keep the running statistics of batch norm unchanged; it still normalises with those of the batch."""
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "running_mean")]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
