"""Rescoring, compared with Python integers over all rows: the same hits for every number of shards."""

import asyncio
import math

import numpy as np
import pytest
from search_parts import (
    Case,
    MemoryArchive,
    StubEncoder,
    memory_shards,
    random_case,
    random_codes,
    small_case,
)

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Encoded, outputs_of, unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.engine import rescoring
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.local_index import LocalIndex
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery
from orbithash.search.protocol.queries import Cursor, Example, Query
from orbithash.search.segments.dealing import Deal

DIMS = 6


def make_vectors(case, seed):
    """Vectors of few distinct values, so that scores tie; some are zeros, some are unknown."""
    rng = np.random.default_rng(seed)
    vectors = rng.integers(-2, 3, (len(case.ids), DIMS)).astype(np.int8)
    return [None if rng.random() < 0.2 else vector for vector in vectors]


def exact_cosine(query, vector):
    dot = sum(int(q) * int(v) for q, v in zip(query, vector, strict=True))
    squares = sum(int(q) ** 2 for q in query) * sum(int(v) ** 2 for v in vector)
    return dot / math.sqrt(squares) if squares else 0.0


def oracle(case, vectors, query, rescore, k, size, radius=None, maximum=None):
    """Return hits [(id, distance, score)], ties, radius and whether the shortlist is bounded."""
    code, outputs, vector = (None if part is None else part[0] for part in query)
    bits = int.from_bytes(code.tobytes())
    rows = []
    for id_, row, stored in zip(case.ids.tolist(), case.codes, vectors, strict=True):
        distance = (int.from_bytes(row.tobytes()) ^ bits).bit_count()
        if radius is not None and distance > radius:
            continue
        if rescore == "vector":
            score = None if stored is None else exact_cosine(vector, stored)
            place = (1, distance, id_) if score is None else (0, -score, id_)
        else:
            differs = unpack(row, case.bits) != (outputs >= 0)
            score = float(sum(abs(int(o)) for o, d in zip(outputs, differs, strict=True) if d))
            place = (score, id_)
        rows.append((distance, id_, place, score))
    rows.sort(key=lambda row: row[:2])
    if not rows:
        return [], 0, None, False
    cutoff = rows[min(size, len(rows)) - 1][0]
    nearest = [row for row in rows if row[0] <= cutoff]
    shortlist = nearest if maximum is None else nearest[:maximum]
    hits = [(id_, distance, score) for distance, id_, _, score in sorted(shortlist, key=lambda row: row[2])[:k]]
    ties = sum(distance == cutoff for distance, *_ in rows)
    return hits, ties, cutoff, len(shortlist) < len(nearest)


def outcome(answer):
    assert [hit.rank for hit in answer.hits] == list(range(1, len(answer.hits) + 1))
    assert answer.next is None
    hits = [(hit.id, hit.distance, hit.score) for hit in answer.hits]
    return hits, answer.ties_at_cutoff, answer.shortlist_radius, answer.is_shortlist_bounded


def engine_of(case, vectors, query, num_shards=None):
    async def encode(items):
        return Encoded(*(np.repeat(part, len(items), axis=0) for part in query))

    archive = MemoryArchive(case.ids, case.codes, case.bits, vectors if case.ids.size else None)
    shards = memory_shards(case, num_shards, archive)
    return Engine(Snapshot.of(archive, shards, Deal(len(shards)), StubEncoder(encode)))


def make_query(case, seed):
    rng = np.random.default_rng(seed + 1)
    code = case.queries[seed % len(case.queries)][None]
    magnitudes = rng.integers(0, 128, (1, case.bits))
    outputs = (np.sign(outputs_of(code, case.bits)) * magnitudes).astype(np.int8)
    # An output of 0 counts for nothing, whatever its bit.
    return Encoded(code, outputs, rng.integers(-3, 4, (1, DIMS)).astype(np.int8))


