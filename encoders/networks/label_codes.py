"""Binary codes of class indices, which DHCL appends to a hash code.

The paper uses natural binary, in which two classes may differ in one bit or in all bits; the other codes are additions.
"""

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError

__all__ = ["LABEL_CODES", "label_table"]

LABEL_CODES = ("none", "binary", "gray", "one-hot", "error-correcting")

# Smallest Hamming distance between two labels of the error-correcting code.
MIN_DISTANCE = 4


def label_table(kind: str, num_classes: int) -> npt.NDArray[np.bool_]:
    """Return the label bits of each class, bool [C, L], the most significant bit first; L is 0 for `none`."""
    if kind not in LABEL_CODES:
        raise InputError(f"label code is {kind!r}; allowed are {', '.join(LABEL_CODES)}")
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
    """Return the shortest words with distances of at least `MIN_DISTANCE`, the first ones in numerical order."""
    for width in range(MIN_DISTANCE, 33):
        words: list[np.uint32] = []
        free = np.arange(2**width, dtype=np.uint32)
        while len(words) < num_words and len(free):
            words.append(free[0])
            free = free[np.bitwise_count(free ^ free[0]) >= MIN_DISTANCE]
        if len(words) == num_words:
            return _bits(np.array(words, np.int64), width)
    raise InputError(f"the error-correcting label code cannot hold {num_words} classes; use binary or gray")
