"""Bands as numbers: float32 values in physical units, NaN where a pixel is missing."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.rendering import Rendering

__all__ = ["Numbers", "check_numbers", "to_numbers"]

Numbers = npt.NDArray[np.float32]

# Sentinel-2 and many others store reflectance as integers of ten thousandths.
_REFLECTANCE_SCALE = 1e-4


def to_numbers(
    values: npt.NDArray[Any], valid: npt.NDArray[np.bool_], rendering: Rendering, bands: Sequence[BandInfo]
) -> Numbers:
    """Return values [B, H, W] in physical units as float32 [B, H, W]; NaN where not valid, infinite or undefined.

    Args:
        values: numbers as they are stored.
        valid: bool [B, H, W].
        rendering: the kind of values, with scale and offset where the user states them.
        bands: what metadata state about each of the B bands.

    Raises:
        ImageError: a scale that is missing or cannot be applied, or decibels where linear power is expected.
    """
    numbers = np.empty(values.shape, np.float32)
    for band, (stored, mask, info, out) in enumerate(zip(values, valid, bands, numbers, strict=True)):
        scale, offset = _scaling(band, len(values), stored.dtype, rendering, info)
        # float64 holds every number of 32 bits; band by band, because it takes twice the memory of the result.
        physical = stored.astype(np.float64)
        with np.errstate(all="ignore"):
            physical *= scale
            physical += offset
            if rendering.values == "power":
                if np.count_nonzero(physical[mask] < 0) * 2 > np.count_nonzero(mask):
                    raise ImageError("most values are below 0, which linear power never is; set values=decibel")
                physical = 10 * np.log10(physical)
            out[...] = physical
        out[~(mask & np.isfinite(out))] = np.nan
    return numbers


def check_numbers(numbers: Numbers, rendering: Rendering) -> None:
    """Raise `ImageError` if no value is there, or if none of decibels is below 0."""
    there = np.isfinite(numbers)
    if not there.any():
        raise ImageError("no valid data")
    if rendering.values == "decibel":
        low, high = np.nanmin(numbers), np.nanmax(numbers)
        if low >= 0 and high > 0:
            raise ImageError(
                f"values from {low:g} to {high:g} are not decibels of a radar image, some of which are below 0; set "
                "values=power for linear power"
            )


def _scaling(
    band: int, num_bands: int, dtype: np.dtype[Any], rendering: Rendering, info: BandInfo
) -> tuple[float, float]:
    """Scale and offset of a band: those of the settings, else of the metadata, else of the kind of values."""
    scale = _of_band("band_scale", rendering.band_scale, band, num_bands)
    offset = _of_band("band_offset", rendering.band_offset, band, num_bands)
    if scale is not None:
        return scale, offset or 0.0
    stated = BandInfo() if rendering.values == "raw" else info
    if stated.scale is None and stated.offset is None:
        return _default_scale(dtype, rendering), offset or 0.0
    stated.check()
    scale = stated.scale if stated.scale is not None else _default_scale(dtype, rendering)
    return scale, offset if offset is not None else stated.offset or 0.0


def _of_band(name: str, settings: tuple[float, ...], band: int, num_bands: int) -> float | None:
    if len(settings) > 1 and len(settings) != num_bands:
        raise ImageError(f"{len(settings)} numbers for {name}, and the image has {num_bands} bands")
    if not settings:
        return None
    return settings[band] if len(settings) > 1 else settings[0]


def _default_scale(dtype: np.dtype[Any], rendering: Rendering) -> float:
    if rendering.values != "reflectance" or dtype.kind == "f":
        return 1.0
    if dtype.itemsize == 1:
        raise ImageError(f"{dtype} without a scale is no reflectance; set band_scale, or values=picture or values=raw")
    return _REFLECTANCE_SCALE
