"""`upsert` and `query` at a gateway whose model takes published embeddings instead of images."""

import json

import numpy as np
import pytest
from archive_parts import serving_archive
from search_parts import StubEncoder

from orbithash.encoders.codes import Encoded, pack
from orbithash.search.client import Client
from tests.encoders.sources.embedding_tables import DIMS, vector_column, vectors, write_table


class EmbeddingEncoder(StubEncoder):
    """Bits are signs of the first dimensions."""

    num_features = DIMS
    embedding = "dino"

    def __init__(self):
        super().__init__(vectors=self._encode)

    async def _encode(self, rows):
        return Encoded(pack(np.stack(rows)[:, :16] > 0), None, None)


@pytest.fixture
def served(tmp_path):
    with serving_archive(tmp_path / "archive", encoder=EmbeddingEncoder()) as (address, _, _):
        yield address


def table(folder, name="dino", dims=DIMS):
    values = vectors(30, dims=dims).astype(np.float32)
    values[7] = np.nan
    columns = {
        "id": [f"row{number}" for number in range(30)],
        "embedding": vector_column(values),
        "label": ["harbor" if number % 2 else None for number in range(30)],
        "lon": [float(number) for number in range(30)],
        "lat": [1.0] * 30,
    }
    return write_table(folder / f"{name}.parquet", columns, {"emb": json.dumps({"model": {"id": name}})}), values


def test_a_table_of_embeddings_becomes_rows(cli, served, tmp_path):
    path, values = table(tmp_path)
    done = json.loads(cli("upsert", path, "--address", served, "--json").out)
    assert done["written"] == 29
    assert list(done["refused"]) == ["row7"]
    with Client(served) as client:
        assert client.describe().embedding == "dino"
        found = client.get(["row3", "row4"], include=("code", "uri"))
        assert (found["row3"].label, found["row3"].lon, found["row3"].uri) == ("harbor", 3.0, str(path))
        assert found["row4"].label is None
        assert found["row3"].code == pack(values[3:4, :16] > 0).tobytes()
    np.save(tmp_path / "vector.npy", values[5])
    hits = json.loads(cli("query", "--vector", tmp_path / "vector.npy", "--address", served, "--json").out)["hits"]
    assert (hits[0]["key"], hits[0]["distance"]) == ("row5", 0)
    assert "image queries" in cli("status", "--address", served).out


@pytest.mark.parametrize(
    ("fields", "words"),
    [({"name": "clay"}, "the embedding clay; the model takes dino"), ({"dims": 8}, "of 8 dimensions; the model takes")],
)
def test_another_embedding_is_refused(cli, served, tmp_path, fields, words):
    path, _ = table(tmp_path, **fields)
    ended = cli("upsert", path, "--address", served)
    assert ended.code == 2
    assert words in ended.err
    assert ended.err.count("\n") == 1
