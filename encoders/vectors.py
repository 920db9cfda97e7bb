"""Stored vectors, and the scores by which a shortlist is ranked again.

Dot products of int8 vectors and sums of int8 outputs are integers, so that scores do not depend on the order of
summation: the same row has the same score in every batch, shard and process.
"""

from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, unpack

__all__ = ["VectorSpec", "asymmetric_distances", "cosine_scores"]
Vectors = npt.NDArray[np.int8]


class VectorSpec(NamedTuple):
    """The stored vectors of a model: int8 of `dims` components; `scale` is the length of one unit of a component.

    The dot product of two vectors, times the square of the scale, approximates the cosine of what they were made from.
    """

    dims: int
    scale: float


def cosine_scores(query: Vectors, vectors: Vectors) -> npt.NDArray[np.float64]:
    """Return the cosines, float64 [N], of a query int8 [d] and stored vectors int8 [N, d]; 0 for a vector of zeros."""
    rows, one = vectors.astype(np.float64), query.astype(np.float64)
    # Every product and every partial sum is an integer below 2^53, and a square root and a division are rounded
    # correctly: the result is the same in every order.
    dots, squares = rows @ one, np.square(rows).sum(axis=1) * float(one @ one)
    scores: npt.NDArray[np.float64] = np.divide(dots, np.sqrt(squares), out=np.zeros(len(rows)), where=squares > 0)
    return scores


def asymmetric_distances(outputs: Vectors, codes: Codes) -> npt.NDArray[np.int64]:
    """Return the asymmetric distances, int64 [N], of a query's outputs int8 [K] from codes uint8 [N, ceil(K/8)].

    The distance is the sum of the magnitudes of the outputs whose bits differ from those of the code.
    """
    differs = unpack(codes, len(outputs)) != (outputs >= 0)
    distances: npt.NDArray[np.int64] = differs @ np.abs(outputs.astype(np.int64))
    return distances
