"""The verbs card, push and pull, and models of the hub for --model, against a stand-in of the hub."""

import json

import pytest
from method_parts import write_data

from orbithash.cluster.cli.options import local_model
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers import train

NAME = "lab/beaches"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("publishing")
    data = write_data(folder / "images")
    train("dhcl", data, folder / "run", bits=16, backbone="resnet8", image_size=32, batch_size=8, epochs=1)
    return folder / "run"


def test_a_model_goes_to_the_hub_and_back(cli, run, hub, tmp_path):
    said = cli("card", run, "--licence", "mit", "--bbox", "-10,40,5,50", "--dates", "2020-01-01/2020-12-31")
    assert said.code == 0
    assert f"orbithash evaluate {run} --data FOLDER" in said.err
    written = json.loads(cli("card", run, "--licence", "mit", "--name", "Beaches", "--json").out)
    assert written["card"] == str(run / "model" / "README.md")
    assert written["evaluations"] == []
    assert json.loads((run / "model" / "stac-item.json").read_text())["id"] == "Beaches"
    sent = json.loads(cli("push", run, NAME, "--json").out)
    assert sent["model_id"] == written["model_id"]
    assert "uploaded " in cli("push", run / "model", NAME, "--public").err
    assert hub.repositories[NAME].visibility == "private"
    pulled = json.loads(cli("pull", f"{NAME}@{sent['commit']}", tmp_path / "model", "--json").out)
    assert (pulled["model_id"], pulled["commit"]) == (written["model_id"], sent["commit"])
    assert HashModel.load(tmp_path / "model").model_id == written["model_id"]
    assert cli("pull", f"hf:{NAME}", tmp_path / "model").code == 0
    cached = local_model(f"hf:{NAME}")
    assert HashModel.load(cached).model_id == written["model_id"]
    assert local_model(run) == run
    assert local_model(None) is None


def test_wrong_input_is_refused_in_one_line(refused, run, hub, tmp_path):
    refused("card", tmp_path, words=[tmp_path, "not a run folder"])
    refused("card", run, "--bbox", "1,2,3", words=["'1,2,3'", "WEST,SOUTH,EAST,NORTH"])
    refused("card", run, "--bits", "12", words=["no model of 12 bits"])
    refused("push", tmp_path, NAME, words=["not a model folder"])
    refused("push", run, "beaches", words=["'beaches'", "ORG/NAME"])
    refused("pull", NAME, tmp_path / "model", words=[NAME, "no such model"])
    for verb in ("encode", "serve"):
        refused(
            *(verb, tmp_path, "--model", "hf:lab/none", *(("--archive", tmp_path / "a") if verb == "encode" else ())),
            words=["lab/none", "no such model"],
        )
