"""A scan in numpy in the place of `search.index.code_rows` and `search.index.row_index` until they are there."""

# ruff: noqa: D101, D102, D103
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, hamming
from orbithash.search.index.answers import NO_HIT, Counts, Distances

__all__ = ["CodeRows", "RowAnswer", "RowIndex", "RowMask", "build_row_index"]

Bits = npt.NDArray[np.uint8]


class RowMask(NamedTuple):
    alive: Bits | None = None
    passing: Bits | None = None
    few: Any = None


class RowAnswer(NamedTuple):
    distances: Distances
    rows: npt.NDArray[np.uint32]
    ties: Counts


class CodeRows(NamedTuple):
    words: npt.NDArray[np.uint64]
    starts: npt.NDArray[np.uint32] | None
    rows: npt.NDArray[np.uint32]

    @classmethod
    def build(cls, codes: Codes, bits: int) -> "CodeRows":
        padded = np.zeros((len(codes), -(-codes.shape[1] // 8) * 8), np.uint8)
        padded[:, : codes.shape[1]] = codes
        words = padded.view(">u8").astype(np.uint64)
        order = np.lexsort(words.T[::-1])
        words = words[order]
        is_first = np.append([True], (words[1:] != words[:-1]).any(axis=1))[: len(words)]
        starts = np.append(np.flatnonzero(is_first), len(words)).astype(np.uint32)
        return cls(words[is_first], None if is_first.all() else starts, order.astype(np.uint32))


class RowIndex:
    is_exact = True

    def __init__(self, rows: CodeRows, bits: int) -> None:
        counts = 1 if rows.starts is None else np.diff(rows.starts)
        width = (bits + 7) // 8
        self._codes = np.empty((len(rows.rows), width), np.uint8)
        self._codes[rows.rows] = np.repeat(rows.words.astype(">u8").view(np.uint8)[:, :width], counts, axis=0)

    def search(
        self, queries: Codes, k: int, radius: int | None, after: tuple[int, int] | None, mask: RowMask
    ) -> RowAnswer:
        num_rows, count = len(self._codes), min(k, len(self._codes))
        distances = np.full((len(queries), count), NO_HIT, np.int32)
        rows = np.zeros((len(queries), count), np.uint32)
        ties = np.zeros(len(queries), np.int64)
        searched = np.ones(num_rows, np.bool_)
        for bits in (mask.alive, mask.passing):
            if bits is not None:
                searched &= np.unpackbits(bits, count=num_rows, bitorder="little").astype(np.bool_)
        for query, all_distances in enumerate(hamming(queries, self._codes)):
            passes = searched.copy()
            if radius is not None:
                passes &= all_distances <= radius
            if after is not None:
                at = (all_distances == after[0]) & (np.arange(num_rows) > after[1])
                passes &= (all_distances > after[0]) | at
            passing = np.flatnonzero(passes)
            passing = passing[np.argsort(all_distances[passing], kind="stable")]
            first = passing[:count]
            distances[query, : len(first)], rows[query, : len(first)] = all_distances[first], first
            if len(first):
                ties[query] = (all_distances[passing] == all_distances[first[-1]]).sum()
        return RowAnswer(distances, rows, ties)

    def arrays(self) -> dict[str, npt.NDArray[Any]]:
        return {}

    @property
    def num_bytes(self) -> int:
        return 0


def build_row_index(
    name: str, rows: CodeRows, bits: int, arrays: Mapping[str, npt.NDArray[Any]] | None = None
) -> RowIndex:
    return RowIndex(rows, bits)
