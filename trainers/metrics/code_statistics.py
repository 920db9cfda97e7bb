"""Statistics of a set of codes: distinct codes, balance and correlation of bits, and which bits are wasted."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_codes, num_bytes, unpack
from orbithash.encoders.errors import InputError

__all__ = ["CodeStatistics", "CorrelatedBits", "UnbalancedBit", "code_statistics"]

# Minimum absolute correlation of two bits that are listed as correlated, and maximum number of pairs listed.
CORRELATION_LIMIT, MAX_CORRELATED = 0.9, 20
# Share of codes with the rarer value below which a bit is listed as unbalanced.
RARE_SHARE = 0.05

# Number of rows unpacked at once: 64 MiB of float32 at 512 bits. Sums stay far below 2^24, the limit of exact counts in
# float32.
_CHUNK_ROWS = 32_768


@dataclass(frozen=True)
class CorrelatedBits:
    """Two bits, the lower number first, and their correlation over the codes."""

    bits: list[int]
    correlation: float


@dataclass(frozen=True)
class UnbalancedBit:
    """A bit with two values, one of them in less than `RARE_SHARE` of the codes; `ones` is its share of ones."""

    bit: int
    ones: float


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of N codes of K bits; `dataclasses.asdict` makes them serialisable as JSON.

    A collapsed hash function gives few distinct codes. Wasted bits are dead, unbalanced or correlated. Bits are
    numbered from 0.
    """

    count: int
    """N."""
    bytes_per_code: int
    distinct: int
    """Number of distinct codes."""
    bit_balance: list[float]
    """Share of ones of each bit, K numbers; 0.5 carries the most information."""
    bit_entropy: float
    """Mean entropy of the bits, in bits: 1 if every bit is balanced, 0 if all are constant."""
    dead_bits: list[int]
    """Bits with the same value in all codes, ascending."""
    unbalanced_bits: list[UnbalancedBit]
    """Bits with a rare value, the least balanced first; without dead bits."""
    mean_abs_correlation: float | None
    """Mean absolute correlation of two different bits, without dead bits; None if fewer than two bits vary."""
    correlated_bits: list[CorrelatedBits]
    """The pairs with an absolute correlation of at least `CORRELATION_LIMIT`: the `MAX_CORRELATED` strongest."""
    num_correlated: int
    """Number of all such pairs."""


def code_statistics(codes: npt.NDArray[np.uint8], bits: int) -> CodeStatistics:
    """Return the statistics of codes uint8 [N, ceil(bits/8)]; `InputError` without codes."""
    check_codes(codes, bits)
    if codes.ndim != 2 or not len(codes):
        raise InputError(f"code statistics need at least one code, uint8 [N, {num_bytes(bits)}], got {codes.shape}")
    both = np.zeros((bits, bits))
    for start in range(0, len(codes), _CHUNK_ROWS):
        ones = unpack(codes[start : start + _CHUNK_ROWS], bits).astype(np.float32)
        both += ones.T @ ones
    counts = both.diagonal()
    share = counts / len(codes)
    varying = np.flatnonzero((counts > 0) & (counts < len(codes)))
    used = share[varying]
    pairs, correlations = _correlations(both[np.ix_(varying, varying)] / len(codes), used)
    strength = np.abs(correlations)
    strong = np.flatnonzero(strength >= CORRELATION_LIMIT)
    rarer = np.minimum(used, 1 - used)
    return CodeStatistics(
        count=len(codes),
        bytes_per_code=num_bytes(bits),
        distinct=len(np.unique(np.ascontiguousarray(codes).view(np.dtype((np.void, codes.shape[1]))))),
        bit_balance=share.tolist(),
        bit_entropy=float(-(used * np.log2(used) + (1 - used) * np.log2(1 - used)).sum() / bits),
        dead_bits=np.setdiff1d(np.arange(bits), varying).tolist(),
        unbalanced_bits=[
            UnbalancedBit(int(varying[i]), float(used[i]))
            for i in np.argsort(rarer, kind="stable").tolist()
            if rarer[i] < RARE_SHARE
        ],
        mean_abs_correlation=float(strength.mean()) if len(strength) else None,
        correlated_bits=[
            CorrelatedBits([int(varying[side[i]]) for side in pairs], float(correlations[i]))
            # Rounding must not decide the order of equal correlations.
            for i in strong[np.argsort(-strength[strong].round(9), kind="stable")][:MAX_CORRELATED].tolist()
        ],
        num_correlated=len(strong),
    )


def _correlations(
    both: npt.NDArray[np.float64], share: npt.NDArray[np.float64]
) -> tuple[tuple[npt.NDArray[np.intp], npt.NDArray[np.intp]], npt.NDArray[np.float64]]:
    """Return the pairs of different varying bits, the lower one first, and their correlations, from -1 to 1."""
    pairs = np.triu_indices(len(share), 1)
    deviations = np.sqrt(share * (1 - share))
    covariances = both[pairs] - share[pairs[0]] * share[pairs[1]]
    return pairs, np.clip(covariances / (deviations[pairs[0]] * deviations[pairs[1]]), -1, 1)
