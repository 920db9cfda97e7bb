"""Tables of embeddings: layouts, types, places, refused rows, chunks, and what is wrong with a table."""

import datetime as dt
import json

import numpy as np
import pyarrow as pa
import pytest
import shapely

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.embeddings import parquet
from orbithash.encoders.sources.embeddings.tables import EmbeddingTable, is_embedding_table
from tests.encoders.sources.embedding_tables import (
    DIMS,
    geo_metadata,
    vector_column,
    vectors,
    write_table,
    write_vectors,
)

SQUARE = shapely.box(4, 50, 5, 51)


def rows_of(table, **options):
    return [rows for chunk in table.chunks() for rows in table.reader.read(chunk, **options)]


def only(path, *options, prefix=""):
    (rows,) = rows_of(EmbeddingTable.open(path, options, prefix))
    return rows


def test_earth_index_with_the_footer_of_geoembeddings(tmp_path):
    emb = {
        "version": "0.0.1",
        "model": {"id": "dinov2_vits14_softcon", "source": "https://github.com/zhu-xlab/softcon"},
    }
    path = write_table(
        tmp_path / "21MNT.parquet",
        {
            "geometry": [SQUARE.wkb, shapely.Point(7, 8).wkb],
            "id": ["a", "b"],
            "embedding": vector_column(vectors(2), fixed=False),
        },
        geo_metadata() | {"emb": json.dumps(emb)},
    )
    table = EmbeddingTable.open(path)
    assert (table.reader.columns.layout, table.dims, table.num_rows) == ("earth-index", DIMS, 2)
    assert (table.embedding, table.origin) == ("dinov2_vits14_softcon", "https://github.com/zhu-xlab/softcon")
    rows = only(path)
    assert rows.keys.to_pylist() == ["a", "b"]
    np.testing.assert_array_equal(rows.vectors, vectors(2))
    assert rows.columns["lon"].to_pylist() == pytest.approx([4.5, 7])
    assert shapely.from_wkb(rows.columns["footprint"][0].as_py()).equals(SQUARE)
    assert not rows.problems


def test_major_tom(tmp_path):
    path = write_table(
        tmp_path / "part.parquet",
        {
            "unique_id": ["u1", "u2"],
            "embedding": vector_column(vectors(2)),
            "grid_cell": ["922D_249L", "922D_249L"],
            "timestamp": ["20180321T101021", None],
            "centre_lat": [1.5, None],
            "centre_lon": [2.5, None],
            "pixel_bbox": [[0, 0, 224, 224], [224, 0, 448, 224]],
        },
    )
    rows = only(path)
    assert EmbeddingTable.open(path).reader.columns.layout == "major-tom"
    assert rows.keys.to_pylist() == ["u1", "u2"]
    assert rows.columns["datetime"].to_pylist() == [dt.datetime(2018, 3, 21, 10, 10, 21, tzinfo=dt.UTC), None]
    assert rows.columns["lon"].to_pylist() == [2.5, None]
    assert rows.columns["lat"].to_pylist() == [1.5, None]


def test_clay_has_no_ids_and_the_keys_are_file_and_row(tmp_path):
    for name in ("03WVN.gpq", "27WXN.gpq"):
        write_table(
            tmp_path / "v0" / name,
            {
                "index": [0, 1],
                "source_url": ["s3://clay/0.tif", "s3://clay/1.tif"],
                "date": pa.array([dt.date(2022, 6, 10)] * 2),
                "embeddings": vector_column(vectors(2), fixed=False),
                "geometry": [shapely.Point(7, 8).wkb] * 2,
            },
            geo_metadata(),
        )
    table = EmbeddingTable.open(tmp_path / "v0", prefix="clay")
    first, second = rows_of(table)
    assert table.reader.columns.layout == "clay"
    assert first.keys.to_pylist() == ["clay/03WVN.gpq#0", "clay/03WVN.gpq#1"]
    assert second.keys.to_pylist() == ["clay/27WXN.gpq#0", "clay/27WXN.gpq#1"]
    assert first.columns["uri"].to_pylist() == ["s3://clay/0.tif", "s3://clay/1.tif"]
    assert first.columns["datetime"][0].as_py() == dt.datetime(2022, 6, 10, tzinfo=dt.UTC)
    assert table.check_keys() == 4


