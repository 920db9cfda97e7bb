"""From a table of embeddings to answers: train, encode, search in process and through a gateway."""

import json

import numpy as np
import pytest
from PIL import Image
from serving_parts import ready_at

from orbithash.encoders.networks.model import HashModel
from orbithash.search.client.client import Client
from orbithash.search.engine.local_index import LocalIndex
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.rows import Row
from orbithash.trainers.library import train
from tests.encoders.sources.embedding_tables import vectors, write_vectors

COUNT = 300


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    labels = [f"class{number % 3}" for number in range(COUNT)]
    return write_vectors(tmp_path_factory.mktemp("tables") / "t.parquet", COUNT, label=labels, lon=[1.0] * COUNT)


@pytest.fixture(scope="module")
def model(table, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "run"
    train("itq", table, folder, bits=16)
    return folder / "model"


@pytest.fixture
def archive(cli, table, model, tmp_path):
    ended = cli("encode", table, "--model", model, "--archive", tmp_path / "archive")
    assert ended.code == 0, ended.err
    return tmp_path / "archive"


def test_each_vector_finds_itself(archive, model):
    queries = HashModel.load(model).encode_items("vector", vectors(COUNT)[:5], with_outputs=True)
    for number, answer in enumerate(LocalIndex.open(archive).search(queries, k=3, rescore="vector")):
        assert answer.keys[0] == f"row{number}"


@pytest.mark.slow
def test_a_gateway_takes_vectors_and_no_images(archive, model, cli, start, tmp_path):
    process = start("serve", archive, "--model", model, "--local", "--address", "127.0.0.1:0")
    address = ready_at(process)
    np.save(tmp_path / "query.npy", vectors(COUNT)[7])
    ended = cli(
        "query", "--vector", tmp_path / "query.npy", "--rescore", "vector", "-k", "3", "--address", address, "--json"
    )
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["hits"][0]["key"] == "row7"
    with Client(address, timeout_s=30) as client:
        assert client.search(key="row7", k=1).hits[0].distance == 0
        with pytest.raises(SearchError, match="vectors"):
            client.search(image=Image.new("RGB", (32, 32)))
        with pytest.raises(SearchError, match="16"):
            client.search(vector=np.ones(8, np.float32))
        client.upsert([Row(key="new", vector=-vectors(COUNT)[7])])
        assert client.search(vector=-vectors(COUNT)[7], rescore="vector", k=1).hits[0].key == "new"
