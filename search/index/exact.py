"""The index "exact": multi-index hashing with a widening radius, and a scan where that is cheaper."""

import logging
import math
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_codes, words_of
from orbithash.encoders.compiled import flat, kernel_folder, read_only
from orbithash.encoders.errors import InputError
from orbithash.search.index.code_rows import Bits, CodeRows, FewRows, RowNumbers, Words, few_rows
from orbithash.search.index.kernels import AUTO, fill_table, search_codes
from orbithash.search.index.row_types import ALL_ROWS, RowAnswer, RowMask

__all__ = ["MIN_WORDS", "ExactIndex", "Scope", "code_parts", "scan_few", "warm_up"]

_LOG = logging.getLogger(__name__)

# Codes of fewer words together have no tables: the scan takes less than 30 us.
MIN_WORDS = 1 << 17
# Widths of the parts of a code in bits.
_MIN_PART_BITS, _MAX_PART_BITS = 4, 24
# Queries per call of the kernel, and rows of their answers together; bound its temporary memory.
_QUERIES_AT_ONCE, _ROWS_AT_ONCE = 64, 1 << 20

_NONE: Any = {kind: read_only(np.empty(0, kind)) for kind in (np.uint8, np.uint32, np.int64)}


class _Tables(NamedTuple):
    """The arrays that kernels search; see `search_codes`."""

    words: Words
    starts: npt.NDArray[np.uint32]
    rows: RowNumbers
    offsets: npt.NDArray[np.uint32]
    numbers: npt.NDArray[np.uint32]
    parts: npt.NDArray[np.int64]


class ExactIndex:
    """Index that finds the nearest rows exactly. A search uses only the calling thread, without Python's lock."""

    is_exact = True

    def __init__(
        self,
        rows: CodeRows,
        bits: int,
        arrays: Mapping[str, npt.NDArray[Any]] | None = None,
        *,
        how: int = AUTO,
        min_words: int = MIN_WORDS,
    ) -> None:
        """Build the tables, or take those that `arrays()` of an index over the same codes has returned.

        `how` and `min_words` are for tests: the way of the search, and the number of words of distinct codes from
        which on there are tables.
        """
        self._bits, self._how = bits, how
        words, starts = flat(rows.words), _NONE[np.uint32] if rows.starts is None else flat(rows.starts)
        offsets, numbers, parts = _NONE[np.uint32], _NONE[np.uint32], _NONE[np.int64]
        if rows.words.size >= max(min_words, 1):
            parts = flat(code_parts(len(rows.words), bits))
            if arrays:
                offsets, numbers = flat(arrays["offsets"]), flat(arrays["numbers"])
            else:
                offsets, numbers = _fill(words, rows.words.shape[1], parts)
        self._tables = _Tables(words, starts, flat(rows.rows), offsets, numbers, parts)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return the tables, so that a file can keep them; empty if there are none."""
        tables = self._tables
        return {"offsets": tables.offsets, "numbers": tables.numbers} if len(tables.parts) else {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the tables."""
        return int(self._tables.offsets.nbytes + self._tables.numbers.nbytes)

    def search(
        self,
        queries: Codes,
        k: int,
        radius: int | None = None,
        after: tuple[int, int] | None = None,
        mask: RowMask = ALL_ROWS,
    ) -> RowAnswer:
        """See `RowIndex.search`."""
        return self.search_counted(queries, k, radius, after, mask)[0]

    def search_counted(
        self,
        queries: Codes,
        k: int,
        radius: int | None = None,
        after: tuple[int, int] | None = None,
        mask: RowMask = ALL_ROWS,
    ) -> tuple[RowAnswer, int]:
        """Return the answer and the number of queries that were compared with all codes."""
        num_rows = len(self._tables.rows)
        if mask.few is not None:
            return scan_few(mask.few, num_rows, self._bits, queries, k, radius, after, mask.alive), len(queries)
        scope = Scope.of(self._bits, queries, k, radius, after, mask.alive, mask.passing)
        return _search(self._tables, min(k, num_rows), queries, scope, self._how)


def scan_few(
    few: FewRows,
    num_rows: int,
    bits: int,
    queries: Codes,
    k: int,
    radius: int | None,
    after: tuple[int, int] | None,
    alive: Bits | None,
) -> RowAnswer:
    """Return the nearest of a few rows of a segment of `num_rows` rows; see `RowIndex.search`."""
    tables = _Tables(
        flat(few.words), _NONE[np.uint32], flat(few.rows), _NONE[np.uint32], _NONE[np.uint32], _NONE[np.int64]
    )
    scope = Scope.of(bits, queries, k, radius, after, alive, None)
    return _search(tables, min(k, num_rows), queries, scope, AUTO)[0]


