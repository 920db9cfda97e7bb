"""Binary codes: packing, checks, Hamming distances.

A code of K bits is `uint8[ceil(K/8)]`. Bit j is in byte `j // 8` under the mask `128 >> (j % 8)`, the order of
`numpy.packbits`. Pad bits are zero, so that they do not change Hamming distances.
"""

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer

__all__ = ["MAX_BITS", "MIN_BITS", "check_bits", "check_codes", "hamming", "num_bytes", "pack", "unpack"]

MIN_BITS = 8
MAX_BITS = 512

Codes = npt.NDArray[np.uint8]


def check_bits(bits: int) -> int:
    """Return `bits`; `InputError` if it is not an integer from 8 to 512."""
    return check_integer(bits, "bits", MIN_BITS, MAX_BITS)


def num_bytes(bits: int) -> int:
    """Return the number of bytes of one packed code."""
    return (bits + 7) // 8


def pack(bits: npt.NDArray[np.bool_]) -> Codes:
    """Pack bool [..., K] into uint8 [..., ceil(K/8)]."""
    if bits.dtype != np.bool_:
        raise InputError(
            f"bits to pack must be bool, got {bits.dtype}; compare the outputs with their thresholds first"
        )
    return np.packbits(bits, axis=-1)


def unpack(codes: Codes, bits: int) -> npt.NDArray[np.bool_]:
    """Unpack uint8 [..., ceil(bits/8)] into bool [..., bits]."""
    check_codes(codes, bits)
    return np.unpackbits(codes, axis=-1, count=bits).astype(np.bool_)


def check_codes(codes: Codes, bits: int) -> Codes:
    """Return `codes`; `InputError` if its type, its width or a pad bit is not that of codes of `bits` bits."""
    if codes.dtype != np.uint8:
        raise InputError(f"codes must be uint8, got {codes.dtype}")
    if codes.ndim < 1 or codes.shape[-1] != num_bytes(bits):
        raise InputError(f"a code of {bits} bits has {num_bytes(bits)} bytes, got shape {codes.shape}")
    padding = -bits % 8
    if padding and codes.size and (codes[..., -1] & ((1 << padding) - 1)).any():
        raise InputError(f"a code of {bits} bits ends in {padding} pad bits, which must be zero; one is set")
    return codes


def hamming(queries: Codes, database: Codes) -> npt.NDArray[np.int32]:
    """Return the Hamming distances, int32 [Q, N], of packed codes uint8 [Q, B] and uint8 [N, B]."""
    if queries.ndim != 2 or database.ndim != 2 or queries.shape[1] != database.shape[1]:
        raise InputError(f"codes must be [Q, B] and [N, B] with the same B, got {queries.shape} and {database.shape}")
    distances = np.zeros((len(queries), len(database)), np.int32)
    # Column by column, because [Q, N, B] would take B times the memory of the result.
    for column in range(queries.shape[1]):
        distances += np.bitwise_count(queries[:, column, None] ^ database[None, :, column])
    return distances
