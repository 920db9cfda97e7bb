"""Views of an image, of each of which features are computed once: those of DUCH, and `crop-turn`.

Parameters of DUCH's are those of the authors' code, with two differences: crops of 200 of 256 pixels are a share of the
side here, for images of other sizes, and rotations are interpolated instead of rounded to the nearest pixel.
"""

import math
from collections.abc import Callable

import numpy as np
import torchvision.transforms.v2.functional as F
from PIL.Image import Image as PillowImage
from PIL.Image import Resampling, Transpose, fromarray
from torchvision.transforms import InterpolationMode

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.rendering import Image

__all__ = ["CROP_SHARE", "VIEWS", "view"]

# (image, random generator, share of the shorter side that a crop keeps) to an image.
View = Callable[[PillowImage, np.random.Generator, float], PillowImage]

CROP_SHARE = 200 / 256

BLUR_SIDE_PX = 3
BLUR_SIGMA_PX = (1.1, 1.3)
# In degrees, counter-clockwise.
ROTATION = (-10.0, -5.0)
# Parameters of torchvision's ColorJitter: 0.8 and 0.2 times a strength of 0.5.
JITTER, JITTER_HUE = 0.4, 0.1
# Of crop-turn, as in the augmentation of training images.
MIN_CROP_AREA, MAX_ASPECT = 0.4, 4 / 3


def view(name: str, image: Image, rng: np.random.Generator, crop_share: float = CROP_SHARE) -> Image:
    """Return view `name`, one of `VIEWS`, of a picture uint8 [H, W, 3].

    The side of a square crop is `crop_share`, above 0 and at most 1, of the image's shorter side. Rotations leave black
    corners, which the centre crop of a square image does not contain.
    """
    if name not in VIEWS:
        raise InputError(f"view is {name!r}; allowed are {', '.join(VIEWS)}")
    if not 0 < crop_share <= 1:
        raise InputError(f"crop_share is {crop_share}; it is the share of the image's side, above 0 and at most 1")
    result = np.asarray(VIEWS[name](fromarray(image), rng, crop_share))
    assert result.dtype == np.uint8, "Pillow keeps the type"
    return result


def _sequence(*steps: View) -> View:
    def apply(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
        for step in steps:
            image = step(image, rng, crop_share)
        return image

    return apply


def _blur(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    sigma = rng.uniform(*BLUR_SIGMA_PX)
    if min(image.size) == 1:
        # Too small to mirror at the edges.
        return image
    blurred: PillowImage = F.gaussian_blur(image, [BLUR_SIDE_PX, BLUR_SIDE_PX], [sigma, sigma])
    return blurred


def _rotate(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    rotated: PillowImage = F.rotate(image, rng.uniform(*ROTATION), InterpolationMode.BILINEAR)
    return rotated


def _jitter(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    brightness, contrast, saturation = rng.uniform(1 - JITTER, 1 + JITTER, size=3)
    adjustments: list[Callable[[PillowImage], PillowImage]] = [
        lambda image: F.adjust_brightness(image, brightness),
        lambda image: F.adjust_contrast(image, contrast),
        lambda image: F.adjust_saturation(image, saturation),
        lambda image: F.adjust_hue(image, rng.uniform(-JITTER_HUE, JITTER_HUE)),
    ]
    for number in rng.permutation(len(adjustments)):
        image = adjustments[number](image)
    return image


def _center_crop(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    side = _side(image, crop_share)
    cropped: PillowImage = F.center_crop(image, [side, side])
    return cropped


def _random_crop(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    side = _side(image, crop_share)
    top, left = (int(rng.integers(length - side + 1)) for length in (image.height, image.width))
    cropped: PillowImage = F.crop(image, top, left, side, side)
    return cropped


def _side(image: PillowImage, crop_share: float) -> int:
    return max(1, round(min(image.size) * crop_share))


def _crop_turn(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    """Return a random crop of 40 to 100 % of the area, resized to a square, in one of the eight orientations."""
    area, aspect = rng.uniform(MIN_CROP_AREA, 1), math.exp(rng.uniform(-1, 1) * math.log(MAX_ASPECT))
    width = min(image.width, image.width * math.sqrt(area * aspect))
    height = min(image.height, image.height * math.sqrt(area / aspect))
    left, top = rng.uniform(0, image.width - width), rng.uniform(0, image.height - height)
    side = min(image.size)
    square = image.resize((side, side), Resampling.BILINEAR, (left, top, left + width, top + height))
    orientation = int(rng.integers(8))
    turned = square.rotate(90 * (orientation % 4))
    return turned.transpose(Transpose.FLIP_LEFT_RIGHT) if orientation >= 4 else turned


def _one_of_three(image: PillowImage, rng: np.random.Generator, crop_share: float) -> PillowImage:
    name = ("rotate", "blur", "jitter")[rng.integers(3)]
    return VIEWS[name](image, rng, crop_share)


# All but "none" return squares. "center-crop" is DUCH's original view, "blur-rotate-center" its augmented one;
# "crop-turn" is the view of contrastive training.
VIEWS: dict[str, View] = {
    "none": _sequence(),
    "center-crop": _center_crop,
    "random-crop": _random_crop,
    "blur-rotate-center": _sequence(_blur, _rotate, _center_crop),
    "blur-rotate-random": _sequence(_blur, _rotate, _random_crop),
    "rotate": _sequence(_rotate, _center_crop),
    "blur": _sequence(_blur, _center_crop),
    "jitter": _sequence(_jitter, _center_crop),
    "one-of-three": _one_of_three,
    "crop-turn": _crop_turn,
}
