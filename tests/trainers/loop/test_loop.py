"""The training loop: ranks equal one process, a resumed run equals an uninterrupted one, the test part is not read."""

import dataclasses
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torchvision
from method_parts import Recorder, flat, timeless, trained, write_data
from method_parts import make_run as run_of
from PIL import Image
from safetensors.torch import load_file, save_file

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import StreamedImages
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.features.features import FeatureExtractor
from orbithash.trainers.loop import parts
from orbithash.trainers.loop.backbones import train_in_bfloat16
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import best_epoch, export_models
from orbithash.trainers.loop.loop import is_checkpointed, is_validated, train
from orbithash.trainers.loop.run import Run, check_batch, check_run
from orbithash.trainers.methods import METHODS, get_method
from orbithash.trainers.methods.base import mean_scores
from orbithash.trainers.methods.dhcl import DhclConfig

WORLD_SIZE = 2
METRIC = "validation/ap_min@20"

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Images of three classes with distinct colours: 14 for training, 3 for validation, 4 for test."""
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


def same_state(one, other):
    """Assert that checkpoint folders are equal bit for bit, except for times in the history."""
    states = [load_checkpoint(folder) for folder in (one, other)]
    for state in states:
        state["history"] = timeless(state["history"])
    assert flat(states[0]) == flat(states[1])


# Ranks.


def work(rank, root, folder):
    """What each of the two processes runs."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=WORLD_SIZE)
    with pytest.raises(InputError, match="batch_size 3 over 2 workers in 2 micro-batches: each worker needs images"):
        train(make_run(root, batch_size=3, accumulate=2), Recorder())
    train(shared(root), Recorder(folder if rank == 0 else None))
    dist.destroy_process_group()


def shared(root):
    """A run that any number of ranks can train: no layer of it drops anything at random."""
    return make_run(root, backbone="resnet18", batch_size=7, accumulate=2, epochs=3, warm_up_epochs=0, lr=1e-5)


@pytest.fixture(scope="module")
def ranks(data, tmp_path_factory):
    """The folder with the checkpoints of `shared` by two ranks, which have 4 and 3 images of each batch."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(work, (data, folder), nprocs=WORLD_SIZE)
    return folder


def test_one_rank_goes_on_where_two_stopped(data, ranks, tmp_path):
    for folder in (tmp_path / "resumed", tmp_path / "whole"):
        folder.mkdir()
    resumed = trained(shared(data), tmp_path / "resumed", resume_from=ranks / "epoch1")
    assert resumed.steps[0] == (2, 1, 2)
    whole = trained(shared(data), tmp_path / "whole")
    state = {
        name: load_checkpoint(folder / "epoch3")["method"]
        for name, folder in (("two", ranks), ("resumed", tmp_path / "resumed"), ("one", tmp_path / "whole"))
    }
    for name, value in state["one"].items():
        assert torch.allclose(state["two"][name], value, rtol=1e-3, atol=2e-5), name
        assert torch.allclose(state["resumed"][name], value, rtol=1e-3, atol=2e-5), name
    assert timeless(resumed.history)[0] == timeless(load_checkpoint(ranks / "epoch1")["history"])[0]
    for one, other in zip(resumed.history, whole.history, strict=True):
        assert one["train/loss"] == pytest.approx(other["train/loss"], rel=1e-4)


# Resuming.

EPOCHS = 4


def resumable(root):
    return make_run(root, epochs=EPOCHS, warm_up_epochs=1, lr_decay_epochs=2, validate_every=3)


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """The checkpoints and the history of an uninterrupted run."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("whole")
    return folder, trained(resumable(data), folder).history


class Stop(Exception):
    """Interrupts training."""


