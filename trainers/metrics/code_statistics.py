"""How well a set of codes uses its bits."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import check_codes, num_bytes, unpack
from orbithash.encoders.errors import InputError

__all__ = ["CodeStatistics", "code_statistics"]

# Rows unpacked at once: 64 MiB of float32 at 512 bits, and sums far below 2^24, to where float32 counts exactly.
_CHUNK_ROWS = 32_768


@dataclass(frozen=True)
class CodeStatistics:
    """Statistics of N codes of K bits, JSON-able by `dataclasses.asdict`.

    A collapsed code has few distinct values; wasted bits are constant (balance 0 or 1) or repeat each other.
    """

    count: int
    """N."""
    bytes_per_code: int
    distinct: int
    """Different codes among the N."""
    bit_balance: list[float]
    """Share of ones of each bit, K numbers; 0.5 carries most."""
    bit_entropy: float
    """Mean over the bits of their entropy, in bits: 1 where every bit is balanced, 0 where all are constant."""
    constant_bits: int
    """Bits with one value in all codes."""
    mean_abs_correlation: float | None
    """Mean absolute correlation of two different bits, constant ones left out; None where fewer than two vary."""


def code_statistics(codes: npt.NDArray[np.uint8], bits: int) -> CodeStatistics:
    """Statistics of codes uint8 [N, ceil(bits/8)], N >= 1."""
    check_codes(codes, bits)
    if codes.ndim != 2 or not len(codes):
        raise InputError(f"code statistics need one code or more, uint8 [N, {num_bytes(bits)}], got {codes.shape}")
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
