import numpy as np
import pytest
from search_parts import build_shards, oracle, random_case, rows_of

from orbithash.search.merge import cut, merge
from orbithash.search.shard import Shard


@pytest.mark.parametrize("seed", range(1000, 1110))
def test_sharded_equals_the_oracle(seed):
    case = random_case(seed)
    shards = build_shards(case.ids, case.codes, case.bits, case.num_shards)
    for k in case.ks:
        merged = merge([shard.search(case.queries, k) for shard in shards], k)
        for i, query in enumerate(case.queries):
            assert rows_of(merged, i) == oracle(case.ids, case.codes, query, k)


@pytest.mark.parametrize("seed", range(2000, 2020))
def test_any_assignment_of_rows_to_shards_gives_the_same(seed):
    case = random_case(seed, max_rows=600)
    rng = np.random.default_rng(seed)
    shard_of = rng.integers(0, case.num_shards, len(case.ids))
    shards = [Shard(case.ids[shard_of == s], case.codes[shard_of == s], case.bits) for s in range(case.num_shards)]
    rng.shuffle(shards)
    for k in case.ks:
        merged = merge([shard.search(case.queries, k) for shard in shards], k)
        for i, query in enumerate(case.queries):
            assert rows_of(merged, i) == oracle(case.ids, case.codes, query, k)


@pytest.mark.parametrize("seed", range(3000, 3020))
def test_a_cut_answer_is_that_of_the_smaller_k(seed):
    case = random_case(seed, max_rows=600)
    shards = build_shards(case.ids, case.codes, case.bits, case.num_shards)
    largest = max(case.ks)
    merged = merge([shard.search(case.queries, largest) for shard in shards], largest)
    for k in {*case.ks, 1, 5, 50, largest}:
        smaller = cut(merged, k)
        for i, query in enumerate(case.queries):
            assert rows_of(smaller, i) == oracle(case.ids, case.codes, query, k)


def test_ties_are_those_of_all_shards_though_few_are_returned():
    ids = np.arange(90, dtype=np.uint64)
    shards = build_shards(ids, np.zeros((90, 1), np.uint8), 8, 3)
    merged = merge([shard.search(np.zeros((1, 1), np.uint8), 2) for shard in shards], 2)
    assert rows_of(merged, 0) == ([(0, 0), (0, 1)], 90)


def test_nothing_merges_to_nothing():
    empty = Shard(np.zeros(0, np.uint64), np.zeros((0, 1), np.uint8), 8)
    merged = merge([empty.search(np.zeros((2, 1), np.uint8), 3)] * 2, 3)
    assert merged.ids.shape == (2, 0)
    assert merged.ties.tolist() == [0, 0]