def test_alphaearth_has_one_column_for_each_band(tmp_path):
    numbers = vectors(3, 64)
    bands = {f"A{band:02d}": numbers[:, band].astype(np.float64) for band in range(64)}
    path = write_table(tmp_path / "samples.parquet", bands | {"system:index": ["0", "1", "2"], "landcover": [1, 2, 1]})
    table = EmbeddingTable.open(path, ["label=landcover"])
    assert (table.embedding, table.dims) == ("alphaearth", 64)
    rows = only(path, "label=landcover")
    np.testing.assert_array_equal(rows.vectors, numbers)
    assert rows.columns["label"].to_pylist() == ["1", "2", "1"]


def test_integers_of_alphaearth_are_decoded_and_no_data_is_refused(tmp_path):
    bands = {f"A{band:02d}": pa.array([127, -64, -128, None], pa.int8()) for band in range(64)}
    rows = only(write_table(tmp_path / "samples.parquet", bands))
    assert rows.vectors[0, 0] == pytest.approx((127 / 127.5) ** 2)
    assert rows.vectors[1, 0] == pytest.approx(-((64 / 127.5) ** 2))
    assert sorted(rows.problems) == [2, 3]


@pytest.mark.parametrize("kind", [pa.float16(), pa.float32(), pa.float64(), pa.int8()])
@pytest.mark.parametrize("fixed", [True, False])
def test_every_type_of_number(tmp_path, kind, fixed):
    values = np.rint(vectors(5) * 20).astype(np.int8)
    rows = only(
        write_table(tmp_path / "t.parquet", {"key": [3, 4, 5, 6, 7], "vector": vector_column(values, kind, fixed)})
    )
    np.testing.assert_array_equal(rows.vectors, values.astype(np.float32))
    assert rows.keys.to_pylist() == ["3", "4", "5", "6", "7"]


def test_named_columns_take_precedence(tmp_path):
    columns = {
        "id": ["a"],
        "name": ["b"],
        "clip": vector_column(vectors(1, seed=1)),
        "vector": vector_column(vectors(1)),
    }
    rows = only(write_table(tmp_path / "t.parquet", columns), "vector=clip", "id=name")
    assert rows.keys.to_pylist() == ["b"]
    np.testing.assert_array_equal(rows.vectors, vectors(1, seed=1))


@pytest.mark.parametrize(
    ("column", "expected"),
    [
        (pa.array([0], pa.timestamp("ns")), dt.datetime(1970, 1, 1, tzinfo=dt.UTC)),
        (pa.array([3_600_000], pa.timestamp("ms", "Europe/Berlin")), dt.datetime(1970, 1, 1, 1, tzinfo=dt.UTC)),
        (pa.array([dt.date(2020, 2, 3)]), dt.datetime(2020, 2, 3, tzinfo=dt.UTC)),
        (pa.array(["2015-05-02T01:31:00+01:00"]), dt.datetime(2015, 5, 2, 0, 31, tzinfo=dt.UTC)),
    ],
)
def test_times_are_utc(tmp_path, column, expected):
    rows = only(write_vectors(tmp_path / "t.parquet", 1, time=column))
    assert rows.columns["datetime"].to_pylist() == [expected]


