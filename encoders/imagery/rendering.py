"""Rendering: the bands of an image that are taken, as an 8-bit picture or as numbers, and limits of sizes."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import ImageError, listed
from orbithash.encoders.imagery.bands import normalised_name

__all__ = [
    "RGB_NAMES",
    "VALUES",
    "Image",
    "Limits",
    "Pixels",
    "Rendering",
    "Stretch",
    "Values",
    "Window",
    "stretch_of",
    "to_8_bit",
]

Pixels = npt.NDArray[np.uint8 | np.float32]
Image = npt.NDArray[np.uint8 | np.float32]
"""[H, W, C], the C bands taken; red, green and blue unless bands are chosen. uint8 of a picture, where missing pixels
are 0; float32 of numbers, where they are NaN."""
Stretch = tuple[tuple[float, float], ...]
"""The value of each band that becomes 0 and the value that becomes 255."""
Window = tuple[int, int, int, int]
"""Column, row, width and height in pixels."""


# Red, green, blue of Sentinel-2. Sentinel-1 has two polarisations, of which one is used twice: all three bands are in
# decibels, so that one range fits them, which would not fit the usual ratio.
RGB_NAMES = (("B04", "B03", "B02"), ("VV", "VH", "VV"))

Values = Literal["picture", "raw", "reflectance", "decibel", "power"]
VALUES: tuple[str, ...] = get_args(Values)


@dataclass(frozen=True)
class Rendering:
    """Which bands of an image are taken, in which order, and what their values become.

    Attributes:
        bands: numbers of bands of a file, counted from 1, or names: of the bands of a patch folder, of the bands that a
            file describes, or of those that STAC names. A single band becomes three equal ones. None is RGB: of a file
            the bands interpreted as red, green and blue, else the first three of three or more, else the only one; of
            a folder B04, B03, B02 (Sentinel-2) or VV, VH, VV (Sentinel-1).
        stretch: of pictures, for data of other than 8 bits; with numbers, of the pictures that people see.
            `percentile:LO:HI` maps the percentiles of each band over its valid pixels to 0 and 255, `range:LO:HI` maps
            these two values.
        values: `picture`: 8-bit, by the stretch. The others are numbers, float32, NaN where a pixel is missing:
            `raw`: as stored; `reflectance`: by the scale and the offset that metadata state, else integers are ten
            thousandths; `decibel`: radar backscatter that is stored in decibels; `power`: linear power, which becomes
            decibels.
        band_scale: of numbers, for each band or for all: value = number * scale + offset. Empty: of the metadata, else
            1 (1e-4 for integers of reflectance); `raw` ignores metadata.
        band_offset: likewise, in the unit of the values. Empty: of the metadata, else 0; if `band_scale` is given, 0.
    """

    bands: tuple[int | str, ...] | None = None
    stretch: str = "percentile:2:98"
    values: str = "picture"
    band_scale: tuple[float, ...] = ()
    band_offset: tuple[float, ...] = ()

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
        problems += self._problems_of_numbers()
        if problems:
            raise listed(problems, "rendering")

    def _problems_of_numbers(self) -> list[str]:
        if self.values not in VALUES:
            return [f"values is {self.values!r}; allowed are {', '.join(VALUES)}"]
        if self.is_picture:
            given = " and ".join(name for name in ("band_scale", "band_offset") if getattr(self, name))
            return [f"{given} given, and values is picture; set values to {', '.join(VALUES[1:])}"] if given else []
        problems = []
        for name, numbers in (("band_scale", self.band_scale), ("band_offset", self.band_offset)):
            if len(numbers) > 1 and len(numbers) != self.num_bands:
                problems.append(
                    f"{name} has {len(numbers)} numbers; 1 or {self.num_bands}, one for each band, are allowed"
                )
            if not all(map(math.isfinite, numbers)) or (name == "band_scale" and 0 in numbers):
                what = "finite numbers other than 0" if name == "band_scale" else "finite numbers"
                problems.append(f"{name} is {list(numbers)}; {what} are allowed")
        return problems

    @property
    def is_picture(self) -> bool:
        """Whether an image becomes an 8-bit picture; else it becomes numbers."""
        return self.values == "picture"

    @property
    def dtype(self) -> str:
        """The type of a rendered image: uint8 of a picture, float32 of numbers."""
        return "uint8" if self.is_picture else "float32"

    @property
    def num_bands(self) -> int:
        """Number of bands that are read; at most, if none are chosen."""
        return 3 if self.bands is None else len(self.bands)

    @property
    def channels(self) -> int:
        """Number of bands of a rendered image, C of [H, W, C]."""
        return 3 if self.bands is None or len(self.bands) == 1 else len(self.bands)

    def of_band(self, channel: int) -> "Rendering":
        """Return the rendering of one of several bands, counted from 0, with its own scale and offset."""
        scale, offset = (
            (numbers[channel],) if len(numbers) > 1 else numbers for numbers in (self.band_scale, self.band_offset)
        )
        return Rendering(None, self.stretch, self.values, scale, offset)

    def picture(self, image: Image) -> npt.NDArray[np.uint8]:
        """Return a rendered image as a picture for people, uint8 [H, W, 3].

        Of more than three bands it shows the known RGB bands, else the first three; of two bands the first, in grey.
        Numbers are stretched by `stretch`; missing pixels are black.
        """
        shown = np.moveaxis(image[..., self._shown_channels()], -1, 0)
        valid = np.isfinite(shown)
        stretch = None if valid.any() else ((0.0, 1.0),) * 3
        return np.ascontiguousarray(np.moveaxis(to_8_bit(shown, valid, self, stretch), 0, -1))

    def _shown_channels(self) -> list[int]:
        if self.channels == 3:
            return [0, 1, 2]
        assert self.bands is not None, "without a choice there are three bands"
        names = [normalised_name(str(band)) for band in self.bands]
        for rgb in (*RGB_NAMES, ("red", "green", "blue")):
            colours = [normalised_name(name) for name in rgb]
            if set(colours) <= set(names):
                return [names.index(colour) for colour in colours]
        return [0, 1, 2] if self.channels > 3 else [0, 0, 0]

    def to_json(self) -> dict[str, Any]:
        """Return the fields as plain JSON values."""
        return {
            "bands": None if self.bands is None else list(self.bands),
            "stretch": self.stretch,
            "values": self.values,
            "band_scale": list(self.band_scale),
            "band_offset": list(self.band_offset),
        }

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
        values, scaling = data.get("values", cls.values), [data.get(name, ()) for name in ("band_scale", "band_offset")]
        if not isinstance(values, str):
            problems.append(f"values is {values!r}; allowed are {', '.join(VALUES)}")
        if not all(isinstance(numbers, list | tuple) for numbers in scaling):
            problems.append(f"band_scale and band_offset are {scaling}; lists of numbers are allowed")
        if problems:
            raise listed(problems, "rendering")
        scale, offset = (tuple(map(float, numbers)) for numbers in scaling)
        return cls(None if bands is None else tuple(bands), stretch, values, scale, offset)

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


def _stretched(values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], stretch: Stretch) -> npt.NDArray[np.uint8]:
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
) -> npt.NDArray[np.uint8]:
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
