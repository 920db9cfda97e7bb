"""Fitted methods: the head against the formulas, prefixes, samples, ranks, and the refusals of wrong settings."""

import dataclasses
import os

import numpy as np
import pytest
import torch
import torch.distributed as dist
from backbone_models import write_hf_dual, write_open_clip
from method_parts import Recorder, make_run, trained, write_data

from orbithash.encoders.codes import pack, unpack
from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.text_towers import text_tower
from orbithash.trainers import library
from orbithash.trainers.config import load_config
from orbithash.trainers.data.loading import Part
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.export import export_models
from orbithash.trainers.loop.loop import train, validate
from orbithash.trainers.methods import METHODS, Fitted, get_method
from orbithash.trainers.methods.label_free.projections import itq_rotation, principal_directions, random_directions
from orbithash.trainers.methods.label_free.sentences import neutral_sentences

FITTED = [name for name, method in METHODS.items() if issubclass(method, Fitted)]
BITS = 16


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("fitted") / "first")


def fitted(name, features, **settings):
    """Return the method of this name, fitted to features float32 [N, D]."""
    config = load_config(get_method(name).Config, backbone="resnet8", **{"bits": BITS, **settings})
    method = get_method(name)(config, 0, len(features))
    part = Part(None, np.full(len(features), -1), [], features={"image": features})
    return method, method.fit(part)


def features(num_rows=200, seed=0):
    width = get_method("lsh")(load_config(get_method("lsh").Config, backbone="resnet8"), 0, 1).network.head.num_features
    rng = np.random.default_rng(seed)
    return (rng.random((num_rows, width)) * rng.random(width) * 9).astype(np.float32)


def expected_directions(name, centred, seed):
    if name == "lsh":
        return random_directions(BITS, centred.shape[1], seed)
    if name == "sign":
        return np.eye(centred.shape[1])[:BITS]
    directions = principal_directions(centred, BITS)
    if name == "pca-sign":
        return directions
    return itq_rotation((centred @ directions.T).astype(np.float32), seed).T @ directions


@pytest.mark.parametrize("name", FITTED)
def test_bits_are_the_signs_of_centred_features_of_unit_length(name):
    rows, others = features(), features(50, seed=1)
    method, metrics = fitted(name, rows, seed=3)
    scaled = [part / np.linalg.norm(part.astype(float), axis=1, keepdims=True) for part in (rows, others)]
    mean = scaled[0].mean(0)
    directions = expected_directions(name, (scaled[0] - mean).astype(np.float32), 3)
    for part, raw in zip(scaled, (rows, others), strict=True):
        expected = (part - mean) @ directions.T
        found = method.network.head(torch.from_numpy(raw)).detach().numpy()
        assert found == pytest.approx(expected, abs=1e-4)
    outputs = (scaled[0] - mean) @ directions.T
    cosines = (outputs * np.sign(outputs)).sum(1) / np.linalg.norm(outputs, axis=1) / BITS**0.5
    assert metrics == {"rows": 200, "sign_cosine": pytest.approx(cosines.mean(), abs=1e-5)}


@pytest.mark.parametrize("name", FITTED)
def test_a_run_leaves_a_model_and_one_record(data, tmp_path, name):
    records = []
    settings = {"backbone": "resnet8", "image_size": 32, "bits": BITS}
    model = library.train(name, data, tmp_path / "run", on_epoch=records.append, **settings)
    assert model.bits == BITS
    assert [(record["epoch"], record["train/rows"]) for record in records] == [(1, 19)]
    assert 0 <= records[0]["validation/ap_min@20"] <= 1
    # The same command again returns the finished model.
    again = library.train(name, data, tmp_path / "run", on_epoch=records.append, **settings)
    assert again.model_id == model.model_id
    assert len(records) == 1


def test_a_run_that_ended_before_its_model_was_written_resumes(data, tmp_path, monkeypatch):
    def fail(*arguments):
        raise OSError("no space")

    settings = {"backbone": "resnet8", "image_size": 32, "bits": BITS}
    with monkeypatch.context() as patch:
        patch.setattr(library, "export_models", fail)
        with pytest.raises(OSError, match="no space"):
            library.train("itq", data, tmp_path / "run", **settings)
    records = []
    model = library.train("itq", data, tmp_path / "run", on_epoch=records.append, **settings)
    assert records == []
    assert model.model_id == library.train("itq", data, tmp_path / "other", **settings).model_id


@pytest.mark.parametrize("name", ["pca-sign", "lsh", "sign"])
def test_a_prefix_is_the_code_of_the_method_with_fewer_bits(data, tmp_path, name):
    run = make_run(data, name, backbone="resnet8", nested_bits=(8,), bits=BITS)
    trained(run, tmp_path)
    whole, (short,) = export_models(run, tmp_path / "epoch1")
    trained(make_run(data, name, backbone="resnet8", bits=8), tmp_path / "short")
    alone, _ = export_models(make_run(data, name, backbone="resnet8", bits=8), tmp_path / "short" / "epoch1")
    images = list(np.random.default_rng(0).integers(0, 256, (5, 40, 40, 3), dtype=np.uint8))
    assert (short.encode(images) == alone.encode(images)).all()
    assert (unpack(whole.encode(images), BITS)[:, :8] == unpack(short.encode(images), 8)).all()


def test_of_many_images_a_sample_is_fitted(data, tmp_path):
    run = make_run(data, "lsh", max_rows=7)
    (record,) = trained(run, tmp_path).history
    assert record["train/rows"] == 7
    sample = [image.id for image in run.images("train")]
    assert sample == [image.id for image in run.manifest.part("train") if image.id in sample]
    assert sample != [image.id for image in make_run(data, "lsh", max_rows=7, seed=1).images("train")]
    assert len(make_run(data, "lsh", max_rows=19).images("train")) == 19