def test_rows_that_cannot_be_used_have_reasons_and_the_others_are_read(tmp_path):
    values = [list(row) for row in vectors(9)]
    values[1], values[2], values[3][4], values[4][4] = None, values[2][:5], float("nan"), None
    values[5] = [0.0] * DIMS
    path = write_table(
        tmp_path / "t.parquet",
        {
            "id": ["a", "b", "c", "d", "e", "f", "g\n", None, "i"],
            "embedding": pa.array(values, pa.list_(pa.float32())),
            "lon": [0.0] * 8 + [400.0],
            "lat": [0.0] * 9,
        },
    )
    rows = only(path)
    assert {row: reason.split(";")[0] for row, reason in rows.problems.items()} == {
        1: "its vector is null",
        2: "its vector has 5 dimensions",
        3: "its vector has a number that is NaN, null or infinite as float32",
        4: "its vector has a number that is NaN, null or infinite as float32",
        5: "its vector has only zeros, which have no direction",
        6: "a key has printable characters, no control characters or line separators",
        7: "column id is null",
        8: "lon 400 and lat 0",
    }
    assert not rows.vectors[1:6].any()
    np.testing.assert_array_equal(rows.vectors[0], vectors(9)[0])
    assert rows.keys[7].as_py() == "t.parquet#7"


def test_extreme_numbers_are_not_taken_for_faults(tmp_path):
    values = np.full((3, DIMS), 1e25)
    values[1], values[2] = 1e-30, 1e60
    rows = only(write_table(tmp_path / "t.parquet", {"embedding": vector_column(values, pa.float64())}))
    assert sorted(rows.problems) == [2]
    assert rows.vectors[1].any()


def test_text_that_is_no_time_refuses_its_rows(tmp_path):
    rows = only(write_vectors(tmp_path / "t.parquet", 3, time=["2020-01-01", "soon", ""]))
    assert list(rows.problems) == [1]
    assert "datetime is 'soon'" in rows.problems[1]


def test_chunks_are_whole_row_groups_and_cover_all_rows_once(tmp_path, monkeypatch):
    monkeypatch.setattr("orbithash.encoders.sources.embeddings.parquet._CHUNK_ROWS", 25)
    write_vectors(tmp_path / "t" / "a.parquet", 100, rows_per_group=10)
    write_vectors(tmp_path / "t" / "b10.parquet", 7, start=100, seed=1, rows_per_group=3)
    write_vectors(tmp_path / "t" / "b9.parquet", 40, start=107, seed=2)
    table = EmbeddingTable.open(tmp_path / "t")
    chunks = list(table.chunks())
    assert [(chunk.name, chunk.first, chunk.stop) for chunk in chunks] == [
        *[("a.parquet", first, first + 20) for first in range(0, 100, 20)],
        ("b9.parquet", 0, 40),
        ("b10.parquet", 0, 7),
    ]
    found = rows_of(table)
    assert sum(len(rows.keys) for rows in found) == table.num_rows == table.check_keys() == 147
    np.testing.assert_array_equal(np.concatenate([rows.vectors for rows in found])[:100], vectors(100))


def test_only_the_needed_columns_are_read(tmp_path):
    (rows,) = rows_of(
        EmbeddingTable.open(write_vectors(tmp_path / "t.parquet", lon=[1.0] * 20)), vectors=False, places=False
    )
    assert rows.vectors is None
    assert rows.columns == {}
    assert len(rows.keys) == 20


def test_ids_that_occur_twice_are_named(tmp_path):
    write_vectors(tmp_path / "t" / "a.parquet", 20)
    write_vectors(tmp_path / "t" / "b.parquet", 2, start=19)
    with pytest.raises(InputError, match=r"1 ids occur more than once \(first: 'row19' \(2 times\)\)"):
        EmbeddingTable.open(tmp_path / "t").check_keys()


def test_equal_hashes_of_different_ids_are_not_repeated_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(parquet, "hash_keys", lambda keys: np.zeros(len(keys), np.uint64))
    assert EmbeddingTable.open(write_vectors(tmp_path / "t.parquet", 20)).check_keys() == 20


