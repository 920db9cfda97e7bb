"""Binary codes of class indices: what DHCL appends to a hash code.

Natural binary is the paper's; neighbouring classes can differ in one bit or in all of them, so the others are offered.
"""

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError

__all__ = ["LABEL_CODES", "label_table"]

LABEL_CODES = ("none", "binary", "gray", "one-hot")


def label_table(kind: str, num_classes: int) -> npt.NDArray[np.bool_]:
    """One row of bits for each class: bool [C, L], the most significant bit first; L = 0 for `none`."""
    if kind not in LABEL_CODES:
        raise InputError(f"unknown label code {kind!r}; there are {', '.join(LABEL_CODES)}")
    if kind == "none":
        return np.zeros((num_classes, 0), np.bool_)
    if kind == "one-hot":
        return np.eye(num_classes, dtype=np.bool_)
    index = np.arange(num_classes)
    if kind == "gray":
        index = index ^ (index >> 1)
    width = max(1, (num_classes - 1).bit_length())
    return (index[:, None] >> np.arange(width - 1, -1, -1) & 1).astype(np.bool_)