def test_without_labels_there_is_no_score(data, tmp_path):
    run = make_run(data, "itq")
    images = tuple(dataclasses.replace(image, labels=()) for image in run.manifest.images)
    run = dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images, classes=()))
    (record,) = trained(run, tmp_path).history
    assert not any(key.startswith("validation/") for key in record)
    assert record["score"] == 1
    assert validate(run, tmp_path / "epoch1") == {"epoch": 1, "score": 1}


# Sentences.


@pytest.fixture(scope="module", params=["open_clip", "hf"])
def dual_encoder(request, tmp_path_factory):
    write = {"open_clip": write_open_clip, "hf": write_hf_dual}[request.param]
    return f"{request.param}:{write(tmp_path_factory.mktemp('clip') / 'model')}"


def without_captions(run):
    images = tuple(dataclasses.replace(image, captions=()) for image in run.manifest.images)
    return dataclasses.replace(run, manifest=dataclasses.replace(run.manifest, images=images))


@pytest.mark.parametrize("captioned", [True, False])
def test_sentences_have_the_directions_of_images_and_a_mean_of_their_own(data, dual_encoder, tmp_path, captioned):
    run = make_run(data, "itq", backbone=dual_encoder, bits=8)
    run = run if captioned else without_captions(run)
    trained(run, tmp_path)
    model, _ = export_models(run, tmp_path / "epoch1")
    model.save(tmp_path / "model")
    loaded = type(model).load(tmp_path / "model")
    assert loaded.has_joint_text
    weight = model.network.head.output.weight
    assert (model.text_head.output.weight == weight).all()
    captions = [caption for image in run.images("train") for caption in image.captions]
    tower = text_tower(dual_encoder)
    features = tower.encode(captions if captioned else neutral_sentences())
    mean = (features / np.linalg.norm(features, axis=1, keepdims=True)).mean(0)
    assert model.text_head.output.bias.numpy() == pytest.approx(-weight.numpy() @ mean, abs=1e-5)
    sentences = ["a beach", "some forest", "this river"]
    features = tower.encode(sentences)
    outputs = (features / np.linalg.norm(features, axis=1, keepdims=True) - mean) @ weight.numpy().T
    assert (loaded.encode_texts(sentences) == pack(outputs >= 0)).all()


def test_a_backbone_without_a_text_tower_encodes_no_sentence(data, dual_encoder, tmp_path):
    for name, settings in [("alone", {}), ("unasked", {"backbone": dual_encoder, "sentences": "none"})]:
        run = make_run(data, "lsh", **settings)
        trained(run, tmp_path / name)
        model, _ = export_models(run, tmp_path / name / "epoch1")
        with pytest.raises(InputError, match="encodes images only; train duch with captions, or itq on a dual encoder"):
            model.encode_texts(["a beach"])


def test_neutral_sentences_are_distinct():
    sentences = neutral_sentences()
    assert len(set(sentences)) == len(sentences) == 120


# Ranks.


def work(rank, root, folder):
    # The ranks compute the features themselves.
    os.environ["ORBITHASH_CACHE"] = str(folder / "cache")
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    for name in FITTED:
        train(make_run(root, name, backbone="resnet8"), Recorder(folder / f"{name} {rank}"))
    dist.destroy_process_group()


@pytest.mark.usefixtures("one_thread")
def test_two_ranks_fit_the_same_head_as_one(data, tmp_path):
    for name in FITTED:
        trained(make_run(data, name, backbone="resnet8"), tmp_path / name)
    torch.multiprocessing.spawn(work, (data, tmp_path), nprocs=2)
    for name in FITTED:
        states = [
            load_checkpoint(tmp_path / folder / "epoch1")["method"] for folder in (name, f"{name} 0", f"{name} 1")
        ]
        for key, tensor in states[0].items():
            assert (states[1][key] == tensor).all()
            assert (states[2][key] == tensor).all()


# Refusals.


@pytest.mark.parametrize("name", ["itq", "pca-sign", "sign"])
def test_more_bits_than_features_are_refused(name):
    with pytest.raises(InputError, match=rf"^bits is 512: {name} takes at most one bit for each feature, and resnet8"):
        fitted(name, features(), bits=512)


def test_lsh_takes_more_bits_than_features():
    method, _ = fitted("lsh", features(), bits=512)
    assert method.network.head(torch.from_numpy(features(3))).shape == (3, 512)


@pytest.mark.parametrize("name", ["itq", "pca-sign"])
def test_fewer_directions_than_bits_are_refused(name):
    with pytest.raises(
        InputError, match=r"features of the 12 training images vary in 11 directions only; give --bits 11"
    ):
        fitted(name, features(12))


def test_a_backbone_of_few_features_gives_few_bits():
    with pytest.raises(InputError, match="give --bits"):
        fitted("sign", features(), bits=500)


@pytest.mark.parametrize(
    ("name", "settings", "message"),
    [
        ("itq", {"epochs": 5, "batch_size": 4}, "epochs, batch_size cannot be set: this method does not use it"),
        ("itq", {"nested_bits": [16]}, "unknown key 'nested_bits'"),
        ("lsh", {"nested_bits": [64]}, r"nested_bits \[64\]: 8 to 63 are allowed"),
        ("pca-sign", {"max_rows": 1}, "max_rows is 1: "),
    ],
)
def test_wrong_settings_are_refused(name, settings, message):
    with pytest.raises(InputError, match=message):
        load_config(get_method(name).Config, **settings)
