"""The number of rows at each distance of a code."""

# numba reads the types from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# ruff: noqa: ANN001, D417
import numpy as np

from orbithash.encoders.compiled import Kernel, count_ones

__all__ = ["add_distances"]


@Kernel
def add_distances(query, words, starts, rows, begin, end, chosen, counts) -> None:
    """Add the rows of the codes from `begin` to `end` to the number of rows at each distance, int64 [bits + 1].

    Args:
        query: uint64 [W], the code to which distances are measured.
        words, starts, rows: arrays of `CodeRows`, flat; without `starts`, each code has one row.
        chosen: bits of the rows that are counted; empty: all.
    """
    num_words = len(query)
    for code in range(begin, end):
        distance = np.uint64(0)
        for word in range(num_words):
            distance += count_ones(words[code * num_words + word] ^ query[word])
        first, last = code, code + 1
        if len(starts):
            first, last = starts[code], starts[code + 1]
        if len(chosen):
            for place in range(first, last):
                row = rows[place]
                counts[distance] += (chosen[row >> 3] >> (row & 7)) & 1
        else:
            counts[distance] += last - first
