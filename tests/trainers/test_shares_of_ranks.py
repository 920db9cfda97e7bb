"""How rows are dealt: every row once, as evenly as it goes, and in the order of one process where it matters."""

import itertools

import pytest

from orbithash.trainers.dealing import deal


@pytest.mark.parametrize(
    ("num_rows", "group_size", "num_micro_batches", "num_ranks"),
    [
        (groups * size, size, micro, ranks)
        for groups, size, micro, ranks in itertools.product((8, 9, 11, 24), (1, 3), (1, 2, 3), (1, 2, 3, 8))
    ],
)
def test_every_row_is_dealt_once_and_evenly(num_rows, group_size, num_micro_batches, num_ranks):
    dealing = deal(num_rows, group_size, num_micro_batches, num_ranks)
    shares = [dealing.positions(rank).tolist() for rank in range(num_ranks)]
    assert sorted(itertools.chain(*shares)) == list(range(num_rows))
    assert tuple(map(len, shares)) == dealing.of_ranks
    assert (dealing.num_rows, len(dealing.counts)) == (num_rows, num_micro_batches)

    # Micro-batch by micro-batch, rank by rank, as slow as can be.
    left = list(range(num_rows))
    for counts in dealing.counts:
        for share, count in zip(shares, counts, strict=True):
            assert count % group_size == 0
            assert [share.pop(0) for _ in range(count)] == [left.pop(0) for _ in range(count)]
        assert max(counts) - min(counts) <= group_size
        assert list(counts) == sorted(counts, reverse=True)
    sizes = [sum(counts) for counts in dealing.counts]
    assert max(sizes) - min(sizes) <= group_size
    assert [alone.counts for alone in dealing.micro_batches()] == [(counts,) for counts in dealing.counts]


def test_equal_shares_are_consecutive_parts():
    dealing = deal(12, 1, 2, 3)
    assert [dealing.positions(rank).tolist() for rank in range(3)] == [[0, 1, 6, 7], [2, 3, 8, 9], [4, 5, 10, 11]]
