"""A model against the test part: which images are asked and searched, and what is refused."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from PIL import Image

from orbithash.encoders.card import ModelCard, NetworkSpec
from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.images import Rendering, read_image
from orbithash.encoders.model import HashModel
from orbithash.encoders.networks import HashNetwork
from orbithash.encoders.preprocessing import Preprocessing
from orbithash.trainers import model_evaluation
from orbithash.trainers.datasets import Manifest, make_manifest
from orbithash.trainers.model_evaluation import check_untrained, evaluate_model

BITS = 16


@pytest.fixture
def root(tmp_path):
    rng = np.random.default_rng(0)
    for name, colour in (("beach", 190), ("forest", 60)):
        (tmp_path / "data" / name).mkdir(parents=True)
        for i in range(10):
            noise = rng.integers(-50, 50, (40, 36, 3)) + colour
            image = Image.fromarray(np.clip(noise, 0, 255).astype(np.uint8))
            image.save(tmp_path / "data" / name / f"{name}{i}.png")
    return tmp_path / "data"


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    spec = NetworkSpec("mobilenet_v3_small", "group", "avg", BITS, 2)
    preprocessing = Preprocessing(Rendering(), 32, 32)
    return HashModel(
        ModelCard("dhcl", spec, (0.0,) * BITS, "none", 1, preprocessing, ("beach", "forest"), {}, {}), HashNetwork(spec)
    )


def precision_at_1(model, manifest, root):
    """Share of queries whose nearest image is of their class; of several nearest, the share among them."""
    queries, database = manifest.part("test"), manifest.part("train", "validation")
    codes = [model.encode([read_image(root / image.path) for image in part]) for part in (queries, database)]
    shares = []
    for query, distances in zip(queries, hamming(*codes), strict=True):
        nearest = [image for image, d in zip(database, distances, strict=True) if d == distances.min()]
        shares.append(sum(image.label == query.label for image in nearest) / len(nearest))
    return sum(shares) / len(shares)


def test_queries_are_the_test_part_and_the_database_is_the_rest(root, model):
    manifest = make_manifest(root)
    found = evaluate_model(model, manifest, root).metrics
    assert (found["dataset"], found["protocol"], found["method"], found["bits"]) == ("folder", "random", "dhcl", BITS)
    assert (found["queries"], found["database"], found["queries_in_database"]) == (4, 16, 0)
    assert found["exclude_self"] is False
    assert list(found["per_class"]) == ["beach", "forest"]
    assert found["metrics"]["precision@1"]["expected"] == pytest.approx(precision_at_1(model, manifest, root))
    json.dumps(found)


@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_progress_counts_every_image_once(root, model, monkeypatch, chunk):
    monkeypatch.setattr(model_evaluation, "CHUNK", chunk)
    told = []
    evaluation = evaluate_model(model, make_manifest(root), root, on_progress=told.append)
    steps = [b - a for a, b in zip([0, *told], told, strict=False)]
    assert told[-1] == 20
    assert all(0 < step <= chunk for step in steps)
    assert evaluation.metrics == evaluate_model(model, make_manifest(root), root).metrics


def test_other_files_than_the_manifests_are_refused(root, model):
    manifest = make_manifest(root)
    (root / "beach" / "beach0.png").write_bytes((root / "beach" / "beach1.png").read_bytes())
    with pytest.raises(InputError, match=r"beach/beach0\.png: another file"):
        evaluate_model(model, manifest, root)


def test_an_image_that_cannot_be_read_is_named(root, model):
    (root / "beach" / "beach0.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"beach0\.png: "):
        evaluate_model(model, make_manifest(root), root)


def test_without_a_test_part_there_is_nothing_to_evaluate(root, model):
    manifest = make_manifest(root)
    images = tuple(image for image in manifest.images if image.split != "test")
    with pytest.raises(InputError, match="no test part"):
        evaluate_model(model, dataclasses.replace(manifest, images=images), root)


# Queries that the model has seen.


def resplit(manifest, splits):
    """The manifest with other parts: path -> split."""
    images = tuple(dataclasses.replace(i, split=splits.get(i.path, i.split)) for i in manifest.images)
    return dataclasses.replace(manifest, protocol="dhcl", images=images)


def test_the_same_split_is_untrained(root):
    manifest = make_manifest(root)
    check_untrained(manifest, manifest)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_queries_that_were_trained_on_or_chose_the_model_are_found(root, split):
    manifest = make_manifest(root)
    path = manifest.part(split)[0].path
    with pytest.raises(InputError, match=f"1 of the 5 queries of protocol dhcl .*first: {path}"):
        check_untrained(resplit(manifest, {path: "test"}), manifest)


def test_copies_under_another_name_are_found(root, tmp_path):
    trained = make_manifest(root)
    for number, image in enumerate(trained.part("train")):
        target = tmp_path / "copies" / ("a" if number % 2 else "b") / f"renamed{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / image.path).read_bytes())
    asked = make_manifest(tmp_path / "copies")
    assert isinstance(asked, Manifest)
    assert not {image.path for image in asked.images} & {image.path for image in trained.images}
    with pytest.raises(InputError, match="queries of protocol random were training or validation images"):
        check_untrained(asked, trained)


def test_queries_never_seen_are_taken(root):
    manifest = make_manifest(root)
    fewer = {image.path: "unused" for image in manifest.part("test")[1:]}
    check_untrained(resplit(manifest, fewer), manifest)