@pytest.mark.parametrize("seed", range(24))
def test_answers_are_those_of_the_oracle(seed):
    case = random_case(seed, max_rows=400)
    if not len(case.ids):
        case = small_case()
    vectors, query = make_vectors(case, seed), make_query(case, seed)
    vectors[0] = np.ones(DIMS, np.int8)
    radius = None if seed % 3 else case.bits // 2

    async def main():
        for num_shards in (1, case.num_shards):
            engine = engine_of(case, vectors, query, num_shards)
            for rescore in ("vector", "asymmetric"):
                for k, oversampling in ((1, 1), (3, 1.5), (10, 4), (len(case.ids) + 5, 2)):
                    given = Query(image=b"x", k=k, rescore=rescore, oversampling=oversampling, radius=radius)
                    expected = oracle(case, vectors, query, rescore, k, math.ceil(k * oversampling), radius)
                    assert outcome(await engine.search(given, 30.0)) == expected

    asyncio.run(main())


def test_more_ties_than_a_shortlist_holds_are_reported(monkeypatch):
    monkeypatch.setattr(rescoring, "MAX_SHORTLIST", 50)
    case = Case(16, np.arange(120, dtype=np.uint64), np.zeros((120, 2), np.uint8), np.zeros((1, 2), np.uint8), [], 3)
    vectors, query = make_vectors(case, 0), make_query(case, 0)
    expected = oracle(case, vectors, query, "vector", 10, 40, maximum=50)
    assert expected[1:] == (120, 0, True)
    answer = asyncio.run(engine_of(case, vectors, query).search(Query(image=b"x", rescore="vector"), 30.0))
    assert outcome(answer) == expected


def test_concurrent_queries_share_batches_and_keep_their_answers():
    case = random_case(5, max_rows=300)
    vectors, query = make_vectors(case, 1), make_query(case, 1)
    vectors[0] = np.ones(DIMS, np.int8)
    queries = [
        Query(image=b"x", k=k, rescore=rescore, oversampling=2)
        for k in range(1, 9)
        for rescore in ("vector", "", "asymmetric")
    ]

    async def main():
        engine = engine_of(case, vectors, query)
        return await asyncio.gather(*(engine.search(one, 30.0) for one in queries))

    for one, answer in zip(queries, asyncio.run(main()), strict=True):
        if one.rescore:
            assert outcome(answer) == oracle(case, vectors, query, one.rescore, one.k, 2 * one.k)
        else:
            assert all(hit.score is None for hit in answer.hits)


def test_a_row_is_a_query_by_its_own_vector_and_examples_add_theirs():
    case = small_case(60)
    vectors = make_vectors(case, 3)
    vectors[4], vectors[5], vectors[6] = np.eye(DIMS, dtype=np.int8)[:3] * 100
    key = [f"place/{number}.tif" for number in range(60)]

    async def search(**given):
        return outcome(await engine_of(case, vectors, None).search(Query(rescore="vector", k=5, **given), 30.0))

    alone = Encoded(case.codes[4:5], None, vectors[4][None])
    assert asyncio.run(search(key=key[4])) == oracle(case, vectors, alone, "vector", 5, 20)
    positives = (Example(key=key[4]), Example(key=key[5]))
    (best, *_), *_ = asyncio.run(search(positives=positives, negatives=(Example(key=key[6]),), oversampling=12))
    together = np.array([64, 64, -127, 0, 0, 0])
    assert best[2] == max(exact_cosine(together, vector) for vector in vectors if vector is not None)