@pytest.mark.parametrize(
    ("columns", "options", "message"),
    [
        (
            {"id": ["a"], "size": [1.0]},
            [],
            r"there is no column of vectors .* the columns are id \(string\), size \(double\)",
        ),
        (
            {"embedding": vector_column(vectors(1)), "vector": vector_column(vectors(1))},
            [],
            "the columns embedding, vector hold vectors",
        ),
        ({"x": vector_column(vectors(1)), "y": vector_column(vectors(1))}, [], "the columns x, y hold vectors"),
        ({"embedding": vector_column(vectors(1))}, ["vector=emb"], "there is no column emb for vector"),
        ({"embedding": vector_column(vectors(1)), "a": [1.5]}, ["id=a"], "column a of type double cannot hold ids"),
        (
            {"embedding": vector_column(vectors(1)), "a": [["x"]]},
            ["vector=a"],
            r"column a of type list.* cannot hold vectors",
        ),
        (
            {"embedding": vector_column(vectors(1))},
            ["layout=clay"],
            "layout clay needs the columns embeddings, source_url",
        ),
        ({"embedding": vector_column(vectors(1))}, ["layout=unknown"], "unknown layout 'unknown'"),
        ({"embedding": vector_column(vectors(1))}, ["embedding"], "ROLE=NAME is needed"),
        ({"embedding": vector_column(vectors(1))}, ["id=a", "id=b"], "given twice"),
        ({"embedding": pa.array([], pa.list_(pa.float32()))}, [], "has no rows with a vector"),
    ],
)
def test_unusable_tables_are_explained_in_one_line(tmp_path, columns, options, message):
    with pytest.raises(InputError, match=message) as error:
        EmbeddingTable.open(write_table(tmp_path / "t.parquet", columns), options)
    assert "\n" not in str(error.value)


def test_a_damaged_file_and_an_absent_one(tmp_path):
    path = write_vectors(tmp_path / "t.parquet", 3000)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"t\.parquet is not a readable Parquet file"):
        EmbeddingTable.open(path)
    damaged = bytearray(content)
    damaged[4 : len(content) // 2] = bytes(len(content) // 2 - 4)
    path.write_bytes(damaged)
    with pytest.raises(InputError, match=r"t\.parquet is not a readable Parquet file"):
        rows_of(EmbeddingTable.open(path))
    with pytest.raises(InputError, match="does not exist"):
        EmbeddingTable.open(tmp_path / "absent.parquet")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="has no Parquet file"):
        EmbeddingTable.open(tmp_path / "empty")


def test_files_that_are_not_parts_of_one_table(tmp_path):
    write_vectors(tmp_path / "t" / "a.parquet")
    write_vectors(tmp_path / "t" / "b.parquet", dims=8, start=20)
    with pytest.raises(InputError, match="their vectors have 8 and 16 dimensions"):
        EmbeddingTable.open(tmp_path / "t")
    write_vectors(tmp_path / "t" / "b.parquet", 1, start=20, label=["a"])
    with pytest.raises(InputError, match="their columns differ"):
        EmbeddingTable.open(tmp_path / "t")


def test_another_embedding_is_refused(tmp_path):
    table = EmbeddingTable.open(write_vectors(tmp_path / "t.parquet"), ["name=clip"])
    table.check_embedding("clip", DIMS)
    table.check_embedding("", DIMS)
    with pytest.raises(InputError, match="of 16 dimensions; the model takes dino of 8 dimensions"):
        table.check_embedding("dino", 8)
    with pytest.raises(InputError, match="the embedding clip; the model takes dino"):
        table.check_embedding("dino", DIMS)


def test_which_sources_are_tables_of_embeddings(tmp_path):
    write_vectors(tmp_path / "t" / "year=2024" / "a.parquet")
    assert is_embedding_table(tmp_path / "t")
    assert is_embedding_table(tmp_path / "t" / "year=2024" / "a.parquet")
    write_table(tmp_path / "ben" / "metadata.parquet", {"patch_id": ["a"], "labels": [["x"]]})
    assert not is_embedding_table(tmp_path / "ben")
    write_vectors(tmp_path / "images" / "a.parquet")
    (tmp_path / "images" / "a.png").write_bytes(b"")
    assert not is_embedding_table(tmp_path / "images")
    assert not is_embedding_table(tmp_path / "absent")
