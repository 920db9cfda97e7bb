"""Encoding of tables of embeddings: each vector becomes one row, once, or a refused row with its reason."""

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pytest
import shapely
from cluster_parts import save_vector_model

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.networks.model import HashModel
from tests.encoders.sources.embedding_tables import geo_metadata, vector_column, vectors, write_table, write_vectors


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_vector_model(tmp_path_factory.mktemp("models") / "model")


@pytest.fixture
def encode(cli, model, tmp_path):
    """Encode a table into `tmp_path/archive` and return the summary."""

    def call(source, *options):
        ended = cli("encode", source, "--model", model, "--archive", tmp_path / "archive", "--json", *options)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        return json.loads(ended.out)

    return call


def counts(summary):
    """Return the counts of a summary that are not 0."""
    return {name: value for name, value in summary.items() if name.startswith("num_") and value}


def stored(archive, *columns):
    """Return the rows of an archive by key; no key occurs twice."""
    _, table = Archive.open(archive).scan(["key", *columns])
    rows = {row.pop("key"): row for row in table.to_pylist()}
    assert len(rows) == len(table)
    return rows


def test_each_vector_is_a_row_or_has_a_reason(encode, model, tmp_path):
    values = vectors(6)
    values[2, 3], values[4] = np.inf, 0
    path = write_table(
        tmp_path / "t.parquet",
        {
            "id": ["a", "b", "c", "d", "e", "f"],
            "embedding": vector_column(values, pa.float16()),
            "geometry": [shapely.Point(7, 8).wkb, shapely.box(4, 50, 5, 51).wkb, None, None, None, None],
            "datetime": pa.array([dt.datetime(2020, 1, 2)] * 6),
            "label": ["x", None, "x", "x", "x", "x"],
            "caption": ["a harbour"] * 6,
            "url": ["https://example.org/a.tif", None, None, None, None, None],
        },
        geo_metadata(),
    )
    assert counts(encode(path)) == {"num_listed": 6, "num_encoded": 4, "num_refused": 2}
    rows = stored(
        tmp_path / "archive", "code", "vector", "uri", "label", "caption", "datetime", "lon", "lat", "footprint"
    )
    assert rows.keys() == {"a", "b", "d", "f"}
    alone = HashModel.load(model)
    for key, place in (("a", 0), ("f", 5)):
        one = alone.encode_items("vector", values[place : place + 1].astype(np.float16).astype(np.float32))
        assert rows[key]["code"] == one.codes[0].tolist()
        assert rows[key]["vector"] == one.vectors[0].tolist()
    assert (rows["a"]["lon"], rows["a"]["lat"]) == (7, 8)
    assert shapely.from_wkb(rows["b"]["footprint"]).equals(shapely.box(4, 50, 5, 51))
    assert (rows["d"]["lon"], rows["d"]["footprint"]) == (None, None)
    assert (rows["a"]["label"], rows["b"]["label"], rows["a"]["caption"]) == ("x", None, "a harbour")
    assert rows["a"]["datetime"] == dt.datetime(2020, 1, 2, tzinfo=dt.UTC)
    assert (rows["a"]["uri"], rows["b"]["uri"]) == ("https://example.org/a.tif", str(path))
    refused = Archive.open(tmp_path / "archive").refused()
    assert {key: reason[:25] for key, reason in refused.items()} == {
        "c": "its vector has a number t",
        "e": "its vector has only zeros",
    }


@pytest.mark.slow
@pytest.mark.ray
def test_actors_of_ray_data_encode_many_vectors(ray_cluster, encode, model, tmp_path, monkeypatch):
    monkeypatch.setattr("orbithash.cluster.encoding.vectors.MAX_ENCODED_HERE", 0)
    monkeypatch.setattr("orbithash.encoders.sources.embeddings.parquet._CHUNK_ROWS", 500)
    path = write_vectors(tmp_path / "t.parquet", 3000, rows_per_group=100)
    assert counts(encode(path, "--workers", "2")) == {"num_listed": 3000, "num_encoded": 3000}
    rows = stored(tmp_path / "archive", "code", "vector")
    whole = HashModel.load(model).encode_items("vector", vectors(3000))
    assert [rows[f"row{number}"]["code"] for number in range(3000)] == whole.codes.tolist()
    assert [rows[f"row{number}"]["vector"] for number in range(3000)] == whole.vectors.tolist()
    assert counts(encode(path)) == {"num_listed": 3000, "num_done_before": 3000}


def test_a_second_run_adds_what_is_new_and_replaces_what_has_changed(encode, tmp_path):
    table, archive = tmp_path / "t", tmp_path / "archive"
    write_vectors(table / "a.parquet", 40, rows_per_group=10)
    assert counts(encode(table)) == {"num_listed": 40, "num_encoded": 40}
    first, version = stored(archive, "code"), Archive.open(archive).version
    assert counts(encode(table)) == {"num_listed": 40, "num_done_before": 40}
    assert Archive.open(archive).version == version

    # Another file: only its rows are new. A deleted row comes back.
    write_vectors(table / "b.parquet", 10, start=40, seed=1)
    opened = Archive.open(archive)
    with opened.writing():
        opened.delete(["row7"])
    assert counts(encode(table)) == {"num_listed": 50, "num_done_before": 39, "num_encoded": 11}
    second = stored(archive, "code")
    assert len(second) == 50
    assert {key: second[key] for key in first} == first

    # A changed file: its rows are replaced, and those that it has no more stay.
    write_vectors(table / "b.parquet", 9, start=40, seed=2)
    summary = counts(encode(table))
    assert summary == {"num_listed": 49, "num_done_before": 40, "num_encoded": 9, "num_replaced": 9}
    third = stored(archive, "code")
    assert third.keys() == second.keys()
    assert {key for key in third if third[key] != second[key]} == {f"row{number}" for number in range(40, 49)}


