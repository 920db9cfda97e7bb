"""Training on Ray Train: complete run folders, resumed runs, invalid data, missing resources."""

import json
import shutil
import signal

import pytest
import yaml
from cluster_parts import family, kill, scalars, wait_for

from orbithash.cluster.training import train as training
from orbithash.encoders.networks.model import HashModel
from orbithash.trainers.datasets import Manifest
from orbithash.trainers.loop.export import best_epoch

pytestmark = pytest.mark.ray

METRIC = "validation/ap_min@20"
SETTINGS = ("backbone=mobilenet_v3_small", "image_size=32", "batch_size=4", "warm_up_epochs=0")


def command(data, out, **settings):
    pairs = [*SETTINGS, *(f"{key}={value}" for key, value in settings.items())]
    options = [word for pair in pairs for word in ("--set", pair)]
    return ("train", "dhcl", "--data", data, "--out", out, "--bits", "16", "--workers", "2", *options)


def history_of(run):
    path = run / "metrics.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def files_of(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.slow
def test_two_workers_write_a_complete_run_folder(ray_cluster, cli, labelled, tmp_path):
    run = tmp_path / "run"
    ended = cli(*command(labelled, run, epochs=2, nested_bits="[8]"))
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["method"], config["data"], config["bits"], config["epochs"]) == ("dhcl", str(labelled), 16, 2)
    manifest = Manifest.read(run / "manifest.parquet")
    history = history_of(run)
    assert [record["epoch"] for record in history] == [1, 2]
    best = best_epoch(history)
    model = HashModel.load(run / "model")
    assert (model.bits, model.card.classes, model.card.metrics) == (16, ("beach", "forest", "river"), best)
    assert model.card.dataset["manifest_sha256"] == manifest.sha256
    assert f"epoch {best['epoch']} of 2 is the best" in ended.err
    files = {
        "config.yaml",
        "manifest.parquet",
        "metrics.jsonl",
        "model",
        "model-8",
        "ray",
        "tensorboard",
        "tracking.json",
    }
    assert {path.name for path in run.iterdir()} == files
    logged = scalars(run / "tensorboard")["train/loss"]
    assert logged == [(record["epoch"], pytest.approx(record["train/loss"])) for record in history]

    # Repeating the command does nothing; other settings are refused in this folder.
    before = files_of(run)
    ended = cli(*command(labelled, run, epochs=2, nested_bits="[8]"))
    assert ended.code == 0
    assert "is complete already; nothing to train" in ended.err
    ended = cli(*command(labelled, run, epochs=3, nested_bits="[8]"))
    assert ended.code == 2
    assert "holds another run (epochs was 2, is 3)" in ended.err
    assert files_of(run) == before

    # The run can be evaluated, and its page needs no other file.
    ended = cli("evaluate", run, "--data", labelled, "--json")
    assert ended.code == 0, ended.err
    metrics = json.loads(ended.out)
    assert metrics == json.loads((run / "evaluation" / "metrics.json").read_text())
    assert (metrics["queries"], metrics["database"]) == (
        len(manifest.part("test")),
        len(manifest.part("train", "validation")),
    )
    assert (run / "evaluation" / "report.html").stat().st_size > 10_000

    # The trained shorter length, a prefix of the same codes, can be evaluated too; other lengths are refused.
    ended = cli("evaluate", run, "--data", labelled, "--bits", "8", "--json")
    assert ended.code == 0, ended.err
    shorter = json.loads(ended.out)
    assert shorter == json.loads((run / "evaluation-8" / "metrics.json").read_text())
    assert (shorter["bits"], shorter["codes"]["bytes_per_code"], shorter["queries"]) == (8, 1, metrics["queries"])
    assert shorter["codes"]["bit_balance"] == metrics["codes"]["bit_balance"][:8]
    assert (run / "evaluation-8" / "report.html").exists()
    ended = cli("evaluate", run, "--data", labelled, "--bits", "12")
    assert ended.code == 2
    assert f"error: {run} has no model of 12 bits; there is 8 and 16" in ended.err


