"""CSQ: central similarity quantisation (Yuan, Wang, Zhang, Tay, Jie, Liu, Feng, CVPR 2020, arXiv 1908.00347).

Each class has a hash centre, a code that is far from those of the other classes; images are hashed to their centre.

- Centres, for K a power of two and C <= 2K classes: the first C rows of [H; -H], where H is the K x K Hadamard matrix;
  any two differ in K/2 bits or in all K. Otherwise, each bit is drawn from a Bernoulli distribution with p = 1/2.
- The centre of an image with several classes is the majority vote of their centres, bit by bit. Bits with equally many
  votes are those of one random code.
- With t = tanh of the outputs, h = (t + 1) / 2 and the centre c in {0, 1}^K, each loss is a mean over images and bits:

      central similarity  -(c log h + (1 - c) log(1 - h))      (eq. 4)
      quantisation        log cosh(|t| - 1)                    (eq. 6, smooth form of ||t| - 1|)

Deviations from the authors' code:

- The hash layer is linear, after a layer norm, as for our other methods (in the code: three linear layers).
- The outputs have no activation; the losses apply tanh. h is a sigmoid of twice the output, so the central similarity
  is computed from it without overflow, and a saturated output still has a gradient.
- Both losses are means (in the paper: sums), so the quantisation weight does not depend on the batch.
- Of 20 Bernoulli draws, the one with the largest minimum distance between centres is kept (in the code: the first one
  above a quarter of the bits). Two equal centres are refused.
- The random code for ties is drawn with the run's seed.
- The settings of training are those of our other fine-tuned methods.

The first column of a Hadamard matrix is constant: with C <= K, the first bit is the same for all classes.
"""

from typing import Annotated

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.card import HeadSpec
from orbithash.trainers.methods.base import Batch
from orbithash.trainers.methods.fine_tuning import FineTuned, FineTuningConfig
from orbithash.trainers.methods.losses import at_least_float32, class_matrix
from orbithash.trainers.search_space import Log

__all__ = ["Csq", "CsqConfig", "central_similarity_loss", "hash_centres", "log_cosh_loss", "voted_centres"]

NUM_DRAWS = 20


class CsqConfig(FineTuningConfig):
    """Settings of CSQ."""

    quantisation_weight: Annotated[float, Log(1e-5, 1)] = Field(
        1e-4, ge=0, le=1000, description="weight lambda of the quantisation loss"
    )


def hash_centres(num_classes: int, bits: int, seed: int) -> npt.NDArray[np.bool_]:
    """Return the hash centres of the classes, bool [C, K].

    Raises:
        InputError: two centres are equal, because the codes are too short for this many classes.
    """
    if bits & (bits - 1) == 0 and num_classes <= 2 * bits:
        from scipy.linalg import hadamard

        positive = np.asarray(hadamard(bits)) > 0
        return np.concatenate([positive, ~positive])[:num_classes]
    rng = np.random.default_rng([seed, num_classes, bits])
    draws = (rng.integers(0, 2, (num_classes, bits)).astype(np.bool_) for _ in range(NUM_DRAWS))
    best = max(draws, key=_min_distance)
    if _min_distance(best) == 0:
        raise InputError(
            f"bits={bits} is too short for the centres of {num_classes} classes, two of which are equal; use more bits"
        )
    return best


def _min_distance(centres: npt.NDArray[np.bool_]) -> int:
    """Return the minimum Hamming distance between two centres [C, K]; K + 1 for a single one."""
    codes = np.packbits(centres, axis=1)
    distances = hamming(codes, codes).astype(np.int64)
    np.fill_diagonal(distances, centres.shape[1] + 1)
    return int(distances.min(initial=centres.shape[1] + 1))


def voted_centres(classes: Tensor, centres: Tensor, tie_code: Tensor) -> Tensor:
    """Return the centre of each image, bool [N, K]: the majority vote of the centres of its classes.

    Args:
        classes: bool [N, C].
        centres: bool [C, K].
        tie_code: bool [K], the bits for equally many votes.
    """
    votes = classes.float() @ (2 * centres.float() - 1)
    return torch.where(votes == 0, tie_code, votes > 0)


def central_similarity_loss(outputs: Tensor, centres: Tensor) -> Tensor:
    """Return the mean binary cross-entropy of outputs [N, K] before tanh and centres bool [N, K], a scalar."""
    outputs = at_least_float32(outputs)
    return F.binary_cross_entropy_with_logits(2 * outputs, centres.to(outputs))


def log_cosh_loss(outputs: Tensor) -> Tensor:
    """Return the mean of log cosh(|tanh x| - 1) over outputs x [N, K], a scalar."""
    return torch.log(torch.cosh(torch.tanh(at_least_float32(outputs)).abs() - 1)).mean()


class Csq(FineTuned):
    """The hash network without activation, and the hash centres."""

    name = "csq"
    learns_from = "class labels, one or several per image"
    paper = "Yuan et al.: Central similarity quantization, CVPR 2020 (arXiv 1908.00347)"
    Config = CsqConfig
    supervision = "classes"

    centres: Tensor
    tie_code: Tensor

    def __init__(self, config: CsqConfig, num_classes: int, num_rows: int) -> None:
        super().__init__(config, num_classes, num_rows)
        self.config: CsqConfig = config
        self.network = self.build_network(HeadSpec(config.bits, activation="none"))
        self.register_buffer("centres", torch.from_numpy(hash_centres(num_classes, config.bits, config.seed)))
        tie_code = np.random.default_rng([config.seed, config.bits]).integers(0, 2, config.bits).astype(np.bool_)
        self.register_buffer("tie_code", torch.from_numpy(tie_code))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Return the losses, see `Method`. Both are means over this rank's images."""
        outputs = self.outputs(batch).hashes
        centres = voted_centres(class_matrix(batch.labels, len(self.centres)), self.centres, self.tie_code)
        central = batch.weight * central_similarity_loss(outputs, centres)
        quantisation = batch.weight * log_cosh_loss(outputs)
        return {
            "loss": central + self.config.quantisation_weight * quantisation,
            "central_similarity": central,
            "quantisation": quantisation,
        }
