"""Tables of features over several mapped parts, against one array with the same rows."""

import numpy as np
import pytest

from orbithash.trainers.data.feature_table import FeatureTable, selected


@pytest.fixture
def parts():
    rng = np.random.default_rng(0)
    return [rng.standard_normal((n, 4)).astype(np.float32) for n in (3, 1, 5)]


@pytest.mark.parametrize("shape", [(7,), (4, 3), (0,), (0, 2)])
def test_rows_are_those_of_the_joined_parts(parts, shape):
    rows = np.random.default_rng(1).integers(0, 9, shape)
    table, whole = FeatureTable(parts, rows), np.concatenate(parts)[rows]
    assert table.shape == whole.shape
    assert (table.dtype, len(table)) == (whole.dtype, len(whole))
    assert (np.asarray(table) == whole).all()
    for index in (slice(1, None, 2), slice(0, 0), np.flatnonzero(np.arange(len(rows)) % 2), np.arange(len(rows))[::-1]):
        assert table[index].shape == whole[index].shape
        assert (table[index] == whole[index]).all()
        assert (table.select(index)[:] == whole[index]).all()
    assert (table.reshape(-1)[:] == whole.reshape(-1, 4)).all()


def test_one_row_and_one_sentence_of_each_image(parts):
    rows = np.array([[0, 8], [4, 3], [3, 3]])
    table, whole = FeatureTable(parts, rows), np.concatenate(parts)[rows]
    assert (table[1] == whole[1]).all()
    index = np.arange(3), np.array([1, 0, 1])
    assert (table[index] == whole[index]).all()


def test_some_rows_of_an_array_or_a_table_are_not_copied(parts):
    array = parts[2]
    assert np.shares_memory(selected(array, slice(1, 3)), array)
    table = selected(FeatureTable(parts, np.arange(9)), slice(0, None, 2))
    assert isinstance(table, FeatureTable)
    assert (table[:] == np.concatenate(parts)[::2]).all()


def test_rows_that_are_returned_may_be_changed(parts):
    table = FeatureTable(parts, np.arange(9))
    table[:][:] = 0
    assert (table[:] == np.concatenate(parts)).all()