def test_a_row_that_was_refused_is_read_when_its_file_has_changed(encode, tmp_path):
    values = vectors(3)
    values[1] = 0
    path = write_table(tmp_path / "t.parquet", {"id": ["a", "b", "c"], "embedding": vector_column(values)})
    assert counts(encode(path)) == {"num_listed": 3, "num_encoded": 2, "num_refused": 1}
    assert counts(encode(path)) == {"num_listed": 3, "num_done_before": 2, "num_refused_before": 1}
    assert counts(encode(path, "--retry-refused")) == {"num_listed": 3, "num_done_before": 2, "num_refused": 1}
    write_table(path, {"id": ["a", "b", "c"], "embedding": vector_column(vectors(3))})
    assert counts(encode(path)) == {"num_listed": 3, "num_encoded": 3, "num_replaced": 2}
    assert Archive.open(tmp_path / "archive").refused() == {}


def test_ids_of_another_source_need_a_prefix(encode, cli, model, tmp_path):
    encode(write_vectors(tmp_path / "a.parquet", 20))
    other = write_vectors(tmp_path / "b.parquet", 5, start=18, seed=1)
    ended = cli("encode", other, "--model", model, "--archive", tmp_path / "archive")
    assert ended.code == 2
    assert "the archive has a row 'row18' of another source" in ended.err
    assert Archive.open(tmp_path / "archive").num_rows == 20
    assert counts(encode(other, "--prefix", "b")) == {"num_listed": 5, "num_encoded": 5}
    assert "b/row18" in stored(tmp_path / "archive")
    assert counts(encode(other, "--prefix", "b")) == {"num_listed": 5, "num_done_before": 5}


def test_rows_without_a_stamp_came_through_a_gateway_and_stay(encode, model, tmp_path):
    encode(write_vectors(tmp_path / "a.parquet", 5))
    archive = Archive.open(tmp_path / "archive")
    encoded = HashModel.load(model).encode_items("vector", vectors(1, seed=9))
    with archive.writing():
        archive.upsert(Archive.table(encoded.codes, archive.bits, ["row7"], ["row7"], vector=encoded.vectors))
    path = write_vectors(tmp_path / "b.parquet", 5, start=5, seed=1)
    for expected in ({"num_done_before": 1, "num_encoded": 4}, {"num_done_before": 5}):
        assert counts(encode(path)) == {"num_listed": 5} | expected
    assert stored(tmp_path / "archive", "code")["row7"]["code"] == encoded.codes[0].tolist()


def test_what_does_not_fit_is_refused_in_one_line_before_anything_is_written(
    refused, model, tmp_path, tmp_path_factory
):
    folder = tmp_path_factory.mktemp("tables")
    good = write_vectors(folder / "good.parquet")
    archive = ("--archive", tmp_path / "archive")
    refused("encode", write_vectors(folder / "b.parquet", dims=8), "--model", model, *archive, words=["8 dimensions"])
    other = write_table(
        folder / "c.parquet",
        {"id": ["a"], "embedding": vector_column(vectors(1))},
        {"emb": '{"model": {"id": "clip"}}'},
    )
    refused("encode", other, "--model", model, *archive, words=["embedding clip", "takes dino of 16 dimensions"])
    twice = write_table(folder / "d.parquet", {"id": ["a", "a"], "embedding": vector_column(vectors(2))})
    refused("encode", twice, "--model", model, *archive, words=["'a' (2 times)"])
    refused("encode", good, "--model", model, *archive, "--table", "vector=x", words=["no column x for vector"])
    refused("encode", good, "--model", model, *archive, "--tile", "64", words=["--tile is for images"])
    refused("encode", good, "--model", model, *archive, "--watch", words=["--watch is for images"])


def test_vectors_are_not_images_and_images_no_vectors(refused, scenes, tmp_path, tmp_path_factory):
    from cluster_parts import save_random_model

    folder = tmp_path_factory.mktemp("tables")
    of_images = save_random_model(folder / "images", seed=0)
    of_vectors = save_vector_model(folder / "vectors")
    path = write_vectors(folder / "t.parquet")
    archive = ("--archive", tmp_path / "archive")
    refused(
        "encode",
        path,
        "--model",
        of_images,
        *archive,
        words=["no column path or uri", "its vectors need a model that was trained on vectors"],
    )
    refused("encode", path, "--model", of_images, *archive, "--table", "id=id", words=["--table is for vectors"])
    refused("encode", scenes, "--model", of_vectors, *archive, words=["has no Parquet file"])


def test_an_archive_of_another_model_is_refused(encode, cli, tmp_path):
    path = write_vectors(tmp_path / "t.parquet")
    encode(path)
    other = save_vector_model(tmp_path / "other", seed=1)
    ended = cli("encode", path, "--model", other, "--archive", tmp_path / "archive")
    assert ended.code == 2
    assert "Codes of another model are refused" in ended.err
