"""The indexes over the rows of a segment, by name.

"exact" and "flat" are exact: "exact" is orbithash's own (see `exact`), "flat" the linear scan of FAISS, "gpu-flat" the
same on a GPU. "ivf" and "hnsw" are approximate: they compare a query with some of the codes, so they can miss hits, and
answers depend on the number of shards and segments.
"""

from collections.abc import Mapping
from typing import Any

import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.search.index.code_rows import Bits, CodeRows, FewRows, few_rows
from orbithash.search.index.exact import ExactIndex, warm_up
from orbithash.search.index.row_types import ALL_ROWS, RowAnswer, RowIndex, RowMask

__all__ = [
    "ALL_ROWS",
    "ROW_INDEXES",
    "Bits",
    "CodeRows",
    "FewRows",
    "RowAnswer",
    "RowIndex",
    "RowMask",
    "build_row_index",
    "few_rows",
    "is_exact_index",
    "warm_up",
]

# Whether the index of a name is exact.
ROW_INDEXES = {"exact": True, "flat": True, "gpu-flat": True, "ivf": False, "hnsw": False}


def build_row_index(
    name: str, rows: CodeRows, bits: int, arrays: Mapping[str, npt.NDArray[Any]] | None = None
) -> RowIndex:
    """Return the index of this name over the rows of a segment.

    Args:
        name: one of `ROW_INDEXES`; `InputError` for others.
        rows: the codes and their rows.
        bits: bits of a code.
        arrays: what `RowIndex.arrays` of an index of this name over the same rows returned; None: build it.
    """
    if is_exact_index(name) and name == "exact":
        return ExactIndex(rows, bits, arrays)
    from orbithash.search.index.faiss_rows import FaissRows

    return FaissRows(name, rows, bits)


def is_exact_index(name: str) -> bool:
    """Return whether the index of this name is exact; `InputError` for an unknown name."""
    if name not in ROW_INDEXES:
        raise InputError(f"unknown index {name!r}; there are {', '.join(ROW_INDEXES)}")
    return ROW_INDEXES[name]
