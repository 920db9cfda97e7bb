"""A backbone of another library through the command line and Ray: train, encode, serve, query."""

import json
import shutil

import pytest
from backbone_models import write_open_clip
from cluster_parts import wait_for
from method_parts import write_data

from orbithash.encoders.networks.card import read_model_folder


@pytest.mark.slow
@pytest.mark.ray
def test_a_dual_encoder_from_training_to_a_query(ray_cluster, cli, start, tmp_path):
    data, source, run = write_data(tmp_path / "data"), write_open_clip(tmp_path / "open_clip"), tmp_path / "run"
    settings = {
        "backbone": f"open_clip:{source}",
        "encoding_precision": "bfloat16",
        "bits": 16,
        "batch_size": 12,
        "steps_per_epoch": 30,
        "epochs": 2,
        "hidden": "[16]",
    }
    words = [word for key, value in settings.items() for word in ("--set", f"{key}={value}")]
    ended = cli("train", "mhcln", "--data", data, "--out", run, *words)
    assert ended.code == 0, ended.err
    assert "the weights of open_clip are from folder open_clip; their licence is mit" in ended.err
    card, _, _ = read_model_folder(run / "model")
    assert (card.network.backbone.source, card.precision) == ("open_clip", "bfloat16")
    # The model folder needs the source no longer.
    shutil.rmtree(source)
    ended = cli("encode", data, "--model", run / "model", "--archive", tmp_path / "archive")
    assert ended.code == 0, ended.err
    process = start("serve", tmp_path / "archive", "--model", run / "model", "--address", "127.0.0.1:0")
    line = wait_for(lambda: [s for s in process.err.read_text().splitlines() if "ready at " in s], process)[0]
    address = line.partition("ready at ")[2].partition(";")[0]
    photo = data / "forest" / "forest0.png"
    ended = cli("query", "--image", photo, "--json", "-k", 1, "--address", address)
    assert ended.code == 0, ended.err
    (hit,) = json.loads(ended.out)["hits"]
    assert (hit["key"], hit["distance"]) == ("forest/forest0.png", 0)
