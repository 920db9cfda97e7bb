"""(Geo)TIFF, JPEG 2000 and 16-bit PNG through GDAL: opened without their sidecar files, read by window."""

import math
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo, find_bands
from orbithash.encoders.imagery.mosaic_files import mosaic_xml
from orbithash.encoders.imagery.mosaics import is_mosaic
from orbithash.encoders.imagery.numbers import check_numbers, to_numbers
from orbithash.encoders.imagery.rendering import Image, Limits, Rendering, Stretch, Window, stretch_of, to_8_bit

__all__ = [
    "SCENE_FORMATS",
    "as_image",
    "band_infos",
    "check_blocks",
    "check_layout",
    "check_numbers_size",
    "gdal_errors",
    "image_format",
    "image_formats",
    "is_folder",
    "one_of",
    "open_raster",
    "opened",
    "read_band",
    "read_bytes",
    "read_window",
    "reads_jpeg_2000",
    "stretch_limits",
]

_LIMITS = Limits()
_MAX_BANDS = 1024
_MAGIC = {
    b"\xff\xd8\xff": "JPEG",
    b"\x89PNG\r\n\x1a\n": "PNG",
    b"II*\0": "TIFF",
    b"MM\0*": "TIFF",
    b"II+\0": "TIFF",
    b"MM\0+": "TIFF",
    # A JP2 file begins with its signature box, a raw code stream with the markers SOC and SIZ.
    b"\0\0\0\x0cjP  \r\n\x87\n": "JPEG 2000",
    b"\xff\x4f\xff\x51": "JPEG 2000",
}
_DRIVERS = {"TIFF": "GTiff", "JPEG 2000": "JP2OpenJPEG", "PNG": "PNG", "VRT": "VRT"}
# Formats that can hold a georeference and are read by window.
SCENE_FORMATS = ("TIFF", "JPEG 2000")
# OpenJPEG decodes every value to 32 bits.
_OPENJPEG_BYTES = 4
# Maximum number of pixels from which the stretch of a scene is computed.
_STRETCH_PIXELS = 2**20
# GDAL reads neither sidecar files (.aux.xml, .tfw, .ovr, .msk) nor the listing of the folder.
_GDAL = {"GDAL_DISABLE_READDIR_ON_OPEN": "EMPTY_DIR"}


def stretch_limits(
    path: Path, rendering: Rendering, limits: Limits = _LIMITS, stated: Sequence[BandInfo] = ()
) -> Stretch | None:
    """Return the stretch of a whole scene, which its tiles share; None for 8-bit data and for numbers, without stretch.

    It is computed from at most about a million pixels, on a regular grid that depends on the size of the scene only.

    Raises:
        ImageError: not a readable TIFF or JPEG 2000 file, or one without valid data.
    """
    if not rendering.is_picture:
        return None
    with open_raster(path) as dataset:
        check_blocks(dataset, limits)
        bands = _chosen_bands(dataset, rendering, stated)
        if dataset.dtypes[0] == "uint8":
            return None
        step = max(1.0, math.sqrt(dataset.width * dataset.height / _STRETCH_PIXELS))
        shape = (len(bands), math.ceil(dataset.height / step), math.ceil(dataset.width / step))
        if is_mosaic(path):
            return stretch_of(*_sampled(dataset, bands, *shape[1:]), rendering)
        values = dataset.read(bands, out_shape=shape)
        return stretch_of(values, _valid(dataset, bands, values, out_shape=shape), rendering)


