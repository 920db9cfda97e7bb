"""Rendering: the bands of an image that are shown, the stretch of their values to 8 bits, and limits of sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import ImageError, listed

__all__ = ["RGB_NAMES", "Image", "Limits", "Rendering", "Stretch", "Window", "stretch_of", "to_8_bit"]

Image = npt.NDArray[np.uint8]
"""[H, W, C], the C bands shown; red, green and blue unless bands are chosen."""
Stretch = tuple[tuple[float, float], ...]
"""The value of each band that becomes 0 and the value that becomes 255."""
Window = tuple[int, int, int, int]
"""Column, row, width and height in pixels."""


# Red, green, blue of Sentinel-2. Sentinel-1 has two polarisations, of which one is used twice: all three bands are in
# decibels, so that one range fits them, which would not fit the usual ratio.
RGB_NAMES = (("B04", "B03", "B02"), ("VV", "VH", "VV"))


@dataclass(frozen=True)
class Rendering:
    """Which bands of an image are taken, in which order, and how they become 8-bit.

    Attributes:
        bands: numbers of bands of a file, counted from 1, or names of bands of a patch folder. A single band becomes
            three equal ones. None is RGB: of a file the bands interpreted as red, green and blue, else the first three
            of three or more, else the only one; of a folder B04, B03, B02 (Sentinel-2) or VV, VH, VV (Sentinel-1).
        stretch: for data of other than 8 bits. `percentile:LO:HI` maps the percentiles of each band over its valid
            pixels to 0 and 255, `range:LO:HI` maps these two values.
    """

    bands: tuple[int | str, ...] | None = None
    stretch: str = "percentile:2:98"

    def __post_init__(self) -> None:
        """Raise `InputError` with all problems."""
        problems = []
        if self.bands is not None:
            numbers = all(isinstance(band, int) and not isinstance(band, bool) and band > 0 for band in self.bands)
            names = all(isinstance(band, str) and band for band in self.bands)
            if not self.bands or not (numbers or names):
                problems.append(
                    f"bands is {self.bands!r}; numbers counted from 1, such as 4,3,2, or names, such as B04,B03"
                )
        kind, low, high = self.parsed_stretch()
        if kind == "percentile" and not 0 <= low < high <= 100:
            problems.append(f"stretch is {self.stretch!r}; percentiles rise from 0 to 100, as in percentile:2:98")
        elif kind == "range" and not (math.isfinite(low) and math.isfinite(high) and low < high):
            problems.append(f"stretch is {self.stretch!r}; the limits of a range rise, as in range:0:10000")
        elif kind not in ("percentile", "range"):
            problems.append(f"stretch is {self.stretch!r}; allowed are percentile:LO:HI and range:LO:HI")
        if problems:
            raise listed(problems, "rendering")

    @property
    def channels(self) -> int:
        """Number of bands of a rendered image, C of [H, W, C]."""
        return 3 if self.bands is None or len(self.bands) == 1 else len(self.bands)

    def picture(self, image: Image) -> Image:
        """Return a rendered image as a picture for people, uint8 [H, W, 3].

        Of more than three bands it shows the known RGB bands, else the first three; of two bands the first, in grey.
        """
        if self.channels == 3:
            return image
        assert self.bands is not None, "without a choice there are three bands"
        for rgb in RGB_NAMES:
            if set(rgb) <= set(self.bands):
                return np.ascontiguousarray(image[..., [self.bands.index(name) for name in rgb]])
        return np.ascontiguousarray(image[..., [0, 1, 2] if self.channels > 3 else [0, 0, 0]])

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {"bands": None if self.bands is None else list(self.bands), "stretch": self.stretch}

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Rendering":
        """Return the rendering that `to_json` wrote; `InputError` for other keys or values."""
        known = [field.name for field in fields(cls)]
        problems = [f"unknown key {name!r}; the keys are {', '.join(known)}" for name in data if name not in known]
        bands, stretch = data.get("bands"), data.get("stretch", cls.stretch)
        if bands is not None and not isinstance(bands, list | tuple):
            problems.append(f"bands is {bands!r}; a list of numbers or names, or null, is allowed")
        if not isinstance(stretch, str):
            problems.append(f"stretch is {stretch!r}; text such as percentile:2:98 is allowed")
        if problems:
            raise listed(problems, "rendering")
        return cls(None if bands is None else tuple(bands), stretch)

    def parsed_stretch(self) -> tuple[str, float, float]:
        """Return kind, low and high of `stretch`; the kind is "" if it is invalid."""
        try:
            kind, low, high = self.stretch.split(":")
            return kind, float(low), float(high)
        except ValueError:
            return "", math.nan, math.nan


@dataclass(frozen=True)
class Limits:
    """Limits of the sizes of an image.

    Attributes:
        max_bytes: maximum size of the encoded file.
        max_pixels: maximum of width times height.
        max_decoded_bytes: maximum size of the values that are decoded at once: of an image, or of a block of a scene.
        min_side: minimum of the shorter side, pixels.
    """

    max_bytes: int = 64 * 2**20
    max_pixels: int = 50_000_000
    max_decoded_bytes: int = 2**30
    min_side: int = 16

    def check_bytes(self, num_bytes: int) -> None:
        """Raise `ImageError` for an encoded image of too many bytes."""
        if num_bytes > self.max_bytes:
            raise ImageError(
                f"more than {self.max_bytes:,} bytes, the maximum for an image; cut a larger scene into tiles"
            )

    def check_size(self, width: int, height: int) -> None:
        """Raise `ImageError` for an image of too few or too many pixels."""
        if min(width, height) < self.min_side:
            raise ImageError(f"{width} x {height} pixels; at least {self.min_side} x {self.min_side} are required")
        if width * height > self.max_pixels:
            raise ImageError(
                f"{width} x {height} pixels; at most {self.max_pixels:,} in all: cut larger scenes into tiles"
            )


def stretch_of(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], rendering: Rendering) -> Stretch:
    """Return the stretch of values [B, H, W] by `rendering`, from the valid ones (bool [B, H, W]).

    Raises:
        ImageError: no value is valid.
    """
    if not valid.any():
        raise ImageError("no valid data")
    kind, low, high = rendering.parsed_stretch()
    if kind == "range":
        return ((low, high),) * len(values)
    # A band without valid data is black with any stretch.
    return tuple(
        _percentiles(band[mask], low, high) if mask.any() else (0.0, 1.0)
        for band, mask in zip(values, valid, strict=True)
    )


def _stretched(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], stretch: Stretch) -> Image:
    """Values [B, H, W] as uint8: linear from 0 to 255 within the stretch, clipped beyond it, 0 where invalid.

    A stretch of no extent, as of a constant image, gives zeros.
    """
    shown = np.zeros(values.shape, np.uint8)
    for band, mask, (low, high), out in zip(values, valid, stretch, shown, strict=True):
        # Halved, because the extent of float64 data can exceed the largest float64.
        extent = high / 2 - low / 2
        if extent > 0:
            numbers = band[mask].astype(_working_type(values.dtype))
            np.clip(numbers, low, high, out=numbers)
            out[mask] = np.rint((numbers / 2 - low / 2) / extent * 255).astype(np.uint8)
    return shown


def to_8_bit(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], rendering: Rendering, stretch: Stretch | None = None
) -> Image:
    """Return values [B, H, W] as uint8 [B, H, W]: 8-bit values as they are, others stretched; 0 where not valid.

    Args:
        values: the bands.
        valid: bool [B, H, W].
        rendering: how to stretch them if `stretch` is None.
        stretch: the stretch of a whole scene.
    """
    if values.dtype == np.uint8:
        return np.where(valid, values, np.uint8(0))
    return _stretched(values, valid, stretch or stretch_of(values, valid, rendering))


def _percentiles(values: npt.NDArray[Any], low: float, high: float) -> tuple[float, float]:
    # As floats, because numpy interpolates in the type of the data, in which int16 can overflow.
    bounds = np.percentile(values.astype(_working_type(values.dtype)), [low, high])
    return float(bounds[0]), float(bounds[1])


def _working_type(dtype: np.dtype[Any]) -> type[np.floating[Any]]:
    """The type to compute in: float32 represents every 16-bit number exactly, in half the memory of float64."""
    return np.float32 if dtype.kind in "iu" and dtype.itemsize <= 2 else np.float64
