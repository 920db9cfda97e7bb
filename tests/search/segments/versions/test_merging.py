"""Which segments are merged."""

import numpy as np

from orbithash.search.segments.versions.merging import SMALL_ROWS, segments_to_merge, small_segments


def test_segments_stay_few_and_rows_are_written_a_few_times():
    rng = np.random.default_rng(0)
    sizes, written, total = [10**6], 0, 0
    for _ in range(3000):
        new = int(rng.choice([1, 20, 300, 5000]))
        total += new
        chosen = small_segments(sizes, new)
        new += sum(sizes[number] for number in chosen)
        sizes = [size for number, size in enumerate(sizes) if number not in chosen] + [new]
        while chosen := segments_to_merge(sizes, sizes):
            merged = sum(sizes[number] for number in chosen)
            assert len(chosen) > 1
            written += merged
            sizes = [size for number, size in enumerate(sizes) if number not in chosen] + [merged]
        assert len(sizes) <= 12
    assert sum(sizes) == 10**6 + total
    assert written <= 15 * total


def test_small_segments_are_merged_at_once_with_new_rows():
    assert small_segments([SMALL_ROWS, 10, 20], 5) == [1, 2]
    assert small_segments([10], SMALL_ROWS) == []
    assert small_segments([SMALL_ROWS - 10, 5], 5) == [1]


def test_merged_segments_have_a_maximum_number_of_rows():
    assert segments_to_merge([100, 90], [100, 90], max_rows=150) == []
    assert segments_to_merge([100, 30, 30], [100, 30, 30], max_rows=150) == [1, 2]


def test_segments_of_many_dead_rows_are_written_again():
    num_rows = 10 * SMALL_ROWS
    assert segments_to_merge([num_rows - SMALL_ROWS], [num_rows]) == []
    assert segments_to_merge([num_rows // 2], [num_rows]) == [0]
    # Few rows are not worth it.
    assert segments_to_merge([1], [SMALL_ROWS]) == []
