"""Ids, codes and searches of a segment against plain Python."""

import numpy as np
import pytest
from segment_parts import random_codes, random_ids

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import NO_HIT
from orbithash.search.index.row_index import RowMask
from orbithash.search.segments.ids import SortedIds
from orbithash.search.segments.segment import Segment


@pytest.mark.parametrize("seed", range(12))
def test_ids_and_rows(seed):
    rng = np.random.default_rng(seed)
    ids = np.sort(random_ids(rng, int(rng.choice([1, 2, 100]))))
    kept = SortedIds.of(ids)
    assert (kept.base, kept.last) == (ids[0], ids[-1])
    rows = rng.integers(0, len(ids), (3, 5))
    assert kept.of_rows(rows).dtype == np.uint64
    np.testing.assert_array_equal(kept.of_rows(rows), ids[rows])
    near = np.unique(np.concatenate([ids, ids + np.uint64(1), ids - np.uint64(1), np.array([0, 2**64 - 1], np.uint64)]))
    place = {id_: row for row, id_ in enumerate(ids.tolist())}
    assert kept.rows_of(near).tolist() == [place.get(id_, -1) for id_ in near.tolist()]
    assert [kept.num_up_to(id_) for id_ in near.tolist()] == [int((ids <= id_).sum()) for id_ in near]


def test_ids_take_no_more_bytes_than_their_range():
    assert SortedIds.of(np.arange(7, 1007, dtype=np.uint64)).num_bytes == 0
    assert SortedIds.of(np.arange(7, 2007, 2, dtype=np.uint64)).num_bytes == 4000
    assert SortedIds.of(np.array([0, 2**32 - 1], np.uint64)).num_bytes == 8
    assert SortedIds.of(np.array([0, 2**32], np.uint64)).num_bytes == 16
    empty = SortedIds.of(np.empty(0, np.uint64))
    assert (empty.last, empty.num_up_to(5), empty.rows_of(np.array([0], np.uint64)).tolist()) == (-1, 0, [-1])


@pytest.mark.parametrize("seed", range(30))
def test_searches(seed):
    rng = np.random.default_rng(seed)
    bits = int(rng.choice([8, 9, 20, 63, 64, 65, 128, 511]))
    num_rows = int(rng.choice([0, 1, 2, 300]))
    ids, codes = random_ids(rng, num_rows), random_codes(rng, num_rows, bits)
    segment = Segment.build(ids, codes, bits)
    assert (segment.num_rows, segment.is_exact, segment.is_mapped) == (num_rows, True, False)
    assert segment.columns.names == ()
    order = np.argsort(ids)
    ids, codes = ids[order], codes[order]
    if num_rows:
        assert (segment.first_id, segment.last_id) == (ids[0], ids[-1])
    rows = rng.integers(0, max(1, num_rows), 7 if num_rows else 0)
    np.testing.assert_array_equal(segment.codes_of(rows), codes[rows])
    queries = np.concatenate([random_codes(rng, 2, bits), codes[:1]])
    distances = hamming(queries, codes)
    alive, passing = (rng.random(num_rows) < share for share in (0.8, 0.5))
    for k in (1, 5, num_rows + 3):
        for radius in (None, bits // 3):
            for after in (None, (bits // 3, int(ids[num_rows // 2]) if num_rows else 7), (0, 2**64 - 1), (bits, 0)):
                for is_alive, is_passing in ((None, None), (alive, None), (alive, passing)):
                    mask = RowMask(*(None if each is None else packed(each) for each in (is_alive, is_passing)))
                    answer = segment.search(queries, k, radius, after, mask)
                    searched = np.ones(num_rows, np.bool_)
                    searched &= alive if is_alive is not None else True
                    searched &= passing if is_passing is not None else True
                    for query in range(len(queries)):
                        every = sorted(zip(distances[query][searched].tolist(), ids[searched].tolist(), strict=True))
                        every = [hit for hit in every if radius is None or hit[0] <= radius]
                        every = [hit for hit in every if after is None or hit > after]
                        is_hit = answer.distances[query] != NO_HIT
                        found = list(zip(answer.distances[query].tolist(), answer.ids[query].tolist(), strict=True))
                        assert found[: is_hit.sum()] == every[:k]
                        assert set(found[is_hit.sum() :]) <= {(NO_HIT, 0)}
                        ties = sum(hit[0] == every[:k][-1][0] for hit in every) if every else 0
                        assert answer.ties[query] == ties


def packed(mask):
    return np.packbits(mask, bitorder="little")


@pytest.mark.parametrize(
    ("ids", "codes", "message"),
    [
        ([1, 2, 1], np.zeros((3, 2), np.uint8), "unique ids; 1 of 3"),
        ([1, 2], np.zeros((3, 2), np.uint8), "ids uint64"),
        ([1, 2], np.zeros((2, 3), np.uint8), "2 bytes"),
        ([1, 2], np.zeros((2, 2), np.int8), "uint8"),
        ([1], np.full((1, 2), 255, np.uint8), "pad bits"),
    ],
)
def test_rows_that_are_refused(ids, codes, message):
    with pytest.raises(InputError, match=message):
        Segment.build(np.array(ids, np.uint64), codes, 15)
