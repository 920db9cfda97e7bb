"""Tables of embeddings as datasets: samples, labels, splits, and what has changed since the split."""

import logging

import numpy as np
import pyarrow as pa
import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.datasets.embeddings import read_vectors
from tests.encoders.sources.embedding_tables import DIMS, vector_column, vectors, write_table, write_vectors


def labels(count):
    return [f"class{number % 3}" for number in range(count)]


def test_rows_are_split_by_the_usual_protocols(tmp_path):
    write_vectors(tmp_path / "t" / "a.parquet", 60, label=labels(60), rows_per_group=25)
    write_vectors(tmp_path / "t" / "b.parquet", 40, start=60, seed=1, label=labels(40))
    manifest = make_manifest(tmp_path / "t")
    assert (manifest.dataset, manifest.protocol) == ("embeddings", "random")
    assert manifest.classes == ("class0", "class1", "class2")
    assert [image.id for image in manifest.images] == [f"row{number}" for number in range(100)]
    assert manifest.images[61].path == "b.parquet#1"
    assert manifest.images[61].labels == (1,)
    assert len(manifest.part("test")) == 21
    other = make_manifest(tmp_path / "t", "embeddings", "duch", seed=3)
    assert len(other.part("database")) == 40
    chosen = [manifest.images[row] for row in (99, 3, 61, 27)]
    expected = np.concatenate([vectors(60), vectors(40, seed=1)])[[99, 3, 61, 27]]
    np.testing.assert_array_equal(read_vectors(tmp_path / "t", (), chosen), expected)


def test_a_sample_is_uniform_and_depends_on_the_seed_only(tmp_path, monkeypatch):
    path = write_vectors(tmp_path / "t.parquet", 1000, rows_per_group=100)
    sample = make_manifest(path, max_rows=300, seed=1)
    assert len(sample.images) == 300
    assert sample.classes == ()
    assert sample == make_manifest(path, max_rows=300, seed=1)
    assert {image.id for image in sample.images} != {image.id for image in make_manifest(path, max_rows=300).images}
    numbers = np.array([int(image.path.rpartition("#")[2]) for image in sample.images])
    assert (np.bincount(numbers // 100, minlength=10) > 10).all()
    assert read_vectors(path, (), sample.images).shape == (300, DIMS)


def test_rows_that_cannot_be_used_are_counted(tmp_path, caplog):
    values = vectors(30)
    values[4, 2], values[9] = np.nan, 0
    path = write_table(tmp_path / "t.parquet", {"id": list(range(30)), "embedding": vector_column(values)})
    with caplog.at_level(logging.WARNING):
        manifest = make_manifest(path)
    assert len(manifest.images) == 28
    assert "left out 2 rows that cannot be used (first: t.parquet#4: its vector has a number" in caplog.text


def test_small_classes_are_left_out_and_rows_without_a_label_stay(tmp_path, caplog):
    names = [*labels(30), "rare", None]
    path = write_vectors(tmp_path / "t.parquet", 32, kind=names)
    with caplog.at_level(logging.WARNING):
        manifest = make_manifest(path, table=["label=kind"])
    assert "left out 1 rows of 1 classes with fewer than 5 rows" in caplog.text
    assert len(manifest.images) == 31
    assert manifest.images[-1].labels == ()
    assert make_manifest(path).classes == ()


def test_a_role_can_be_left_empty(tmp_path):
    path = write_vectors(tmp_path / "t.parquet", 30, label=labels(30))
    assert make_manifest(path, table=["label="]).classes == ()


def test_vectors_that_have_changed_or_are_gone_are_named(tmp_path):
    path = write_vectors(tmp_path / "t.parquet", 30)
    images = make_manifest(path).images
    values = vectors(30)
    values[7] += 1
    write_table(path, {"id": pa.array([f"row{n}" for n in range(30)]), "embedding": vector_column(values)})
    with pytest.raises(InputError, match=r"t\.parquet#7: another vector"):
        read_vectors(path, (), images)
    write_vectors(path, 29)
    with pytest.raises(InputError, match=r"t\.parquet#29: absent"):
        read_vectors(path, (), images)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"id": ["a", "a"], "embedding": vector_column(vectors(2))}, "ids occur more than once"),
        ({"id": ["a", "b"], "embedding": vector_column(vectors(2))}, "only 2 images"),
        ({"id": ["a", "b"], "embedding": vector_column(vectors(2) * 0)}, "no row can be used"),
        ({"id": ["a", "b"]}, "no column of vectors"),
    ],
)
def test_unusable_tables(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        make_manifest(write_table(tmp_path / "t.parquet", columns))