@pytest.mark.slow
def test_two_workers_share_weights_and_optimizer_state(ray_cluster, cli, labelled, tmp_path):
    run = tmp_path / "run"
    ended = cli(*command(labelled, run, epochs=2, shard="true"))
    assert ended.code == 0, ended.err
    assert "Traceback" not in ended.err
    assert yaml.safe_load((run / "config.yaml").read_text())["shard"] is True
    assert [record["epoch"] for record in history_of(run)] == [1, 2]
    assert all(METRIC in record for record in history_of(run))
    ended = cli("evaluate", run, "--data", labelled, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["queries"] == len(Manifest.read(run / "manifest.parquet").part("test"))


@pytest.mark.slow
def test_of_equal_epochs_the_last_becomes_the_model(ray_cluster, cli, labelled, tmp_path):
    """With a learning rate of almost 0, scores are equal; Ray keeps the last of the best checkpoints."""
    run = tmp_path / "run"
    ended = cli(*command(labelled, run, epochs=3, lr="1e-30"))
    assert ended.code == 0, ended.err
    assert len({record["score"] for record in history_of(run)}) == 1
    assert HashModel.load(run / "model").card.metrics["epoch"] == 3
    assert "epoch 3 of 3 is the best" in ended.err


@pytest.mark.slow
def test_images_that_cannot_be_trained_on(ray_cluster, cli, labelled, tmp_path):
    data, run = tmp_path / "data", tmp_path / "run"
    shutil.copytree(labelled, data)
    for name in ("beach", "forest", "river"):
        for image in (data / name).iterdir():
            if image.stem[-1] in "258":
                image.write_bytes(b"broken")
    ended = cli(*command(data, run, epochs=1))
    assert ended.code == 2
    message = ended.err[ended.err.index("error: ") :].splitlines()
    assert "images that cannot be read" in message[0]
    assert len(message) > 2
    assert all(": not a JPEG, PNG" in line for line in message[1:])
    assert not run.exists(), "the folder name can be used again with repaired images"


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGKILL, signal.SIGINT])
def test_a_stopped_run_resumes(ray_cluster, start, cli, labelled, tmp_path, by):
    run, epochs = tmp_path / "run", 12
    process = start(*command(labelled, run, epochs=epochs))

    def has_checkpoint():
        snapshot = run / "ray" / "checkpoint_manager_snapshot.json"
        return snapshot.exists() and "checkpoint_2" in snapshot.read_text()

    wait_for(has_checkpoint, process, timeout_s=240)
    if by == signal.SIGKILL:
        kill(process, *family(process.pid))
    else:
        process.send_signal(by)
        assert process.wait(timeout=120) == 130
        assert "the same command resumes after the last complete epoch" in process.err.read_text()
        assert "Traceback" not in process.err.read_text()
    before = history_of(run)
    assert 1 <= len(before) < epochs, "it was stopped in the middle"
    assert not (run / "model").exists()

    # The first epoch is not trained again: its record, with its times, is unchanged.
    ended = cli(*command(labelled, run, epochs=epochs))
    assert ended.code == 0, ended.err
    after = history_of(run)
    assert [record["epoch"] for record in after] == list(range(1, epochs + 1))
    assert after[0] == before[0]
    assert HashModel.load(run / "model").card.metrics == best_epoch(after)


@pytest.mark.slow
def test_no_resources_for_the_workers(ray_cluster, cli, labelled, tmp_path, monkeypatch):
    """Other tasks hold the CPUs: the wait ends with an error, and the run folder stays."""
    import ray

    # Defined here, because workers cannot import the tests.
    class Holder:
        def is_ready(self):
            return True

    monkeypatch.setenv("RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S", "1")
    monkeypatch.setattr(training, "MAX_WAITS", 1)
    holder = ray.remote(num_cpus=4)(Holder).remote()
    try:
        assert ray.get(holder.is_ready.remote())
        ended = cli(*command(labelled, tmp_path / "run", epochs=1))
    finally:
        ray.kill(holder)
    assert ended.code == 1
    assert "no free resources for 2 workers with 2 CPUs and 0 GPUs each; the same command resumes" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "run" / "config.yaml").exists()


@pytest.mark.slow
def test_validation_beside_training(ray_cluster, cli, labelled, tmp_path):
    run = tmp_path / "run"
    ended = cli(*command(labelled, run, epochs=4, validate_every=2), "--validate-beside", "--keep", "2")
    assert ended.code == 0, ended.err
    assert "not validated" not in ended.err
    history = history_of(run)
    assert [record["epoch"] for record in history if METRIC in record] == [2, 4]
    assert [record["score"] for record in history] == [-1, history[1][METRIC], -1, history[3][METRIC]]
    best = best_epoch(history)
    assert HashModel.load(run / "model").card.metrics == best
    assert f"epoch {best['epoch']} of 4 is the best on the validation part" in ended.err
    assert not (run / "validation.jsonl").exists()
    logged = scalars(run / "tensorboard")
    assert logged["validation/ap_min_at_20"] == [(epoch, pytest.approx(history[epoch - 1][METRIC])) for epoch in (2, 4)]
    assert [epoch for epoch, _ in logged["train/loss"]] == [1, 2, 3, 4]
    # Ray Train keeps the best checkpoint and the last one.
    kept = json.loads((run / "ray/checkpoint_manager_snapshot.json").read_text())["checkpoint_results"]
    assert best["epoch"] in {result["metrics"]["epoch"] for result in kept}


def test_validation_beside_training_needs_resources(ray_cluster, refused, labelled, tmp_path):
    options = ("--workers", "4", "--validate-beside", "--set", "batch_size=8")
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", *options),
        words=["training with 4 workers and validation beside it needs 5 CPUs, the cluster has 4; ask for fewer"],
    )
    refused(
        *("train", "dhcl", "--data", labelled, "--out", tmp_path / "run", "--validate-beside", "--validation", "0"),
        words=["--validate-beside needs a validation part; set --validation above 0"],
    )


@pytest.mark.slow
def test_two_workers_fit_a_method_to_images_without_labels(ray_cluster, cli, labelled, tmp_path):
    flat, run = tmp_path / "all" / "tiles", tmp_path / "run"
    flat.mkdir(parents=True)
    for path in labelled.rglob("*.png"):
        shutil.copy(path, flat)
    options = ("--set", "backbone=mobilenet_v3_small", "--set", "image_size=32", "--set", "nested_bits=[8]")
    words = ("train", "pca-sign", "--data", flat.parent, "--out", run, "--bits", "16", "--workers", "2", *options)
    ended = cli(*words)
    assert ended.code == 0, ended.err
    assert "fitted to 21 images" in ended.err
    (record,) = history_of(run)
    assert (record["epoch"], record["train/rows"], record["score"]) == (1, 21, 1)
    assert HashModel.load(run / "model").bits == 16
    assert HashModel.load(run / "model-8").bits == 8
    assert scalars(run / "tensorboard")["train/sign_cosine"] == [(1, pytest.approx(record["train/sign_cosine"]))]
    assert "is complete already" in cli(*words).err
    ended = cli("evaluate", run, "--data", flat.parent)
    assert ended.code == 2
    assert "has a class, so no image is relevant to them; evaluation needs labels" in ended.err
