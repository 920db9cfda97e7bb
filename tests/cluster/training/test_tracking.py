"""Training logs of TensorBoard, MLflow and W&B, read back from their files."""

import pytest
from cluster_parts import scalars

from orbithash.cluster.training import tracking
from orbithash.cluster.training.tracking import Tracking, check_trackers
from orbithash.encoders.errors import InputError
from orbithash.trainers.loop.run import make_run


@pytest.fixture
def run(labelled):
    return make_run("dhcl", labelled, bits=16)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "first").mkdir()
    return tmp_path / "first"


def record(epoch):
    return {
        "epoch": epoch,
        "lr": 0.1 / epoch,
        "train/loss": 3.0 - epoch,
        "validation/ap_min@20": epoch / 10,
        "images_per_s": 50.0,
        "step_s": 0.25,
        "seconds": 4.0,
        "waited_for_data_s": 1.0,
        "score": epoch / 10,
    }


SHOWN = {"lr", "train/loss", "validation/ap_min_at_20", "images_per_s", "step_s", "seconds", "waited_for_data_s"}


def follow(run, folder, *names, epochs=2, best=True):
    """Log a training of this number of epochs, after each epoch."""
    place = Tracking(run, folder, names)
    history = []
    for epoch in range(1, epochs + 1):
        history.append(record(epoch))
        place.follow(history)
    place.close(record(2) if best else None)


def test_tensorboard_shows_every_epoch_once(run, folder):
    follow(run, folder, best=False)
    # A resumed run logs no epoch twice.
    follow(run, folder, epochs=3)
    found = scalars(folder / "tensorboard")
    assert "| bits | 16 |" in found.pop("settings/text_summary")
    best = {name: values for name, values in found.items() if name.startswith("best/")}
    assert set(found) - set(best) == SHOWN | {"waited_share"}
    assert found["train/loss"] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert found["waited_share"] == [(epoch, 0.25) for epoch in (1, 2, 3)]
    assert best["best/validation/ap_min_at_20"] == [(2, pytest.approx(0.2))]


def test_mlflow_has_settings_epochs_and_the_best_epoch(run, folder, tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "codes")
    # A store that needs no database.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    follow(run, folder, "mlflow", best=False)
    client = mlflow.MlflowClient()
    (found,) = client.search_runs([client.get_experiment_by_name("codes").experiment_id])
    assert (found.info.run_name, found.info.status) == ("first", "KILLED")
    follow(run, folder, "mlflow", epochs=3)
    (found,) = client.search_runs([client.get_experiment_by_name("codes").experiment_id])
    assert found.info.status == "FINISHED"
    assert found.data.params["method"] == "dhcl"
    assert found.data.params.keys() >= run.config.model_dump().keys()
    losses = client.get_metric_history(found.info.run_id, "train/loss")
    assert [(one.step, one.value) for one in losses] == [(1, 2.0), (2, 1.0), (3, 0.0)]
    assert found.data.metrics["best/validation/ap_min_at_20"] == 0.2
    assert found.data.metrics["images_per_s"] == 50


def test_wandb_offline_writes_a_run(run, folder, monkeypatch):
    pytest.importorskip("wandb", reason="the extra `wandb` is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    follow(run, folder, "wandb")
    (file,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    content = file.read_bytes()
    for word in (b"train/loss", b"images_per_s", b"waited_share", b"best/validation/ap_min_at_20", b"batch_size"):
        assert word in content


def test_unknown_trackers_and_missing_packages(monkeypatch):
    with pytest.raises(InputError, match="--track is 'tensorflow'; the trackers are mlflow, wandb"):
        check_trackers(["tensorflow"])
    monkeypatch.setitem(tracking.TRACKERS, "mlflow", (None, "no_such_package"))
    with pytest.raises(
        InputError,
        match=r"--track mlflow needs no_such_package, which is not installed; run: pip install 'orbithash\[mlflow\]'",
    ):
        check_trackers(["mlflow"])


def test_an_unreachable_server_is_reported_before_training(run, folder, monkeypatch):
    pytest.importorskip("mlflow", reason="the extra `mlflow` is not installed")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(InputError) as caught:
        Tracking(run, folder, ["mlflow"])
    assert str(caught.value).startswith("--track mlflow: ")
    assert "\n" not in str(caught.value)


def test_a_tracker_that_fails_later_is_dropped(run, folder, monkeypatch, capsys):
    class Fails:
        def __init__(self, *_):
            pass

        def epoch(self, *_):
            raise OSError("the server is gone\nand more")

    monkeypatch.setitem(tracking.TRACKERS, "mlflow", (Fails, "json"))
    follow(run, folder, "mlflow", epochs=3)
    err = capsys.readouterr().err
    assert err.count("mlflow: the server is gone; training continues without it") == 1
    assert len(scalars(folder / "tensorboard")["train/loss"]) == 3
