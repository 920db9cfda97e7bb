"""Resampling of pictures and of numbers with missing pixels, with the geometry of Pillow."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from orbithash.encoders.imagery.rendering import Pixels

__all__ = ["INTERPOLATIONS", "Box", "resample", "resize_band"]

Box = tuple[float, float, float, float]
"""Left, top, right and bottom in pixels."""

INTERPOLATIONS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def resample(image: Pixels, side: int, box: Box, interpolation: str = "bilinear") -> Pixels:
    """Return the part in `box` of an image [H, W, C] as [side, side, C] of the same type, antialiased.

    uint8 is rounded. In float32, missing pixels (NaN, infinite) have no weight; a result is missing where they have
    more than half of the weight.
    """
    if image.dtype == np.uint8 and image.shape[2] == 3:
        return np.asarray(Image.fromarray(image).resize((side, side), INTERPOLATIONS[interpolation], box=box))
    # Pillow resamples at most four bands together, and treats the fourth as alpha.
    bands = [resize_band(image[..., band], (side, side), box, interpolation) for band in range(image.shape[2])]
    return np.stack(bands, axis=2)


def resize_band(
    band: npt.NDArray[Any], size: tuple[int, int], box: Box | None = None, interpolation: str = "bilinear"
) -> npt.NDArray[Any]:
    """Return a band uint8 or float32 [H, W], or its part in `box`, at `size` (width, height); see `resample`."""

    def resized(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        return np.asarray(Image.fromarray(values).resize(size, INTERPOLATIONS[interpolation], box=box))

    if band.dtype == np.uint8:
        return resized(band)
    there = np.isfinite(band)
    if there.all():
        return resized(np.ascontiguousarray(band))
    weight = resized(there.astype(np.float32))
    total = resized(np.where(there, band, np.float32(0)))
    is_there = weight >= 0.5
    return np.where(is_there, total / np.where(is_there, weight, 1), np.float32(np.nan))
