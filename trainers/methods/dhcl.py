"""DHCL: deep hashing assisted by classification labels (Liu, Liu, Shan, Zhou, Remote Sensing 14(24):6358, 2022).

One network hashes and classifies: the classifier reads the hash layer, and the bits of the predicted label can be
appended to the hash bits. There are three losses: a self-paced proxy loss on the cosines between hashes and one learned
proxy per class, cross-entropy, and quantisation.

The authors' released code does not run, and its proxy loss has the wrong sign; the formulas in the paper's body were
not available. This module implements their architecture with the proxy loss in the form of circle loss (Sun et al.,
CVPR 2020), summed over proxies as in Proxy-Anchor (Kim et al., CVPR 2020). Deviations from the released code:

- The default has no label bits, for which the method is named (label_code=binary restores them).
- The exponent of positives has a negative sign, so that images are pulled towards their own proxy. The self-paced
  weights are clamped at 0 and have no gradient. The scale is a setting (the code omits it).
- The cross-entropy is computed from the logits, the quantisation loss from the hashes (not so in the code).
- The hashes are tanh outputs without L2 normalisation. The proxies are always trained.
- The classifier also trains during the warm-up. The best epoch is chosen on held-back training images, never on the
  test part.
- The cross-entropy has label smoothing.
- The learning rates follow a cosine, and the head's are larger. The code has lr=1e-4 head_lr_factor=1
  proxy_lr_factor=100 schedule=step lr_decay=0.5 lr_decay_epochs=10.

Images with several classes (our generalisation; the paper has one class per image): in both proxy losses, an image is
pulled to the proxies of all of its classes and pushed from the others. The cross-entropy becomes the binary
cross-entropy, a mean over images and classes. There are no label bits, because no class alone is the predicted one.

Extension: with `nested_bits` the losses are averaged over prefixes of the code, as in nested (Matryoshka)
representations, so that one training gives codes of several lengths.
"""

from typing import Annotated, Literal, Self

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.optim import Optimizer

from orbithash.encoders.codes import MAX_BITS, MIN_BITS
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.label_codes import label_table
from orbithash.trainers.methods.base import Batch
from orbithash.trainers.methods.fine_tuning import FineTuned, FineTuningConfig
from orbithash.trainers.methods.losses import class_matrix, classification_loss, quantisation_loss
from orbithash.trainers.metrics.retrieval import Labels
from orbithash.trainers.search_space import Choice, Linear, Log

__all__ = ["Dhcl", "DhclConfig", "circle_proxy_loss", "proxy_anchor_loss"]


