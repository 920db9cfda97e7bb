"""The columns of a manifest against a list of its images."""

import dataclasses
import hashlib
import pickle

import numpy as np
import pyarrow as pa
import pytest

from orbithash.trainers.datasets import Image, Images

SPLITS = ("train", "validation", "test", "database")


def sha256(text):
    return hashlib.sha256(text.encode()).hexdigest()


def make_images(count, seed=0):
    """Return images with and without every optional field."""
    rng = np.random.default_rng(seed)
    images = []
    for i in range(count):
        second = f"second/ü{i}.png" if rng.integers(2) else None
        images.append(
            Image(
                id=f"patch {i}" if rng.integers(2) else f"a/{i}.png",
                path=f"a/{i}.png",
                labels=tuple(sorted(rng.choice(9, rng.integers(4), replace=False).tolist())),
                split=SPLITS[rng.integers(4)],
                sha256=sha256(f"{i}"),
                captions=tuple(f"sentence {n} of {i} ." for n in range(rng.integers(3))),
                second=second,
                second_sha256=second and sha256(second),
            )
        )
    return images


@pytest.fixture(params=[0, 1, 300])
def pair(request):
    """Return a list of images, and the same as columns: in many chunks, selected from more rows in another order."""
    images = make_images(request.param)
    shuffled = np.random.default_rng(1).permutation(len(images))
    others = make_images(7, seed=9)
    table = pa.concat_tables(
        Images.of([*others[:3], *(images[row] for row in shuffled), *others[3:]]).table().slice(start, 11)
        for start in range(0, len(images) + 7, 11)
    )
    return images, Images(table, 3 + np.argsort(shuffled))


def test_rows_are_the_images(pair):
    images, columns = pair
    assert (len(columns), [*columns], bool(columns)) == (len(images), images, bool(images))
    assert [columns[i] for i in range(-len(images), len(images))] == images * 2
    for key in (len(images), -len(images) - 1):
        with pytest.raises(IndexError):
            columns[key]
    assert [*columns[1::3]] == images[1::3]
    assert [*columns[::-1]] == images[::-1]
    rows = np.random.default_rng(2).integers(0, max(1, len(images)), len(images))
    assert [*columns[rows]] == [images[row] for row in rows]
    assert [*columns[columns.has_second][2:]] == [image for image in images if image.second is not None][2:]


def test_columns_are_the_fields(pair):
    images, columns = pair
    assert columns.ids == [image.id for image in images]
    assert columns.paths == [image.path for image in images]
    assert columns.splits == [image.split for image in images]
    assert columns.seconds == [image.second for image in images]
    assert [tuple(captions) for captions in columns.captions] == [image.captions for image in images]
    assert [hash.hex() for hash in columns.sha256s.tolist()] == [image.sha256 for image in images]
    assert [hash.hex() for hash in columns.second_sha256s.tolist()] == [i.second_sha256 or "00" * 32 for i in images]
    assert columns.has_second.tolist() == [image.second is not None for image in images]
    assert columns.has_captions.tolist() == [bool(image.captions) for image in images]
    assert columns.is_labelled.tolist() == [bool(image.labels) for image in images]
    assert columns.labels.counts.tolist() == [len(image.labels) for image in images]
    assert columns.labels.values.tolist() == [label for image in images for label in image.labels]


def test_parts(pair):
    images, columns = pair
    for wanted in ((), ("train",), ("test", "validation"), SPLITS):
        assert [*columns.part(*wanted)] == [image for image in images if image.split in wanted]
        assert [*columns.part("train").part(*wanted)] == [i for i in images if i.split in wanted and i.split == "train"]
    assert [*(columns.part("test") + columns.part("train"))] == [
        image for split in ("test", "train") for image in images if image.split == split
    ]
    splits = [SPLITS[i % 3] for i in range(len(images))]
    assert [*columns.with_splits(splits)] == [
        dataclasses.replace(image, split=split) for image, split in zip(images, splits, strict=True)
    ]


def test_equality_and_digest_depend_on_the_content_only(pair):
    images, columns = pair
    assert columns == Images.of(images) == pickle.loads(pickle.dumps(columns))
    assert columns.digest() == Images.of(images).digest()
    if len(images) > 1:
        assert columns != columns[::-1]


@pytest.mark.parametrize(
    "change",
    [
        {"id": "another"},
        {"path": "b"},
        {"labels": (1,)},
        {"labels": (0, 0)},
        {"split": "test"},
        {"sha256": "f" * 64},
        {"captions": ("A ", "beach .")},
        {"captions": ()},
        {"second": "y"},
        {"second": None},
        {"second_sha256": None},
    ],
)
def test_every_field_is_in_the_digest(change):
    image = Image("id", "a", (0,), "train", "0" * 64, ("A beach .", ""), "x", "1" * 64)
    changed = dataclasses.replace(image, **change)
    assert Images.of([image, image]).digest() != Images.of([image, changed]).digest()
    assert Images.of([image, changed]) != Images.of([changed, image])


def number(value):
    return value.to_bytes(8, "little", signed=True)


def text_column(values):
    """Return the bytes of a column of texts that are hashed: lengths, then texts."""
    lengths = b"".join(number(-1 if value is None else len(value)) for value in values)
    return lengths + b"".join(value for value in values if value is not None)


def list_lengths(lists):
    return b"".join(number(len(values)) for values in lists)


def test_the_digest_is_the_one_that_its_description_defines():
    """Run folders and models of earlier times identify their split by it."""
    images = make_images(40)
    content = text_column([None if image.id == image.path else image.id.encode() for image in images])
    content += text_column([image.path.encode() for image in images])
    content += list_lengths(image.labels for image in images)
    content += b"".join(number(label) for image in images for label in image.labels)
    content += text_column([image.split.encode() for image in images])
    content += text_column([bytes.fromhex(image.sha256) for image in images])
    content += list_lengths(image.captions for image in images)
    content += text_column([caption.encode() for image in images for caption in image.captions])
    content += text_column([image.second and image.second.encode() for image in images])
    content += text_column([image.second_sha256 and bytes.fromhex(image.second_sha256) for image in images])
    assert Images.of(images).digest() == hashlib.sha256(content).digest()
