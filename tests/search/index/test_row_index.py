"""Indexes over the rows of a segment against a loop over all rows."""

import threading

import numpy as np
import pytest

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import NO_HIT
from orbithash.search.index.code_rows import CodeRows, few_rows
from orbithash.search.index.exact import ExactIndex
from orbithash.search.index.kernels import AUTO, PROBE, SCAN
from orbithash.search.index.row_index import RowMask, build_row_index, is_exact_index

BITS = (8, 9, 20, 63, 64, 65, 127, 128, 256, 511, 512)


def pack_rows(mask):
    return None if mask is None else np.packbits(mask, bitorder="little")


def clustered(rng, count, bits, flip, num_centres=3):
    """Return codes near a few centres, and three queries near them."""
    centres = rng.random((num_centres, bits)) < 0.5
    drawn = centres[rng.integers(0, num_centres, count + 3)] ^ (rng.random((count + 3, bits)) < flip)
    codes = np.packbits(drawn, axis=1)
    return codes[:count], codes[count:]


def expected(codes, query, k, radius, after, searched):
    """Return the hits (distance, row) and the number of ties with the last, computed row by row."""
    distances = hamming(query[None], codes)[0].tolist()
    order = sorted((distance, row) for row, distance in enumerate(distances) if searched[row])
    found = [
        place for place in order if (radius is None or place[0] <= radius) and (after is None or place > tuple(after))
    ]
    hits = found[:k]
    return hits, sum(place[0] == hits[-1][0] for place in found) if hits else 0


def check(answer, codes, queries, k, radius=None, after=None, searched=None):
    searched = np.ones(len(codes), np.bool_) if searched is None else searched
    assert answer.distances.shape == answer.rows.shape == (len(queries), min(k, len(codes)))
    assert (answer.distances.dtype, answer.rows.dtype, answer.ties.dtype) == (np.int32, np.uint32, np.int64)
    for query, distances, rows, ties in zip(queries, *answer, strict=True):
        hits, num_ties = expected(codes, query, k, radius, after, searched)
        pairs = list(zip(distances.tolist(), rows.tolist(), strict=True))
        assert pairs == hits + [(NO_HIT, 0)] * (len(pairs) - len(hits))
        assert ties == num_ties


def indexes_of(rows, bits):
    return [ExactIndex(rows, bits, how=how, min_words=1) for how in (PROBE, SCAN, AUTO)]