def warm_up(bits: int) -> float:
    """Compile, or load, all kernels that a segment of codes of `bits` bits needs; return the seconds."""
    begun = time.perf_counter()
    codes = np.packbits(np.eye(8, bits, dtype=np.bool_), axis=1)
    rows = CodeRows.build(np.concatenate([codes, codes]), bits)
    index = ExactIndex(rows, bits, min_words=1)
    index.search(codes[:1], 1)
    few = few_rows(rows, np.array([1, 0], np.uint8))
    index.search(codes[:1], 1, mask=RowMask(few=few))
    seconds = time.perf_counter() - begun
    _LOG.info("kernels ready in %.1f s (cache: %s)", seconds, kernel_folder(__file__))
    return seconds


def code_parts(num_codes: int, bits: int) -> npt.NDArray[np.int64]:
    """Return the bits at which the parts of a code begin, and the end, int64 [m + 1].

    A part has at most about log2(number of codes) bits, so that a bucket holds about one code or more. The first
    parts are the longer ones.
    """
    longest = min(max(math.log2(num_codes), _MIN_PART_BITS), _MAX_PART_BITS)
    num_parts = math.ceil(bits / longest)
    width, num_longer = divmod(bits, num_parts)
    ends = np.cumsum([width + (part < num_longer) for part in range(num_parts)])
    return np.concatenate([[0], ends]).astype(np.int64)


def _fill(words: Words, num_words: int, parts: npt.NDArray[np.int64]) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
    """Return the offsets and code numbers of the tables; see `search_codes`."""
    num_codes = len(words) // num_words
    sizes = [(1 << int(width)) + 1 for width in np.diff(parts)]
    offsets = np.zeros(sum(sizes), np.uint32)
    numbers = np.empty((len(sizes) - 1) * num_codes, np.uint32)
    start = 0
    for part, size in enumerate(sizes):
        # The codes are in the order of the first part.
        of_part = numbers[max(0, part - 1) * num_codes : part * num_codes]
        begin, end = int(parts[part]), int(parts[part + 1])
        fill_table(words, num_words, begin, end, offsets[start : start + size], of_part)
        start += size
    return read_only(offsets), read_only(numbers)


class Scope(NamedTuple):
    """The searched part as kernels take it: sets of rows (empty: all), the place in the order, the largest distance."""

    alive: Bits
    passing: Bits
    after_distance: int
    after_row: int
    radius: int

    @classmethod
    def of(
        cls,
        bits: int,
        queries: Codes,
        k: int,
        radius: int | None,
        after: tuple[int, int] | None,
        alive: Bits | None,
        passing: Bits | None,
    ) -> "Scope":
        """Return the scope of a search; `InputError` for queries of a wrong shape and k below 1."""
        check_codes(queries, bits)
        if queries.ndim != 2 or k < 1:
            raise InputError(
                f"a search requires queries uint8 [Q, B] and k >= 1, got shape {list(queries.shape)} and k {k}"
            )
        after_distance, after_row = (-1, -1) if after is None else after
        return cls(
            _NONE[np.uint8] if alive is None else read_only(alive),
            _NONE[np.uint8] if passing is None else read_only(passing),
            int(after_distance),
            int(after_row),
            bits if radius is None else min(int(radius), bits),
        )


def _search(tables: _Tables, width: int, queries: Codes, scope: Scope, how: int) -> tuple[RowAnswer, int]:
    """Return the answer of `width` columns, and the number of queries that were compared with all codes."""
    # A small selection has fewer rows than its segment.
    count = min(width, len(tables.rows))
    words, num_queries = words_of(queries), len(queries)
    at_once = min(_QUERIES_AT_ONCE, max(1, _ROWS_AT_ONCE // max(1, count)))
    if 0 < num_queries <= at_once and 0 < count == width and scope.radius >= 0:
        *answer, num_scanned = search_codes(words, *tables, *scope, count, how)
        return RowAnswer(*answer), num_scanned
    answer = RowAnswer.empty(num_queries, width)
    total = 0
    if count and scope.radius >= 0:
        for start in range(0, num_queries, at_once):
            part = slice(start, start + at_once)
            distances, rows, ties, num_scanned = search_codes(words[part], *tables, *scope, count, how)
            answer.distances[part, :count], answer.rows[part, :count], answer.ties[part] = distances, rows, ties
            total += num_scanned
    return answer, total
