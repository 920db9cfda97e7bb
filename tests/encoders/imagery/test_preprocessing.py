"""Preprocessing against its two-step definition: resize the shorter side, then crop the centre."""

import json
import re

import numpy as np
import pytest
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering
from orbithash.encoders.imagery.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing


def noise(height, width, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)


def in_two_steps(image, resize, crop):
    """Resize the whole image (the longer side must become an integer), then crop the centre square."""
    height, width = image.shape[:2]
    shorter = min(height, width)
    assert height * resize % shorter == 0
    assert width * resize % shorter == 0
    size = (width * resize // shorter, height * resize // shorter)
    whole = np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BILINEAR))
    top, left = (whole.shape[0] - crop) // 2, (whole.shape[1] - crop) // 2
    return whole[top : top + crop, left : left + crop]


@pytest.mark.parametrize(
    ("height", "width", "resize", "crop"),
    [
        (64, 64, 32, 32),
        (64, 64, 32, 16),
        (128, 64, 32, 24),
        (64, 192, 32, 28),
        (32, 48, 64, 32),
        (40, 40, 40, 20),
        (96, 96, 36, 32),
    ],
)
def test_equals_resizing_and_then_cropping(height, width, resize, crop):
    image = noise(height, width)
    found = Preprocessing(Rendering(), resize, crop).prepare(image)
    assert found.dtype == np.uint8
    assert found.shape == (crop, crop, 3)
    # Within one grey level: Pillow computes its fixed-point weights from a box in single precision.
    assert np.abs(found.astype(int) - in_two_steps(image, resize, crop)).max() <= 1


def test_halving_averages_with_the_triangle_filter():
    """Bilinear resampling to half size weighs four neighbours 1:3:3:1; three values are computed by hand."""
    line = np.array([0, 80, 160, 240] * 8, np.uint8)
    image = np.broadcast_to(line[None, :, None], (32, 32, 3))
    found = Preprocessing(Rendering(), 16, 16).prepare(np.ascontiguousarray(image))
    inner = found[8, 2:6, 0].tolist()
    expected = []
    for i in range(2, 6):
        a, b, c, d = (int(line[j]) for j in range(2 * i - 1, 2 * i + 3))
        expected.append((a + 3 * b + 3 * c + d) / 8)
    assert np.allclose(inner, expected, atol=1)


def test_an_image_of_the_final_size_is_unchanged():
    image = noise(32, 32)
    assert (Preprocessing(Rendering(), 32, 32).prepare(image) == image).all()


@pytest.mark.parametrize("shape", [(16, 5000), (5000, 16)])
def test_the_middle_of_a_long_thin_image_is_used(shape):
    image = np.zeros((*shape, 3), np.uint8)
    middle = [slice(n // 2 - 8, n // 2 + 8) for n in shape]
    image[middle[0], middle[1]] = 200
    found = Preprocessing(Rendering(), 64, 64).prepare(image)
    assert found.shape == (64, 64, 3)
    # The two outermost pixels blend with pixels outside of the crop.
    assert (found[3:-3, 3:-3] == 200).all()


@pytest.mark.parametrize("side", [1, 15, 17, 255, 257, 1023])
@pytest.mark.parametrize(("resize", "crop"), [(224, 224), (256, 224), (1024, 1023)])
def test_images_of_every_size_become_the_square(side, resize, crop):
    found = Preprocessing(Rendering(), resize, crop).prepare(np.full((side, side + 1, 3), 77, np.uint8))
    assert found.shape == (crop, crop, 3)
    assert (found == 77).all()


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((20, 20, 3), np.float32),
        np.zeros((20, 20, 3), np.int8),
        np.zeros((20, 20), np.uint8),
        np.zeros((20, 20, 4), np.uint8),
        np.zeros((1, 20, 20, 3), np.uint8),
        np.zeros((0, 20, 3), np.uint8),
    ],
)
def test_other_arrays_are_refused(image):
    with pytest.raises(InputError, match=r"uint8 \[H, W, 3\]"):
        Preprocessing(Rendering(), 32, 32).prepare(image)


@pytest.mark.parametrize(("resize", "crop"), [(32, 33), (15, 15), (1025, 64), (32, 0), (32, -1)])
def test_sizes_out_of_range_are_refused(resize, crop):
    with pytest.raises(InputError, match="16 <= crop <= resize <= 1024"):
        Preprocessing(Rendering(), resize, crop)


@pytest.mark.parametrize("std", [(0.2, 0.2, 0.0), (0.2, 0.2), (0.2, 0.2, float("nan"))])
def test_a_std_that_is_not_positive_is_refused(std):
    with pytest.raises(InputError, match="std"):
        Preprocessing(Rendering(), 32, 32, std=std)


@pytest.mark.parametrize("orientations", [0, 2, 16, -1])
def test_an_unknown_number_of_orientations_is_refused(orientations):
    with pytest.raises(InputError, match=f"orientations {orientations}; 1, 4, 8 are allowed"):
        Preprocessing(Rendering(), 32, 32, orientations=orientations)


@pytest.mark.parametrize("smaller", [(32,), (40,), (15,), (20, 20)])
def test_smaller_sizes_are_smaller_and_different(smaller):
    with pytest.raises(InputError, match=re.escape(f"smaller {smaller}; different sides from 16 to below 32")):
        Preprocessing(Rendering(), 32, 32, smaller=smaller)


def test_both_problems_are_reported_at_once():
    with pytest.raises(InputError, match=r"(?s)2 problems.*crop 99.*std"):
        Preprocessing(Rendering(), 32, 99, std=(0.0, 0.0, 0.0))


def test_json_round_trip():
    before = Preprocessing(
        Rendering((4, 3, 2), "range:0:10000"), 73, 64, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6), 4, "bilinear", (48, 32)
    )
    assert Preprocessing.from_json(json.loads(json.dumps(before.to_json()))) == before
    assert Preprocessing(Rendering(), 64, 64).to_json()["mean"] == list(IMAGENET_MEAN)
    assert Preprocessing(Rendering(), 64, 64).to_json()["std"] == list(IMAGENET_STD)


@pytest.mark.parametrize("key", ["rendering", "resize", "crop", "mean", "std", "orientations", "smaller"])
def test_json_without_a_key_is_refused(key):
    fields = Preprocessing(Rendering(), 64, 64).to_json()
    del fields[key]
    with pytest.raises(KeyError, match=key):
        Preprocessing.from_json(fields)
