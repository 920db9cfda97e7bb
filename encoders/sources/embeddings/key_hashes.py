"""Hashes of many keys at once, to find keys that occur twice with 8 bytes for each."""

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["hash_keys", "repeated"]

Hashes = npt.NDArray[np.uint64]

# The multipliers of MurmurHash3's last step.
_FIRST, _SECOND = np.uint64(0xFF51AFD7ED558CCD), np.uint64(0xC4CEB9FE1A85EC53)
_SHIFT = np.uint64(33)


def hash_keys(keys: Any) -> Hashes:
    """Return hashes uint64 [N] of an Arrow array of texts without nulls; equal texts have equal hashes everywhere.

    Different texts rarely have equal hashes; someone can construct such texts.
    """
    import pyarrow as pa

    keys = keys.cast(pa.large_binary())
    offsets = np.frombuffer(keys.buffers()[1], np.int64)[keys.offset : keys.offset + len(keys) + 1]
    data = np.frombuffer(keys.buffers()[2] or b"", np.uint8)
    lengths, starts = np.diff(offsets), offsets[:-1]
    hashes = np.empty(len(keys), np.uint64)
    for length in np.unique(lengths).tolist():
        rows = np.flatnonzero(lengths == length)
        padded = np.zeros((len(rows), -(-length // 8) * 8), np.uint8)
        padded[:, :length] = data[starts[rows, None] + np.arange(length)]
        mixed = np.full(len(rows), length, np.uint64)
        for words in padded.view("<u8").T:
            mixed = _mix(mixed ^ words)
        hashes[rows] = mixed
    return hashes


def repeated(parts: Iterable[Hashes]) -> tuple[int, Hashes]:
    """Return the number of all hashes, and those that occur more than once, ascending."""
    hashes = np.sort(np.concatenate([np.empty(0, np.uint64), *parts]))
    return len(hashes), np.unique(hashes[1:][hashes[1:] == hashes[:-1]])


def _mix(values: Hashes) -> Hashes:
    # Multiplication wraps around.
    values = (values ^ (values >> _SHIFT)) * _FIRST
    values = (values ^ (values >> _SHIFT)) * _SECOND
    return values ^ (values >> _SHIFT)
