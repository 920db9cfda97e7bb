"""The training loop: ranks train as one process, a killed run ends as if it had not been, the test part stays shut."""

import json
import math
import multiprocessing
import os
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from PIL import Image
from safetensors.torch import load_file, save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.images import read_image
from orbithash.encoders.model import HashModel
from orbithash.trainers.checkpoint import load_checkpoint
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.loading import Part, batches
from orbithash.trainers.loop import SELECTION_METRIC, Run, best_epoch, export_model, train
from orbithash.trainers.methods.dhcl import Dhcl, DhclConfig
from orbithash.trainers.metrics import mean_average_precision

WORLD_SIZE = 2
METRIC = f"validation/{SELECTION_METRIC}"


@pytest.fixture(autouse=True)
def one_thread():
    """The order of a sum depends on the number of threads."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of three classes that colour tells apart, of unequal number: 14 to train on, 3 to validate, 4 to test."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name, count, colour in (("beach", 9, (200, 180, 90)), ("forest", 7, (30, 90, 40)), ("river", 5, (40, 60, 160))):
        (root / name).mkdir()
        for i in range(count):
            noise = rng.integers(-30, 30, (44, 40, 3)) + colour
            Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8)).save(root / name / f"{name}{i}.png")
    return root


def make_run(root, **settings):
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 2, **settings}
    return Run("dhcl", load_config(DhclConfig, **given), make_manifest(root, protocol="random"), root)


class Recorder:
    """Notes what the loop tells, and writes each epoch's checkpoint."""

    def __init__(self, folder=None):
        self.folder = folder
        self.steps, self.history = [], []

    def on_step(self, epoch, step, num_steps, images_per_s):
        assert images_per_s > 0
        self.steps.append((epoch, step, num_steps))

    def on_epoch(self, history, write_checkpoint):
        self.history = json.loads(json.dumps(history))
        if self.folder is not None:
            part = self.folder / "part"
            write_checkpoint(part)
            part.rename(self.folder / f"epoch{len(history)}")


def trained(run, folder=None, **options):
    recorder = Recorder(folder)
    train(run, recorder, **options)
    return recorder


def timeless(history):
    def is_told_by_the_clock(key):
        return key not in ("epoch", "lr") and not key.startswith(("train/", "validation/"))

    return [{key: value for key, value in record.items() if not is_told_by_the_clock(key)} for record in history]


def flat(value, name=""):
    """Every leaf of a checkpoint by its path; tensors as their bytes."""
    if isinstance(value, torch.Tensor):
        return {name: (str(value.dtype), tuple(value.shape), value.numpy().tobytes())}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else None
    if items is None:
        return {name: value}
    return {path: leaf for key, item in items for path, leaf in flat(item, f"{name}/{key}").items()}


def same_state(one, other):
    """Checkpoint folders equal to the last bit, but for the times in the history."""
    states = [load_checkpoint(folder) for folder in (one, other)]
    for state in states:
        state["history"] = timeless(state["history"])
    assert flat(states[0]) == flat(states[1])


# Ranks.

# Name of the case -> settings. More than one epoch, because the ranks' wrapper is made anew for each.
CASES = {
    "circle, resnet18": {"backbone": "resnet18", "epochs": 1, "warm_up_epochs": 0},
    "circle, warm-up": {"warm_up_epochs": 1},
    "anchor": {"warm_up_epochs": 0, "proxy_loss": "proxy-anchor"},
}


class Watched(Dhcl):
    """DHCL whose gradients can be looked at after each step.

    Its network is of double precision: on images this small, group norm and ReLU blow up the rounding of single.
    """

    def __init__(self, config, num_classes):
        super().__init__(config, num_classes)
        self.double()
        self.network.backbone.register_forward_pre_hook(lambda module, inputs: (inputs[0].double(),))

    def build_optimizer(self):
        Watched.method = self
        return super().build_optimizer()


class Watcher(Recorder):
    """Notes the gradients of every step and the parameters after the last."""

    def __init__(self):
        super().__init__()
        self.gradients, self.parameters = [], {}

    def on_step(self, *arguments):
        super().on_step(*arguments)
        named = Watched.method.named_parameters()
        self.gradients.append({name: p.grad.clone() for name, p in named if p.grad is not None})

    def on_epoch(self, history, write_checkpoint):
        super().on_epoch(history, write_checkpoint)
        self.parameters = {name: p.detach().clone() for name, p in Watched.method.named_parameters()}


def watch(run):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("orbithash.trainers.loop.get_method", lambda name: Watched)
        watcher = Watcher()
        train(run, watcher)
    return {"gradients": watcher.gradients, "parameters": watcher.parameters, "history": watcher.history}


def work(rank, root, folder):
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE)
    for case, settings in CASES.items():
        torch.save(watch(make_run(root, **settings)), folder / f"{case} {rank}.pt")
    refusals = []
    for batch_size in (5, 2):
        try:
            train(make_run(root, batch_size=batch_size), Recorder())
        except InputError as err:
            refusals.append(str(err))
    torch.save(refusals, folder / f"refusals {rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """The folder in which two processes left what they found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (data, folder), nprocs=WORLD_SIZE)
    return folder