@pytest.mark.parametrize("stop_after", [1, 2, 3])
def test_a_run_stopped_between_epochs_ends_the_same(data, whole, tmp_path, stop_after):
    class Stopped(Recorder):
        def on_epoch(self, history, write_checkpoint):
            super().on_epoch(history, write_checkpoint)
            if len(history) == stop_after:
                raise Stop

    with pytest.raises(Stop):
        train(resumable(data), Stopped(tmp_path))
    # Another run in between: no state may remain in the process.
    torch.manual_seed(99)
    recorder = trained(resumable(data), tmp_path, resume_from=tmp_path / f"epoch{stop_after}")
    assert recorder.steps[0] == (stop_after + 1, 1, 3)
    same_state(whole[0] / f"epoch{EPOCHS}", tmp_path / f"epoch{EPOCHS}")
    assert timeless(recorder.history) == timeless(whole[1])


def test_a_run_at_its_end_has_nothing_to_do(data, whole):
    recorder = trained(resumable(data), resume_from=whole[0] / f"epoch{EPOCHS}")
    assert recorder.steps == recorder.history == []


def test_a_run_without_its_last_checkpoint_is_refused(data, tmp_path):
    with pytest.raises(InputError, match="the checkpoint is damaged"):
        train(resumable(data), Recorder(), resume_from=tmp_path)


# Observers.


def test_steps_and_history(data):
    run = make_run(data, epochs=5, validate_every=2, warm_up_epochs=1, lr=0.01, schedule="step", lr_decay_epochs=2)
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


def test_a_run_that_somebody_else_validates(data):
    run, recorder = make_run(data, epochs=3, validate_every=2), Recorder()
    train(run, recorder, validates=False)
    assert [record["score"] for record in recorder.history] == [-1, -1, -1]
    assert not any(name.startswith("validation/") for record in recorder.history for name in record)
    assert [is_validated(run, epoch) for epoch in (1, 2, 3)] == [False, True, True]
    assert not is_validated(dataclasses.replace(run, manifest=make_manifest(data, protocol="random", validation=0)), 2)


def test_the_last_and_every_validated_epoch_is_checkpointed(data):
    run = make_run(data, epochs=7, validate_every=3, checkpoint_every=2)
    assert [is_checkpointed(run, epoch) for epoch in range(1, 8)] == [False, True, True, True, False, True, True]


def test_the_best_epoch_is_the_last_of_equals():
    history = [{"epoch": epoch, "score": score} for epoch, score in ((1, 0.5), (2, 0.7), (3, 0.7), (4, -1))]
    assert best_epoch(history)["epoch"] == 3


def test_the_model_of_a_checkpoint_is_the_one_that_was_validated(data, whole, tmp_path):
    run, (folder, history) = resumable(data), whole
    model, _ = export_models(run, folder / f"epoch{EPOCHS}")
    assert model.card.classes == ("beach", "forest", "river")
    assert model.card.metrics[METRIC] == history[-1][METRIC]
    assert model.card.dataset == {
        "name": "folder",
        "protocol": "random",
        "seed": 0,
        "manifest_sha256": run.manifest.sha256,
    }
    model.save(tmp_path / "model")
    loaded = HashModel.load(tmp_path / "model")
    codes, labels = {}, {}
    for split in ("validation", "train"):
        images = run.manifest.part(split)
        codes[split] = loaded.encode([read_image(data / image.path) for image in images])
        labels[split] = np.array([image.label for image in images])
    (found,) = mean_scores(codes["validation"], codes["train"], labels["validation"], labels["train"], loaded.bits)
    assert found == pytest.approx(history[-1][METRIC], abs=1e-12)


@pytest.mark.parametrize(("vector_dims", "stored_dims"), [(0, None), (5, 5)])
def test_the_projection_is_fitted_to_the_final_features_of_training_images(data, tmp_path, vector_dims, stored_dims):
    run = make_run(data, epochs=1, vector_dims=vector_dims)
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    assert (model.card.projection and model.card.projection.dims) == stored_dims
    if model.projection is not None:
        images = [read_image(data / image.path) for image in run.manifest.part("train")]
        features = torch.from_numpy(model.features(model.prepare(images)))
        assert torch.equal(model.projection.directions, Projection.fit(features, vector_dims).directions)


