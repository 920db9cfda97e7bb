"""Dealing of rows to shards by blocks of ids."""

import numpy as np
import pytest

from orbithash.search.segments.dealing import Deal, ShardPart


@pytest.mark.parametrize(
    ("num_ids", "num_shards", "shift"),
    [(0, 3, 0), (15, 1, 0), (16, 1, 0), (32, 1, 1), (10**7, 1, 19), (10**7, 2, 18), (10**9, 4, 20), (10**8, 1024, 12)],
)
def test_blocks_are_as_large_as_balanced_shards_allow(num_ids, num_shards, shift):
    assert Deal.of(num_ids, num_shards) == Deal(num_shards, shift)
    assert not shift or num_ids >> shift >= 16 * num_shards


def test_every_row_has_one_owner_and_parts_are_ranges():
    rng = np.random.default_rng(0)
    for _ in range(50):
        deal = Deal(int(rng.integers(1, 9)), int(rng.integers(0, 6)))
        num_ids = int(rng.integers(0, 2000))
        ids = np.arange(num_ids, dtype=np.uint64)
        assert deal.owner(ids).tolist() == [id_ // 2**deal.shift % deal.num_shards for id_ in range(num_ids)]
        for number in range(deal.num_shards):
            part = ShardPart(deal, number)
            mine = ids[part.contains(ids)]
            ranges = part.ranges(num_ids, num_ids)
            assert mine.tolist() == [id_ for first, end in ranges for id_ in range(first, end)]


def test_large_ids_have_owners_too():
    ids = np.array([2**64 - 1, 2**63], np.uint64)
    assert Deal(7, 3).owner(ids).tolist() == [(2**64 - 1 >> 3) % 7, (2**63 >> 3) % 7]


def test_too_many_ranges_are_not_listed():
    assert ShardPart(Deal(2, 0), 0).ranges(10**9, 1000) is None
