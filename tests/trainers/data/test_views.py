"""DUCH's views: sizes, effects on pixels, and dependence on (seed, id) only."""

import numpy as np
import pytest
from PIL import Image, ImageEnhance
from scipy.ndimage import gaussian_filter

from orbithash.encoders.errors import InputError
from orbithash.trainers.data.views import BLUR_SIGMA_PX, CROP_SHARE, JITTER, ROTATION, VIEWS, view

RANDOM = [name for name in VIEWS if name not in ("none", "center-crop")]


def view_rng(seed, name):
    """Return the random numbers of one image's view."""
    return np.random.default_rng([seed, *name.encode()])


def picture(height=64, width=64, seed=0):
    """Smooth colours, so that small turns and blurs change little, with noise on top."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (8, 8, 3), np.uint8))
    smooth = np.asarray(small.resize((width, height), Image.Resampling.BICUBIC)).astype(int)
    return np.clip(smooth + rng.integers(-10, 11, (height, width, 3)), 0, 255).astype(np.uint8)


class Fixed:
    """A random generator whose numbers are all at one position of their range."""

    def __init__(self, place):
        self.place = place

    def uniform(self, low, high, size=None):
        value = low + self.place * (high - low)
        return value if size is None else np.full(size, value)

    def integers(self, high):
        return min(high - 1, int(self.place * high))

    def permutation(self, num):
        return range(num)


@pytest.mark.parametrize("name", VIEWS)
@pytest.mark.parametrize(("height", "width", "side"), [(256, 256, 200), (64, 100, 50), (33, 20, 16), (1, 1, 1)])
def test_views_are_squares_and_leave_the_image_alone(name, height, width, side):
    image = picture(height, width)
    before = image.copy()
    result = view(name, image, view_rng(0, "a"))
    assert result.dtype == np.uint8
    # crop-turn enlarges what it crops.
    side = min(height, width) if name == "crop-turn" else side
    assert result.shape == ((height, width, 3) if name == "none" else (side, side, 3))
    assert np.array_equal(image, before)


@pytest.mark.parametrize("name", VIEWS)
def test_the_random_numbers_decide_the_view(name):
    image = picture()
    first = view(name, image, view_rng(3, "river07"))
    assert np.array_equal(first, view(name, image, view_rng(3, "river07")))
    others = [view(name, image, view_rng(seed, id)) for seed, id in [(4, "river07"), (3, "river08"), (3, "")]]
    assert all(np.array_equal(first, other) for other in others) == (name not in RANDOM)


def test_none_and_the_middle_crop_against_slices():
    image = picture(64, 96)
    assert np.array_equal(view("none", image, view_rng(0, "a")), image)
    assert np.array_equal(view("center-crop", image, view_rng(0, "a"), 0.5), image[16:48, 32:64])
    assert np.array_equal(view("center-crop", image[:, :64], view_rng(0, "a"), 1), image[:, :64])


def test_random_crops_are_slices_from_everywhere():
    image = picture(20, 30)
    assert np.array_equal(view("random-crop", image, Fixed(0), 0.5), image[:10, :10])
    assert np.array_equal(view("random-crop", image, Fixed(1), 0.5), image[10:, 20:])
    found = set()
    for number in range(2000):
        crop = view("random-crop", image, view_rng(0, str(number)), 0.5)
        places = [(y, x) for y in range(11) for x in range(21) if np.array_equal(image[y : y + 10, x : x + 10], crop)]
        assert len(places) == 1
        found |= set(places)
    assert len(found) == 11 * 21


@pytest.mark.parametrize("place", [0, 0.5, 1])
def test_blur_against_scipy(place):
    image = picture()
    sigma = BLUR_SIGMA_PX[0] + place * (BLUR_SIGMA_PX[1] - BLUR_SIGMA_PX[0])
    # Radius 1: a kernel of three pixels.
    slow = gaussian_filter(image.astype(float), (sigma, sigma, 0), radius=(1, 1, 0), mode="mirror")
    fast = view("blur", image, Fixed(place), 1)
    assert np.abs(fast - slow).max() <= 0.51
    assert np.abs(fast - image.astype(float)).max() > 5


@pytest.mark.parametrize("place", [0, 1])
def test_rotation_is_clockwise_by_five_to_ten_degrees(place):
    image = picture()
    angle = ROTATION[int(place)]
    assert angle in (-10, -5)
    fast = view("rotate", image, Fixed(place), 0.5).astype(float)
    # Each pixel of the view equals the image's pixel at the position rotated back about the centre.
    radians = np.deg2rad(angle)
    for y, x in [(16, 16), (20, 40), (47, 30)]:
        dy, dx = y - 31.5, x - 31.5
        sy = 31.5 + np.cos(radians) * dy + np.sin(radians) * dx
        sx = 31.5 - np.sin(radians) * dy + np.cos(radians) * dx
        top, left = int(sy), int(sx)
        patch = image[top : top + 2, left : left + 2].astype(float)
        rows = patch[0] * (1 - (sy - top)) + patch[1] * (sy - top)
        expected = rows[0] * (1 - (sx - left)) + rows[1] * (sx - left)
        assert np.abs(fast[y - 16, x - 16] - expected).max() <= 1.5


def test_no_black_corner_gets_into_the_middle_crop_of_a_square():
    white = np.full((256, 256, 3), 255, np.uint8)
    for place in (0, 1):
        for name in ("rotate", "blur-rotate-center"):
            assert view(name, white, Fixed(place)).min() == 255
        assert view("blur-rotate-random", white, Fixed(place)).min() == 0


def test_the_augmented_view_is_blur_then_rotation_then_crop():
    image = picture()
    rng = view_rng(1, "a")
    blurred = view("blur", image, rng, 1)
    turned = view("rotate", blurred, rng, CROP_SHARE)
    assert np.array_equal(view("blur-rotate-center", image, view_rng(1, "a")), turned)


def test_jitter_stays_within_its_strengths():
    grey = np.full((8, 8, 3), 100, np.uint8)
    # On uniform grey, contrast, saturation and hue have no effect; only brightness has.
    values = [int(view("jitter", grey, view_rng(0, str(i)))[0, 0, 0]) for i in range(300)]
    assert min(values) >= 100 * (1 - JITTER) - 1
    assert max(values) <= 100 * (1 + JITTER) + 1
    assert min(values) < 65
    assert max(values) > 135


def test_jitter_against_pillow():
    image = picture()
    factor = 1 - JITTER
    slow = Image.fromarray(image)
    for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
        slow = kind(slow).enhance(factor)
    hue, saturation, value = slow.convert("HSV").split()
    # A tenth of the hue circle backwards.
    hue = Image.fromarray(((np.asarray(hue).astype(int) - 25) % 256).astype(np.uint8))
    slow = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    assert np.array_equal(view("jitter", image, Fixed(0), 1), np.asarray(slow))


def test_one_of_three_is_each_of_them_by_turns():
    image = picture()
    counts = dict.fromkeys(("rotate", "blur", "jitter"), 0)
    for number in range(150):
        rng = view_rng(0, str(number))
        result = view("one-of-three", image, rng)
        again = view_rng(0, str(number))
        name = ("rotate", "blur", "jitter")[again.integers(3)]
        assert np.array_equal(result, view(name, image, again))
        counts[name] += 1
    assert min(counts.values()) > 30


def test_unknown_views_and_shares_are_refused():
    with pytest.raises(InputError, match="view is 'flip'; allowed are none, center-crop"):
        view("flip", picture(), view_rng(0, "a"))
    for share in (0, -0.5, 1.01, float("nan")):
        with pytest.raises(InputError, match="crop_share is"):
            view("none", picture(), view_rng(0, "a"), share)