def test_the_sizes_of_encoding_are_not_that_of_training_views(data, monkeypatch, tmp_path):
    shapes = {"train": set(), "encode": set()}
    features = HashNetwork.features

    def note(network, images):
        shapes["train" if network.training else "encode"].add(tuple(images.shape[2:]))
        return features(network, images)

    monkeypatch.setattr(HashNetwork, "features", note)
    run = make_run(data, encoding_sizes=[40, 48], epochs=1)
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    assert shapes == {"train": {(32, 32)}, "encode": {(40, 40), (48, 48)}}
    assert (model.preprocessing.resize, model.preprocessing.crop, model.preprocessing.smaller) == (48, 48, (40,))


def test_label_bits_reach_the_model(data, tmp_path):
    run = make_run(data, epochs=1, label_code="one-hot", label_weight=2)
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    assert (model.bits, model.card.label_code, model.card.label_weight) == (16 + 2 * 3, "one-hot", 2)


# Files that are not read.


def test_the_test_part_is_never_opened(data, tmp_path):
    root = Path(shutil.copytree(data, tmp_path / "data"))
    run = make_run(root, epochs=1)
    for image in run.manifest.part("test"):
        (root / image.path).unlink()
    assert METRIC in trained(run).history[-1]
    (root / run.manifest.part("validation")[0].path).unlink()
    with pytest.raises(InputError, match="images that cannot be read"):
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
        "network.backbone.body." + key.removeprefix("features."): value
        for key, value in load_file(tmp_path / "weights.safetensors").items()
        if key.startswith("features.") and not key.endswith("num_batches_tracked")
    }
    fresh = run.build().state_dict()
    after_warm_up, after_training = (load_checkpoint(tmp_path / f"epoch{i}")["method"] for i in (1, 2))
    assert {key for key in after_training if key.startswith("network.backbone.")} == given.keys()
    assert all(torch.equal(value, after_warm_up[key]) for key, value in given.items())
    head = [key for key in fresh if key not in given]
    assert {"proxies", "network.head.output.weight", "network.classifier.weight", "network.head.norm.weight"} <= set(
        head
    )
    assert not any(torch.equal(fresh[key], after_warm_up[key]) for key in head)
    changed = {key for key, value in given.items() if not torch.equal(value, after_training[key])}
    assert changed == {key for key, value in given.items() if value.ndim == 4}


# Errors.


def test_a_loss_that_is_no_number_is_reported(data):
    with pytest.raises(InputError, match="the loss is inf in epoch 1, step 1; try a smaller lr or scale"):
        trained(make_run(data, quantisation_weight=1e39))


def test_a_batch_larger_than_the_training_part_is_refused(data):
    with pytest.raises(
        InputError, match="batch_size 15 is more than the 14 training images; give --set batch_size=14 or"
    ):
        trained(make_run(data, batch_size=15))
    with pytest.raises(
        InputError, match="batch_size 18 is more than the 14 training images; give --set batch_size=12 or"
    ):
        check_batch(make_run_of_mhcln(data, batch_size=18), 3)
    with pytest.raises(InputError, match="batch_size 20 is more than the 14 training images; add images"):
        check_batch(make_run(data, batch_size=20), 16)
    assert trained(make_run(data, batch_size=14, epochs=1)).steps == [(1, 1, 1)]


def test_an_order_that_is_refused_is_found_before_training(data):
    run = make_run_of_mhcln(data, batch_size=12)
    check_run(run, 3)
    # All but one of the rivers are held back.
    rivers = [image for image in run.manifest.part("train") if image.label == 2]
    images = tuple(
        dataclasses.replace(image, split="validation") if image in rivers[1:] else image
        for image in run.manifest.images
    )
    run = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images))
    with pytest.raises(InputError, match="needs at least 2 training images of each class; class number 2 has 1"):
        check_run(run, 2)


def make_run_of_mhcln(root, **settings):
    return dataclasses.replace(
        make_run(root), method="mhcln", config=load_config(get_method("mhcln").Config, image_size=32, **settings)
    )


# Images of several classes.


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """A folder with everything that any method needs."""
    return write_data(tmp_path_factory.mktemp("pairs") / "first")


def relabelled(run, labels_of):
    images = tuple(dataclasses.replace(image, labels=labels_of(image)) for image in run.manifest.images)
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images))


