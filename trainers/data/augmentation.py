"""Random views of training images: what is drawn for a view, and how Pillow makes it on a CPU."""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance

from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.imagery.resampling import Box, resample

__all__ = ["Augmentation", "ViewDraw", "augment", "draw_view"]


@dataclass(frozen=True)
class Augmentation:
    """Strength of the random changes of a training view.

    Attributes:
        min_crop_area: smallest share of the image's area that a crop keeps. Objects in overhead images are small, and
            smaller crops lose them.
        colour_jitter: largest relative change of brightness, contrast and saturation; hue changes by a fifth of it.
        grayscale: share of the views without colour.
        interpolation: see `Preprocessing`.
    """

    min_crop_area: float = 0.4
    colour_jitter: float = 0.0
    grayscale: float = 0.0
    interpolation: str = "bilinear"

    @property
    def changes_colours(self) -> bool:
        """Whether views have other colours than their image."""
        return bool(self.colour_jitter or self.grayscale)


@dataclass(frozen=True)
class ViewDraw:
    """What is drawn for one view.

    Attributes:
        box: the crop in pixels of the image.
        orientation: quarter turns counter-clockwise, plus 4 for a mirror image after them.
        factors: of brightness, contrast and saturation.
        hue_turn: added to the hue, which has 256 values; None: the hue is not touched.
        is_grey: whether the view has no colour.
    """

    box: Box
    orientation: int
    factors: tuple[float, float, float] = (1.0, 1.0, 1.0)
    hue_turn: int | None = None
    is_grey: bool = False


_DEFAULT = Augmentation()


def draw_view(full: int, rng: np.random.Generator, augmentation: Augmentation = _DEFAULT) -> ViewDraw:
    """Return the draws of a view of an image [full, full, C].

    All eight orientations are equally likely, because overhead images have no upward direction. Colours change in
    pictures of three bands only.
    """
    area, aspect = rng.uniform(augmentation.min_crop_area, 1), math.exp(rng.uniform(-math.log(4 / 3), math.log(4 / 3)))
    width, height = (min(full, full * math.sqrt(area * a)) for a in (aspect, 1 / aspect))
    left, top = rng.uniform(0, full - width), rng.uniform(0, full - height)
    box, orientation = (left, top, left + width, top + height), int(rng.integers(8))
    if not augmentation.changes_colours:
        return ViewDraw(box, orientation)
    strength = augmentation.colour_jitter
    brightness, contrast, saturation = (rng.uniform(1 - strength, 1 + strength) for _ in range(3))
    hue_turn = round(rng.uniform(-strength, strength) / 5 * 255) if strength else None
    is_grey = rng.uniform() < augmentation.grayscale
    return ViewDraw(box, orientation, (brightness, contrast, saturation), hue_turn, is_grey)


def augment(image: Pixels, side: int, rng: np.random.Generator, augmentation: Augmentation = _DEFAULT) -> Pixels:
    """Return a random view [side, side, C] of an image [S, S, C]: crop, orientation, colours."""
    draw = draw_view(image.shape[0], rng, augmentation)
    cut = resample(image, side, draw.box, augmentation.interpolation)
    if augmentation.changes_colours:
        cut = np.asarray(_recolour(Image.fromarray(cut), draw))
    view = np.rot90(cut, draw.orientation % 4)
    return view[:, ::-1] if draw.orientation >= 4 else view


def _recolour(image: Image.Image, draw: ViewDraw) -> Image.Image:
    enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
    for enhance, factor in zip(enhancers, draw.factors, strict=True):
        image = enhance(image).enhance(factor)
    if (turn := draw.hue_turn) is not None:
        hue, saturation, value = image.convert("HSV").split()
        hue = hue.point(lambda h: (h + turn) % 256)
        image = Image.merge("HSV", (hue, saturation, value)).convert("RGB")
    if draw.is_grey:
        image = image.convert("L").convert("RGB")
    return image
