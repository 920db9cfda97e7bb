"""Errors of `train` about its data: one message with all problems, before Ray starts; nothing is written."""

import json
import shutil

import numpy as np
import pytest
from cluster_parts import TINY, write_image

from orbithash.cluster.training import train as training

CLASSES = ("beach", "river")
NUM_IMAGES = 6


@pytest.fixture
def refused_data(refused, tmp_path, monkeypatch):
    """Assert that training is refused with these problems, before Ray starts."""

    def no_ray():
        raise AssertionError("Ray would start")

    monkeypatch.setattr(training, "connected", no_ray)

    def check(method, data, *options, words, problems=1):
        refused(
            *("train", method, "--data", data, "--out", tmp_path / "run", *TINY, *options),
            words=words if problems == 1 else [f"found {problems} problems", *words],
            lines=1 if problems == 1 else 1 + problems,
        )

    return check


@pytest.fixture
def data(tmp_path):
    """Six images of each of two classes."""
    return write_classes(tmp_path / "data", (128, 128, 128))


@pytest.fixture
def pairs(tmp_path):
    """Images of two classes with a second source."""
    root = tmp_path / "pairs"
    for name, grey in (("first", 100), ("second", 150)):
        write_classes(root / name, (grey, grey, grey))
    return root


def write_classes(root, colour):
    rng = np.random.default_rng(0)
    for name in CLASSES:
        (root / name).mkdir(parents=True)
        for i in range(NUM_IMAGES):
            write_image(root / name / f"{name}{i}.png", rng, colour)
    return root


def sentences_of(number, name):
    """Return the entry of one image in a captions file."""
    sentences = [{"raw": f"{word} {name}", "sentid": 5 * number + i} for i, word in enumerate("abcde")]
    return {"filename": name, "imgid": number, "sentences": sentences}


def entries_of(data):
    return [sentences_of(i, path.relative_to(data).as_posix()) for i, path in enumerate(sorted(data.rglob("*.png")))]


def write_captions(path, entries):
    path.write_text(json.dumps({"images": entries}))
    return path


# Captions.


def test_captions_and_images_that_do_not_match(refused_data, data, tmp_path):
    entries = entries_of(data)
    entries[3]["imgid"] = entries[4]["imgid"]
    entries[7] = sentences_of(7, "beach/gone.png")
    (data / "river" / "river5.png").rename(data / "river" / "new.png")
    refused_data(
        *("duch", data, "--captions", write_captions(tmp_path / "captions.json", entries)),
        words=[
            data,
            "captions for beach/gone.png, which is missing",
            "captions for river/river5.png, which is missing",
            "river/river1.png has no captions",
            "river/new.png has no captions",
            "captions.json: imgid 4 occurs 2 times",
        ],
        problems=5,
    )


def test_duplicate_ids(refused_data, data, tmp_path):
    entries = entries_of(data)
    entries[1]["imgid"] = 0
    entries[2]["sentences"][0]["sentid"] = 3
    entries.append(sentences_of(100, entries[5]["filename"]))
    refused_data(
        *("duch", data, "--captions", write_captions(tmp_path / "captions.json", entries)),
        words=[
            "captions.json: filename beach/beach5.png occurs 2 times",
            "captions.json: imgid 0 occurs 2 times",
            "captions.json: sentid 3 occurs 2 times",
        ],
        problems=3,
    )


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("beach: a beach", "captions.json is damaged, or not JSON"),
        ('{"images": [', "captions.json is damaged, or not JSON"),
        ("[]", 'captions.json has no list "images"; it is not a file of captions'),
        ('{"images": {"beach": "a beach"}}', 'captions.json has no list "images"; it is not a file of captions'),
    ],
)
def test_an_invalid_captions_file(refused_data, data, tmp_path, content, words):
    (tmp_path / "captions.json").write_text(content)
    refused_data("duch", data, "--captions", tmp_path / "captions.json", words=[data, words])


def test_a_missing_captions_file(refused_data, data, tmp_path):
    file = tmp_path / "captions.json"
    refused_data("duch", data, "--captions", file, words=[file, "no such file of captions"])