def with_second_class(image):
    """Class 0 is in every image, but the first of few."""
    return (image.label, 0) if image.label else (0, 1)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.supervision == "one class"])
def test_methods_of_one_class_an_image_refuse_several(data, method):
    run = relabelled(make_run(data), lambda image: with_second_class(image) if "river" in image.id else image.labels)
    run = dataclasses.replace(run, method=method, config=load_config(get_method(method).Config, batch_size=6))
    several = [image.path for image in run.manifest.part("train", "validation") if len(image.labels) == 2]
    message = (
        rf"{len(several)} of 17 training images have several classes \(first: {several[0]}\); {method} needs "
        r"exactly one class per image; .*classifier.* train on several; .*duch.* need none"
    )
    with pytest.raises(InputError, match=message):
        check_run(run, 1)
    with pytest.raises(InputError, match=message):
        train(run, Recorder())
    unknown = relabelled(run, lambda image: image.labels if "river" in image.id else ())
    with pytest.raises(InputError, match=r"have no class .* and .* have several classes"):
        check_run(unknown, 1)


@pytest.mark.parametrize("method", [name for name, kind in METHODS.items() if kind.supervision == "classes"])
def test_methods_of_several_classes_refuse_none(data, method):
    run = relabelled(make_run(data), lambda image: with_second_class(image) if "river" in image.id else ())
    run = dataclasses.replace(run, method=method, config=load_config(get_method(method).Config, batch_size=6))
    message = rf"of 17 training images have no class .*; {method} needs one or more classes per image; .* need none"
    with pytest.raises(InputError, match=message):
        check_run(run, 1)
    check_run(relabelled(run, with_second_class), 1)


@pytest.mark.parametrize(
    ("method", "metric", "settings"),
    [
        ("duch", "i2t_ap_min@20", {"hidden": 12}),
        ("mrhash", "ap_min@20", {"num_clusters": 4, "num_latents": 5, "autoencoder_epochs": 1, "hidden": (12,)}),
    ],
)
def test_validation_counts_any_shared_class(pairs, method, metric, settings):
    """As in evaluation. If all images share a class, every hit is relevant."""
    run = run_of(pairs, method, epochs=1, **settings)
    check_run(relabelled(run, with_second_class), 2)
    (first,) = trained(relabelled(run, with_second_class)).history
    assert first[f"validation/{metric}"] == 1
    (plain,) = trained(run).history
    assert plain[f"validation/{metric}"] < 1
    assert plain["train/loss"] == first["train/loss"]


# Memory.


def test_the_memory_of_the_steps_is_told(data, monkeypatch):
    """Without the memory used before training or in an earlier epoch."""
    kind = get_method("dhcl")

    class Wasteful(kind):
        def start_epoch(self, epoch, training):
            self.waste_mb = 800 if epoch == 0 else 0
            np.ones(1200 * 2**17)
            return super().start_epoch(epoch, training)

        def after_step(self, batch):
            np.ones(self.waste_mb * 2**17)

    monkeypatch.setattr("orbithash.trainers.loop.run.get_method", lambda name: Wasteful)
    history = trained(make_run(data, epochs=3)).history
    needed = [record["peak_memory_mb"] - record["memory_mb"] for record in history]
    # Garbage of other tests may be freed meanwhile.
    assert 400 < needed[0] < 1100
    assert needed[2] < 300
    assert all(record["memory_mb"] > 50 for record in history)


# Steps.


def gradients_of(run, monkeypatch, clipped=False):
    """The gradients of the first step of a run as one vector, after clipping if the run clips."""
    found = []

    class Noted(torch.optim.SGD):
        def step(self):
            found.append(torch.cat([p.grad.flatten() for group in self.param_groups for p in group["params"]]))
            raise Stop

    monkeypatch.setattr(get_method(run.method), "build_optimizer", lambda self: Noted(self.parameters(), lr=0.1))
    with pytest.raises(Stop):
        train(run, Recorder())
    return found[0]