def _sampled(dataset: Any, bands: list[int], height: int, width: int) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the values [B, height, width] of a mosaic at a regular grid of pixels, and which are data.

    The pixels are those that GDAL takes of a single file. Of a VRT it takes others near the borders of its files, and
    not always the same ones.
    """
    from rasterio.windows import Window as RasterWindow

    rows, columns = (
        ((np.arange(number) + 0.5) * (size / number) + 1e-10).astype(np.int64)
        for number, size in ((height, dataset.height), (width, dataset.width))
    )
    values = np.empty((len(bands), height, width), dataset.dtypes[0])
    valid = np.empty(values.shape, np.bool_)
    for i, row in enumerate(rows.tolist()):
        part = {"window": RasterWindow(0, row, dataset.width, 1)}
        line = dataset.read(bands, **part)
        values[:, i], valid[:, i] = line[:, 0, columns], _valid(dataset, bands, line, **part)[:, 0, columns]
    return values, valid


def read_window(
    dataset: Any,
    window: Window | None,
    rendering: Rendering,
    stretch: Stretch | None,
    stated: Sequence[BandInfo] = (),
) -> Image:
    """Return a window of an open raster, or all of it, as an image [height, width, C].

    Masked pixels of a picture are black, of numbers NaN. Without `stretch` a picture gets its own. `stated` is what
    metadata outside the file state about its bands.
    """
    from rasterio.enums import ColorInterp
    from rasterio.windows import Window as RasterWindow

    bands = _chosen_bands(dataset, rendering, stated)
    part = {} if window is None else {"window": RasterWindow(*window)}
    values = dataset.read(bands, **part)
    valid = _valid(dataset, bands, values, **part)
    if not rendering.is_picture:
        infos = band_infos(dataset, stated)
        numbers = to_numbers(values, valid, rendering, [infos[band - 1] for band in bands])
        check_numbers(numbers, rendering)
        return as_image(np.moveaxis(numbers, 0, -1))
    if not valid.any():
        raise ImageError("no valid data")
    if dataset.colorinterp[0] == ColorInterp.palette and bands == [1]:
        colours = np.zeros((np.iinfo(values.dtype).max + 1, 3), np.uint8)
        for index, colour in dataset.colormap(1).items():
            colours[index] = colour[:3]
        return as_image(np.where(valid[0, ..., None], colours[values[0]], 0))
    return as_image(np.moveaxis(to_8_bit(values, valid, rendering, stretch), 0, -1))


def band_infos(dataset: Any, stated: Sequence[BandInfo] = ()) -> list[BandInfo]:
    """Return what is known about each band of an open raster: its description and GDAL's scale and offset.

    Where the file states nothing, `stated` counts, if it has as many bands.
    """
    infos = []
    for description, scale, offset in zip(dataset.descriptions, dataset.scales, dataset.offsets, strict=True):
        # GDAL returns 1 and 0 where the file states nothing.
        scaling = (None, None) if (scale, offset) == (1.0, 0.0) else (scale, offset)
        infos.append(BandInfo((description,) if description else (), *scaling))
    if len(stated) != len(infos):
        return infos
    return [info.completed(other) for info, other in zip(infos, stated, strict=True)]


def read_band(
    dataset: Any, height: int | None = None, width: int | None = None
) -> tuple[npt.NDArray[Any], npt.NDArray[np.bool_]]:
    """Return the first band: its values, and bool: which are data.

    With a size it is resampled to [height, width], values bilinear and validity by the nearest pixel.
    """
    from rasterio.enums import Resampling

    shape = (1, height or dataset.height, width or dataset.width)
    values = dataset.read([1], out_shape=shape, resampling=Resampling.bilinear)
    return values[0], _valid(dataset, [1], values, out_shape=shape)[0]


def as_image(pixels: Image) -> Image:
    """Return bands [H, W, C] as a contiguous image; a single band becomes three equal ones."""
    channels = 3 if pixels.shape[2] == 1 else pixels.shape[2]
    return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], channels)))


@contextmanager
def open_raster(source: bytes | Path) -> Iterator[Any]:
    """Open one TIFF or JPEG 2000 file (from bytes also a 16-bit PNG), without sidecar files, as a rasterio dataset.

    The path may also be that of a mosaic of such files (`mosaics`).

    rasterio warns of files without georeference (`NotGeoreferencedWarning`); applications may hide that.

    Raises:
        ImageError: not such a file, or damaged; also if reading fails inside the `with` block.
    """
    import rasterio

    if isinstance(source, Path) and is_mosaic(source):
        kind, source = "VRT", mosaic_xml(source, open_raster)
    else:
        kind = image_format(source)
    if isinstance(source, Path) and kind not in SCENE_FORMATS:
        formats = one_of([name for name in image_formats() if name in SCENE_FORMATS])
        raise ImageError(f"not a {formats} but a {kind}, which is not read by window")
    options = {"driver": _DRIVERS[kind], "sharing": False}
    try:
        with ExitStack() as stack:
            stack.enter_context(rasterio.Env(**_GDAL))
            if isinstance(source, Path):
                dataset = rasterio.open(source.resolve(), **options)
            else:
                dataset = stack.enter_context(rasterio.MemoryFile(source, filename="image")).open(**options)
            yield stack.enter_context(dataset)
    except gdal_errors() as error:
        # GDAL's own message is in the cause; rasterio's last error only points to it.
        words = re.sub(r"/vsimem/[^/]+/", "", str(error.__cause__ or error))
        raise ImageError(f"damaged or truncated: {words.splitlines()[0]}") from error


def gdal_errors() -> tuple[type[Exception], ...]:
    """Return the types that rasterio raises if GDAL fails: its own errors, and GDAL's, which have no public name."""
    from rasterio._err import CPLE_BaseError
    from rasterio.errors import RasterioError

    return RasterioError, CPLE_BaseError, OSError


def check_blocks(dataset: Any, limits: Limits) -> None:
    """Raise `ImageError` if a block of a scene, the smallest unit to decode, is beyond `limits`."""
    height, width = dataset.block_shapes[0]
    check_layout(dataset, width * height, limits)