def test_problems_of_captions_and_of_classes_come_together(refused_data, data, tmp_path):
    for i in range(1, NUM_IMAGES):
        (data / "river" / f"river{i}.png").unlink()
    (data / "beach" / "beach5.png").unlink()
    shutil.copytree(data / "beach", data / "Beach")
    for path in list((data / "Beach").iterdir()):
        path.rename(path.with_name(f"other-{path.name}"))
    file = write_captions(tmp_path / "captions.json", entries_of(data)[1:])
    refused_data(
        *("dhcl", data, "--captions", file),
        words=[
            "class 'river' has 1 image; at least 5 are needed",
            "classes that differ only in case: 'beach'",
            "Beach/other-beach0.png has no captions",
        ],
        problems=3,
    )


# Second sources.


def test_a_second_source_with_other_images_and_classes(refused_data, pairs):
    (pairs / "second" / "beach" / "beach0.png").unlink()
    (pairs / "first" / "beach" / "beach1.png").unlink()
    (pairs / "second" / "river" / "river2.png").rename(pairs / "second" / "beach" / "river2.png")
    refused_data(
        *("mrhash", pairs),
        words=[
            pairs,
            "first/beach/beach0.png has no second source second/beach/beach0.png",
            "second/beach/beach1.png is not the second source of an image",
            "first/river/river2.png: its second source has the class beach",
        ],
        problems=3,
    )


# Classes.


def test_classes_of_one_image(refused_data, data):
    for name in ("lake", "sea"):
        (data / name).mkdir()
        shutil.copy(data / "beach" / "beach0.png", data / name / f"{name}.png")
    refused_data(
        *("dhcl", data),
        words=[data, *(f"class '{name}' has 1 image; at least 5 are needed" for name in ("lake", "sea"))],
        problems=2,
    )


def test_images_without_a_class(refused_data, data, tmp_path):
    """As in RSICD, whose class lists omit many images."""
    file = write_captions(tmp_path / "captions.json", [{**e, "filename": e["filename"][6:]} for e in entries_of(data)])
    lists = data / "txtclasses_rsicd"
    lists.mkdir()
    for name in CLASSES:
        (lists / f"{name}.txt").write_text("".join(f"{name}{i}.png\n" for i in range(NUM_IMAGES - 1)))
    refused_data(
        *("classifier", data, "--captions", file, "--protocol", "random"),
        words=[
            "2 of 10 training images have no class (first: beach/beach5.png)",
            "duch, mrhash, contrastive, itq, pca-sign, lsh and sign need none",
        ],
    )


# Requirements of methods.


def test_a_method_on_data_without_captions_or_text_encoder(refused_data, data, tmp_path):
    no_text, no_captions = "text_encoder is not set", "10 of 10 images have no captions (first: beach/beach"
    refused_data("duch", data, "--protocol", "random", words=[no_text, no_captions, "--captions FILE"], problems=2)
    folder = tmp_path / "nope"
    refused_data(
        *("duch", data, "--protocol", "random", "--set", f"text_encoder={folder}"),
        words=[f"text model '{folder}': no such folder", "give the folder of a Hugging Face model", no_captions],
        problems=2,
    )
    (tmp_path / "text").mkdir()
    file = write_captions(tmp_path / "captions.json", entries_of(data))
    refused_data(
        *("duch", data, "--captions", file, "--set", f"text_encoder={tmp_path / 'text'}"),
        words=[f"{tmp_path / 'text'}: not a Hugging Face model folder (it has no config.json)"],
    )


def test_a_method_on_data_without_a_second_source(refused_data, data):
    refused_data(
        *("mrhash", data, "--set", "num_clusters=4"),
        words=[
            "10 of 10 images have no second source (first: beach/beach",
            "use a data set of pairs; `orbithash wald`",
        ],
    )


def test_problems_that_workers_would_find_are_reported_together(refused_data, data):
    refused_data(
        *("mrhash", data, "--set", "num_clusters=40", "--set", "batch_size=20"),
        words=[
            "batch_size 20 is more than the ",
            "images have no second source",
            "num_clusters is 40: at most the ",
        ],
        problems=3,
    )


def test_a_batch_that_workers_cannot_share(refused_data, data):
    refused_data(
        *("dhcl", data, "--workers", "1:5"),
        words=["batch_size 4 over 5 workers: each worker needs images", "batch_size=5 or more, or at most 4 workers"],
    )
