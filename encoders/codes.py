"""Binary codes: packing, checks, Hamming distances.

A code of K bits is `uint8[ceil(K/8)]`. Bit j is in byte `j // 8` under the mask `128 >> (j % 8)`, the order of
`numpy.packbits`. Pad bits are zero, so that they do not change Hamming distances.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer

__all__ = [
    "MAX_BITS",
    "MAX_OUTPUT",
    "MIN_BITS",
    "Encoded",
    "Kind",
    "check_bits",
    "check_codes",
    "hamming",
    "num_bytes",
    "outputs_of",
    "pack",
    "unpack",
    "words_of",
]

MIN_BITS = 8
MAX_BITS = 512

# Largest magnitude of an output in `Encoded`. -128 is not used, so that negation is possible.
MAX_OUTPUT = 127

Codes = npt.NDArray[np.uint8]
# What a model encodes: images, sentences, or vectors that are inputs of the head of images.
Kind = Literal["image", "text", "vector"]


class Encoded(NamedTuple):
    """What a model computes for N items.

    Attributes:
        codes: packed codes uint8 [N, B].
        outputs: outputs of the head minus their thresholds, int8 [N, K], scaled in each row so that the largest
            magnitude is 127. An output is positive only where the code's bit is 1, and negative only where it is 0.
            Label bits have 127 and -127. None if they were not requested.
        vectors: stored vectors int8 [N, d]; None for a model without a projection.
    """

    codes: Codes
    outputs: npt.NDArray[np.int8] | None
    vectors: npt.NDArray[np.int8] | None

    def split(self) -> list["Encoded"]:
        """Return the items one by one, each with arrays of one row."""
        return [
            Encoded(
                self.codes[row : row + 1],
                None if self.outputs is None else self.outputs[row : row + 1],
                None if self.vectors is None else self.vectors[row : row + 1],
            )
            for row in range(len(self.codes))
        ]

    @classmethod
    def joined(cls, parts: Sequence["Encoded"]) -> "Encoded":
        """Return the items of at least one part in order. `outputs` and `vectors` are None if a part lacks them."""
        outputs = [part.outputs for part in parts if part.outputs is not None]
        vectors = [part.vectors for part in parts if part.vectors is not None]
        return cls(
            np.concatenate([part.codes for part in parts]),
            np.concatenate(outputs) if len(outputs) == len(parts) else None,
            np.concatenate(vectors) if len(vectors) == len(parts) else None,
        )


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


def outputs_of(codes: Codes, bits: int) -> npt.NDArray[np.int8]:
    """Return the outputs, int8 [..., bits], of items of which only the codes are known: 127 for 1 and -127 for 0."""
    return np.where(unpack(codes, bits), np.int8(MAX_OUTPUT), np.int8(-MAX_OUTPUT))


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


def words_of(codes: Codes) -> npt.NDArray[np.uint64]:
    """Return codes uint8 [N, B] as words uint64 [N, ceil(B/8)], which sort as the bytes do."""
    count, width = codes.shape
    if width % 8:
        padded = np.zeros((count, width + -width % 8), np.uint8)
        padded[:, :width] = codes
        codes = padded
    return np.ascontiguousarray(codes).view(">u8").astype(np.uint64)