class DhclConfig(FineTuningConfig):
    """Settings of DHCL. "code: X" in a description is the value in the authors' released code if it differs."""

    pooling: Annotated[Literal["avg", "max", "avg+max"], Choice(("avg", "max", "avg+max"))] = Field(
        "avg+max", description="pooling of the last feature map"
    )
    proxy_loss: Annotated[Literal["circle", "proxy-anchor"], Choice(("circle", "proxy-anchor"))] = Field(
        "circle", description="form of the proxy loss"
    )
    margin: Annotated[float, Linear(0.1, 0.4)] = Field(
        0.25, gt=0, lt=1, description="margin m of the circle form; the anchor form has delta 0.1 instead"
    )
    scale: Annotated[float, Log(8, 64)] = Field(
        32.0, gt=0, le=256, description="factor g on cosines; code: 1, by oversight"
    )
    classification_weight: Annotated[float, Log(0.1, 10)] = Field(1.0, ge=0, description="weight of the cross-entropy")
    label_smoothing: Annotated[float, Linear(0, 0.2)] = Field(
        0.1, ge=0, lt=1, description="label smoothing of the cross-entropy; code: 0"
    )
    quantisation_weight: Annotated[float, Log(1e-3, 10)] = Field(
        1.0, ge=0, description="weight of the mean squared distance of a hash to its sign"
    )
    proxy_lr_factor: Annotated[float, Log(1, 1000)] = Field(
        50.0, gt=0, le=1000, description="factor on lr for the proxies; code: 100"
    )
    nested_bits: tuple[int, ...] = Field(
        (), description="shorter lengths whose prefix of the code is trained as a code of its own"
    )
    label_code: Literal["none", "binary", "gray", "one-hot", "error-correcting"] = Field(
        "none", description="code of the label bits appended to the hash bits; code: binary"
    )
    label_weight: int = Field(1, ge=1, le=16, description="number of repetitions of the label bits")
    count_label_bits: bool = Field(False, description="whether `bits` includes the label bits")

    @model_validator(mode="after")
    def _check_nested(self) -> Self:
        if self.nested_bits and self.label_code != "none":
            raise ValueError(
                f"nested_bits with label_code={self.label_code}: a prefix of the code would lack the label bits at its "
                "end; set one of the two"
            )
        if any(not MIN_BITS <= bits < self.bits for bits in self.nested_bits):
            raise ValueError(f"nested_bits {list(self.nested_bits)}: {MIN_BITS} to {self.bits - 1} are allowed")
        return self

    def hash_bits(self, num_classes: int) -> int:
        """Return the number of outputs of the hash layer: `bits`, less the label bits if `count_label_bits`.

        Raises:
            InputError: too few hash bits are left, or the code is too long.
        """
        label_bits = self.label_weight * label_table(self.label_code, num_classes).shape[1]
        hash_bits = self.bits - label_bits if self.count_label_bits else self.bits
        total = hash_bits + label_bits
        if hash_bits < MIN_BITS or total > MAX_BITS:
            raise InputError(
                f"bits={self.bits} with {label_bits} label bits leaves {hash_bits} hash bits in a code of {total}; "
                f"at least {MIN_BITS} hash bits and at most {MAX_BITS} bits in total are allowed"
            )
        return hash_bits


def _cosines(hashes: Tensor, proxies: Tensor) -> Tensor:
    """Return the cosines of hashes [N, K] and proxies [C, K]; in float32 [N, C], the range that exponentials need."""
    return F.normalize(hashes.float(), dim=1, eps=1e-6) @ F.normalize(proxies.float(), dim=1, eps=1e-6).T


def _pull_and_push(positive: Tensor, negative: Tensor, is_own: Tensor) -> Tensor:
    """Return the pull of own images plus the push of the others, each a mean over classes of log(1 + sum of exp(.)).

    The sums run over images. The pull is averaged over the classes in the batch, the push over all classes. The
    exponents and `is_own` (image n is of class c) are [N, C].
    """
    lowest = torch.finfo(positive.dtype).min

    def log_one_plus_sum(exponents: Tensor, mask: Tensor) -> Tensor:
        rows = torch.cat([exponents.new_zeros(1, exponents.shape[1]), exponents.masked_fill(~mask, lowest)])
        return torch.logsumexp(rows, dim=0)

    num_present = is_own.any(dim=0).sum().clamp(min=1)
    pull = log_one_plus_sum(positive, is_own).sum() / num_present
    return pull + log_one_plus_sum(negative, ~is_own).mean()


def circle_proxy_loss(hashes: Tensor, labels: Tensor, proxies: Tensor, margin: float, scale: float) -> Tensor:
    """Return the self-paced proxy loss of hashes [N, K], labels and proxies [C, K], a float32 scalar.

    Labels are int64 [N], or bool [N, C] for images with several classes, hence several own proxies. With cosines s:
    pull exp(-scale * a+ * (s - (1 - margin))), push exp(scale * a- * (s - margin)). The paces
    a+ = max(0, 1 + margin - s) and a- = max(0, s + margin) have no gradient. The loss is 0 for an empty batch.
    """
    cosines = _cosines(hashes, proxies)
    pull_pace = (1 + margin - cosines).clamp(min=0).detach()
    push_pace = (cosines + margin).clamp(min=0).detach()
    is_own = class_matrix(labels, len(proxies))
    return _pull_and_push(-scale * pull_pace * (cosines - (1 - margin)), scale * push_pace * (cosines - margin), is_own)


