"""Several examples as one query: each output is decided by a vote."""

import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import MAX_OUTPUT, Encoded, pack, unpack

__all__ = ["compose"]


def compose(positives: Sequence[Encoded], negatives: Sequence[Encoded], weights: Sequence[float], bits: int) -> Encoded:
    """Return the query, one row, of examples of one row each that have outputs.

    Each example votes with its outputs times its weight: positives for them, negatives against them, divided by the
    number of examples of the group. The sign of the sum is the bit; the first positive decides where the sum is 0. The
    stored vector is the sum of the stored vectors, weighted in the same way; None if an example has none. Outputs and
    vectors are scaled so that the largest magnitude is 127. The arithmetic is exact: a weight is the decimal number
    that `repr` prints.

    Args:
        positives: at least one.
        negatives: any number.
        weights: one positive number for each example, positives first.
        bits: bits of a code.
    """
    shares = _shares(weights, len(positives))
    examples = (*positives, *negatives)
    outputs = [example.outputs for example in examples if example.outputs is not None]
    assert len(outputs) == len(examples), "every example has outputs"
    balance = _weighted_sum(shares, outputs)
    codes = pack(np.where(balance == 0, unpack(positives[0].codes, bits), balance > 0))
    vectors = [example.vectors for example in examples if example.vectors is not None]
    vector = _scaled(_weighted_sum(shares, vectors)) if len(vectors) == len(examples) else None
    return Encoded(codes, _scaled(balance), vector)


def _shares(weights: Sequence[float], num_positives: int) -> list[int]:
    """Return integers proportional to the weights over the sizes of their groups, those of negatives below 0."""
    num_negatives = len(weights) - num_positives
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / num_positives for weight in exact[:num_positives]]
    shares += [-weight / num_negatives for weight in exact[num_positives:]]
    denominator = math.lcm(*(share.denominator for share in shares))
    return [int(share * denominator) for share in shares]


def _weighted_sum(shares: Sequence[int], rows: Sequence[npt.NDArray[np.int8]]) -> npt.NDArray[Any]:
    """Return the sum [1, K] of int8 [1, K] times shares, as Python integers, which cannot overflow."""
    total: npt.NDArray[Any] = np.zeros(rows[0].shape, object)
    for share, row in zip(shares, rows, strict=True):
        total += share * row.astype(object)
    return total


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Return integers [1, K] as int8, scaled so that the largest magnitude is 127; halves are rounded away from 0."""
    largest = max(1, *(abs(value) for value in values[0]))
    scaled = [(2 * MAX_OUTPUT * abs(value) + largest) // (2 * largest) for value in values[0]]
    return np.where(values[0] < 0, -np.array(scaled, np.int64), np.array(scaled, np.int64)).astype(np.int8)[None]
