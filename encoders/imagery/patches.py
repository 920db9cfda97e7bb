"""Patch folders: one TIFF per band, as in BigEarthNet; file names end in the band, such as `..._B04.tif`.

Bands may differ in resolution: coarser bands are resampled to the finest of the bands that are read (bilinear).
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo, find_bands, named, normalised_name
from orbithash.encoders.imagery.numbers import check_numbers, to_numbers
from orbithash.encoders.imagery.rasters import (
    as_image,
    band_infos,
    check_layout,
    image_format,
    open_raster,
    read_band,
    read_bytes,
)
from orbithash.encoders.imagery.rendering import RGB_NAMES, Image, Limits, Rendering, to_8_bit
from orbithash.encoders.imagery.resampling import resize_band
from orbithash.encoders.imagery.sentinel2 import stated_scaling

__all__ = ["band_files", "read_patch"]

_SUFFIXES = (".tif", ".tiff")
# Bounds that differ by less than this part of the finest pixel are equal.
_TOLERANCE = 0.01


class _Layout(NamedTuple):
    """Size of one band in pixels, and its place: coordinate system and bounds, or None without a georeference."""

    height: int
    width: int
    place: tuple[Any, tuple[float, ...]] | None


def band_files(folder: Path) -> dict[str, Path]:
    """Return the file of each band; `ImageError` if the folder has no bands, or one band twice."""
    files: dict[str, Path] = {}
    try:
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise ImageError(f"the folder cannot be read: {error.strerror}") from error
    for path in paths:
        _, underscore, name = path.stem.rpartition("_")
        if path.name.startswith(".") or path.suffix.lower() not in _SUFFIXES or not (underscore and name):
            continue
        if name in files:
            raise ImageError(f"band {name} occurs twice: {files[name].name} and {path.name}")
        files[name] = path
    if not files:
        raise ImageError("a folder without bands; bands are TIFFs whose names end in the band, such as ..._B04.tif")
    return files


def read_patch(folder: Path, rendering: Rendering, limits: Limits) -> Image:
    """Return a patch folder as an image [H, W, C], with its bands in the order of `rendering`; see `read_image`.

    Only the files of the requested bands are opened. All of them are checked against `limits` before any pixel is
    decoded.

    Raises:
        ImageError: as `read_image`, and for bands of different places.
    """
    files = band_files(folder)
    bands = _chosen(folder, files, rendering)
    contents: dict[str, bytes] = {}
    layouts: dict[str, _Layout] = {}
    for name in dict.fromkeys(bands):
        with _naming(name):
            contents[name] = read_bytes(files[name], limits)
            limits.check_bytes(sum(map(len, contents.values())))
            layouts[name] = _layout(contents[name], limits)
    finest = max(layouts, key=lambda name: layouts[name].height * layouts[name].width)
    height, width, _ = layouts[finest]
    limits.check_size(width, height)
    # Values of at most 8 bytes each, and one byte each for their mask.
    decoded = height * width * len(bands) * 9
    if decoded > limits.max_decoded_bytes:
        raise ImageError(
            f"{len(bands)} bands of {width} x {height} pixels decode to {decoded:,} bytes; at most "
            f"{limits.max_decoded_bytes:,}: take fewer bands"
        )
    for name, layout in layouts.items():
        with _naming(name):
            _check_same_place(layout, layouts[finest], finest)
    if not rendering.is_picture:
        return _read_numbers(folder, bands, contents, (width, height), rendering)
    read = {}
    for name, data in contents.items():
        with _naming(name), open_raster(data) as dataset:
            read[name] = read_band(dataset, height, width)
    values, valid = (np.stack([read[name][part] for name in bands]) for part in (0, 1))
    if not valid.any():
        raise ImageError("no valid data")
    return as_image(np.moveaxis(to_8_bit(values, valid, rendering), 0, -1))


def _read_numbers(
    folder: Path, bands: Sequence[str], contents: dict[str, bytes], size: tuple[int, int], rendering: Rendering
) -> Image:
    """The bands as float32 [H, W, C] of a size (width, height), from the contents of their files."""
    numbers = np.empty((len(bands), size[1], size[0]), np.float32)
    stated = stated_scaling(folder) if rendering.values == "reflectance" else {}
    for channel, name in enumerate(bands):
        with _naming(name), open_raster(contents[name]) as dataset:
            values, valid = read_band(dataset)
            info = band_infos(dataset)[0].completed(stated.get(normalised_name(name), BandInfo()))
            band = to_numbers(values[None], valid[None], rendering.of_band(channel), [info])[0]
            numbers[channel] = band if band.shape == numbers.shape[1:] else resize_band(band, size)
    check_numbers(numbers, rendering)
    return as_image(np.moveaxis(numbers, 0, -1))


def _chosen(folder: Path, files: dict[str, Path], rendering: Rendering) -> Sequence[str]:
    """The names of the bands to read."""
    names = list(files)
    if rendering.bands is None:
        for rgb in RGB_NAMES:
            if set(rgb) <= files.keys():
                return rgb
        raise ImageError(f"no known RGB among the bands {named(names)}; state the bands to show by name")
    if isinstance(rendering.bands[0], int):
        raise ImageError(f"the bands of a folder have names, not numbers: {named(names)}")
    positions = find_bands(rendering.bands, [BandInfo((name,)) for name in names], files[names[0]].name)
    return [names[position] for position in positions]


def _layout(data: bytes, limits: Limits) -> _Layout:
    if image_format(data) != "TIFF":
        raise ImageError("not a TIFF")
    with open_raster(data) as dataset:
        if dataset.count != 1:
            raise ImageError(f"its file has {dataset.count} bands; one is required")
        check_layout(dataset, dataset.width * dataset.height, limits)
        placed = dataset.crs is not None and not dataset.transform.is_identity
        return _Layout(dataset.height, dataset.width, (dataset.crs, tuple(dataset.bounds)) if placed else None)


def _check_same_place(layout: _Layout, finest: _Layout, name: str) -> None:
    """Raise `ImageError` if a pixel of the band is not a whole block of the finest band's pixels, at the same place."""
    factor = finest.width // layout.width
    if (layout.width * factor, layout.height * factor) != (finest.width, finest.height):
        raise ImageError(
            f"{layout.width} x {layout.height} pixels do not divide the {finest.width} x {finest.height} of band "
            f"{name} by one whole number"
        )
    if layout.place is None or finest.place is None:
        return
    (system, bounds), (finest_system, finest_bounds) = layout.place, finest.place
    pixel = abs(finest_bounds[2] - finest_bounds[0]) / finest.width
    if system != finest_system or not np.allclose(bounds, finest_bounds, rtol=0, atol=_TOLERANCE * pixel):
        raise ImageError(f"its place differs from that of band {name}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Name the band in errors about it."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"band {name}: {error}") from error
