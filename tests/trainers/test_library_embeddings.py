"""Training and evaluation on a table of embeddings instead of images."""

import json

import numpy as np
import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.library import evaluate, train
from tests.encoders.sources.embedding_tables import DIMS, vector_column, vectors, write_table, write_vectors

TINY = {"bits": 32, "epochs": 2, "steps_per_epoch": 20, "hidden": (16,), "batch_size": 30}


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    """A table of three clusters with labels and the name of the embedding."""
    kinds = np.arange(150) % 3
    values = 3 * vectors(3)[kinds] + vectors(150, seed=1)
    return write_table(
        tmp_path_factory.mktemp("embeddings") / "clusters.parquet",
        {
            "id": [f"row{number}" for number in range(150)],
            "embedding": vector_column(values.astype(np.float16)),
            "label": [f"class{kind}" for kind in kinds],
        },
        {"emb": json.dumps({"model": {"id": "dino", "source": "https://example.org/dino"}})},
        rows_per_group=40,
    )


@pytest.fixture(scope="module")
def run(table, tmp_path_factory):
    """A complete run on the table."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    train("mhcln", table, folder, **TINY)
    return folder


def test_the_model_states_its_embedding_and_takes_no_images(run, table):
    model = train("mhcln", table, run, **TINY)
    spec = model.card.network.backbone
    assert (spec.source, spec.name, spec.num_features) == ("embedding", "dino", DIMS)
    assert spec.origin == "https://example.org/dino"
    side = model.preprocessing.crop
    with pytest.raises(InputError, match=r"takes vectors of 16 dimensions \(dino\), and no images") as error:
        model.encode_prepared(np.zeros((1, side, side, 3), np.uint8))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("method", ["cdne", "csq"])
def test_supervised_methods_train_a_head_on_vectors(table, tmp_path, method):
    train(method, table, tmp_path / "run", bits=32, epochs=3, batch_size=30)
    assert evaluate(tmp_path / "run")["metrics"]["ap_min@20"]["expected"] > 0.8


def test_evaluation_reads_the_vectors_for_codes_and_baselines(run, table):
    metrics = evaluate(run, baselines=True)
    assert (metrics["dataset"], metrics["queries"], metrics["database"]) == ("embeddings", 30, 120)
    assert metrics["metrics"]["ap_min@20"]["expected"] > 0.8
    assert metrics["baselines"]
    assert (run / "evaluation" / "report.html").is_file()


def test_other_vectors_are_refused(run, tmp_path):
    path = write_vectors(tmp_path / "other.parquet", 150)
    with pytest.raises(InputError, match="is not the data of this run's manifest"):
        evaluate(run, path)
    with pytest.raises(InputError, match=r"of 8 dimensions; the model takes dino of 16 dimensions \(https"):
        evaluate(run, write_vectors(tmp_path / "short.parquet", 150, dims=8))


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("mrhash", {"fine_tune": True, "sources": "first"}, "mrhash trains on images, and .* has vectors"),
        ("dhcl", {"tune": "lora"}, "tune is lora, and .* has vectors without a backbone; omit tune or set none"),
        ("dhcl", {"augment_on": "device"}, "augment_on is device, and .* has vectors without views; omit augment_on"),
        ("dhcl", {"shard": True}, "shard is true, and .* has vectors without a backbone; omit shard"),
        ("mhcln", {"augment_on": "device"}, "unknown key 'augment_on'"),
        ("mhcln", {"weights": "IMAGENET1K_V2"}, "need no backbone"),
        ("mhcln", {"backbone": "resnet18"}, "need no backbone"),
        ("mhcln", {"table": ("vector=id",)}, "column id of type string cannot hold vectors"),
        ("mhcln", {"table": ("label=",)}, "images have no class"),
        ("duch", {}, "duch needs features of changed images, and the data are embeddings"),
    ],
)
def test_what_does_not_fit_vectors_is_refused_in_one_line(table, tmp_path, method, settings, message):
    with pytest.raises(InputError, match=message):
        train(method, table, tmp_path / "run", **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("method", "settings"), [("itq", {}), ("dhcl", {"epochs": 1})])
def test_other_methods_train_on_vectors_too(table, tmp_path, method, settings):
    model = train(method, table, tmp_path / "run", bits=8, **settings)
    assert model.card.network.backbone.source == "embedding"
    assert model.encode_items("vector", vectors(3)).codes.shape == (3, model.num_bytes)


def test_the_backbone_of_embeddings_is_not_for_images(tmp_path):
    (tmp_path / "images").mkdir()
    with pytest.raises(InputError):
        train("mhcln", tmp_path / "images", tmp_path / "run", backbone="embedding:16:dino:")