@pytest.mark.parametrize(
    ("given", "with_vectors", "message"),
    [
        ({"code": b"ab", "rescore": "vector"}, True, "the query has no stored vector"),
        ({"key": "place/1.tif", "rescore": "vector"}, True, "the query has no stored vector"),
        ({"key": "place/2.tif", "rescore": "vector"}, False, "this archive has no stored vectors"),
        ({"key": "place/2.tif", "rescore": "cosine"}, True, "allowed: vector and asymmetric"),
        ({"code": b"ab", "rescore": "asymmetric", "oversampling": 0.5}, True, "a number of at least 1, got 0.5"),
        ({"code": b"ab", "rescore": "asymmetric", "oversampling": math.nan}, True, "a number of at least 1"),
        ({"code": b"ab", "rescore": "asymmetric", "k": 10_000, "oversampling": 5.1}, True, "at most 50,000"),
        ({"code": b"ab", "rescore": "asymmetric", "after": Cursor(1, 2)}, True, "has no pages"),
    ],
)
def test_what_cannot_be_rescored_is_refused_in_one_line(given, with_vectors, message):
    case = small_case()
    vectors = [None if number == 1 else np.ones(DIMS, np.int8) for number in range(len(case.ids))]
    archive = MemoryArchive(case.ids, case.codes, 16, vectors if with_vectors else None)
    engine = Engine(Snapshot.of(archive, memory_shards(case, archive=archive), Deal(case.num_shards), None))
    with pytest.raises(InvalidQuery, match=message) as error:
        asyncio.run(engine.search(Query(**given), 30.0))
    assert "\n" not in str(error.value)


# The index in this process


@pytest.fixture(scope="module")
def stored(tmp_path_factory):
    """An archive on disk: its folder, case and vectors; every row whose id is even is a harbor."""
    rng = np.random.default_rng(8)
    codes, num_rows = random_codes(rng, 200, 16) & np.array([0xF0, 0x0F], np.uint8), 200
    folder = tmp_path_factory.mktemp("archive") / "a"
    archive = Archive.create(folder, 16, "m" * 32, VectorSpec(DIMS, 0.01))
    case = Case(16, np.zeros(num_rows, np.uint64), codes, codes[:3], [], 1)
    vectors = make_vectors(case, 8)
    keys = [f"k{number}" for number in range(num_rows)]
    raw = [None if vector is None else vector.tobytes() for vector in vectors]
    labels = ["harbor" if number % 2 else "river" for number in range(num_rows)]
    case.ids[:] = archive.upsert(Archive.table(codes, 16, keys, keys, raw, label=labels))
    return folder, case, vectors


@pytest.mark.parametrize("rescore", ["vector", "asymmetric"])
def test_the_local_index_answers_as_the_engine(stored, rescore):
    folder, case, vectors = stored
    index = LocalIndex.open(folder)
    queries = [make_query(case, seed) for seed in range(3)]
    together = Encoded(*(np.concatenate(parts) for parts in zip(*queries, strict=True)))
    for filter_, radius in (("", None), ("label = 'harbor'", None), ("", 3)):
        chosen = slice(1, None, 2) if filter_ else slice(None)
        part = Case(16, case.ids[chosen], case.codes[chosen], case.queries, [], 1)
        answers = index.search(together, 7, radius=radius, filter=filter_, rescore=rescore, oversampling=2)
        for query, answer in zip(queries, answers, strict=True):
            scores = [None if score != score else score for score in answer.scores.tolist()]
            hits = list(zip(answer.ids.tolist(), answer.distances.tolist(), scores, strict=True))
            expected = oracle(part, vectors[chosen], query, rescore, 7, 14, radius)
            assert (hits, answer.ties_at_cutoff, answer.shortlist_radius, answer.is_shortlist_bounded) == expected
            assert len(answer.keys) == len(hits)


@pytest.mark.parametrize(
    ("query", "given", "message"),
    [
        (Encoded(np.zeros((1, 2), np.uint8), None, None), {"rescore": "vector"}, "no stored vector"),
        (Encoded(np.zeros((1, 2), np.uint8), None, None), {"rescore": "asymmetric"}, "with_outputs=True"),
        (np.zeros((1, 2), np.uint8), {"rescore": "both"}, "allowed: vector and asymmetric"),
        (np.zeros((1, 2), np.uint8), {"rescore": "vector", "oversampling": 0}, "at least 1"),
    ],
)
def test_the_local_index_refuses_in_one_line(stored, query, given, message):
    with pytest.raises(InputError, match=message):
        LocalIndex.open(stored[0]).search(query, **given)


def test_an_index_over_an_array_cannot_rescore():
    with pytest.raises(InputError, match=r"use LocalIndex\.open"):
        LocalIndex(np.zeros((3, 2), np.uint8)).search(np.zeros((1, 2), np.uint8), rescore="vector")