def test_the_ranks_of_these_cases_hold_different_classes(data):
    """Shows that the next test can fail: a loss taken rank by rank is another one."""
    run = make_run(data)
    labels = np.array([image.label for image in run.manifest.part("train")])
    part = Part(np.zeros((len(labels), 8, 8, 3), np.uint8), labels, [""] * len(labels))
    shares = [[set(b.labels.tolist()) for b in batches(part, 8, 4, 0, 0, rank, WORLD_SIZE)] for rank in (0, 1)]
    assert any(one != other for one, other in zip(*shares, strict=True))


@pytest.mark.parametrize("case", CASES)
def test_two_ranks_train_as_one_process_does(data, ranks, case):
    expected = watch(make_run(data, **CASES[case]))
    num_steps = 3 * CASES[case].get("epochs", 2)
    assert len(expected["gradients"]) == num_steps
    for rank in range(WORLD_SIZE):
        found = torch.load(ranks / f"{case} {rank}.pt", weights_only=True)
        for one, other in zip(expected["gradients"], found["gradients"], strict=True):
            assert one.keys() == other.keys()
            for name, gradient in one.items():
                scale = max(1.0, float(gradient.abs().max()))
                assert float((gradient - other[name]).abs().max()) <= 1e-9 * scale, name
        for name, parameter in expected["parameters"].items():
            assert float((parameter - found["parameters"][name]).abs().max()) <= 1e-9, name
        for one, other in zip(timeless(expected["history"]), timeless(found["history"]), strict=True):
            assert one.keys() == other.keys()
            assert all(one[key] == pytest.approx(other[key], rel=1e-4, abs=1e-6) for key in one)


def test_a_batch_that_ranks_cannot_share_is_refused(ranks):
    for rank in range(WORLD_SIZE):
        odd, small = torch.load(ranks / f"refusals {rank}.pt")
        assert "batch_size 5 over 2 workers; it must be a multiple" in odd
        assert "batch_size 2 over 2 workers" in small
        assert "at least 2 images" in small


# Going on.

EPOCHS = 4


def resumable(root):
    return make_run(root, epochs=EPOCHS, warm_up_epochs=1, lr_decay_epochs=2, validate_every=3)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The checkpoints and the history of a run that nothing stopped."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(resumable(data), folder).history


class Stop(Exception):
    """Raised in the middle of things."""


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_stopped_between_epochs_ends_the_same(data, whole, tmp_path, stop_after):
    class Stopped(Recorder):
        def on_epoch(self, history, write_checkpoint):
            super().on_epoch(history, write_checkpoint)
            if len(history) == stop_after:
                raise Stop

    with pytest.raises(Stop):
        train(resumable(data), Stopped(tmp_path))
    # Another run in between: nothing may live on in the process.
    torch.manual_seed(99)
    recorder = trained(resumable(data), tmp_path, resume_from=tmp_path / f"epoch{stop_after}")
    assert recorder.steps[0] == (stop_after + 1, 1, 3)
    same_state(whole[0] / f"epoch{EPOCHS}", tmp_path / f"epoch{EPOCHS}")
    assert timeless(recorder.history) == timeless(whole[1])


class Killed(Recorder):
    """Is killed in the middle of the third epoch."""

    def on_step(self, epoch, step, num_steps, images_per_s):
        if (epoch, step) == (3, 2):
            os.kill(os.getpid(), signal.SIGKILL)


def run_until_killed(root, folder):
    torch.set_num_threads(1)
    train(resumable(root), Killed(folder))


def test_a_run_killed_in_mid_epoch_ends_the_same(data, whole, tmp_path):
    process = multiprocessing.get_context("spawn").Process(target=run_until_killed, args=(data, tmp_path))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert sorted(path.name for path in tmp_path.iterdir()) == ["epoch1", "epoch2"]
    recorder = trained(resumable(data), tmp_path, resume_from=tmp_path / "epoch2")
    assert recorder.steps[0] == (3, 1, 3)
    same_state(whole[0] / f"epoch{EPOCHS}", tmp_path / f"epoch{EPOCHS}")


def test_a_run_at_its_end_has_nothing_to_do(data, whole):
    recorder = trained(resumable(data), resume_from=whole[0] / f"epoch{EPOCHS}")
    assert recorder.steps == recorder.history == []


def test_a_run_without_its_last_checkpoint_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        train(resumable(data), Recorder(), resume_from=tmp_path)


# What is told.


