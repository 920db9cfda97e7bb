"""From the features of items to codes, outputs and stored vectors that do not depend on the batch size."""

import copy
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from orbithash.encoders.codes import Codes, Encoded, num_bytes, outputs_of, pack
from orbithash.encoders.networks.card import ModelCard
from orbithash.encoders.networks.devices import exact_float32
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork, NetworkOutput
from orbithash.encoders.networks.label_codes import label_table
from orbithash.encoders.networks.projection import Projection, rounded
from orbithash.encoders.networks.rounding import scaled_outputs

__all__ = ["MARGIN", "Binarizer", "Parts"]

# An output closer to its threshold than this share of its `error_scale` is computed again, alone, because rounding
# differs with the batch size. The largest difference measured is a tenth of it.
MARGIN = 2e-6

# Error of float64 as a share of that of float32, rounded up.
_FLOAT64_ERROR = 1e-8


class _Decided(NamedTuple):
    """What follows from the features of N items.

    Attributes:
        bits: hash bits, bool [N, K].
        labels: predicted classes, int64 [N]; 0 for a model without label bits.
        outputs: outputs of the hash bits, int8 [N, K], see `Encoded`; None if they were not requested.
        vectors: stored vectors, int8 [N, d]; None if they were not requested.
        unsure: items of which rounding could change another field, bool [N].
    """

    bits: Tensor
    labels: Tensor
    outputs: Tensor | None
    vectors: Tensor | None
    unsure: Tensor


class Parts(NamedTuple):
    """What to compute beside codes: outputs of the head, and stored vectors if the model has a projection."""

    outputs: bool = False
    vectors: bool = False


class Binarizer:
    """The heads of a model with their thresholds and label bits, and its projection."""

    def __init__(
        self,
        card: ModelCard,
        network: HashNetwork,
        text_head: HashHead | None,
        projection: Projection | None,
        device: torch.device,
    ) -> None:
        """All modules are on `device`."""
        self._bits = card.bits
        self._network = network
        self._text_head = text_head
        self._projection = projection
        self._device = device
        # As a share of that of float32.
        self._error = 1.0
        # Vectors are exact, unlike the features that a backbone computes: items near a threshold, which are many among
        # those with stored vectors, are then computed in float64 together instead of one by one.
        self._takes_vectors = card.network.backbone.source == "embedding"
        self._labels = np.tile(label_table(card.label_code, len(card.classes)), (1, card.label_weight))
        self._thresholds = torch.tensor(card.thresholds, device=device)

    @torch.inference_mode()
    def encode(
        self,
        num_rows: int,
        size: int,
        features_of: Callable[[slice], Tensor],
        *,
        parts: Parts,
        of_text: bool = False,
        are_features_fixed: bool = False,
    ) -> Encoded:
        """Return the codes, and on request other parts, of rows 0 to num_rows - 1.

        `features_of` returns the features float [N, D] of some rows. It is called with `size` rows at a time, and again
        with each row alone that rounding could change. With `are_features_fixed`, features of a row do not depend on
        the rows beside it, and only the heads are computed again.
        """
        codes = np.empty((num_rows, num_bytes(self._bits)), np.uint8)
        outputs = np.empty((num_rows, self._bits), np.int8) if parts.outputs else None
        vectors = None
        if parts.vectors and self._projection is not None:
            vectors = np.empty((num_rows, self._projection.spec.dims), np.int8)
        with exact_float32(self._device):
            for start in range(0, num_rows, size):
                rows = slice(start, min(start + size, num_rows))
                features = features_of(rows)
                decided = self._decide(features, of_text, parts)
                unsure = decided.unsure.nonzero()[:, 0]
                if self._takes_vectors and len(unsure):
                    _replace(decided, unsure, self._in_float64(features[unsure], of_text, parts))
                    unsure = unsure[:0]
                for row in unsure.tolist():
                    alone = slice(row, row + 1)
                    # Copied: kernels are also chosen by the alignment of their inputs.
                    again = (
                        features[alone].clone()
                        if are_features_fixed
                        else features_of(slice(start + row, start + row + 1))
                    )
                    _replace(decided, alone, self._decide(again, of_text, parts))
                codes[rows] = self._pack(decided)
                if outputs is not None and decided.outputs is not None:
                    outputs[rows] = outputs_of(codes[rows], self._bits)
                    outputs[rows, : decided.outputs.shape[1]] = decided.outputs.cpu().numpy()
                if vectors is not None and decided.vectors is not None:
                    vectors[rows] = decided.vectors.cpu().numpy()
        return Encoded(codes, outputs, vectors)

    @torch.inference_mode()
    def is_certain(self, features: Tensor) -> Tensor:
        """Return for which images rounding cannot change code or vector, bool [N], from their features float [N, D]."""
        with exact_float32(self._device):
            return ~self._decide(features, False, Parts(vectors=True)).unsure

    def _in_float64(self, features: Tensor, of_text: bool, parts: Parts) -> _Decided:
        """Return the result of `_decide` for exact features [N, D], computed in float64 with the current weights.

        Rounding in float64 can change very few items: these are computed again, alone.
        """
        double = copy.copy(self)
        double._network = copy.deepcopy(self._network).double()
        double._projection = None if self._projection is None else copy.deepcopy(self._projection).double()
        double._error = _FLOAT64_ERROR
        features = features.double()
        decided = double._decide(features, of_text, parts)
        for row in decided.unsure.nonzero()[:, 0].tolist():
            _replace(decided, slice(row, row + 1), double._decide(features[row : row + 1], of_text, parts))
        return decided

    def _pack(self, decided: _Decided) -> Codes:
        bits = decided.bits.cpu().numpy()
        if self._labels.size:
            bits = np.concatenate([bits, self._labels[decided.labels.cpu().numpy()]], axis=1)
        return pack(bits)

    def _decide(self, features: Tensor, of_text: bool, parts: Parts) -> _Decided:
        if of_text:
            assert self._text_head is not None, "a model with a text side"
            output = NetworkOutput(self._text_head(features), None)
            scale = NetworkOutput(self._text_head.error_scale(features), None)
        else:
            output, scale = self._network.hash(features), self._network.error_scale(features)
        bits, differences = output.hashes >= self._thresholds, output.hashes - self._thresholds
        unsure = (differences.abs() < MARGIN * self._error * scale.hashes).any(dim=1)
        outputs = vectors = None
        if parts.outputs:
            outputs, could_differ = scaled_outputs(differences, MARGIN * self._error * scale.hashes)
            unsure |= could_differ
        if parts.vectors and self._projection is not None:
            components = self._projection(features)
            vectors = rounded(components)
            unsure |= self._projection.is_near_rounding(components, MARGIN * self._error)
        if not self._labels.shape[1]:
            return _Decided(
                bits, torch.zeros(len(bits), dtype=torch.int64, device=bits.device), outputs, vectors, unsure
            )
        assert output.logits is not None, "label bits come from a classifier"
        assert scale.logits is not None, "as the logits"
        best = output.logits.topk(2, dim=1).values
        unsure |= best[:, 0] - best[:, 1] < 2 * MARGIN * self._error * scale.logits.amax(dim=1)
        return _Decided(bits, output.logits.argmax(dim=1), outputs, vectors, unsure)


def _replace(decided: _Decided, rows: Tensor | slice, by: _Decided) -> None:
    """Set the rows of all parts of a result to those of another one."""
    for part, of_rows in zip(decided, by, strict=True):
        if part is not None and of_rows is not None:
            part[rows] = of_rows