def proxy_anchor_loss(
    hashes: Tensor, labels: Tensor, proxies: Tensor, delta: float = 0.1, scale: float = 32.0
) -> Tensor:
    """Return the Proxy-Anchor loss (Kim et al., CVPR 2020, eq. 4); arguments as in `circle_proxy_loss`."""
    cosines = _cosines(hashes, proxies)
    is_own = class_matrix(labels, len(proxies))
    return _pull_and_push(-scale * (cosines - delta), scale * (cosines + delta), is_own)


class Dhcl(FineTuned):
    """The hash network with its classifier, and one proxy per class."""

    name = "dhcl"
    learns_from = "class labels, one or several per image"
    paper = "Liu, Liu, Shan, Zhou: DHCL, Remote Sensing 14(24):6358, 2022"
    Config = DhclConfig
    supervision = "classes"

    def __init__(self, config: DhclConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config: DhclConfig = config
        head = HeadSpec(config.hash_bits(num_classes))
        self.network = self.build_network(head, num_classes)
        self.proxies = nn.Parameter(torch.empty(num_classes, head.bits))
        nn.init.kaiming_normal_(self.proxies, mode="fan_out")

    @property
    def label_code(self) -> tuple[str, int]:
        """Kind and weight of the label bits, see `Method`."""
        return self.config.label_code, self.config.label_weight

    @property
    def nested_bits(self) -> tuple[int, ...]:
        """Shorter code lengths, see `Method`."""
        return self.config.nested_bits

    def order(self, labels: Labels, epoch: int) -> npt.NDArray[np.int64]:
        """Return the epoch's batches, see `Method`; `InputError` for label bits of images with several classes."""
        if labels.ndim == 2 and self.config.label_code != "none":
            raise InputError(
                f"label_code={self.config.label_code} appends the predicted class, but some images have several "
                "classes; set label_code=none"
            )
        return super().order(labels, epoch)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`.

        The proxy loss is not a mean over images, so every rank computes it on all ranks' hashes.
        """
        config = self.config
        hashes, _ = self.outputs(batch)
        labels = batch.gather(batch.labels)
        gathered = batch.gather(hashes)
        lengths = (*config.nested_bits, self.network.spec.bits)
        proxy = torch.stack([self._proxy_loss(gathered[:, :k], labels, self.proxies[:, :k]) for k in lengths]).mean()
        classifications = torch.stack([self._classification(hashes[:, :k], batch.labels) for k in lengths])
        classification = batch.weight * classifications.mean()
        quantisation = batch.weight * quantisation_loss(hashes)
        return {
            "loss": proxy + config.classification_weight * classification + config.quantisation_weight * quantisation,
            "proxy": proxy,
            "classification": classification,
            "quantisation": quantisation,
        }

    def _proxy_loss(self, hashes: Tensor, labels: Tensor, proxies: Tensor) -> Tensor:
        config = self.config
        if config.proxy_loss == "circle":
            return circle_proxy_loss(hashes, labels, proxies, config.margin, config.scale)
        return proxy_anchor_loss(hashes, labels, proxies, scale=config.scale)

    def _classification(self, hashes: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of classification by a prefix of the hashes and of the classifier's weights."""
        classifier = self.network.classifier
        assert classifier is not None
        logits = F.linear(hashes, classifier.weight[:, : hashes.shape[1]], classifier.bias)
        return classification_loss(logits, labels, self.config.label_smoothing)

    def build_optimizer(self) -> Optimizer:
        """Return the optimizer with a third group for the proxies, see `Method`."""
        optimizer = super().build_optimizer()
        optimizer.add_param_group({"params": [self.proxies], "lr": self.config.lr * self.config.proxy_lr_factor})
        return optimizer
