import numpy as np
import pytest

from orbithash.search.segments import bits

SIZES = [0, 1, 7, 8, 9, 63, 64, 65, 1000, 100_000]


@pytest.mark.parametrize("num_rows", SIZES)
def test_sets_of_rows_equal_masks(num_rows):
    rng = np.random.default_rng(num_rows)
    first, second = rng.random((2, num_rows)) < 0.4
    one, other = bits.from_mask(first), bits.from_mask(second)
    assert one.nbytes == -(-num_rows // 8)
    assert bits.to_mask(one, num_rows).tolist() == first.tolist()
    assert bits.count(one) == first.sum()
    assert bits.count(bits.full(num_rows)) == num_rows
    assert bits.count(bits.empty(num_rows)) == 0
    assert bits.to_mask(bits.both(one, other), num_rows).tolist() == (first & second).tolist()
    assert bits.both(None, one) is one
    assert bits.both(one, None) is one
    assert bits.both(None, None) is None
    numbers = rng.integers(0, max(num_rows, 1), min(num_rows, 50)).astype(np.uint32)
    assert bits.contains(one, numbers).tolist() == first[numbers].tolist()
    for before, mask in ((one, first), (None, np.ones(num_rows, bool))):
        left = mask.copy()
        left[numbers] = False
        kept = None if before is None else before.copy()
        assert bits.to_mask(bits.without(before, numbers, num_rows), num_rows).tolist() == left.tolist()
        assert before is None or (before == kept).all()


@pytest.mark.parametrize("num_rows", SIZES)
def test_rows_of_a_set_are_listed_in_pages(num_rows):
    mask = np.random.default_rng(num_rows).random(num_rows) < 0.3
    packed = bits.from_mask(mask)
    every = np.flatnonzero(mask)
    assert bits.rows(packed).tolist() == every.tolist()
    for begin in (0, 1, 8, 13, num_rows // 2, num_rows - 1, num_rows):
        if begin >= 0:
            for limit in (0, 1, 20, None):
                assert bits.rows(packed, begin, limit).tolist() == every[every >= begin][:limit].tolist()
    assert bits.rows(packed).dtype == np.uint32