def test_steps_and_history(data):
    run = make_run(data, epochs=5, validate_every=2, warm_up_epochs=1, lr=0.01, lr_decay=0.5, lr_decay_epochs=2)
    recorder = trained(run)
    assert recorder.steps == [(epoch, step, 3) for epoch in range(1, 6) for step in range(1, 4)]
    assert [record["epoch"] for record in recorder.history] == [1, 2, 3, 4, 5]
    assert [record["lr"] for record in recorder.history] == [0.01, 0.01, 0.005, 0.005, 0.0025]
    # Every second epoch, and the last one in any case.
    assert [METRIC in record for record in recorder.history] == [False, True, False, True, True]
    for record in recorder.history:
        assert {
            "train/loss",
            "train/proxy",
            "train/classification",
            "train/quantisation",
            "images_per_s",
        } <= record.keys()
        parts = sum(record[f"train/{name}"] for name in ("proxy", "classification", "quantisation"))
        assert record["train/loss"] == pytest.approx(parts, rel=1e-5)
        assert all(math.isfinite(value) for value in record.values())
        assert 0 <= record.get(METRIC, 0) <= 1


def test_training_learns(data):
    history = trained(make_run(data, backbone="resnet18", epochs=8, lr=5e-4)).history
    assert history[-1]["train/loss"] < 0.5 * history[0]["train/loss"]
    assert best_epoch(history)[METRIC] > 0.9


def test_the_best_epoch_is_the_first_of_equals():
    history = [{"epoch": 1, METRIC: 0.5}, {"epoch": 2}, {"epoch": 3, METRIC: 0.7}, {"epoch": 4, METRIC: 0.7}]
    assert best_epoch(history)["epoch"] == 3


def test_the_model_of_a_checkpoint_is_the_one_that_was_validated(data, whole, tmp_path):
    run, (folder, history) = resumable(data), whole
    model = export_model(run, folder / f"epoch{EPOCHS}")
    assert model.card.classes == ("beach", "forest", "river")
    assert model.card.metrics[METRIC] == history[-1][METRIC]
    assert model.card.dataset == {"name": "folder", "protocol": "random", "manifest_sha256": run.manifest.sha256}
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    codes, labels = {}, {}
    for split in ("validation", "train"):
        images = run.manifest.part(split)
        codes[split] = loaded.encode([read_image(data / image.path) for image in images])
        labels[split] = np.array([image.label for image in images])
    found = mean_average_precision(
        codes["validation"], codes["train"], labels["validation"], labels["train"], loaded.bits, k=20
    )
    assert found == pytest.approx(history[-1][METRIC], abs=1e-12)


def test_label_bits_reach_the_model(data, tmp_path):
    run = make_run(data, epochs=1, label_code="one-hot", label_weight=2)
    trained(run, tmp_path)
    model = export_model(run, tmp_path / "epoch1")
    assert (model.bits, model.card.label_code, model.card.label_weight) == (16 + 2 * 3, "one-hot", 2)


# What is not touched.


def test_the_test_part_is_never_opened(data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    run = make_run(root, epochs=1)
    for image in run.manifest.part("test"):
        (root / image.path).unlink()
    assert METRIC in trained(run).history[-1]
    (root / run.manifest.part("validation")[0].path).unlink()
    with pytest.raises(InputError, match="images that cannot be trained on"):
        trained(run)


def test_the_backbone_rests_in_the_warm_up_and_its_batch_norm_always(data, tmp_path):
    torch.manual_seed(7)
    model = torchvision.models.mobilenet_v2(weights=None)
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.running_mean.uniform_(-0.1, 0.1)
            module.running_var.uniform_(0.5, 2)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    run = make_run(
        data, backbone="mobilenet_v2", weights=str(tmp_path / "weights.safetensors"), warm_up_epochs=1, lr=0.01
    )
    trained(run, tmp_path)
    given = {
        "network.backbone." + key.removeprefix("features."): value
        for key, value in load_file(tmp_path / "weights.safetensors").items()
        if key.startswith("features.") and not key.endswith("num_batches_tracked")
    }
    fresh = run.build().state_dict()
    after_warm_up, after_training = (load_checkpoint(tmp_path / f"epoch{i}")["method"] for i in (1, 2))
    assert {key for key in after_training if key.startswith("network.backbone.")} == given.keys()
    assert all(torch.equal(value, after_warm_up[key]) for key, value in given.items())
    head = [key for key in fresh if key not in given]
    assert {"proxies", "network.hash_layer.weight", "network.classifier.weight", "network.norm.weight"} <= set(head)
    assert not any(torch.equal(fresh[key], after_warm_up[key]) for key in head)
    changed = {key for key, value in given.items() if not torch.equal(value, after_training[key])}
    assert changed == {key for key, value in given.items() if value.ndim == 4}


# What is refused.


def test_a_loss_that_is_no_number_is_reported(data):
    with pytest.raises(InputError, match="the loss is inf in epoch 1, step 1; a smaller lr or scale may help"):
        trained(make_run(data, quantisation_weight=1e39))


def test_a_batch_larger_than_the_training_part_is_refused(data):
    with pytest.raises(InputError, match="batch_size 15 is more than the 14 training images"):
        trained(make_run(data, batch_size=15))
    assert trained(make_run(data, batch_size=14, epochs=1)).steps == [(1, 1, 1)]
