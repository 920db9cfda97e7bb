"""The column of stored vectors: kept by every change, unknown where only the code is known, refused if it differs."""

import lance
import numpy as np
import pytest

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.tables import fixed_size_rows
from orbithash.encoders.errors import InputError
from orbithash.encoders.vectors import VectorSpec

BITS, DIMS = 16, 5
SPEC = VectorSpec(DIMS, 0.0031)


def make_rows(keys, vectors=None):
    codes = np.random.default_rng(len(keys)).integers(0, 256, (len(keys), 2), dtype=np.uint8)
    return Archive.table(codes, BITS, list(keys), list(keys), vector=vectors)


def make_vectors(num_rows, seed=0):
    return np.random.default_rng(seed).integers(-127, 128, (num_rows, DIMS)).astype(np.int8)


@pytest.fixture
def archive(tmp_path):
    return Archive.create(tmp_path / "archive", BITS, "model", SPEC)


def stored(archive, keys):
    ids = archive.find(list(keys))
    vectors, is_known = fixed_size_rows(archive.take([ids[key] for key in keys], ["vector"])["vector"])
    return [vector.tolist() if known else None for vector, known in zip(vectors, is_known, strict=True)]


def test_the_archive_describes_its_vectors(archive):
    again = Archive.open(archive.path)
    assert again.vector == SPEC
    assert again.schema.metadata[b"orbithash.vector_scale"] == b"0.0031"


def test_vectors_come_back_and_survive_every_kind_of_change(archive):
    vectors = make_vectors(40)
    expected = {}
    for number in range(4):
        keys = [f"{number}-{i}" for i in range(10)]
        part = vectors[10 * number : 10 * number + 10]
        if number % 2:
            archive.upsert(make_rows(keys, part))
        else:
            archive.commit(Archive.write_fragments(archive.path, make_rows(keys, part)))
        expected |= dict(zip(keys, part.tolist(), strict=True))
    archive.upsert(make_rows(["0-1", "3-2", "new"]))
    expected |= dict.fromkeys(["0-1", "3-2", "new"])
    archive.upsert(make_rows(["0-2", "late"], [None, vectors[0].tobytes()]))
    expected |= {"0-2": None, "late": vectors[0].tolist()}
    archive.delete(["1-3"])
    del expected["1-3"]
    for _ in range(2):
        assert dict(zip(expected, stored(archive, expected), strict=True)) == expected
        ids, table = archive.scan(["key", "vector"])
        scanned, is_known = fixed_size_rows(table["vector"])
        keys = table["key"].to_pylist()
        assert {key: v.tolist() if known else None for key, v, known in zip(keys, scanned, is_known, strict=True)} == (
            expected
        )
        assert len(ids) == len(expected)
        archive.optimize()


def test_an_archive_without_a_projection_has_no_column(tmp_path):
    archive = Archive.create(tmp_path / "plain", BITS, "model")
    assert archive.vector is None
    assert "vector" not in archive.schema.names
    archive.upsert(make_rows("ab", [None, None]))
    with pytest.raises(InputError, match="rows of other columns"):
        archive.upsert(make_rows("cd", make_vectors(2)))


def test_fixed_size_rows_another_length_are_not_written(archive):
    with pytest.raises(InputError, match="rows of other columns"):
        archive.upsert(make_rows("ab", np.zeros((2, DIMS + 1), np.int8)))
    assert archive.num_rows == 0


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.zeros((2, DIMS), np.float32), "int8"),
        (np.zeros(2 * DIMS, np.int8), "int8"),
        (np.zeros((3, DIMS), np.int8), "2 codes with 3 values of vector"),
        ([bytes(DIMS), bytes(DIMS + 1)], "2 lengths"),
    ],
)
def test_vectors_that_do_not_fit_the_rows_are_refused(vectors, message):
    with pytest.raises(InputError, match=message):
        make_rows("ab", vectors)


@pytest.mark.parametrize("vector", [None, VectorSpec(DIMS + 1, SPEC.scale), VectorSpec(DIMS, 0.5)])
def test_an_archive_of_other_vectors_is_refused(archive, vector):
    assert Archive.open_or_create(archive.path, BITS, "model", SPEC).vector == SPEC
    with pytest.raises(InputError, match="give a new folder"):
        Archive.open_or_create(archive.path, BITS, "model", vector)


def test_vectors_without_a_scale_are_damage(archive):
    schema = archive.schema.with_metadata(
        {name: value for name, value in archive.schema.metadata.items() if name != b"orbithash.vector_scale"}
    )
    path = archive.path + "-copy"
    lance.write_dataset(schema.empty_table(), path, schema=schema, enable_stable_row_ids=True)
    with pytest.raises(InputError, match="damaged"):
        Archive.open(path)
