"""Directions in the space of features whose signs are the bits of a code.

Rows are features scaled to unit length, minus the mean of a sample: then Hamming distances of the signs approximate the
cosine of the features. Everything is computed in one thread, because the order of a sum depends on the number of
threads: the same rows give the same directions on every machine of one kind, with any number of ranks.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

__all__ = [
    "first_features",
    "itq_rotation",
    "mean_row",
    "principal_directions",
    "random_directions",
    "unit",
    "whitening",
]

Rows = npt.NDArray[np.float32]
Matrix = npt.NDArray[np.float64]

# Rows that are in memory as float64 at once.
CHUNK_ROWS = 4096

# A direction with less of the largest variance than this has no variance but rounding errors.
MIN_VARIANCE = 1e-12


def unit(rows: Rows) -> Rows:
    """Return rows [N, D] scaled to unit length; a row of zeros is unchanged."""
    scaled: Rows = rows / np.maximum(np.linalg.norm(rows, axis=1, keepdims=True), np.finfo(np.float32).tiny)
    return scaled


def mean_row(rows: Rows) -> Matrix:
    """Return the mean float64 [D] of rows [N, D]."""
    mean: Matrix = rows.mean(axis=0, dtype=np.float64)
    return mean


def first_features(count: int, num_features: int) -> Matrix:
    """Return the directions [count, D] of the first `count` of D features."""
    return np.eye(count, num_features)


def random_directions(count: int, num_features: int, seed: int) -> Matrix:
    """Return `count` Gaussian directions [count, D] (Charikar 2002); the first of them are the same for every count."""
    return np.random.default_rng(seed).standard_normal((count, num_features))


def principal_directions(rows: Rows, count: int) -> Matrix:
    """Return the orthonormal principal directions [min(count, R), D] of centred rows [N, D], largest variance first.

    R is the number of directions in which the rows vary. The largest component of each direction is positive.
    """
    with _one_thread():
        scatter = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
        for chunk in _chunks(rows):
            scatter += chunk.T @ chunk
        variances, vectors = torch.linalg.eigh(scatter)
    num_varying = int((variances > MIN_VARIANCE * variances[-1]).sum())
    directions = vectors.flip(1).T[: min(count, num_varying)]
    largest = directions.gather(1, directions.abs().argmax(dim=1, keepdim=True))
    found: Matrix = (directions * largest.sign()).numpy()
    return found


def whitening(views: Sequence[Rows], shrinkage: float) -> Matrix:
    """Return the symmetric matrix [D, D] that whitens the differences between the views of one item.

    `views` are rows of unit length [N, D] of the same N items, two or more. The covariance of the rows around the mean
    of their item is mixed with its mean variance in all directions; `shrinkage`, above 0, is the share of the latter.
    """
    num_rows, num_features = views[0].shape
    scatter = torch.zeros(num_features, num_features, dtype=torch.float64)
    with _one_thread():
        for chunks in zip(*map(_chunks, views), strict=True):
            mean = torch.stack(chunks).mean(dim=0)
            for chunk in chunks:
                scatter += (chunk - mean).T @ (chunk - mean)
        covariance = scatter / (num_rows * (len(views) - 1))
        mean_variance = covariance.trace() / num_features
        covariance = (1 - shrinkage) * covariance + shrinkage * mean_variance * torch.eye(num_features).double()
        variances, vectors = torch.linalg.eigh(covariance)
        found: Matrix = ((vectors * variances.clamp(min=torch.finfo().tiny).rsqrt()) @ vectors.T).numpy()
    return found


def itq_rotation(rows: Rows, seed: int, iterations: int = 50) -> Matrix:
    """Return the rotation [K, K] with which `rows @ rotation`, of rows [N, K], comes closest to its signs.

    Alternates between taking signs and solving for the rotation (orthogonal Procrustes), from a random start (Gong and
    Lazebnik 2011). faiss.ITQMatrix (1.15) is not used: its loss does not decrease monotonically and ends higher.
    """
    num_bits = rows.shape[1]
    start = np.random.default_rng(seed).standard_normal((num_bits, num_bits))
    with _one_thread():
        rotation = torch.linalg.qr(torch.from_numpy(start))[0]
        for _ in range(iterations):
            product = torch.zeros_like(rotation)
            for chunk in _chunks(rows):
                product += chunk.T @ torch.where(chunk @ rotation >= 0, 1.0, -1.0).double()
            left, _, right = torch.linalg.svd(product)
            rotation = left @ right
    found: Matrix = rotation.numpy()
    return found


def _chunks(rows: Rows) -> Iterator[Tensor]:
    for start in range(0, len(rows), CHUNK_ROWS):
        yield torch.from_numpy(rows[start : start + CHUNK_ROWS]).double()


@contextmanager
def _one_thread() -> Iterator[None]:
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)
