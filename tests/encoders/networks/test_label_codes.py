"""Label codes against their definitions, written out class by class."""

import itertools

import numpy as np
import pytest

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.label_codes import LABEL_CODES, label_table


@pytest.mark.parametrize("num_classes", [1, 2, 3, 8, 9, 21, 256])
def test_binary_is_the_index_most_significant_bit_first(num_classes):
    table = label_table("binary", num_classes)
    width = len(f"{num_classes - 1:b}")
    assert table.dtype == np.bool_
    assert table.shape == (num_classes, width)
    for index, row in enumerate(table):
        assert "".join("01"[int(bit)] for bit in row) == f"{index:0{width}b}"


@pytest.mark.parametrize("num_classes", [2, 3, 8, 21, 256])
def test_gray_neighbours_differ_in_one_bit_and_no_two_rows_are_equal(num_classes):
    table = label_table("gray", num_classes)
    assert table.shape == label_table("binary", num_classes).shape
    for one, other in itertools.pairwise(table):
        assert (one != other).sum() == 1
    assert len({tuple(row) for row in table}) == num_classes


def test_one_hot_sets_the_bit_of_the_class():
    table = label_table("one-hot", 5)
    assert [np.flatnonzero(row).tolist() for row in table] == [[0], [1], [2], [3], [4]]


def test_none_has_no_bits():
    assert label_table("none", 21).shape == (21, 0)


def test_an_unknown_kind_lists_the_known_ones():
    with pytest.raises(InputError, match=r"'grey'.*none, binary, gray, one-hot, error-correcting"):
        label_table("grey", 4)
    assert LABEL_CODES == ("none", "binary", "gray", "one-hot", "error-correcting")


@pytest.mark.parametrize(("num_classes", "width"), [(1, 4), (2, 4), (3, 6), (4, 6), (16, 8), (21, 10), (45, 11)])
def test_error_correcting_labels_differ_in_four_bits_at_least(num_classes, width):
    table = label_table("error-correcting", num_classes)
    assert table.shape == (num_classes, width)
    for one, other in itertools.combinations(table, 2):
        assert (one != other).sum() >= 4