def additive(root, **settings):
    """A run whose loss is a mean over images."""
    run = make_run(root)
    given = {"backbone": "resnet18", "image_size": 32, "bits": 16, "batch_size": 12, "warm_up_epochs": 0, **settings}
    return dataclasses.replace(run, method="classifier", config=load_config(get_method("classifier").Config, **given))


def test_pieces_of_a_batch_give_the_gradient_of_the_whole(data, monkeypatch):
    whole = gradients_of(additive(data), monkeypatch)
    assert whole.abs().max() > 0
    # With 5, the pieces are not equally large.
    for accumulate in (2, 3, 5):
        pieces = gradients_of(additive(data, accumulate=accumulate), monkeypatch)
        assert torch.allclose(pieces, whole, rtol=1e-3, atol=1e-5 * float(whole.abs().max()))


def test_what_is_done_around_a_step_is_done_once(data, monkeypatch):
    seen = []
    kind = get_method("classifier")
    forward = kind.forward

    def note(self, batch):
        seen.append(("piece", batch.rows.tolist(), batch.seed))
        return forward(self, batch)

    monkeypatch.setattr(kind, "forward", note)
    monkeypatch.setattr(kind, "before_step", lambda self, batch, _: seen.append(("before", batch.rows.tolist())) or {})
    monkeypatch.setattr(kind, "after_step", lambda self, batch: seen.append(("after", batch.rows.tolist())))
    recorder = trained(additive(data, accumulate=3, epochs=1))
    assert recorder.steps == [(1, 1, 1)]
    before, *pieces, after = seen
    rows = [row for _, piece, _ in pieces for row in piece]
    assert (before, after) == (("before", rows), ("after", rows))
    assert [len(piece) for _, piece, _ in pieces] == [4, 4, 4]
    assert len({seed for *_, seed in pieces}) == 3


def test_a_memory_is_written_once_with_all_pieces(data, tmp_path):
    """A step does not read what it writes, so micro-batches leave the same memory."""
    memories = []
    for accumulate in (1, 2):
        given = {"backbone": "resnet18", "image_size": 32, "bits": 16, "batch_size": 8, "epochs": 1, "lr": 1e-12}
        config = load_config(get_method("cdne").Config, variant="memory-bank", accumulate=accumulate, **given)
        folder = tmp_path / str(accumulate)
        folder.mkdir()
        trained(dataclasses.replace(make_run(data), method="cdne", config=config), folder)
        memories.append(load_checkpoint(folder / "epoch1")["method"]["memory.whole"])
    assert torch.allclose(*memories, atol=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "workers", "message"),
    [
        (
            "classifier",
            {"batch_size": 4},
            (1, 5),
            "batch_size 4 over 5 workers: each worker needs images of each batch; give --set batch_size=5 or more, or "
            "at most 4 workers",
        ),
        (
            "classifier",
            {"batch_size": 7, "accumulate": 2},
            4,
            "batch_size 7 over 4 workers in 2 micro-batches: .* give --set batch_size=8 or more, or at most 3 workers$",
        ),
        ("classifier", {"batch_size": 3, "accumulate": 2}, 1, "give --set batch_size=4 or more$"),
        ("mhcln", {"batch_size": 9}, 4, "give --set batch_size=12 or more, or at most 3 workers$"),
    ],
)
def test_more_workers_than_images_of_a_batch_are_refused(data, method, settings, workers, message):
    config = load_config(get_method(method).Config, image_size=32, **settings)
    run = dataclasses.replace(make_run(data), method=method, config=config)
    with pytest.raises(InputError, match=message):
        check_batch(run, workers)


def test_any_number_of_workers_shares_a_batch(data):
    for batch_size, accumulate, workers in ((7, 1, (1, 7)), (13, 3, (2, 4)), (14, 7, 2), (2, 1, 1)):
        check_run(additive(data, batch_size=batch_size, accumulate=accumulate), workers)
    check_run(make_run_of_mhcln(data, batch_size=12), (1, 4))


