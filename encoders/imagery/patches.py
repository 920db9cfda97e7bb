"""Patches of one TIFF a band, as BigEarthNet has them: a folder whose files' names end in the band, `..._B04.tif`.

The bands may have several resolutions: the coarser ones are resampled to the finest of those that are taken.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.rasters import as_image, check_layout, image_format, open_tiff, read_band, read_bytes
from orbithash.encoders.imagery.rendering import RGB_NAMES, Image, Limits, Rendering, to_8_bit

__all__ = ["band_files", "read_patch"]

_SUFFIXES = (".tif", ".tiff")
# Places that differ by less than this share of the finest pixel are the same.
_TOLERANCE = 0.01


class _Layout(NamedTuple):
    """Of one band: `place` is its coordinate system and bounds, None without a georeference."""

    height: int
    width: int
    place: tuple[Any, tuple[float, ...]] | None


def band_files(folder: Path) -> dict[str, Path]:
    """Band to file; `ImageError` where the folder has none, or one twice."""
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
            raise ImageError(f"band {name} is there twice, in {files[name].name} and {path.name}")
        files[name] = path
    if not files:
        raise ImageError("a folder without bands, which are TIFFs whose names end in the band, such as ..._B04.tif")
    return files


def read_patch(folder: Path, rendering: Rendering, limits: Limits) -> Image:
    """A folder of one TIFF a band as uint8 [H, W, C], its bands in the order of `rendering`; see `read_image`.

    Only the files of the bands asked for are opened, and no pixel is decoded before all of them are within `limits`.
    """
    files = band_files(folder)
    bands = _chosen(files, rendering)
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
    # Values of at most 8 bytes, and which of them are data.
    decoded = height * width * len(bands) * 9
    if decoded > limits.max_decoded_bytes:
        raise ImageError(
            f"{len(bands)} bands of {width} x {height} pixels decode to {decoded:,} bytes; at most "
            f"{limits.max_decoded_bytes:,}: take fewer bands"
        )
    for name, layout in layouts.items():
        with _naming(name):
            _check_same_place(layout, layouts[finest], finest)
    read = {}
    for name, data in contents.items():
        with _naming(name), open_tiff(data) as dataset:
            read[name] = read_band(dataset, height, width)
    values, valid = (np.stack([read[name][part] for name in bands]) for part in (0, 1))
    if not valid.any():
        raise ImageError("no valid data")
    return as_image(np.moveaxis(to_8_bit(values, valid, rendering), 0, -1))


def _chosen(files: dict[str, Path], rendering: Rendering) -> Sequence[str]:
    there = ", ".join(files)
    if rendering.bands is None:
        for rgb in RGB_NAMES:
            if set(rgb) <= files.keys():
                return rgb
        raise ImageError(f"bands {there} have no RGB that is known; state those to show by name")
    bands = [band for band in rendering.bands if isinstance(band, str)]
    if len(bands) < len(rendering.bands):
        raise ImageError(f"bands of a folder have names, not numbers: {there}")
    absent = [name for name in bands if name not in files]
    if absent:
        raise ImageError(f"no band {', '.join(dict.fromkeys(absent))}; there are {there}")
    return bands


def _layout(data: bytes, limits: Limits) -> _Layout:
    if image_format(data) != "TIFF":
        raise ImageError("not a TIFF")
    with open_tiff(data) as dataset:
        if dataset.count != 1:
            raise ImageError(f"its file holds {dataset.count} bands; one is needed")
        check_layout(dataset, dataset.width * dataset.height, limits)
        placed = dataset.crs is not None and not dataset.transform.is_identity
        return _Layout(dataset.height, dataset.width, (dataset.crs, tuple(dataset.bounds)) if placed else None)


def _check_same_place(layout: _Layout, finest: _Layout, name: str) -> None:
    """Refuses a band whose pixels are not whole blocks of the finest band's, or that lies elsewhere."""
    factor = finest.width // layout.width
    if (layout.width * factor, layout.height * factor) != (finest.width, finest.height):
        raise ImageError(
            f"{layout.width} x {layout.height} pixels, and band {name} has {finest.width} x {finest.height}: not the "
            "same whole number of times as many in both directions"
        )
    if layout.place is None or finest.place is None:
        return
    (system, bounds), (finest_system, finest_bounds) = layout.place, finest.place
    pixel = abs(finest_bounds[2] - finest_bounds[0]) / finest.width
    if system != finest_system or not np.allclose(bounds, finest_bounds, rtol=0, atol=_TOLERANCE * pixel):
        raise ImageError(f"it shows another place than band {name}")


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Errors about one band say which."""
    try:
        yield
    except ImageError as error:
        raise ImageError(f"band {name}: {error}") from error
