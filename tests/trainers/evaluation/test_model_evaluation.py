"""Evaluation of a model: the images used as queries and database, cached features, and refused inputs."""

import dataclasses
import functools
import json
import os
from pathlib import PurePosixPath

import numpy as np
import pytest
import torch
from PIL import Image

from orbithash.encoders.codes import hamming
from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec, ModelCard, TextSpec
from orbithash.encoders.networks.hash_network import HashHead, HashNetwork
from orbithash.encoders.networks.model import HashModel
from orbithash.encoders.networks.projection import Projection
from orbithash.encoders.networks.reading import read_batches
from orbithash.trainers.datasets import Manifest, make_manifest
from orbithash.trainers.evaluation import model_evaluation as module
from orbithash.trainers.evaluation.baselines import evaluate_baselines
from orbithash.trainers.evaluation.evaluation import metrics_of
from orbithash.trainers.evaluation.model_evaluation import check_untrained, draw_caption, evaluate_model
from orbithash.trainers.features import features
from orbithash.trainers.features.features import FeatureExtractor
from orbithash.trainers.features.store import with_writable_store
from orbithash.trainers.methods.base import mean_scores
from orbithash.trainers.metrics.rescored import Scores, rescored_metrics
from orbithash.trainers.metrics.retrieval import Retrieval

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
    network = HashNetwork(build_backbone("mobilenet_v3_small"), HeadSpec(BITS), 2)
    preprocessing = Preprocessing(Rendering(), 32, 32)
    projection = Projection.fit(torch.rand(40, network.head.num_features), 6)
    card = ModelCard("dhcl", network.spec, (0.0,) * BITS, "none", 1, preprocessing, ("beach", "forest"), {}, {})
    return HashModel(dataclasses.replace(card, projection=projection.spec), network, projection=projection)


def precision_at_1(model, manifest, root):
    """Return precision@1: the fraction of queries whose nearest image has their class, averaged over ties."""
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
def test_progress_counts_every_image_once(root, model, monkeypatch, chunk, tmp_path):
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(features, "read_batches", functools.partial(read_batches, batch_size=chunk))
    counts = []
    evaluation = evaluate_model(model, make_manifest(root), root, on_progress=counts.append)
    steps = [b - a for a, b in zip([0, *counts], counts, strict=False)]
    assert counts[-1] == 20
    assert all(0 < step <= chunk for step in steps)
    assert evaluation.metrics == evaluate_model(model, make_manifest(root), root).metrics


def test_files_changed_since_the_manifest_are_refused(root, model):
    manifest = make_manifest(root)
    (root / "beach" / "beach0.png").write_bytes((root / "beach" / "beach1.png").read_bytes())
    with pytest.raises(InputError, match=r"beach/beach0\.png: another file"):
        evaluate_model(model, manifest, root)


