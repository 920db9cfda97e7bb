"""Statistics of a set of codes: distinct codes, balance and correlation of bits."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_codes, num_bytes, unpack
from orbithash.encoders.errors import InputError

__all__ = ["CodeStatistics", "code_statistics"]

# Number of rows unpacked at once: 64 MiB of float32 at 512 bits. Sums stay far below 2^24, the limit of exact counts in
# float32.
_CHUNK_ROWS = 32_768


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of N codes of K bits; `dataclasses.asdict` makes them serialisable as JSON.

    A collapsed hash function gives few distinct codes. Wasted bits are constant (balance 0 or 1) or correlated.
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
    constant_bits: int
    """Number of bits with the same value in all codes."""
    mean_abs_correlation: float | None
    """Mean absolute correlation of two different bits, without constant bits; None if fewer than two bits vary."""


def code_statistics(codes: npt.NDArray[np.uint8], bits: int) -> CodeStatistics:
    """Return the statistics of codes uint8 [N, ceil(bits/8)]; `InputError` without codes."""
    check_codes(codes, bits)
    if codes.ndim != 2 or not len(codes):
        raise InputError(f"code statistics need at least one code, uint8 [N, {num_bytes(bits)}], got {codes.shape}")
    both = np.zeros((bits, bits))
    for start in range(0, len(codes), _CHUNK_ROWS):
        ones = unpack(codes[start : start + _CHUNK_ROWS], bits).astype(np.float32)
        both += ones.T @ ones
    share = both.diagonal() / len(codes)
    varying = np.flatnonzero((share > 0) & (share < 1))
    used = share[varying]
    return CodeStatistics(
        count=len(codes),
        bytes_per_code=num_bytes(bits),
        distinct=len(np.unique(np.ascontiguousarray(codes).view(np.dtype((np.void, codes.shape[1]))))),
        bit_balance=share.tolist(),
        bit_entropy=float(-(used * np.log2(used) + (1 - used) * np.log2(1 - used)).sum() / bits),
        constant_bits=bits - len(varying),
        mean_abs_correlation=_mean_abs_correlation(both[np.ix_(varying, varying)] / len(codes), used),
    )


def _mean_abs_correlation(both: npt.NDArray[np.float64], share: npt.NDArray[np.float64]) -> float | None:
    if len(share) < 2:
        return None
    deviations = np.sqrt(share * (1 - share))
    correlations = (both - np.outer(share, share)) / np.outer(deviations, deviations)
    return float(np.abs(correlations[~np.eye(len(share), dtype=np.bool_)]).mean())
