"""Search for rows with an index of FAISS, which knows only distinct codes."""

from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, num_bytes
from orbithash.encoders.compiled import read_only
from orbithash.search.index.answers import NO_HIT
from orbithash.search.index.code_rows import CodeRows
from orbithash.search.index.exact import Scope, scan_few
from orbithash.search.index.indexes import build_index
from orbithash.search.index.nearest import first_rows
from orbithash.search.index.row_types import RowAnswer, RowMask

__all__ = ["FaissRows"]

# Codes that are requested beyond the number of rows: the codes at the distance of the last hit are known to be complete
# only if a farther one was found.
_MORE_CODES = 64


class FaissRows:
    """Index of FAISS over the rows of a segment."""

    def __init__(self, name: str, rows: CodeRows, bits: int) -> None:
        """Build the index of this name; see `build_index`."""
        self._bits, self._rows = bits, rows
        self._starts = read_only(np.empty(0, np.uint32) if rows.starts is None else rows.starts)
        codes = np.ascontiguousarray(rows.words.astype(">u8").view(np.uint8)[:, : num_bytes(bits)])
        self._num_bytes = codes.nbytes
        self._index = build_index(name, codes)
        self.is_exact = self._index.is_exact

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        """Return nothing: the index is built again."""
        return {}

    @property
    def num_bytes(self) -> int:
        """Bytes of the codes in the index; lists and graphs of approximate indexes are not counted."""
        return self._num_bytes

    def search(
        self, queries: Codes, k: int, radius: int | None, after: tuple[int, int] | None, mask: RowMask
    ) -> RowAnswer:
        """See `RowIndex.search`."""
        num_rows = len(self._rows.rows)
        if mask.few is not None:
            return scan_few(mask.few, num_rows, self._bits, queries, k, radius, after, mask.alive)
        scope = Scope.of(self._bits, queries, k, radius, after, mask.alive, mask.passing)
        answer = RowAnswer.empty(len(queries), min(k, num_rows))
        if not num_rows or scope.radius < 0:
            return answer
        if radius is not None and self._index.is_quick_within(scope.radius):
            found = self._index.within(queries, scope.radius)
            for query in range(len(queries)):
                part = slice(found.limits[query], found.limits[query + 1])
                self._keep(answer, query, found.distances[part], found.numbers[part], scope)
            return answer
        pending, num_codes = np.arange(len(queries)), min(k + _MORE_CODES, len(self._rows.words))
        while len(pending):
            near = self._index.nearest(queries[pending], num_codes)
            is_complete = [
                self._keep(answer, query, distances, numbers, scope) or num_codes == len(self._rows.words)
                for query, distances, numbers in zip(pending.tolist(), near.distances, near.numbers, strict=True)
            ]
            pending = pending[~np.array(is_complete)]
            num_codes = min(4 * num_codes, len(self._rows.words))
        return answer

    def _keep(self, answer: RowAnswer, query: int, distances: Any, numbers: Any, scope: Scope) -> bool:
        """Write the nearest rows of the codes into the answer; return whether farther codes cannot change it."""
        is_code = numbers >= 0
        distances, numbers = distances[is_code].astype(np.int64), numbers[is_code].astype(np.int64)
        answer.distances[query], answer.rows[query] = NO_HIT, 0
        size, answer.ties[query] = first_rows(
            distances, numbers, self._starts, read_only(self._rows.rows), *scope, answer.distances[query],
            answer.rows[query],
        )  # fmt: skip
        farthest = int(distances.max(initial=-1))
        if farthest > scope.radius:
            return True
        is_full = size == len(answer.distances[query])
        # An approximate index decides itself which codes it compares.
        return is_full and (not self.is_exact or farthest > answer.distances[query, -1])
