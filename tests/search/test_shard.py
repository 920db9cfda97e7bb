import threading

import numpy as np
import pytest
from search_parts import oracle, random_case, random_codes, rows_of

from orbithash.encoders.errors import InputError
from orbithash.search.shard import Shard, build_shards, split_rows


@pytest.mark.parametrize("seed", range(110))
def test_equals_the_oracle(seed):
    case = random_case(seed)
    shard = Shard(case.ids, case.codes, case.bits)
    for k in case.ks:
        answer = shard.search(case.queries, k)
        assert (answer.distances.dtype, answer.ids.dtype, answer.ties.dtype) == (np.int32, np.uint64, np.int64)
        for i, query in enumerate(case.queries):
            assert rows_of(answer, i) == oracle(case.ids, case.codes, query, k)


def test_ties_beyond_the_first_pass_are_found_by_the_second():
    # 512 distinct codes at distance 1: far more than the first pass asks for.
    bits, k = 512, 3
    codes = np.packbits(np.eye(bits, dtype=np.uint8), axis=1)
    ids = np.arange(bits, dtype=np.uint64)[::-1].copy()
    answer = Shard(ids, codes, bits).search(np.zeros((1, bits // 8), np.uint8), k)
    assert rows_of(answer, 0) == ([(1, 0), (1, 1), (1, 2)], bits)


def test_one_code_for_all_rows_gives_the_smallest_ids():
    ids = np.random.default_rng(0).permutation(5000).astype(np.uint64)
    codes = np.full((5000, 8), 0xA5, np.uint8)
    answer = Shard(ids, codes, 64).search(codes[:2], 4)
    assert rows_of(answer, 0) == rows_of(answer, 1) == ([(0, 0), (0, 1), (0, 2), (0, 3)], 5000)


def test_more_queries_than_one_pass_takes():
    rng = np.random.default_rng(1)
    codes, queries = random_codes(rng, 300, 16), random_codes(rng, 150, 16)
    ids = rng.permutation(300).astype(np.uint64)
    answer = Shard(ids, codes, 16).search(queries, 9)
    for i, query in enumerate(queries):
        assert rows_of(answer, i) == oracle(ids, codes, query, 9)


def test_insertion_order_and_memory_layout_change_nothing():
    rng = np.random.default_rng(2)
    codes, ids = random_codes(rng, 500, 12), np.arange(500, dtype=np.uint64)
    order = rng.permutation(500)
    expected = Shard(ids, codes, 12).search(codes[:20], 30)
    shuffled = Shard(ids[order], np.asfortranarray(codes[order]), 12)
    queries = np.asfortranarray(codes[:20])
    queries.flags.writeable = False
    answer = shuffled.search(queries, 30)
    np.testing.assert_array_equal(answer.ids, expected.ids)
    np.testing.assert_array_equal(answer.distances, expected.distances)
    np.testing.assert_array_equal(answer.ties, expected.ties)


def test_concurrent_searches_agree():
    rng = np.random.default_rng(3)
    shard = Shard(np.arange(2000, dtype=np.uint64), random_codes(rng, 2000, 24), 24)
    queries = random_codes(rng, 8, 24)
    expected = shard.search(queries, 15)
    answers = [None] * 6

    def search(i):
        answers[i] = shard.search(queries, 15)

    threads = [threading.Thread(target=search, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for answer in answers:
        np.testing.assert_array_equal(answer.ids, expected.ids)


def test_a_search_uses_one_thread_whatever_thread_calls_it():
    import faiss

    shard = Shard(np.arange(4, dtype=np.uint64), np.zeros((4, 1), np.uint8), 8)
    seen = []

    def search():
        faiss.omp_set_num_threads(3)
        shard.search(np.zeros((1, 1), np.uint8), 1)
        seen.append(faiss.omp_get_max_threads())

    thread = threading.Thread(target=search)
    thread.start()
    thread.join()
    assert seen == [1]


def test_empty_shard_and_no_queries():
    empty = Shard(np.zeros(0, np.uint64), np.zeros((0, 2), np.uint8), 16)
    answer = empty.search(np.zeros((3, 2), np.uint8), 5)
    assert answer.ids.shape == answer.distances.shape == (3, 0)
    assert answer.ties.tolist() == [0, 0, 0]
    full = Shard(np.arange(4, dtype=np.uint64), np.zeros((4, 2), np.uint8), 16)
    assert full.search(np.zeros((0, 2), np.uint8), 5).ids.shape == (0, 4)


@pytest.mark.parametrize(
    ("ids", "codes", "bits"),
    [
        (np.arange(3, dtype=np.int64), np.zeros((3, 2), np.uint8), 16),
        (np.arange(2, dtype=np.uint64), np.zeros((3, 2), np.uint8), 16),
        (np.zeros(3, np.uint64), np.zeros((3, 2), np.uint8), 16),
        (np.arange(3, dtype=np.uint64), np.zeros((3, 3), np.uint8), 16),
        (np.arange(3, dtype=np.uint64), np.ones((3, 2), np.uint8), 12),
        (np.arange(3, dtype=np.uint64), np.zeros((3, 1), np.uint8), 7),
    ],
    ids=["signed ids", "lengths differ", "an id twice", "width", "pad bits", "bits"],
)
def test_refuses_what_does_not_belong_together(ids, codes, bits):
    with pytest.raises(InputError):
        Shard(ids, codes, bits)


@pytest.mark.parametrize(("queries", "k"), [(np.zeros((1, 2), np.uint8), 0), (np.zeros(2, np.uint8), 1)])
def test_refuses_wrong_queries(queries, k):
    with pytest.raises(InputError, match="queries"):
        Shard(np.arange(3, dtype=np.uint64), np.zeros((3, 2), np.uint8), 16).search(queries, k)


@pytest.mark.parametrize(("num_rows", "num_shards"), [(0, 3), (2, 5), (10, 3), (1000, 8), (7, 1)])
def test_split_covers_every_row_once_and_evenly(num_rows, num_shards):
    parts = split_rows(num_rows, num_shards)
    assert [row for part in parts for row in range(num_rows)[part]] == list(range(num_rows))
    sizes = [part.stop - part.start for part in parts]
    assert len(parts) == num_shards
    assert max(sizes) - min(sizes) <= 1


def test_split_refuses_no_shards():
    with pytest.raises(InputError, match="at least 1 shard"):
        split_rows(10, 0)


def test_shards_hold_ranges_of_ids():
    ids = np.random.default_rng(4).permutation(100).astype(np.uint64)
    shards = build_shards(ids, np.zeros((100, 1), np.uint8), 8, 3)
    held = [shard.search(np.zeros((1, 1), np.uint8), 100).ids[0].tolist() for shard in shards]
    assert held == [list(range(100))[part] for part in split_rows(100, 3)]
