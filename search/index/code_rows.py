"""The distinct codes of a segment in ascending order, and the rows of each."""

# numba reads the types of kernels from the arguments.
# mypy: disable-error-code="no-untyped-def,no-untyped-call,misc,untyped-decorator"
# ruff: noqa: ANN001, ANN202
from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes, words_of
from orbithash.encoders.compiled import Kernel, read_only

__all__ = ["Bits", "CodeRows", "FewRows", "RowNumbers", "Words", "few_rows"]

Words = npt.NDArray[np.uint64]
RowNumbers = npt.NDArray[np.uint32]
# Sets of rows: uint8 [ceil(N/8)] in little bit order; the bit of row r is set if r belongs to the set.
Bits = npt.NDArray[np.uint8]

# Runs of codes that agree in their first words are sorted by insertion up to this length.
_SHORT_RUN = 24

_NO_STARTS: Any = read_only(np.empty(0, np.uint32))


class CodeRows(NamedTuple):
    """The distinct codes of N rows in ascending order of their bytes, and the rows of each code.

    A row is identified by its number: the rank of its id in the segment. All arrays are read-only.

    Attributes:
        words: uint64 [D, W], distinct codes as big-endian words, filled up with zero bits.
        starts: uint32 [D + 1]: code c has the rows from starts[c] to starts[c + 1] in `rows`; None: one row per code.
        rows: uint32 [N], row numbers in the order of (code, row).
    """

    words: Words
    starts: npt.NDArray[np.uint32] | None
    rows: RowNumbers

    @classmethod
    def build(cls, codes: Codes, bits: int) -> "CodeRows":
        """Return the distinct codes of rows; row r has the code codes[r], uint8 [N, ceil(bits/8)]."""
        check_codes(codes, check_bits(bits))
        words = words_of(codes)
        order = np.arange(len(words), dtype=np.uint32)
        keys, is_first = words[:, 0].copy(), np.ones(len(words), np.bool_)
        num_distinct = _sort_codes(words, order, np.empty_like(order), keys, np.empty_like(keys), is_first)
        distinct, starts = _distinct_codes(words, order, num_distinct)
        has_repeats = num_distinct < len(order)
        return cls(read_only(distinct), read_only(starts) if has_repeats else None, read_only(order))


class FewRows(NamedTuple):
    """The rows of a small selection: row numbers uint32 [N] and the code of each, uint64 [N, W]."""

    rows: RowNumbers
    words: Words


def few_rows(rows: CodeRows, passing: Bits) -> FewRows:
    """Return the rows of a selection with their codes, in the order of (code, row)."""
    starts = _NO_STARTS if rows.starts is None else read_only(rows.starts)
    selected, words = _select_rows(read_only(rows.words), starts, read_only(rows.rows), read_only(passing))
    return FewRows(read_only(selected), read_only(words))


@numba.njit(nogil=True)
def _radix_sort(keys, numbers, spare_keys, spare_numbers, start, stop):
    """Sort a part of `keys` uint64, and of `numbers` with it, stably, by bytes from the lowest."""
    counts = np.zeros((8, 256), np.int64)
    for i in range(start, stop):
        for digit in range(8):
            counts[digit, (keys[i] >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    is_moved = False
    for digit in range(8):
        shift, total, largest = np.uint64(8 * digit), start, 0
        for value in range(256):
            count = counts[digit, value]
            largest = max(largest, count)
            counts[digit, value] = total
            total += count
        if largest == stop - start:
            continue
        for i in range(start, stop):
            value = (keys[i] >> shift) & np.uint64(255)
            place = counts[digit, value]
            counts[digit, value] = place + 1
            spare_keys[place], spare_numbers[place] = keys[i], numbers[i]
        keys, spare_keys = spare_keys, keys
        numbers, spare_numbers = spare_numbers, numbers
        is_moved = not is_moved
    if is_moved:
        for i in range(start, stop):
            spare_keys[i], spare_numbers[i] = keys[i], numbers[i]


@Kernel
def _sort_codes(words, order, spare_order, keys, spare_keys, is_first):
    """Sort `order`, the numbers of codes uint64 [N, W], by (code, number); return the number of distinct codes.

    `keys` has the first words; `is_first` becomes true for the first number of each code.
    """
    count, num_words = words.shape
    num_distinct = 0
    for word in range(num_words):
        start = num_distinct = 0
        while start < count:
            stop = start + 1
            while stop < count and (word == 0 or not is_first[stop]):
                stop += 1
            if word > 0:
                for i in range(start, stop):
                    keys[i] = words[order[i], word]
            if stop - start > _SHORT_RUN:
                _radix_sort(keys, order, spare_keys, spare_order, start, stop)
            else:
                for i in range(start + 1, stop):
                    key, number, j = keys[i], order[i], i
                    while j > start and keys[j - 1] > key:
                        keys[j], order[j] = keys[j - 1], order[j - 1]
                        j -= 1
                    keys[j], order[j] = key, number
            num_distinct += 1
            for i in range(start + 1, stop):
                is_first[i] = keys[i] != keys[i - 1]
                num_distinct += is_first[i]
            start = stop
    return num_distinct


@Kernel
def _distinct_codes(words, order, num_distinct):
    """Return the distinct codes in order, and the place in `order` of the first row of each, and of the end."""
    count, num_words = words.shape
    distinct = np.empty((num_distinct, num_words), np.uint64)
    starts = np.empty(num_distinct + 1, np.uint32)
    code = -1
    for place in range(count):
        row = order[place]
        is_new = code < 0
        for word in range(num_words):
            is_new = is_new or distinct[code, word] != words[row, word]
        if is_new:
            code += 1
            starts[code] = place
            for word in range(num_words):
                distinct[code, word] = words[row, word]
    starts[num_distinct] = count
    return distinct, starts


@Kernel
def _select_rows(words, starts, rows, passing):
    """Return the row numbers of the set `passing` and their codes, in the order of `rows`."""
    num_selected = 0
    for byte in passing:
        for bit in range(8):
            num_selected += (byte >> bit) & 1
    selected = np.empty(num_selected, np.uint32)
    codes = np.empty((num_selected, words.shape[1]), np.uint64)
    code, count = 0, 0
    for place in range(len(rows)):
        if len(starts):
            if place >= starts[code + 1]:
                code += 1
        else:
            code = place
        row = rows[place]
        if (passing[row >> 3] >> (row & 7)) & 1:
            selected[count] = row
            for word in range(words.shape[1]):
                codes[count, word] = words[code, word]
            count += 1
    return selected[:count], codes[:count]