@pytest.mark.parametrize("bits", BITS)
def test_random_cases(bits):
    rng = np.random.default_rng(bits)
    for case in range(24):
        count = int(rng.choice([0, 1, 2, 40, 300]))
        codes, queries = clustered(rng, count, bits, rng.choice([0, 0.03, 0.1, 0.5]))
        k, radius = int(rng.choice([1, 3, 10, 1000])), rng.choice([None, 0, 2, bits // 4, bits])
        after = (int(rng.integers(0, bits // 2 + 1)), int(rng.integers(-1, count + 1))) if case % 3 == 0 else None
        alive, passing = (rng.random(count) < share if rng.random() < 0.5 else None for share in (0.8, 0.4))
        searched = np.ones(count, np.bool_)
        for mask in (alive, passing):
            searched &= True if mask is None else mask
        rows = CodeRows.build(codes, bits)
        few = None if passing is None or case % 2 else few_rows(rows, pack_rows(passing))
        mask = RowMask(pack_rows(alive), pack_rows(passing), few)
        others = [build_row_index("flat", rows, bits)] if count else []
        for index in indexes_of(rows, bits) + others:
            check(index.search(queries, k, radius, after, mask), codes, queries, k, radius, after, searched)


def test_rows_of_equal_codes_and_of_equal_distance_are_in_order():
    codes = np.array([[0b11], [0], [0b1], [0], [0b10], [0b1], [0]], np.uint8)
    rows = CodeRows.build(codes, 8)
    assert rows.starts.tolist() == [0, 3, 5, 6, 7]
    for index in indexes_of(rows, 8):
        distances, numbers, ties = index.search(np.zeros((1, 1), np.uint8), 5, None, None, RowMask())
        assert numbers.tolist() == [[1, 3, 6, 2, 4]]
        assert (distances.tolist(), ties.tolist()) == ([[0, 0, 0, 1, 1]], [3])


def test_pages_follow_each_other():
    rng = np.random.default_rng(1)
    codes, queries = clustered(rng, 200, 64, 0.06)
    for index in indexes_of(CodeRows.build(codes, 64), 64):
        whole = index.search(queries[:1], 200)
        rows, after = [], None
        while len(rows) < 200:
            page = index.search(queries[:1], 7, None, after)
            hits = page.distances[0] != NO_HIT
            rows += page.rows[0, hits].tolist()
            after = (int(page.distances[0, hits][-1]), rows[-1])
        assert rows == whole.rows[0].tolist()


def test_a_batch_is_answered_as_its_queries_alone():
    rng = np.random.default_rng(2)
    codes, near = clustered(rng, 3000, 64, 0.06, num_centres=200)
    queries = np.concatenate([near, codes[:100] ^ np.uint8(1), rng.integers(0, 256, (60, 8), np.uint8)])
    for index in indexes_of(CodeRows.build(codes, 64), 64):
        batch = index.search(queries, 9)
        for number in range(0, len(queries), 10):
            alone = index.search(queries[number : number + 1], 9)
            for of_batch, of_one in zip(batch, alone, strict=True):
                assert of_batch[number].tolist() == of_one[0].tolist()


def test_concurrent_searches():
    rng = np.random.default_rng(3)
    codes, near = clustered(rng, 3000, 64, 0.06, num_centres=200)
    index = ExactIndex(CodeRows.build(codes, 64), 64, min_words=1)
    queries = np.concatenate([near, codes[:200] ^ np.uint8(1)])
    right = index.search(queries, 10)
    answers = []

    def search():
        for _ in range(20):
            answers.append(index.search(queries, 10))

    threads = [threading.Thread(target=search) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(answers) == 160
    assert all(
        np.array_equal(part, of_right) for answer in answers for part, of_right in zip(answer, right, strict=True)
    )


def test_the_tables_of_a_file_serve_as_built_ones():
    rng = np.random.default_rng(4)
    codes, queries = clustered(rng, 500, 128, 0.06)
    rows = CodeRows.build(codes, 128)
    built = ExactIndex(rows, 128, min_words=1, how=PROBE)
    assert built.num_bytes == sum(array.nbytes for array in built.arrays().values()) > 0
    opened = ExactIndex(rows, 128, built.arrays(), min_words=1, how=PROBE)
    assert opened.search(queries, 9).rows.tolist() == built.search(queries, 9).rows.tolist()
    # Short segments are scanned.
    assert not build_row_index("exact", rows, 128).arrays()


def test_the_way_of_a_search_is_chosen_by_cost():
    rng = np.random.default_rng(5)
    codes, near = clustered(rng, 200_000, 64, 0.02, num_centres=50_000)
    rows = CodeRows.build(codes, 64)
    by_cost, by_scan = ExactIndex(rows, 64), ExactIndex(rows, 64, how=SCAN)
    assert by_cost.search_counted(near, 3)[1] == 0
    # From rows to random codes: the search ends in the tables at once, by the counted cost, or by the scan.
    flips = np.packbits(rng.random((60, 64)) < np.linspace(0, 0.5, 60)[:, None], axis=1)
    queries = codes[:60] ^ flips
    assert by_cost.search_counted(queries[-1:], 3)[1] == 1
    for batch in [queries, *np.split(queries, 20)]:
        for radius in (None, 7):
            answer, expected_answer = (index.search(batch, 3, radius) for index in (by_cost, by_scan))
            for part, expected_part in zip(answer, expected_answer, strict=True):
                assert np.array_equal(part, expected_part)


@pytest.mark.parametrize("name", ["ivf", "hnsw"])
def test_approximate_indexes_return_rows_in_order(name):
    rng = np.random.default_rng(6)
    codes, queries = clustered(rng, 2000, 64, 0.06)
    index = build_row_index(name, CodeRows.build(codes, 64), 64)
    assert not index.is_exact
    passing = rng.random(2000) < 0.5
    for radius, after in ((None, None), (9, None), (None, (4, 100))):
        distances, rows, _ = index.search(queries, 5, radius, after, RowMask(None, pack_rows(passing)))
        for query, of_query, numbers in zip(queries, distances, rows, strict=True):
            hits = of_query != NO_HIT
            pairs = list(zip(of_query[hits].tolist(), numbers[hits].tolist(), strict=True))
            assert pairs == sorted(pairs)
            assert passing[numbers[hits]].all()
            assert hamming(query[None], codes[numbers[hits]])[0].tolist() == of_query[hits].tolist()
            assert all((radius is None or pair[0] <= radius) and (after is None or pair > after) for pair in pairs)


def test_few_rows_are_the_selected_ones():
    rng = np.random.default_rng(7)
    codes, _ = clustered(rng, 300, 127, 0.02)
    passing = rng.random(300) < 0.05
    rows, words = few_rows(CodeRows.build(codes, 127), pack_rows(passing))
    assert sorted(rows.tolist()) == np.flatnonzero(passing).tolist()
    assert np.array_equal(words.astype(">u8").view(np.uint8), codes[rows])


def test_invalid_searches_and_names():
    index = build_row_index("exact", CodeRows.build(np.zeros((2, 1), np.uint8), 8), 8)
    for queries, k, message in (
        (np.zeros((1, 1), np.uint8), 0, "k >= 1"),
        (np.zeros(1, np.uint8), 1, r"shape \[1\]"),
        (np.zeros((1, 2), np.uint8), 1, "a code of 8 bits has 1 bytes"),
    ):
        with pytest.raises(InputError, match=message):
            index.search(queries, k)
    with pytest.raises(InputError, match="unknown index 'flatt'; there are exact, flat, gpu-flat, ivf, hnsw"):
        is_exact_index("flatt")
    with pytest.raises(InputError, match="unknown index 'flatt'"):
        build_row_index("flatt", CodeRows.build(np.zeros((2, 1), np.uint8), 8), 8)
