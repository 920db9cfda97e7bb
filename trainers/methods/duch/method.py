"""DUCH: deep unsupervised cross-modal contrastive hashing (Mikriukov, Ravanbakhsh, Demir, ICASSP 2022).

Images and sentences get codes that can be compared, from pairs alone: labels are only looked at to report validation
figures. Both backbones are frozen, and a small network follows each. Four losses on the hashes of an image, an altered
image, a caption and another wording of it: contrastive between images and captions and within each of them, adversarial
(a discriminator is to take images for captions), quantisation against the pair's common code, and bit balance.

What is done otherwise than in the authors' released code, whose losses and settings these are; `Code` is its value:

- the second text view is used (the code compares the first with itself) and the adversarial loss acts on images (in the
  code on captions, which the discriminator calls real already): `compat_txt_view` and `compat_adv_text_only` restore
  both. The backbone is in evaluation mode; in the code it normalises with the statistics of batches of some 500
  images, which is not here at all: an image would have no features of its own to make a code of;
- captions are taken as they are and only their own tokens are averaged; `text_normalise` and text_pooling=last4-padded
  are the code's. Of an image all is seen, not the middle alone (`original_view`);
- without rewording, the second text view is another one of the image's captions, of which the code uses one in all;
- losses are means, scaled to what the code's sums are for 256 pairs over two rows a pair, so the weights do not depend
  on the batch; Adam does not see the factor that is left. A ragged last batch is dropped;
- the contrastive loss masks a row's similarity to itself; the code subtracts it, which is right for temperature 1 only;
- bits are balanced over the batch, not the bits of each code over the code (`bb_axis`);
- features are standardised in each dimension with moments of the plain training images or captions, kept with the model
  (`standardisation`; the code takes one pair of numbers over all splits);
- the discriminator has no batch norm, with which a gradient penalty is not one of single points (`batch_norm_critic`);
- both views of a modality share their batch norm statistics, as they do when a code is made;
- the learning rate falls after epoch 50 only; the code lets it fall after the first epoch as well;
- the temperature is 0.3 (on UC Merced, 64 bits, 60 epochs, validation `ap_first_k@20` of images to captions and back:
  0.883 and 0.966 with the code's 1, 0.939 and 0.990 with 0.3).

Beyond the paper: contrast across modalities only, a learned temperature, all captions of an image, and pairs whose
captions say nearly the same are no negatives. `recipes/duch_plus.yaml` takes the last two (0.947 and 0.991
with the same split; one split and one seed each).
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
from orbithash.encoders.networks.card import HeadSpec, NetworkSpec
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork, Standardise
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.text import TextEncoder
from orbithash.trainers.config import TrainConfig
from orbithash.trainers.data.loading import Part
from orbithash.trainers.data.views import view_rng
from orbithash.trainers.distributed import gather_rows, gather_with_gradient, sum_over_ranks, world_size
from orbithash.trainers.features.features import Table
from orbithash.trainers.methods.base import Batch, Method
from orbithash.trainers.methods.duch.config import MAX_TEMPERATURE, MIN_TEMPERATURE, DuchConfig
from orbithash.trainers.methods.duch.losses import (
    Discriminator,
    balance_loss,
    consensus_loss,
    consensus_of,
    discriminator_loss,
    fooling_loss,
)
from orbithash.trainers.methods.losses import at_least_float32, nt_xent
from orbithash.trainers.metrics.average_precision import average_precision
from orbithash.trainers.metrics.metrics import rank_histograms
from orbithash.trainers.metrics.retrieval import Retrieval, labelled

__all__ = ["Duch"]


class Duch(Method):
    """A head on the features of images and one on those of captions, and the discriminator between their hashes."""

    name = "duch"
    learns_from = "pairs of images and captions"
    paper = "Mikriukov, Ravanbakhsh, Demir: DUCH, ICASSP 2022 (arXiv 2204.08707)"
    Config = DuchConfig
    # As published. Validation figures need labels, which the method has no other use for.
    selection_metric: ClassVar[str | None] = None
    tuning_metric = "t2i_ap_first_k@20"
    needs_labels = False

    text_head: HashHead
    consensus: Tensor

    def __init__(self, config: DuchConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config = config
        self._text_encoders: dict[str, TextEncoder] = {}
        head = HeadSpec(config.bits, norm="standardise", hidden=(config.hidden,), batch_norm=True)
        spec = NetworkSpec(config.backbone, config.norm, config.pooling, head, channels=config.channels)
        self.network = HashNetwork(spec, config.weights, config.rgb)
        self.network.backbone.requires_grad_(False)
        self.text_head = HashHead(self.text_encoder().num_features, head)
        self.discriminator = None
        if config.adversarial_weight:
            # Only its own step trains it, and DDP takes no notice of it.
            self.discriminator = Discriminator(config.bits, config.batch_norm_critic).requires_grad_(False)
        self.log_temperature = None
        if config.learn_temperature:
            self.log_temperature = nn.Parameter(torch.tensor(float(np.log(config.temperature))))
        draw = torch.Generator().manual_seed(config.seed)
        signs = torch.randint(0, 2, (num_rows, config.bits), generator=draw, dtype=torch.int8) * 2 - 1
        self.register_buffer("consensus", signs)
        # Of each training row: which caption is its first text view and which its second. Drawn in `start_epoch`.
        self._chosen = torch.zeros(num_rows, 2, dtype=torch.int64)

    @property
    def trains_on_images(self) -> bool:
        """See `Method`."""
        return False

    @classmethod
    def tables_of(cls, config: DuchConfig) -> dict[str, Table]:
        """See `Method`. "text" and "text_augmented" hold all captions of an image, [N, C, D]."""
        tables = {
            "image": Table("image"),
            # Views crop by themselves.
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
        """See `Method`. It is read once."""
        if self.config.text_encoder is None:
            raise InputError(
                "text_encoder is not set: DUCH reads captions with a Hugging Face text model; give its name or folder"
            )
        if device not in self._text_encoders:
            self._text_encoders[device] = TextEncoder(
                self.config.text_encoder, self.config.text_pooling, device, normalise=self.config.text_normalise
            )
        return self._text_encoders[device]

    def build_optimizer(self) -> Adam:
        """See `Method`. A step moves only what has a gradient: the discriminator, or all the rest."""
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
        """See `Method`. Sets the moments that features are standardised with."""
        for head, name in ((self.network.head, "image"), (self.text_head, "text")):
            features = torch.from_numpy(training.features[name]).flatten(0, -2)
            assert isinstance(head.norm, Standardise)
            head.norm.fit(features, per_dimension=self.config.standardisation == "per-dimension")

    def start_epoch(self, epoch: int, training: Part) -> float:
        """See `Method`. Draws the captions of each pair, two different ones where it has two."""
        config = self.config
        num_captions = training.features["text"].shape[1]
        rng = np.random.default_rng([config.seed, epoch] if config.captions == "random" else config.seed)
        first = rng.integers(num_captions, size=len(training.ids))
        step = rng.integers(1, max(2, num_captions), size=len(training.ids))
        second = first if config.text_augmentation != "none" else (first + step) % num_captions
        self._chosen = torch.from_numpy(np.stack([first, second], axis=1))
        return float(config.lr_decay ** (epoch // config.lr_decay_epochs))

    def before_step(self, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
        """See `Method`. The discriminator's step."""
        discriminator, config = self.discriminator, self.config
        if discriminator is None:
            return {}
        with torch.no_grad(), _statistics_kept(self.network.head), _statistics_kept(self.text_head):
            images, *texts = self._hashes(batch)
        draw = torch.Generator().manual_seed(batch.seed)
        optimizer.zero_grad(set_to_none=True)
        discriminator.requires_grad_(True)
        parameters = list(discriminator.parameters())
        loss = images.new_zeros(())
        for view, text in enumerate(texts):
            text = text.flatten(0, 1)
            image = images[:, view].repeat_interleave(len(text) // max(1, len(images)), dim=0)
            shares = torch.rand(text.shape, generator=draw, dtype=torch.float64).to(at_least_float32(text))
            loss = loss + discriminator_loss(discriminator, text, image, shares, config.gradient_penalty)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.grad = sum_over_ranks(gradient) / world_size()
        discriminator.requires_grad_(False)
        optimizer.step()
        return {"discriminator": loss.detach()}

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """See `Method`. No loss is a mean over pairs alone, so every rank computes all on all ranks' hashes."""
        config = self.config
        images, texts, others = self._hashes(batch)
        rows = gather_with_gradient(batch.rows)
        contrastive = self._contrastive(images, texts, others, self._near(batch))
        # An image's captions, each once: with all of them the second views are the first in another order.
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
            # A row comes once an epoch: what is written here is read in the next one.
            self.consensus[rows] = consensus_of(images, torch.cat([texts, others], dim=1))
        if self.log_temperature is not None:
            losses["temperature"] = self.log_temperature.detach().exp()
        return {"loss": loss, **losses}

    def _hashes(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Hashes of all ranks' pairs: of both image views [N, 2, K], and of T first and T second text views [N, T, K].

        T is 1, or the number of captions when all are taken; then each caption's second view is the next caption,
        unless captions are reworded.
        """
        config, features = self.config, batch.features
        images = _hash_views(self.network.head, torch.stack([features["image"], features["image_augmented"]], dim=1))
        first = features["text"]
        second = features.get("text_augmented", first)
        if config.captions != "all":
            pairs = torch.arange(len(first), device=first.device)
            chosen = self._chosen.to(first.device)[batch.rows]
            first, second = first[pairs, chosen[:, 0]][:, None], second[pairs, chosen[:, 1]][:, None]
        elif config.text_augmentation == "none":
            hashes = gather_with_gradient(_hash_views(self.text_head, first))
            return gather_with_gradient(images), hashes, hashes if config.compat_txt_view else hashes.roll(-1, 1)
        if config.compat_txt_view:
            second = first
        texts = _hash_views(self.text_head, torch.cat([first, second], dim=1))
        one, other = gather_with_gradient(texts).chunk(2, dim=1)
        return gather_with_gradient(images), one, other

    def _contrastive(self, images: Tensor, texts: Tensor, others: Tensor, near: Tensor | None) -> Tensor:
        """The weighted contrastive losses, a mean over the text views."""
        config = self.config

        def contrast(one: Tensor, other: Tensor) -> Tensor:
            return nt_xent(one, other, self._temperature(), config.contrast == "cross-only", near, config.near_as)

        num_texts = texts.shape[1]
        between = torch.stack([contrast(images[:, 0], texts[:, t]) for t in range(num_texts)]).mean()
        of_texts = torch.stack([contrast(texts[:, t], others[:, t]) for t in range(num_texts)]).mean()
        of_images = contrast(images[:, 0], images[:, 1])
        return config.inter_weight * between + config.image_weight * of_images + config.text_weight * of_texts

    def _temperature(self) -> Tensor | float:
        if self.log_temperature is None:
            return self.config.temperature
        return self.log_temperature.exp().clamp(MIN_TEMPERATURE, MAX_TEMPERATURE)

    def _near(self, batch: Batch) -> Tensor | None:
        """Which of all ranks' pairs have nearly the same captions, bool [N, N]."""
        if self.config.near_as == "negatives":
            return None
        captions = F.normalize(self.text_head.norm(batch.features["text"]), dim=2).mean(dim=1)
        captions = gather_with_gradient(F.normalize(captions, dim=1))
        return captions @ captions.T >= self.config.near_cosine

    def validate(self, encoder: HashModel, reference: Part, validation: Part) -> dict[str, float]:
        """See `Method`. Expected `ap_first_k@20` and `ap_min@20` of validation queries in the training part.

        From images to captions (i2t) and back (t2i), with one caption an image; nothing where no query has a label.
        """
        codes, labels = [], []
        for part in (validation, reference):
            captions = part.features["text"]
            seed = self.config.seed
            chosen = [int(view_rng(seed, name).integers(captions.shape[1])) for name in part.ids]
            of_images = encoder.encode_features(part.features["image"])
            of_texts = encoder.encode_text_features(captions[np.arange(len(chosen)), chosen])
            codes.append((gather_rows(of_images), gather_rows(of_texts)))
            labels.append(gather_rows(part.labels))
        known = labelled(labels[0])
        if not known.any():
            return {}
        metrics = {}
        for name, query, database in (("i2t", 0, 1), ("t2i", 1, 0)):
            histograms = rank_histograms(
                Retrieval(codes[0][query][known], codes[1][database], labels[0][known], labels[1], encoder.bits)
            )
            for definition in ("ap_first_k", "ap_min"):
                metrics[f"{name}_{definition}@20"] = float(average_precision(histograms, 20, definition).mean())
        return metrics


def _hash_views(head: HashHead, features: Tensor) -> Tensor:
    """Hashes [B, V, K] of features [B, V, D]."""
    hashes: Tensor = head(features.flatten(0, 1))
    return hashes.reshape(*features.shape[:2], hashes.shape[1])


@contextlib.contextmanager
def _statistics_kept(module: nn.Module) -> Iterator[None]:
    """Batch norm as in training, but its running statistics stay as they are."""
    layers: list[Any] = [layer for layer in module.modules() if hasattr(layer, "running_mean")]
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.momentum = 0.0
    try:
        yield
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
