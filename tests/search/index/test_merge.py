from dataclasses import replace

import numpy as np
import pytest
from search_parts import build_shards, oracle, random_case

from orbithash.search.index.answers import NO_HIT
from orbithash.search.index.merge import merge, merge_lists
from orbithash.search.segments.segment import Segment


def merged(shards, queries, k, asked=None):
    """Return each query's merged answer in the form of `oracle`; each shard returns `asked` rows, or k."""
    answers = [shard.search(queries, asked or k) for shard in shards]
    with_rows = [
        replace(each, rows=tuple(map(b"row %d".__mod__, each.ids[each.distances != NO_HIT]))) for each in answers
    ]
    ks = [k] * len(queries)
    outcomes = []
    assert all(same.rows is None for same in merge_lists(answers, ks, with_rows=False))
    for found, same in zip(merge(answers, ks), merge_lists(with_rows, ks, with_rows=True), strict=True):
        assert (same.distances, same.ids, same.ties) == (found.distances.tolist(), found.ids.tolist(), found.ties)
        assert same.rows == [b"row %d" % id_ for id_ in same.ids]
        outcomes.append((list(zip(same.distances, same.ids, strict=True)), found.ties))
    return outcomes


def expected(case, k):
    return [oracle(case.ids, case.codes, query, k) for query in case.queries]


@pytest.mark.parametrize("seed", range(1000, 1110))
def test_sharded_equals_the_oracle(seed):
    case = random_case(seed)
    shards = build_shards(case.ids, case.codes, case.bits, case.num_shards)
    for k in case.ks:
        assert merged(shards, case.queries, k) == expected(case, k)


@pytest.mark.parametrize("seed", range(2000, 2020))
def test_any_assignment_of_rows_to_shards_gives_the_same(seed):
    case = random_case(seed, max_rows=600)
    rng = np.random.default_rng(seed)
    shard_of = rng.integers(0, case.num_shards, len(case.ids))
    shards = [
        Segment.build(case.ids[shard_of == s], case.codes[shard_of == s], case.bits) for s in range(case.num_shards)
    ]
    rng.shuffle(shards)
    for k in case.ks:
        assert merged(shards, case.queries, k) == expected(case, k)


@pytest.mark.parametrize("seed", range(3000, 3020))
def test_shards_that_were_asked_for_more_give_the_same(seed):
    case = random_case(seed, max_rows=600)
    shards = build_shards(case.ids, case.codes, case.bits, case.num_shards)
    largest = max(case.ks)
    for k in {*case.ks, 1, 5, 50, largest}:
        assert merged(shards, case.queries, k, max(k, largest)) == expected(case, k)


def test_ties_are_those_of_all_shards_though_few_are_returned():
    ids = np.arange(90, dtype=np.uint64)
    shards = build_shards(ids, np.zeros((90, 1), np.uint8), 8, 3)
    assert merged(shards, np.zeros((1, 1), np.uint8), 2) == [([(0, 0), (0, 1)], 90)]


def test_nothing_merges_to_nothing():
    empty = Segment.build(np.zeros(0, np.uint64), np.zeros((0, 1), np.uint8), 8)
    assert merged([empty, empty], np.zeros((2, 1), np.uint8), 3) == [([], 0), ([], 0)]
