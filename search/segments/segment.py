"""A segment: rows of a shard that never change, with the index over their codes and the columns that hits show."""

import secrets
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, check_codes, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import NO_HIT, Ids, ShardAnswer
from orbithash.search.index.row_index import ALL_ROWS, CodeRows, RowIndex, RowMask, build_row_index
from orbithash.search.segments.chunks import USUAL
from orbithash.search.segments.columns import Columns
from orbithash.search.segments.ids import RowNumbers, SortedIds
from orbithash.v1 import search_pb2

__all__ = ["Segment"]

Rows = npt.NDArray[np.integer]


# The field `code` of a Hit; its length follows.
_CODE_TAG = bytes([search_pb2.Hit.CODE_FIELD_NUMBER << 3 | 2])
# Begins the names of segments in memory.
_IN_MEMORY = "memory-"


class Segment:
    """Rows of a shard, numbered from 0 in the order of their ids. Immutable, safe for concurrent calls.

    Attributes:
        name: identifies the content: hash of the files; a random name for a segment in memory.
        bits: bits of a code.
        num_rows: number of rows.
        ids: the ids of the rows.
        code_rows: the distinct codes and the rows of each.
        index: the name of the index over the codes.
        is_exact: whether the index is exact.
        columns: the columns of the rows.
    """

    def __init__(
        self,
        name: str,
        bits: int,
        ids: SortedIds,
        code_rows: CodeRows,
        index: str,
        row_index: RowIndex,
        columns: Columns,
        code_numbers: npt.NDArray[np.uint32] | None = None,
    ) -> None:
        """Take the parts of a segment; use `build`, `write_segment` or `open_segment`.

        `code_numbers`: number of the code of each row, uint32 [N]; None: computed when it is needed first.
        """
        self.name = name
        self.bits = bits
        self.num_rows = ids.num_rows
        self.ids = ids
        self.code_rows = code_rows
        self.index = index
        self.is_exact = row_index.is_exact
        self.columns = columns
        self._row_index = row_index
        self._code_numbers = code_numbers

    @classmethod
    def build(
        cls, ids: Ids, codes: Codes, bits: int, index: str = "exact", columns: Columns | None = None
    ) -> "Segment":
        """Return a segment in memory.

        Args:
            ids: uint64 [N], unique, in any order.
            codes: uint8 [N, ceil(bits/8)], in the order of `ids`.
            bits: bits of a code.
            index: the name of an index; see `build_row_index`.
            columns: columns of the rows in the order of ascending ids; None: no columns.

        Raises:
            InputError: ids and codes have the wrong shape, an id occurs twice, or the index is unknown.
        """
        check_bits(bits)
        check_codes(codes, bits)
        if ids.dtype != np.uint64 or ids.ndim != 1 or codes.ndim != 2 or len(ids) != len(codes):
            raise InputError(
                f"a segment requires ids uint64 [N] and codes uint8 [N, B], got ids {ids.dtype} {list(ids.shape)} and "
                f"codes {list(codes.shape)}"
            )
        if not is_ascending(ids):
            order = np.argsort(ids, kind="stable")
            ids, codes = ids[order], codes[order]
        check_unique(ids)
        code_rows = CodeRows.build(codes, bits)
        row_index = build_row_index(index, code_rows, bits)
        sorted_ids = SortedIds.of(ids)
        name = f"{_IN_MEMORY}{secrets.token_hex(16)}"
        return cls(name, bits, sorted_ids, code_rows, index, row_index, columns or Columns(len(ids), {}))

    def __repr__(self) -> str:
        return f"Segment({self.name!r}, rows={self.num_rows}, bits={self.bits})"

    @property
    def is_mapped(self) -> bool:
        """Whether the segment is mapped from files."""
        return not self.name.startswith(_IN_MEMORY)

    @property
    def first_id(self) -> int:
        """The smallest id; 0 without rows."""
        return self.ids.base

    @property
    def last_id(self) -> int:
        """The largest id; -1 without rows."""
        return self.ids.last

    @property
    def num_bytes(self) -> int:
        """Bytes of what a search reads, in memory or mapped: ids, codes, rows of codes and tables of the index."""
        code_rows = sum(array.nbytes for array in self.code_rows if array is not None)
        return self.ids.num_bytes + code_rows + self._row_index.num_bytes

    def ids_of(self, rows: Rows) -> Ids:
        """Return the ids of rows, uint64 in the shape of `rows`."""
        return self.ids.of_rows(rows)

    def rows_of(self, ids: Ids) -> RowNumbers:
        """Return the row of each id, int64 [N]; -1 for ids that are not in the segment."""
        return self.ids.rows_of(ids)

    def codes_of(self, rows: Rows) -> Codes:
        """Return the codes of rows, uint8 [N, ceil(bits/8)]."""
        if self._code_numbers is None:
            self._code_numbers = code_numbers(self.code_rows)
        words = self.code_rows.words[self._code_numbers[rows]]
        return words.astype(">u8").view(np.uint8)[:, : num_bytes(self.bits)]

    def search(
        self,
        queries: Codes,
        k: int,
        radius: int | None = None,
        after: tuple[int, int] | None = None,
        mask: RowMask = ALL_ROWS,
    ) -> ShardAnswer:
        """Return the k nearest rows of each query among those that the mask lets pass, ordered by (distance, id).

        Args:
            queries: uint8 [Q, ceil(bits/8)].
            k: maximum number of hits of a query.
            radius: maximum distance in bits, inclusive; None: no limit.
            after: return only rows after this (distance, id) in the order; None: from the first.
            mask: the rows that exist and those that pass a filter.
        """
        if after is not None:
            # The last row whose id is not above the cursor's; -1 if there is none.
            after = after[0], self.ids.num_up_to(after[1]) - 1
        distances, rows, ties = self._row_index.search(queries, k, radius, after, mask)
        ids = self.ids.of_rows(rows)
        if distances.size and distances[:, -1].max() == NO_HIT:
            ids[distances == NO_HIT] = 0
        return ShardAnswer(distances, ids, ties, num_rows=self.num_rows)

    def hits(self, rows: Rows, include: Sequence[str] = ()) -> list[bytes]:
        """Return rows as serialised `orbithash.v1.Hit` without rank, distance and score, in the order of `rows`.

        Args:
            rows: row numbers, which may repeat.
            include: any of uri, caption, footprint and code. The concatenation of two serialised messages is their
                union, so that a caller can append further fields, such as a thumbnail.
        """
        names = [*USUAL, *(name for name in include if name != "code")]
        messages = self.columns.messages(rows, names, self.ids.of_rows(rows))
        if "code" in include:
            tag = _CODE_TAG + bytes([num_bytes(self.bits)])
            messages = [
                message + tag + code.tobytes() for message, code in zip(messages, self.codes_of(rows), strict=True)
            ]
        return messages


def is_ascending(ids: Ids) -> bool:
    """Return whether ids are in ascending order; equal ids may follow each other."""
    return bool((ids[1:] >= ids[:-1]).all())


def check_unique(ids: Ids) -> None:
    """Raise `InputError` if one of the ascending ids occurs twice."""
    if num_repeated := int((ids[1:] == ids[:-1]).sum()):
        raise InputError(f"a segment requires unique ids; {num_repeated:,} of {len(ids):,} ids are repeated")


def code_numbers(code_rows: CodeRows) -> npt.NDArray[np.uint32]:
    """Return the number of the code of each row, uint32 [N]."""
    numbers = np.empty(len(code_rows.rows), np.uint32)
    numbers_in_order = np.arange(len(code_rows.words), dtype=np.uint32)
    if code_rows.starts is not None:
        numbers_in_order = np.repeat(numbers_in_order, np.diff(code_rows.starts))
    numbers[code_rows.rows] = numbers_in_order
    return numbers
