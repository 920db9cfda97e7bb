"""A shard that has warmed up compiles nothing for its searches."""

import numpy as np
import pytest

from orbithash.encoders.compiled import read_only
from orbithash.search.index import code_rows, kernels
from orbithash.search.index.exact import warm_up
from orbithash.search.index.row_index import CodeRows, RowMask, build_row_index


@pytest.mark.parametrize("bits", [8, 128])
def test_searches_compile_nothing_after_warm_up(bits):
    kept = [kernels.search_codes, kernels.fill_table, code_rows._sort_codes, code_rows._select_rows]
    warm_up(64)
    before = [kernel._compiled.signatures for kernel in kept]
    codes = np.random.default_rng(0).integers(0, 256, (300, bits // 8), np.uint8)
    index = build_row_index("exact", CodeRows.build(codes, bits), bits)
    passing = np.packbits(np.arange(300) % 2 == 0, bitorder="little")
    index.search(codes[:2], np.int64(3), np.int32(5), (np.int32(1), np.uint64(2)), RowMask(passing, read_only(passing)))
    assert [kernel._compiled.signatures for kernel in kept] == before
