"""Conditions over the columns of a segment, evaluated in chunks of rows with the three-valued logic of SQL.

A condition is bound to the columns of a segment once, and then tested for one chunk of rows after the other. AND and OR
test their cheap parts first, and the expensive ones only for the rows that the cheap ones leave undecided.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.search.segments.stop import Stop

__all__ = [
    "CHEAP",
    "EXPENSIVE",
    "MODERATE",
    "ColumnCondition",
    "Condition",
    "FilterColumns",
    "Junction",
    "Mask",
    "Negation",
    "Test",
    "Truth",
    "in_chunks",
    "part_of",
]

Mask = npt.NDArray[np.bool_]

# Costs of a condition for one row.
CHEAP, MODERATE, EXPENSIVE = range(3)

# Rows of the first, the smallest and the largest chunk of an evaluation. Powers of two: chunks fill whole bytes of
# bits, and none crosses a border of the chunks in which a segment keeps its columns.
_FIRST_CHUNK, _MIN_CHUNK, _MAX_CHUNK = 2**14, 2**10, 2**16
# The size of chunks is adapted so that each takes a time between these, in seconds.
_SHORT_S, _LONG_S = 0.005, 0.02

# Values are picked from a column if at most one row in this many is still undecided; else all are compared.
_PICK = 4


class Truth(NamedTuple):
    """Where a condition is true and where it is false, bool [n] each. Neither: it is unknown."""

    yes: Mask
    no: Mask

    def inverted(self) -> "Truth":
        """Return the truth of the negation."""
        return Truth(self.no, self.yes)


class FilterColumns(Protocol):
    """What is asked of the columns of a segment."""

    def array(self, name: str) -> Any:
        """Return a column as an Arrow array or chunked array, in the order of the rows."""

    def boxes(self) -> npt.NDArray[np.float32] | None:
        """Return west, south, east and north of the box of each row, float32 [4, N]; None: no row has a footprint.

        A box contains the footprint of its row, or the point (lon, lat) if the row has none. It is infinite if the
        footprint is empty or has coordinates that are not finite. NaN: the row has no place.
        """


Test = Callable[[int, int, Mask | None], Truth]
"""Tests the rows from `begin` to before `end`. With a mask, the truth of rows outside it may be anything."""


class Condition(Protocol):
    """A condition that is true, false or unknown for each row."""

    @property
    def cost(self) -> int:
        """Cost of testing one row: `CHEAP`, `MODERATE` or `EXPENSIVE`."""

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""


@dataclass(frozen=True)
class ColumnCondition:
    """A condition on the values of one column.

    Attributes:
        column: name of the column.
        type: type of its values.
        kernel: returns for an Arrow array of values an Arrow array of booleans (null: unknown).
        cost: cost of testing one row.
    """

    column: str
    type: pa.DataType
    kernel: Callable[[pa.Array], pa.Array]
    cost: int

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""
        array = columns.array(self.column)
        if pa.types.is_dictionary(array.type):
            return self._bind_dictionary(array, stop)
        if array.type != self.type:
            array = array.cast(self.type)

        def test(begin: int, end: int, among: Mask | None) -> Truth:
            values = part_of(array, begin, end)
            if among is None or self.cost == CHEAP or np.count_nonzero(among) * _PICK > len(among):
                return _truth(self.kernel(values))
            rows = np.flatnonzero(among)
            return _spread(_truth(self.kernel(values.take(pa.array(rows)))), rows, len(among))

        return test

    def _bind_dictionary(self, array: Any, stop: Stop) -> Test:
        """Return a test that compares each distinct value once, and then looks up the codes of the values."""
        array = pa.chunked_array([array]) if isinstance(array, pa.Array) else array
        chunks = array.unify_dictionaries().chunks
        dictionary = chunks[0].dictionary if chunks else pa.array([], array.type.value_type)
        num_values = len(dictionary)
        codes = pa.chunked_array([chunk.indices for chunk in chunks], array.type.index_type)
        # The truth for null is the last entry.
        values = pa.concat_arrays([dictionary.cast(self.type), pa.nulls(1, self.type)])

        def test_values(begin: int, end: int, among: Mask | None) -> Truth:
            return _truth(self.kernel(values.slice(begin, end - begin)))

        parts = [truth for _, truth in in_chunks(test_values, len(values), stop)]
        yes, no = (np.concatenate(part) for part in zip(*parts, strict=True))

        def test(begin: int, end: int, among: Mask | None) -> Truth:
            part = part_of(codes, begin, end)
            if part.null_count:
                # The type of the codes may be too small for one more.
                part = pc.fill_null(part.cast(pa.int64()), num_values)
            numbers = part.to_numpy()
            return Truth(yes.take(numbers), no.take(numbers))

        return test


@dataclass(frozen=True)
class Negation:
    """NOT of a condition."""

    inner: Condition

    @property
    def cost(self) -> int:
        """Cost of testing one row."""
        return self.inner.cost

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""
        test = self.inner.bind(columns, stop)
        return lambda begin, end, among: test(begin, end, among).inverted()


class Junction:
    """AND or OR of conditions."""

    def __init__(self, is_and: bool, parts: Sequence[Condition]) -> None:
        self._is_and = is_and
        self._parts = sorted(parts, key=lambda part: part.cost)
        self.cost = self._parts[-1].cost

    def bind(self, columns: FilterColumns, stop: Stop) -> Test:
        """Return the test of the rows of one segment, for one thread."""
        # a OR b is NOT (NOT a AND NOT b).
        parts = self._parts if self._is_and else [Negation(part) for part in self._parts]
        tests = [part.bind(columns, stop) for part in parts]

        def test(begin: int, end: int, among: Mask | None) -> Truth:
            yes, no = tests[0](begin, end, among)
            for part in tests[1:]:
                stop.check()
                undecided = ~no if among is None else among & ~no
                if not undecided.any():
                    break
                truth = part(begin, end, undecided)
                yes, no = yes & truth.yes, no | truth.no
            return Truth(yes, no) if self._is_and else Truth(no, yes)

        return test


def in_chunks(test: Test, num_rows: int, stop: Stop) -> Iterator[tuple[int, Truth]]:
    """Test rows 0 to `num_rows` in chunks; yield the first row of each chunk, a multiple of 8, and its truth.

    Raises `Stopped` when `stop` is set, at the latest after the chunk that is being tested.
    """
    begin, size = 0, _FIRST_CHUNK
    while begin < num_rows:
        stop.check()
        end = min((begin // size + 1) * size, num_rows)
        started = time.monotonic()
        yield begin, test(begin, end, None)
        elapsed = time.monotonic() - started
        if elapsed < _SHORT_S:
            size = min(2 * size, _MAX_CHUNK)
        elif elapsed > _LONG_S:
            size = max(size // 2, _MIN_CHUNK)
        begin = end


def part_of(array: Any, begin: int, end: int) -> pa.Array:
    """Return rows of an Arrow array or chunked array as an array, without copying those that lie in one chunk."""
    part = array.slice(begin, end - begin)
    if isinstance(part, pa.ChunkedArray):
        part = part.chunk(0) if part.num_chunks == 1 else part.combine_chunks()
    return part


def _truth(passes: pa.Array) -> Truth:
    """Return the truth of an Arrow array of booleans."""
    yes = pc.fill_null(passes, False).to_numpy(zero_copy_only=False)
    if not passes.null_count:
        return Truth(yes, ~yes)
    return Truth(yes, ~pc.fill_null(passes, True).to_numpy(zero_copy_only=False))


def _spread(truth: Truth, rows: npt.NDArray[np.intp], num_rows: int) -> Truth:
    """Return the truth of all rows of a chunk from that of some; the others are unknown."""
    spread = Truth(np.zeros(num_rows, np.bool_), np.zeros(num_rows, np.bool_))
    spread.yes[rows], spread.no[rows] = truth
    return spread
