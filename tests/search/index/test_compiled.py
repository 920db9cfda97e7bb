"""Kernels are compiled whatever the state of the folder of compiled code."""

import logging

import numpy as np
import pytest

from orbithash.search.index import code_rows, kernels
from orbithash.search.index.compiled import Kernel, kernel_folder, read_only
from orbithash.search.index.exact import warm_up
from orbithash.search.index.row_index import CodeRows, RowMask, build_row_index


def add(array, number):
    return array[0] + number


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path))
    assert kernel_folder().parent == tmp_path / "numba"
    return kernel_folder()


def test_compiled_code_is_kept_and_a_damaged_file_is_replaced(folder, caplog):
    array = read_only(np.arange(3))
    assert Kernel(add)(array, 2) == 2
    (index,) = folder.rglob("*.nbi")
    index.write_bytes(b"")
    with caplog.at_level(logging.WARNING):
        assert Kernel(add)(array, 3) == 3
    assert "add is compiled anew: EOFError" in caplog.text


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path / "file" / "numba"))
    assert Kernel(add)(read_only(np.arange(3)), 4) == 4
    assert "add is compiled anew: " in caplog.text
    assert "cannot be written" in caplog.text


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
