"""Checks of integers within a range."""

import numpy as np
import pytest

from orbithash.encoders.errors import InputError
from orbithash.encoders.ranges import check_integer, is_integer


@pytest.mark.parametrize("value", [1, 5, np.int64(3), np.uint8(5)])
def test_integers_within_the_bounds(value):
    assert is_integer(value, 1, 5)
    checked = check_integer(value, "k", 1, 5)
    assert checked == value
    assert type(checked) is int


@pytest.mark.parametrize("value", [0, 6, True, np.True_, 2.0, "2", None])
def test_everything_else_is_refused(value):
    assert not is_integer(value, 1, 5)
    with pytest.raises(InputError, match=r"^k is .*; an integer from 1 to 5 is required$"):
        check_integer(value, "k", 1, 5)


def test_without_a_maximum():
    assert check_integer(10**12, "k", 1) == 10**12
    with pytest.raises(InputError, match="k is 0; an integer of at least 1 is required"):
        check_integer(0, "k", 1)
