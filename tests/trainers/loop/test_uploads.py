"""Batches that are copied ahead, and training images that are normalised from tensors as from arrays."""

import numpy as np
import pytest
import torch

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.networks.reading import Normaliser
from orbithash.trainers.loop.uploads import one_ahead, uploaded
from orbithash.trainers.methods import Batch

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")


def batches(num):
    rng = torch.Generator().manual_seed(0)
    for number in range(num):
        rows = torch.randint(0, 100, (6,), generator=rng)
        images = torch.randint(0, 256, (6, 16, 16, 3), dtype=torch.uint8, generator=rng) if number % 2 else None
        yield Batch(rows, rows % 3, images, {"image": torch.rand(6, 5, generator=rng)}, number)


def assert_same(found, expected):
    assert found.seed == expected.seed
    assert (found.images is None) == (expected.images is None)
    if expected.images is not None:
        assert torch.equal(found.images.cpu(), expected.images)
    for one, other in zip(
        (found.rows, found.labels, found.features["image"]),
        (expected.rows, expected.labels, expected.features["image"]),
        strict=True,
    ):
        assert torch.equal(one.cpu(), other)


@pytest.mark.parametrize("num", [0, 1, 2, 5])
def test_one_item_is_begun_ahead(num):
    events = []

    def begin(item):
        events.append(f"begin {item}")
        return -item

    for value in one_ahead(range(num), begin):
        events.append(f"use {-value}")
    expected = [f"begin {0}"] if num else []
    for item in range(num):
        expected += [f"begin {item + 1}"] * (item + 1 < num) + [f"use {item}"]
    assert events == expected


def test_on_a_cpu_batches_are_passed_on_one_by_one():
    taken = []

    def counted():
        for batch in batches(3):
            taken.append(batch.seed)
            yield batch

    for number, batch in enumerate(uploaded(counted(), torch.device("cpu"))):
        assert taken == list(range(number + 1))
        assert batch.seed == number


@needs_gpu
@pytest.mark.gpu
def test_batches_on_a_gpu_are_those_on_the_cpu():
    device = torch.device("cuda")
    busy = torch.rand(2048, 2048, device=device)
    for found, expected in zip(uploaded(batches(20), device), batches(20), strict=True):
        assert found.rows.device.type == "cuda"
        # Work that the next copies may overlap with.
        busy = busy @ busy
        assert_same(found, expected)


def test_images_are_normalised_from_tensors_as_from_arrays():
    normaliser = Normaliser(Preprocessing(Rendering(), 16, 16), torch.device("cpu"))
    pixels = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    from_array, from_tensor = normaliser(pixels), normaliser(torch.from_numpy(pixels))
    assert torch.equal(from_array, from_tensor)
    assert from_array.stride() == from_tensor.stride()