def test_an_unreadable_image_is_named(root, model):
    (root / "beach" / "beach0.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"beach0\.png: "):
        evaluate_model(model, make_manifest(root), root)


def test_a_manifest_without_a_test_part_is_refused(root, model):
    manifest = make_manifest(root)
    images = tuple(image for image in manifest.images if image.split != "test")
    with pytest.raises(InputError, match="no test part"):
        evaluate_model(model, dataclasses.replace(manifest, images=images), root)


def by_protocol(manifest, protocol, splits=None, **change):
    """Return the manifest with another protocol.

    `splits` are assigned to the images in turn; `change` maps a field to a function of the image.
    """
    images = [
        dataclasses.replace(
            image,
            split=splits[row % len(splits)] if splits else image.split,
            **{name: make(image) for name, make in change.items()},
        )
        for row, image in enumerate(manifest.images)
    ]
    return dataclasses.replace(manifest, protocol=protocol, images=tuple(images))


def test_leave_one_out_searches_the_other_queries(root, model):
    manifest = by_protocol(make_manifest(root), "mhcln", ["train", "test"])
    evaluation = evaluate_model(model, manifest, root)
    found = evaluation.metrics
    assert (found["queries"], found["database"], found["queries_in_database"], found["exclude_self"]) == (
        10,
        10,
        10,
        True,
    )
    assert (evaluation.histograms.num_items == 9).all()


def test_images_without_a_label_are_not_queries(root, model):
    unlabelled = make_manifest(root).part("test")[0].id
    manifest = by_protocol(
        make_manifest(root), "random", labels=lambda image: () if image.id == unlabelled else image.labels
    )
    found = evaluate_model(model, manifest, root).metrics
    assert (found["queries"], found["queries_without_label"], found["database"]) == (3, 1, 16)


def test_images_with_several_classes(root, model):
    manifest = by_protocol(
        make_manifest(root), "random", labels=lambda image: (0, 1) if "3" in image.id else image.labels
    )
    assert "ndcg@20" in evaluate_model(model, manifest, root).metrics["metrics"]


def colours(images):
    """Return features of manifest images: a class-dependent mean plus noise that depends only on the image's id."""
    rng = [np.random.default_rng(list(image.id.encode())) for image in images]
    shades = np.array([190.0 if "beach" in image.id else 60.0 for image in images])
    return np.stack([s / 100 + g.standard_normal(20) for s, g in zip(shades, rng, strict=True)]).astype(np.float32)


@pytest.mark.parametrize("protocol", ["random", "mhcln", "duch"])
def test_baselines_are_fitted_on_the_training_part(root, model, protocol):
    splits = {"mhcln": ["train", "test"], "duch": ["train", "test", "database"]}.get(protocol)
    manifest = by_protocol(make_manifest(root), protocol, splits)
    requested = []

    def features_of(images):
        requested.append([image.id for image in images])
        return colours(images)

    found = evaluate_model(model, manifest, root, baseline_model=features_of).metrics
    (ids,) = requested
    parts = {
        "random": ("test", "train", "validation"),
        "mhcln": ("test", "train"),
        "duch": ("test", "train", "database"),
    }
    assert sorted(ids) == sorted(image.id for image in manifest.part(*parts[protocol]))
    database = {"random": ("train", "validation"), "mhcln": ("test",), "duch": ("database",)}[protocol]
    query, searched, train = (manifest.part(*which) for which in (("test",), database, ("train",)))
    own = np.arange(len(query)) if protocol == "mhcln" else None
    expected = evaluate_baselines(
        {"train": colours(train), "query": colours(query), "database": colours(searched)},
        {"query": np.array([i.label for i in query]), "database": np.array([i.label for i in searched])},
        BITS,
        own,
    )
    assert found["baselines"].keys() == expected.keys()
    for name, result in expected.items():
        metrics = None if isinstance(result, str) else pytest.approx(dict(result.metrics))
        assert found["baselines"][name].get("metrics") == metrics
    assert set(found["beaten_by"]) <= {"sign_truncated", "lsh", "pca_sign", "itq", "pq"}
    assert "baselines" not in evaluate_model(model, manifest, root).metrics


class Words:
    """A text encoder whose features are counts of a sentence's letters."""

    def encode(self, sentences):
        return np.stack(
            [np.bincount(np.frombuffer(s.encode(), np.uint8) % 12, minlength=12) for s in sentences]
        ).astype(np.float32)


@pytest.fixture(scope="module")
def both(model):
    torch.manual_seed(1)
    card = dataclasses.replace(model.card, text=TextSpec("0", 12, HeadSpec(BITS)))
    return HashModel(
        card, model.network, text_head=HashHead(12, HeadSpec(BITS)), text_encoder=Words(), projection=model.projection
    )


def captioned(manifest, protocol, splits):
    return by_protocol(
        manifest, protocol, splits, captions=lambda image: tuple(f"{n} {image.id}" for n in ("a", "one", "some"))
    )


@pytest.mark.parametrize("protocol", ["duch", "mhcln"])
def test_a_text_model_is_evaluated_in_four_directions(root, both, protocol):
    splits = ["train", "test", "database"] if protocol == "duch" else ["train", "test"]
    manifest = captioned(make_manifest(root), protocol, splits)
    found = evaluate_model(both, manifest, root, baseline_model=colours)
    assert list(found) == ["image->image", "image->text", "text->image", "text->text"]
    queries = manifest.part("test")
    database = manifest.part("database") if protocol == "duch" else queries
    sentences = both.encode_texts([draw_caption(image, manifest.seed) for image in database])
    codes = both.encode([read_image(root / image.path) for image in queries])
    labels = [np.array([image.label for image in part]) for part in (queries, database)]
    assert found["image->text"].headline == mean_scores(codes, sentences, *labels, BITS)[0]
    excluded = {name: evaluation.metrics["exclude_self"] for name, evaluation in found.items()}
    assert excluded == {name: protocol == "mhcln" and name in ("image->image", "text->text") for name in found}
    paired = {name for name, evaluation in found.items() if "pair_recall" in evaluation.metrics}
    assert paired == ({"image->text", "text->image"} if protocol == "mhcln" else set())
    assert [name for name, evaluation in found.items() if "baselines" in evaluation.metrics] == ["image->image"]
    json.dumps(metrics_of(found))


def test_images_without_captions_have_no_sentences(root, both):
    manifest = captioned(make_manifest(root), "duch", ["train", "test", "database"])
    uncaptioned = {manifest.part("test")[0].id, manifest.part("database")[0].id}
    fewer = by_protocol(manifest, "duch", captions=lambda image: () if image.id in uncaptioned else image.captions)
    found = evaluate_model(both, fewer, root)
    counts = {name: (e.metrics["queries"], e.metrics["database"]) for name, e in found.items()}
    q, d = len(manifest.part("test")), len(manifest.part("database"))
    assert counts == {
        "image->image": (q, d),
        "image->text": (q, d - 1),
        "text->image": (q - 1, d),
        "text->text": (q - 1, d - 1),
    }


def test_without_captions_only_images_are_searched(root, both, model):
    assert (
        evaluate_model(both, make_manifest(root), root).metrics
        == evaluate_model(model, make_manifest(root), root).metrics
    )


def test_the_drawn_caption_depends_on_seed_and_image(root):
    images = captioned(make_manifest(root), "random", None).images
    drawn = [[draw_caption(image, seed) for image in images] for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert {caption.split()[0] for caption in drawn[0]} == {"a", "one", "some"}


# Queries that training used.


def resplit(manifest, splits):
    """Return the manifest with other splits, given as path -> split."""
    images = tuple(dataclasses.replace(i, split=splits.get(i.path, i.split)) for i in manifest.images)
    return dataclasses.replace(manifest, protocol="dhcl", images=images)


def test_the_test_part_of_the_training_split_is_accepted(root):
    manifest = make_manifest(root)
    check_untrained(manifest, manifest)


@pytest.mark.parametrize("split", ["train", "validation"])
def test_queries_from_training_or_validation_are_refused(root, split):
    manifest = make_manifest(root)
    path = manifest.part(split)[0].path
    with pytest.raises(InputError, match=f"1 of the 5 queries of protocol dhcl .*first: {path}"):
        check_untrained(resplit(manifest, {path: "test"}), manifest)


def test_renamed_copies_of_training_images_are_refused(root, tmp_path):
    trained = make_manifest(root)
    for number, image in enumerate(trained.part("train")):
        target = tmp_path / "copies" / ("a" if number % 2 else "b") / f"renamed{number}.png"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes((root / image.path).read_bytes())
    renamed = make_manifest(tmp_path / "copies")
    assert isinstance(renamed, Manifest)
    assert not {image.path for image in renamed.images} & {image.path for image in trained.images}
    with pytest.raises(InputError, match="queries of protocol random were training or validation images"):
        check_untrained(renamed, trained)


def test_queries_that_training_did_not_use_are_accepted(root):
    manifest = make_manifest(root)
    fewer = {image.path: "unused" for image in manifest.part("test")[1:]}
    check_untrained(resplit(manifest, fewer), manifest)


def test_rescored_metrics_are_those_of_the_models_vectors_and_outputs(root, model):
    manifest = make_manifest(root)
    found = evaluate_model(model, manifest, root).metrics["rescored"]
    parts = manifest.part("test"), manifest.part("train", "validation")
    pixels = [model.prepare([read_image(root / image.path) for image in part]) for part in parts]
    query, database = (model.encode_items("image", images, with_outputs=True) for images in pixels)
    labels = [np.array([image.label for image in part]) for part in parts]
    retrieval = Retrieval(query.codes, database.codes, *labels, BITS)
    assert found == {
        "oversampling": 4.0,
        "vector": rescored_metrics(retrieval, Scores(query.vectors, database.vectors)),
        "asymmetric": rescored_metrics(retrieval, Scores(query.outputs, database.codes)),
    }
    assert found["vector"] != found["asymmetric"]


# Cached features.


@pytest.fixture
def cached(root, model, tmp_path, monkeypatch):
    """Return a manifest; the features of all its images except the test part are in a new cache."""
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    manifest = make_manifest(root)
    FeatureExtractor(model.network, model.preprocessing)(root, manifest.part("train", "validation"))
    return manifest


def files_read(monkeypatch, model, manifest, root):
    """Evaluate; return the evaluation and the names of the files encoded from pixels, sorted."""
    names = []

    def recorded(paths, *arguments, **options):
        names.extend(PurePosixPath(path).name for path in paths)
        return read_batches(paths, *arguments, **options)

    monkeypatch.setattr(features, "read_batches", recorded)
    progress = []
    evaluation = evaluate_model(model, manifest, root, on_progress=progress.append)
    assert progress[-1] == len(manifest.images)
    return evaluation, sorted(names)


# Database images of which rounding could change a component are read a second time, alone.
FEW = 5


def test_only_images_without_kept_features_are_encoded(root, model, cached, monkeypatch, tmp_path):
    evaluation, names = files_read(monkeypatch, model, cached, root)
    assert {(root / image.path).name for image in cached.part("test")} <= set(names)
    assert len(names) < len(cached.part("test")) + FEW
    again, names = files_read(monkeypatch, model, cached, root)
    assert not names
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "empty"))
    expected, names = files_read(monkeypatch, model, cached, root)
    assert len(cached.images) <= len(names) < len(cached.images) + FEW
    for other in (evaluation, again):
        assert other.metrics == expected.metrics
        assert [query.hits for query in other.gallery] == [query.hits for query in expected.gallery]


