"""Sets of the rows of a segment as packed bits: bit r is set if row r belongs to the set.

`Bits` are uint8 [ceil(N/8)] for N rows, in little bit order (`numpy.packbits(..., bitorder="little")`). The bits after
the last row are 0. Where an argument may be None, it stands for all rows.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Bits", "both", "contains", "count", "empty", "from_mask", "full", "rows", "to_mask", "without"]

Bits = npt.NDArray[np.uint8]
Rows = npt.NDArray[np.uint32]

# Bytes that are unpacked at a time while rows are listed.
_BLOCK = 1 << 13


def empty(num_rows: int) -> Bits:
    """Return the set of no row."""
    return np.zeros(-(-num_rows // 8), np.uint8)


def full(num_rows: int) -> Bits:
    """Return the set of all rows."""
    bits = np.full(-(-num_rows // 8), 255, np.uint8)
    if num_rows % 8:
        bits[-1] = (1 << num_rows % 8) - 1
    return bits


def from_mask(mask: npt.NDArray[np.bool_]) -> Bits:
    """Return the rows at which a mask bool [N] is true."""
    return np.packbits(mask, bitorder="little")


def to_mask(bits: Bits, num_rows: int) -> npt.NDArray[np.bool_]:
    """Return a set as a mask bool [N]."""
    return np.unpackbits(bits, count=num_rows, bitorder="little").view(np.bool_)


def count(bits: Bits) -> int:
    """Return the number of rows of a set."""
    num_words = len(bits) // 8
    words = bits[: 8 * num_words].view(np.uint64)
    return int(np.bitwise_count(words).sum()) + int(np.bitwise_count(bits[8 * num_words :]).sum())


def both(first: Bits | None, second: Bits | None) -> Bits | None:
    """Return the rows that belong to both sets."""
    if first is None or second is None:
        return second if first is None else first
    return first & second


def without(bits: Bits | None, removed: npt.NDArray[np.integer[Any]], num_rows: int) -> Bits:
    """Return a copy of a set of a segment of `num_rows` rows without the rows of the given numbers."""
    left = full(num_rows) if bits is None else bits.copy()
    numbers = removed.astype(np.int64)
    # Unbuffered: several of the rows may lie in the same byte.
    np.bitwise_and.at(left, numbers >> 3, ~(1 << (numbers & 7)).astype(np.uint8))
    return left


def contains(bits: Bits, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[np.bool_]:
    """Return which of the rows of the given numbers belong to a set, bool of their shape."""
    numbers = numbers.astype(np.int64)
    belongs: npt.NDArray[np.bool_] = (bits[numbers >> 3] >> (numbers & 7).astype(np.uint8) & 1).view(np.bool_)
    return belongs


def rows(bits: Bits, begin: int = 0, limit: int | None = None) -> Rows:
    """Return the row numbers of a set that are at least `begin`, uint32, ascending, at most `limit`."""
    found: list[Rows] = []
    num_found = 0
    for start in range(begin // 8, len(bits), _BLOCK):
        block = np.unpackbits(bits[start : start + _BLOCK], bitorder="little")
        numbers = np.flatnonzero(block).astype(np.uint32) + np.uint32(8 * start)
        if 8 * start < begin:
            numbers = numbers[numbers >= begin]
        found.append(numbers)
        num_found += len(numbers)
        if limit is not None and num_found >= limit:
            break
    every = np.concatenate(found) if found else np.empty(0, np.uint32)
    return every if limit is None else every[:limit]
