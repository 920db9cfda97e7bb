"""Binary codes of class indices: what DHCL appends to a hash code.

Natural binary is the paper's; neighbouring classes can differ in one bit or in all of them, so the others are offered.
"""

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError

__all__ = ["LABEL_CODES", "label_table"]

LABEL_CODES = ("none", "binary", "gray", "one-hot", "error-correcting")

# Bits in which any two labels of the error-correcting code differ, at least.
MIN_DISTANCE = 4


def label_table(kind: str, num_classes: int) -> npt.NDArray[np.bool_]:
    """One row of bits for each class: bool [C, L], the most significant bit first; L = 0 for `none`."""
    if kind not in LABEL_CODES:
        raise InputError(f"unknown label code {kind!r}; there are {', '.join(LABEL_CODES)}")
    if kind == "none":
        return np.zeros((num_classes, 0), np.bool_)
    if kind == "one-hot":
        return np.eye(num_classes, dtype=np.bool_)
    if kind == "error-correcting":
        return _lexicode(num_classes)
    index = np.arange(num_classes)
    if kind == "gray":
        index = index ^ (index >> 1)
    return _bits(index, max(1, (num_classes - 1).bit_length()))


def _bits(numbers: npt.NDArray[np.integer], width: int) -> npt.NDArray[np.bool_]:
    return (numbers[:, None] >> np.arange(width - 1, -1, -1) & 1).astype(np.bool_)


def _lexicode(num_words: int) -> npt.NDArray[np.bool_]:
    """The first words, in numerical order, that differ from all before in `MIN_DISTANCE` bits: of the least width."""
    for width in range(MIN_DISTANCE, 33):
        words: list[np.uint32] = []
        free = np.arange(2**width, dtype=np.uint32)
        while len(words) < num_words and len(free):
            words.append(free[0])
            free = free[np.bitwise_count(free ^ free[0]) >= MIN_DISTANCE]
        if len(words) == num_words:
            return _bits(np.array(words, np.int64), width)
    raise InputError(f"{num_words} classes are too many for the error-correcting label code; take binary or gray")
