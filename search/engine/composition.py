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

    Each example votes with its outputs, divided by the sum of their magnitudes, so that an example of which only the
    code is known counts as much as one with outputs. The votes are multiplied by the example's weight and divided by
    the number of examples of its group; positives vote for their outputs, negatives against them. The sign of the sum
    is the bit; the first positive decides where the sum is 0. The stored vector is the sum of the stored vectors
    likewise; None if an example has none. Outputs and vectors are scaled so that the largest magnitude is 127. The
    arithmetic is exact: a weight is the decimal number that `repr` prints.

    Args:
        positives: at least one.
        negatives: any number.
        weights: one positive number for each example, positives first.
        bits: bits of a code.
    """
    exact = [Fraction(repr(float(weight))) for weight in weights]
    shares = [weight / len(positives) for weight in exact[: len(positives)]]
    shares += [-weight / len(negatives) for weight in exact[len(positives) :]]
    examples = (*positives, *negatives)
    outputs = [example.outputs for example in examples if example.outputs is not None]
    assert len(outputs) == len(examples), "every example has outputs"
    balance = _sum(shares, outputs)
    codes = pack(np.where(balance == 0, unpack(positives[0].codes, bits), balance > 0))
    vectors = [example.vectors for example in examples if example.vectors is not None]
    vector = _scaled(_sum(shares, vectors)) if len(vectors) == len(examples) else None
    return Encoded(codes, _scaled(balance), vector)


def _sum(shares: Sequence[Fraction], rows: Sequence[npt.NDArray[np.int8]]) -> npt.NDArray[Any]:
    """Return numbers proportional to the sum of the rows int8 [1, K], each scaled to a magnitude of its share.

    They are Python integers in an array of objects [1, K], which cannot overflow.
    """
    factors = [share / max(1, int(np.abs(row.astype(np.int64)).sum())) for share, row in zip(shares, rows, strict=True)]
    denominator = math.lcm(*(factor.denominator for factor in factors))
    total: npt.NDArray[Any] = np.zeros(rows[0].shape, object)
    for factor, row in zip(factors, rows, strict=True):
        total += int(factor * denominator) * row.astype(object)
    return total


def _scaled(values: npt.NDArray[Any]) -> npt.NDArray[np.int8]:
    """Return integers [1, K] as int8, scaled so that the largest magnitude is 127; halves are rounded away from 0."""
    largest = max(1, *(abs(value) for value in values[0]))
    scaled = [(2 * MAX_OUTPUT * abs(value) + largest) // (2 * largest) for value in values[0]]
    return np.where(values[0] < 0, -np.array(scaled, np.int64), np.array(scaled, np.int64)).astype(np.int8)[None]