def test_gradients_are_clipped_by_value_then_by_length(data, monkeypatch):
    plain = gradients_of(additive(data, clip_value=None), monkeypatch)
    limit = float(plain.abs().max()) / 3
    expected = plain.clamp(-limit, limit)
    assert torch.equal(gradients_of(additive(data, clip_value=limit), monkeypatch), expected)
    length = float(expected.norm()) / 2
    both = gradients_of(additive(data, clip_value=limit, clip_norm=length), monkeypatch)
    assert torch.allclose(both, expected / 2, rtol=1e-3, atol=1e-6)
    # The default does not clip ordinary gradients.
    assert torch.equal(gradients_of(additive(data), monkeypatch), plain.clamp(-10, 10))


def test_bfloat16_is_of_the_backbone_in_training_only(data, tmp_path):
    seen = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        folder.mkdir()
        run = additive(data, precision=precision, epochs=2, lr=1e-4)
        history = trained(run, folder).history
        state = load_checkpoint(folder / "epoch2")["method"]
        assert {value.dtype for value in state.values() if value.is_floating_point()} == {torch.float32}
        seen[precision] = [record["train/loss"] for record in history]
        # Codes are computed in float32, in validation and by the exported model.
        assert run.build().state_dict().keys() == state.keys()
    assert seen["bfloat16"] == pytest.approx(seen["float32"], rel=0.03)
    assert seen["bfloat16"] != seen["float32"]


def test_bfloat16_reaches_the_convolutions_and_no_loss(data, monkeypatch):
    dtypes = {"maps": set(), "hashes": set()}
    method = additive(data).build()
    train_in_bfloat16(method)
    method.network.backbone.register_forward_hook(lambda *call: dtypes["maps"].add(call[2].dtype))
    inner = next(module for module in method.network.backbone.modules() if isinstance(module, torch.nn.Conv2d))
    inner.register_forward_hook(lambda *call: dtypes.setdefault(method.training, set()).add(call[2].dtype))
    method.network.head.register_forward_hook(lambda *call: dtypes["hashes"].add(call[2].dtype))
    for training in (True, False):
        method.train(training)
        method.network(torch.zeros(2, 3, 32, 32))
    assert dtypes == {
        "maps": {torch.float32},
        "hashes": {torch.float32},
        True: {torch.bfloat16},
        False: {torch.float32},
    }


def test_encoding_has_its_own_precision_whatever_training_has(data):
    run = additive(data)
    images = np.random.default_rng(0).integers(0, 256, (3, 32, 32, 3), np.uint8)
    found = []
    for trains_in_bfloat16 in (False, True):
        method = run.build()
        if trains_in_bfloat16:
            train_in_bfloat16(method)
        method.eval()
        extractor = FeatureExtractor(method.network, run.preprocessing(), precision="bfloat16")
        found.append(extractor._model.features(images))
    assert np.array_equal(*found)
    exact = FeatureExtractor(run.build().eval().network, run.preprocessing())._model.features(images)
    assert not np.array_equal(found[0], exact)


# Loading.


@pytest.mark.parametrize("method", ["dhcl", "cdne"])
def test_streamed_images_train_the_same_model(data, tmp_path, monkeypatch, method):
    """Bit for bit; images that do not fit into memory are streamed by default."""
    given = {"backbone": "mobilenet_v3_small", "image_size": 32, "bits": 16, "batch_size": 4, "epochs": 2}
    variant = {"variant": "memory-bank"} if method == "cdne" else {}
    config = load_config(get_method(method).Config, **given, **variant)
    run = dataclasses.replace(make_run(data), method=method, config=config)
    kept = {}
    for loading, free_mb in (("memory", 1e6), ("stream", 1e6), ("auto", 0)):
        streams = []
        monkeypatch.setattr(parts, "fits_in_memory", lambda *_, free=free_mb: free > 0)
        monkeypatch.setattr(parts, "StreamedImages", lambda *args, s=streams: s.append(1) or StreamedImages(*args))
        (tmp_path / loading).mkdir()
        kept[loading] = trained(run, tmp_path / loading, loading=loading).history
        assert len(streams) == (0 if loading == "memory" else 3)
    for loading in ("stream", "auto"):
        same_state(tmp_path / "memory" / "epoch2", tmp_path / loading / "epoch2")
        assert timeless(kept[loading]) == timeless(kept["memory"])
