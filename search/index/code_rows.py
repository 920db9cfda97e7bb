"""The distinct codes of a segment in ascending order, and the rows of each."""

from typing import Any, NamedTuple

import numba
import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes
from orbithash.search.index.compiled import Kernel, read_only

__all__ = ["Bits", "CodeRows", "FewRows", "RowNumbers", "Words", "few_rows", "words_of"]

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
        order, num_distinct = _sort_codes(words)
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


def words_of(codes: Codes) -> Words:
    """Return codes uint8 [N, B] as words uint64 [N, ceil(B/8)], which sort as the bytes do."""
    count, width = codes.shape
    if width % 8:
        padded = np.zeros((count, width + -width % 8), np.uint8)
        padded[:, :width] = codes
        codes = padded
    return np.ascontiguousarray(codes).view(">u8").astype(np.uint64)


@numba.njit(nogil=True)
def _radix_sort(keys, numbers, spare_keys, spare_numbers):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Sort `keys` uint64 and `numbers` with them, stably, by bytes from the lowest. Returns the sorted arrays."""
    counts = np.zeros((8, 256), np.int64)
    for key in keys:
        for digit in range(8):
            counts[digit, (key >> np.uint64(8 * digit)) & np.uint64(255)] += 1
    for digit in range(8):
        shift, places = np.uint64(8 * digit), counts[digit]
        if places.max() == len(keys):
            continue
        total = 0
        for value in range(256):
            count = places[value]
            places[value] = total
            total += count
        for i in range(len(keys)):
            value = (keys[i] >> shift) & np.uint64(255)
            place = places[value]
            places[value] = place + 1
            spare_keys[place], spare_numbers[place] = keys[i], numbers[i]
        keys, spare_keys = spare_keys, keys
        numbers, spare_numbers = spare_numbers, numbers
    return keys, numbers


@Kernel
def _sort_codes(words):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
    """Return the numbers of codes uint64 [N, W] in the order of (code, number), and the number of distinct codes."""
    count, num_words = words.shape
    order = np.arange(count).astype(np.uint32)
    keys, spare_keys, spare = words[:, 0].copy(), np.empty(count, np.uint64), np.empty(count, np.uint32)
    keys, order = _radix_sort(keys, order, spare_keys, spare)
    spare_keys, spare = np.empty(count, np.uint64), np.empty(count, np.uint32)
    is_first = np.ones(count, np.bool_)
    for i in range(1, count):
        is_first[i] = keys[i] != keys[i - 1]
    for word in range(1, num_words):
        start = 0
        while start < count:
            stop = start + 1
            while stop < count and not is_first[stop]:
                stop += 1
            for i in range(start, stop):
                keys[i] = words[order[i], word]
            if stop - start > _SHORT_RUN:
                run = slice(start, stop)
                sorted_keys, sorted_order = _radix_sort(keys[run], order[run], spare_keys[run], spare[run])
                # The sorted arrays may be those given or the spare ones; copying an array to itself is harmless.
                keys[run] = sorted_keys
                order[run] = sorted_order
            else:
                for i in range(start + 1, stop):
                    key, number, j = keys[i], order[i], i
                    while j > start and keys[j - 1] > key:
                        keys[j], order[j] = keys[j - 1], order[j - 1]
                        j -= 1
                    keys[j], order[j] = key, number
            for i in range(start + 1, stop):
                is_first[i] = keys[i] != keys[i - 1]
            start = stop
    return order, is_first.sum()


@Kernel
def _distinct_codes(words, order, num_distinct):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
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
def _select_rows(words, starts, rows, passing):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN202
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