def check_layout(dataset: Any, pixels: int, limits: Limits) -> None:
    """Raise `ImageError` for data that cannot be rendered, or if decoding `pixels` pixels is beyond `limits`."""
    from rasterio.enums import ColorInterp, PhotometricInterp

    dtype = dataset.dtypes[0]
    if dataset.count > _MAX_BANDS:
        raise ImageError(f"{dataset.count} bands; at most {_MAX_BANDS}")
    if np.dtype(dtype).kind not in "iuf":
        raise ImageError(f"values of type {dtype}; integers and floating-point numbers are allowed")
    if dataset.photometric == PhotometricInterp.cmyk:
        raise ImageError("CMYK colours; convert it to RGB")
    num_bits = int(dataset.tags(1, ns="IMAGE_STRUCTURE").get("NBITS", 8))
    if num_bits < 8 and dataset.colorinterp[0] != ColorInterp.palette:
        raise ImageError(f"{num_bits} bits per value; convert it to 8 or 16")
    # GDAL decodes all bands of a block together if they are interleaved by pixel.
    value_bytes = np.dtype(dtype).itemsize
    if dataset.driver == _DRIVERS["JPEG 2000"]:
        value_bytes = max(value_bytes, _OPENJPEG_BYTES)
    decoded = pixels * dataset.count * value_bytes
    if decoded > limits.max_decoded_bytes:
        raise ImageError(
            f"{dataset.count} bands of {dtype} decode to {decoded:,} bytes at once; at most "
            f"{limits.max_decoded_bytes:,} are allowed: cut it into tiles, or rewrite it with internal tiles"
        )


def check_numbers_size(pixels: int, num_bands: int, value_bytes: int, limits: Limits) -> None:
    """Raise `ImageError` if numbers are beyond `limits`: as stored, with their mask, and as float32."""
    decoded = pixels * num_bands * (value_bytes + 1 + 4)
    if decoded > limits.max_decoded_bytes:
        raise ImageError(
            f"{num_bands} bands of {pixels:,} pixels decode to {decoded:,} bytes as numbers; at most "
            f"{limits.max_decoded_bytes:,} are allowed: take fewer bands, or cut it into tiles"
        )


def read_bytes(path: Path, limits: Limits) -> bytes:
    """Return the content of a file; `ImageError` if it is not a file or too long."""
    with opened(path) as file:
        data = file.read(limits.max_bytes + 1)
    limits.check_bytes(len(data))
    return data


@cache
def reads_jpeg_2000() -> bool:
    """Return whether the installed GDAL has a driver for JPEG 2000."""
    import rasterio

    with rasterio.Env() as environment:
        return _DRIVERS["JPEG 2000"] in environment.drivers()


def image_formats() -> tuple[str, ...]:
    """Return the formats that are read here: JPEG, PNG, TIFF and, if GDAL has a driver for it, JPEG 2000."""
    return ("JPEG", "PNG", "TIFF", *(["JPEG 2000"] if reads_jpeg_2000() else []))


def one_of(names: Sequence[str]) -> str:
    """Return names as text: `JPEG, PNG or TIFF`."""
    return " or ".join(filter(None, (", ".join(names[:-1]), names[-1])))


def image_format(source: bytes | Path, formats: Sequence[str] | None = None) -> str:
    """Return the format, one of `formats` (default: `image_formats`), by the first bytes; `ImageError` for others."""
    if isinstance(source, bytes):
        start = source[:12]
    else:
        with opened(source) as file:
            start = file.read(12)
    if not start:
        raise ImageError("the file is empty")
    allowed = image_formats() if formats is None else formats
    for magic, kind in _MAGIC.items():
        if start.startswith(magic) and kind in allowed:
            return kind
    raise ImageError(f"not a {one_of(allowed)}: begins with {start!r}")


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder; False for names that no file system allows."""
    try:
        return path.is_dir()
    except OSError:
        return False


@contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """Open a file for reading; `ImageError` if it is not a file or not readable."""
    try:
        if not path.is_file():
            raise ImageError("it is a folder or a device, not a file" if path.exists() else "there is no such file")
        with path.open("rb") as file:
            yield file
    except OSError as error:
        raise ImageError(f"the file cannot be read: {error.strerror}") from error


def _chosen_bands(dataset: Any, rendering: Rendering, stated: Sequence[BandInfo]) -> list[int]:
    """Numbers of the bands to take: the chosen ones, else red, green and blue, else the first three or the only one."""
    from rasterio.enums import ColorInterp

    if rendering.bands is not None:
        return [position + 1 for position in find_bands(rendering.bands, band_infos(dataset, stated))]
    meanings = dataset.colorinterp
    rgb = (ColorInterp.red, ColorInterp.green, ColorInterp.blue)
    if all(meanings.count(colour) == 1 for colour in rgb):
        return [meanings.index(colour) + 1 for colour in rgb]
    bands = [band for band, meaning in enumerate(meanings, 1) if meaning != ColorInterp.alpha]
    if len(bands) >= 3:
        return bands[:3]
    if len(bands) == 1:
        return bands
    raise ImageError(f"{len(bands)} bands without alpha; state the bands to show")


def _valid(dataset: Any, bands: list[int], values: npt.NDArray[Any], **part: Any) -> npt.NDArray[np.bool_]:
    """Which of the values [B, H, W] are data: bool [B, H, W]."""
    from rasterio.enums import MaskFlags

    valid: npt.NDArray[np.bool_] = np.isfinite(values)
    if any(dataset.mask_flag_enums[band - 1] != [MaskFlags.all_valid] for band in bands):
        valid &= dataset.read_masks(bands, **part) > 0
    return valid