@pytest.mark.parametrize("margin", [2e-6, 1e9])
def test_codes_outputs_and_vectors_are_those_of_encoding(root, model, cached, monkeypatch, margin):
    """Kept features, new ones and those computed alone, for any number of images near a threshold."""
    monkeypatch.setattr("orbithash.encoders.networks.binarizer.MARGIN", margin)
    queries = {image.id for image in cached.part("test")}
    found = module._encode_images(model, *module._queries_and_others(cached), root, None)
    assert found.keys() == set(cached.images.ids)
    for image in cached.images:
        # Alone, which is what images near a threshold are computed as.
        pixels = model.prepare([read_image(root / image.path)])
        alone = model.encode_items("image", pixels, with_outputs=image.id in queries)
        assert (found[image.id].codes == alone.codes).all()
        assert (found[image.id].vectors == alone.vectors).all()
        if image.id in queries:
            assert (found[image.id].outputs == alone.outputs).all()


def test_queries_are_computed_alone(root, model, cached, monkeypatch):
    compute = HashModel.features

    def otherwise_together(self, images, *, batch_size=None):
        return np.roll(compute(self, images, batch_size=batch_size), 0 if batch_size == 1 else 1, axis=1)

    monkeypatch.setattr(HashModel, "features", otherwise_together)
    images = cached.images
    found = module._encode_images(model, images, images[:0], root, None)
    pixels = [model.prepare([read_image(root / path)]) for path in images.paths]
    alone = [model.encode_items("image", each, with_outputs=True) for each in pixels]
    assert all((found[id].vectors == of.vectors).all() for id, of in zip(images.ids, alone, strict=True))
    assert all((found[id].outputs == of.outputs).all() for id, of in zip(images.ids, alone, strict=True))


