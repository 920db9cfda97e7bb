"""A search in this process, against a loop over all rows in Python and against the service."""

import asyncio
import doctest
import subprocess
import sys

import numpy as np
import pytest
from search_parts import StubEncoder, oracle, random_case

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search import LocalIndex
from orbithash.search.engine import local_index
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.protocol.queries import Query
from orbithash.search.service.service import Target, open_service


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """An archive of 300 rows with many ties; ids and keys are in different orders."""
    folder = tmp_path_factory.mktemp("local") / "archive"
    rng = np.random.default_rng(4)
    codes = rng.integers(0, 256, (40, 2), np.uint8)[rng.integers(0, 40, 300)]
    keys = [f"k{number}" for number in rng.permutation(300)]
    archive = Archive.create(folder, 16, "m" * 32)
    labels = [None if number % 4 == 0 else f"c{number % 3}" for number in range(300)]
    for part in (slice(200, 300), slice(0, 200)):
        archive.upsert(Archive.table(codes[part], 16, keys[part], keys[part], label=labels[part]))
    archive.delete([f"k{number}" for number in range(0, 300, 10)])
    return folder


def hits(answer):
    return list(zip(answer.distances.tolist(), answer.ids.tolist(), strict=True)), answer.ties_at_cutoff


@pytest.mark.parametrize("seed", range(700, 712))
def test_an_array_equals_the_oracle(seed):
    case = random_case(seed, max_rows=400)
    index = LocalIndex(case.codes, bits=case.bits, ids=case.ids)
    assert len(index) == len(case.ids)
    for k in case.ks:
        answers = index.search(case.queries, k)
        assert [hits(answer) for answer in answers] == [
            oracle(case.ids, case.codes, query, k) for query in case.queries
        ]
        assert all(answer.keys == () and answer.is_exact and len(answer) == len(answer.ids) for answer in answers)


def test_an_archive_equals_the_service(folder):
    queries = np.random.default_rng(5).integers(0, 256, (8, 2), np.uint8)
    index = LocalIndex.open(folder)
    assert (len(index), index.bits) == (270, 16)
    assert repr(index) == f"LocalIndex({str(folder)!r}, version={Archive.open(folder).version}, rows=270, bits=16)"

    async def scenario():
        async def open_backend(target):
            return LocalBackend(Archive.open(target.archive), StubEncoder(), target.num_shards)

        service = await open_service(open_backend, Target(str(folder), "", 3))
        try:
            for options in ({}, {"radius": 4}, {"filter": "label = 'c1'"}, {"radius": 5, "filter": "label IS NULL"}):
                for k in (1, 7, 300):
                    for code, answer in zip(queries, index.search(queries, k, **options), strict=True):
                        served = await service.search(Query(code=code.tobytes(), k=k, **options), 60.0)
                        assert answer.ids.tolist() == [hit.id for hit in served.hits]
                        assert answer.distances.tolist() == [hit.distance for hit in served.hits]
                        assert answer.keys == tuple(hit.key for hit in served.hits)
                        assert answer.ties_at_cutoff == served.ties_at_cutoff
        finally:
            await service.close()

    asyncio.run(scenario())


def test_it_holds_the_version_that_was_opened(folder, tmp_path):
    archive = Archive.create(tmp_path / "a", 16, "m" * 32)
    archive.upsert(Archive.table(np.zeros((3, 2), np.uint8), 16, list("abc"), list("abc")))
    before, index = archive.version, LocalIndex.open(tmp_path / "a")
    archive.delete(["a"])
    code = np.zeros((1, 2), np.uint8)
    assert index.search(code)[0].keys == ("a", "b", "c")
    assert index.search(code, filter="key <> 'b'")[0].keys == ("a", "c")
    assert LocalIndex.open(tmp_path / "a").search(code)[0].keys == ("b", "c")
    assert LocalIndex.open(tmp_path / "a", before).search(code)[0].keys == ("a", "b", "c")


def test_no_queries_and_no_rows(folder):
    assert LocalIndex.open(folder).search(np.zeros((0, 2), np.uint8)) == []
    (answer,) = LocalIndex(np.zeros((0, 2), np.uint8)).search(np.zeros((1, 2), np.uint8))
    assert (len(answer), answer.ties_at_cutoff) == (0, 0)


def test_approximate_indexes_are_marked(folder):
    (answer,) = LocalIndex.open(folder, index="hnsw").search(np.zeros((1, 2), np.uint8))
    assert not answer.is_exact


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (
            lambda index: index.search(np.zeros(2, np.uint8)),
            r"codes uint8 \[Q, B\], got shape \[2\]; write code\[None\]",
        ),
        (lambda index: index.search(np.zeros((1, 3), np.uint8)), "a code of 16 bits has 2 bytes"),
        (lambda index: index.search(np.zeros((1, 2), np.int64)), "uint8, got int64"),
        (lambda index: index.search(np.zeros((1, 2), np.uint8), k=0), "k >= 1"),
        (lambda index: index.search(np.zeros((1, 2), np.uint8), radius=-1), "radius is -1 bits"),
        (lambda index: index.search(np.zeros((1, 2), np.uint8), filter="colour = 'x'"), "no column 'colour'"),
        (
            lambda index: LocalIndex(np.zeros((1, 2), np.uint8)).search(np.zeros((1, 2), np.uint8), filter="lon > 1"),
            "open",
        ),
        (lambda index: LocalIndex(np.zeros(2, np.uint8)), r"codes uint8 \[N, B\], got shape \[2\]"),
        (lambda index: LocalIndex(np.zeros((1, 2), np.uint8), index="x"), "unknown index 'x'"),
        (lambda index: LocalIndex(np.zeros((1, 2), np.uint8), bits=24), "a code of 24 bits has 3 bytes"),
    ],
)
def test_wrong_arguments_are_refused(folder, call, words):
    with pytest.raises(InputError, match=words):
        call(LocalIndex.open(folder))


def test_examples_of_the_docstrings():
    assert doctest.testmod(local_index).attempted
    assert not doctest.testmod(local_index).failed


def test_names_of_the_package_are_imported_when_they_are_used():
    program = """
import sys
import orbithash.search
assert {"Client", "AsyncClient", "LocalIndex"} <= set(dir(orbithash.search))
assert not {"numpy", "faiss", "lance", "grpc"} & set(sys.modules)
from orbithash.search import AsyncClient, Client
assert not {"numpy", "faiss", "lance"} & set(sys.modules), "a client needs none of them"
from orbithash.search import LocalIndex
assert not {"faiss", "lance"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
