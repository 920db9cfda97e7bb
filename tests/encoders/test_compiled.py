"""Kernels are compiled whatever the state of the folder of compiled code."""

import logging

import numpy as np
import pytest

from orbithash.encoders.compiled import Kernel, kernel_folder, read_only


def add(array, number):
    return array[0] + number


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.delenv("NUMBA_CACHE_DIR", raising=False)
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path))
    assert kernel_folder(__file__).parent == tmp_path / "numba"
    return kernel_folder(__file__)


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