@pytest.mark.parametrize("margin", [2e-6, 1e9])
def test_what_is_wanted_is_all_that_evaluation_computes(root, model, tmp_path, monkeypatch, margin):
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("orbithash.encoders.networks.binarizer.MARGIN", margin)
    manifest = make_manifest(root)
    torch.manual_seed(5)
    pretrained = FeatureExtractor(HashNetwork.from_spec(model.card.network), model.preprocessing)
    wanted = module.wanted_features(model, manifest, root, pretrained)
    assert wanted.keys() == {"queries", "others", "baselines"}
    tables = {name: rows.table() for name, rows in wanted.items()}
    unsure = np.flatnonzero(~model.is_certain(tables["others"]))
    module.wanted_if_unsure(model, manifest, root, unsure)["unsure"].table()
    monkeypatch.setattr(HashModel, "features", None)
    evaluate_model(model, manifest, root, baseline_model=lambda images: pretrained(root, images))


def test_a_folder_of_features_that_may_not_be_written_is_a_warning(root, model, tmp_path, monkeypatch, caplog):
    manifest = make_manifest(root)
    expected = evaluate_model(model, manifest, root).metrics
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "file" / "features"))
    found = with_writable_store(lambda: evaluate_model(model, manifest, root)).metrics
    assert found == expected
    (warning,) = [line for line in caplog.messages if "features cannot be written there" in line]
    assert warning.endswith("computing without keeping them")
    assert os.environ["ORBITHASH_FEATURES"] == str(tmp_path / "file" / "features")
    # Other errors are those of the work.
    without = dataclasses.replace(manifest, images=tuple(image for image in manifest.images if image.split != "test"))
    with pytest.raises(InputError, match="no test part"):
        with_writable_store(lambda: evaluate_model(model, without, root))


def test_kept_features_of_other_weights_are_not_used(root, model, cached, monkeypatch):
    torch.manual_seed(2)
    other = HashModel(model.card, HashNetwork.from_spec(model.card.network), projection=model.projection)
    _, names = files_read(monkeypatch, other, cached, root)
    assert len(names) >= len(cached.images)


def test_images_near_a_threshold_are_encoded_from_their_pixels(root, model, cached, monkeypatch):
    monkeypatch.setattr("orbithash.encoders.networks.binarizer.MARGIN", 1e9)
    _, names = files_read(monkeypatch, model, cached, root)
    assert len(names) == len(cached.images)
