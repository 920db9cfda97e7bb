import threading

import numpy as np
import pytest
from search_parts import oracle, random_case, random_codes, rows_of

from orbithash.encoders.errors import InputError
from orbithash.search.index.host import MAX_VERSIONS, Diff, ShardHost
from orbithash.search.index.shard import Shard, part_of


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
def test_shards_hold_every_row_once_and_evenly(num_rows, num_shards):
    ids = np.arange(num_rows, dtype=np.uint64)
    parts = [ids[part_of(ids, number, num_shards)] for number in range(num_shards)]
    assert sorted(np.concatenate(parts).tolist()) == ids.tolist()
    sizes = list(map(len, parts))
    assert max(sizes) - min(sizes) <= 1


# A part of the rows, and other rows.


@pytest.mark.parametrize("index", ["flat", "multi-hash"])
@pytest.mark.parametrize("seed", range(200, 240))
def test_radius_pages_and_filters_equal_the_oracle(seed, index):
    case = random_case(seed, max_rows=600)
    rng = np.random.default_rng(seed)
    kept = rng.random(len(case.ids)) < rng.choice([0.0, 0.02, 0.5, 1.0])
    shard = Shard(case.ids, case.codes, case.bits, index).where(np.sort(case.ids[kept]))
    assert shard.num_rows == kept.sum()
    ids, codes = case.ids[kept], case.codes[kept]
    for query in case.queries:
        every, _ = oracle(ids, codes, query, len(ids) + 1)
        radius = int(rng.integers(0, case.bits + 2))
        near = [hit for hit in every if hit[0] <= radius]
        for k in case.ks[:3]:
            answer = shard.search(query[None], k, radius)
            assert rows_of(answer, 0) == (near[:k], sum(hit[0] == near[:k][-1][0] for hit in near) if near else 0)
            after = near[int(rng.integers(len(near)))] if near else (radius // 2, 5)
            rest = [hit for hit in near if hit > after]
            answer = shard.search(query[None], k, radius, after)
            assert rows_of(answer, 0) == (rest[:k], sum(hit[0] == rest[:k][-1][0] for hit in rest) if rest else 0)


def test_pages_walk_through_all_rows():
    case = random_case(7)
    shard = Shard(case.ids, case.codes, case.bits)
    for query in case.queries[:2]:
        every, _ = oracle(case.ids, case.codes, query, len(case.ids))
        walked, after = [], None
        while hits := rows_of(shard.search(query[None], 37, after=after), 0)[0]:
            walked += hits
            after = hits[-1]
        assert walked == every


@pytest.mark.parametrize("seed", range(300, 340))
def test_changes_equal_a_new_shard(seed):
    case = random_case(seed, max_rows=800)
    rng = np.random.default_rng(seed)
    start = rng.random(len(case.ids)) < 0.6
    shard = Shard(case.ids[start], case.codes[start], case.bits)
    rows = dict(zip(case.ids[start].tolist(), case.codes[start], strict=True))
    for _ in range(4):
        gone = rng.choice(case.ids, min(len(case.ids), int(rng.integers(0, 60))), replace=False)
        new = rng.permutation(len(case.ids))[: int(rng.integers(0, 60))]
        codes = case.codes[rng.permutation(len(case.ids))][: len(new)]
        shard = shard.changed(gone, case.ids[new], codes)
        rows = {row: code for row, code in rows.items() if row not in set(gone.tolist())}
        rows |= dict(zip(case.ids[new].tolist(), codes, strict=True))
        assert shard.num_rows == len(rows)
        ids = np.array(list(rows), np.uint64)
        held = np.array(list(rows.values()), np.uint8).reshape(len(rows), case.codes.shape[1])
        for query in case.queries:
            assert rows_of(shard.search(query[None], 50), 0) == oracle(ids, held, query, 50)


@pytest.mark.parametrize("index", ["ivf", "hnsw"])
@pytest.mark.parametrize("num_rows", [0, 1, 3, 2000])
def test_approximate_indexes_tell_true_distances_in_order(index, num_rows):
    rng = np.random.default_rng(8)
    codes, ids = random_codes(rng, num_rows, 64), rng.permutation(num_rows).astype(np.uint64)
    codes[num_rows // 2 :] = codes[: num_rows - num_rows // 2]
    shard = Shard(ids, codes, 64, index)
    queries = np.concatenate([codes[:20], random_codes(rng, 5, 64)])
    code_of = dict(zip(ids.tolist(), codes, strict=True))
    for radius in (None, 20):
        for query, i in zip(queries, range(len(queries)), strict=True):
            hits, ties = rows_of(shard.search(queries, 10, radius), i)
            assert hits == sorted(set(hits))
            assert all(np.bitwise_count(code_of[row] ^ query).sum() == distance for distance, row in hits)
            assert all(radius is None or distance <= radius for distance, _ in hits)
            assert ties >= sum(distance == hits[-1][0] for distance, _ in hits) if hits else ties == 0
    if num_rows == 2000:
        recall = np.mean([rows_of(shard.search(q[None], 1), 0)[0][0][0] == 0 for q in queries[:20]])
        assert recall > 0.8


def test_an_unknown_index_is_refused():
    with pytest.raises(InputError, match="unknown index 'flatt'; there are flat, multi-hash"):
        Shard(np.arange(4, dtype=np.uint64), np.zeros((4, 1), np.uint8), 8, "flatt")


def test_versions_that_are_loaded_again_do_not_take_the_newest_ones_place():
    loaded = []

    def load(version):
        loaded.append(version)
        return [(np.arange(version, dtype=np.uint64), np.zeros((version, 1), np.uint8))]

    host = ShardHost(load, 8, 0, 1)
    for version in (20, *range(1, 9)):
        assert host.num_rows(version) == version
    assert host.holds(20)
    assert sum(host.holds(version) for version in range(30)) == MAX_VERSIONS
    host.apply(Diff(20, 21, np.array([3], np.uint64), np.empty(0, np.uint64), np.empty((0, 1), np.uint8)))
    assert host.num_rows(21) == 19
    assert 21 not in loaded
