"""JPEG, PNG, (Geo)TIFF and JPEG 2000 images as pictures or numbers: from files, untrusted bytes, and patch folders.

The format is detected from the first bytes, never from the file name. The header is checked against `Limits` before any
pixel is decoded. An image that cannot be read raises `ImageError`; the message leaves out the file or key, which the
caller knows.

Masked pixels are black at every bit depth, and NaN among numbers: nodata, alpha of zero, transparent colours, and the
mask inside a TIFF.
Files beside an image are not read, neither masks (.msk) nor world files, so that an image is the same from a folder,
an object store and a request.
"""

import re
import struct
from collections.abc import Sequence
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo, find_bands
from orbithash.encoders.imagery.numbers import check_numbers, to_numbers
from orbithash.encoders.imagery.patches import read_patch
from orbithash.encoders.imagery.rasters import (
    as_image,
    check_layout,
    check_numbers_size,
    image_format,
    is_folder,
    open_raster,
    read_bytes,
    read_window,
    stretch_limits,
)
from orbithash.encoders.imagery.rendering import Image, Limits, Rendering, Stretch, Window

__all__ = ["Image", "Limits", "Rendering", "Stretch", "Window", "image_format", "read_image", "stretch_limits"]

_RENDERING = Rendering()
_LIMITS = Limits()
# The tag of EXIF and of TIFF that says how a camera was held.
_ORIENTATION = 274


def read_image(
    source: bytes | Path,
    rendering: Rendering = _RENDERING,
    limits: Limits = _LIMITS,
    formats: Sequence[str] | None = None,
    stated: Sequence[BandInfo] = (),
) -> Image:
    """Return one image [H, W, C] with the bands that `rendering` takes.

    A picture is uint8: 8-bit data unchanged, other data by `rendering.stretch`; masked and invalid pixels are black.
    Numbers are float32 in the unit of `rendering.values`; masked and invalid pixels are NaN. A grey image becomes three
    equal bands, a palette image its colours (its indices as numbers); alpha is dropped. An image without georeference
    is turned upright by its EXIF (or TIFF) orientation.

    Args:
        source: the encoded image, its file, or a patch folder (one TIFF per band).
        rendering: bands, and what their values become.
        limits: maximum sizes.
        formats: the formats that are allowed, of `JPEG`, `PNG`, `TIFF` and `JPEG 2000`. Default: all that can be read.
        stated: what metadata outside the file, such as STAC, state about its bands.

    Raises:
        ImageError: not readable as an image, of another format, without a requested band, or beyond `limits`.
    """
    if isinstance(source, bytes):
        limits.check_bytes(len(source))
        data = source
    elif is_folder(source):
        return read_patch(source, rendering, limits)
    else:
        data = read_bytes(source, limits)
    kind = image_format(data, formats)
    if kind == "JPEG" or (kind == "PNG" and not _is_deep_png(data, limits)):
        return _read_with_pillow(data, kind, rendering, limits)
    with open_raster(data) as dataset:
        limits.check_size(dataset.width, dataset.height)
        num_pixels = dataset.width * dataset.height
        check_layout(dataset, num_pixels, limits)
        if not rendering.is_picture:
            check_numbers_size(num_pixels, rendering.num_bands, np.dtype(dataset.dtypes[0]).itemsize, limits)
        image = read_window(dataset, None, rendering, None, stated)
        is_placed = dataset.crs is not None or not dataset.transform.is_identity
    return image if is_placed or kind != "TIFF" else _upright(image, _tiff_orientation(data))


def _is_deep_png(data: bytes, limits: Limits) -> bool:
    """Whether a PNG has 16 bits per sample, from its header; checks the size first."""
    if len(data) < 33:
        raise ImageError("truncated: the PNG header is not complete")
    width, height, depth = struct.unpack(">IIB", data[16:25])
    limits.check_size(width, height)
    return bool(depth == 16)


def _read_with_pillow(data: bytes, kind: str, rendering: Rendering, limits: Limits) -> Image:
    from PIL import Image as Pillow

    try:
        # Opening reads the header only.
        with Pillow.open(BytesIO(data), formats=[kind]) as image:
            limits.check_size(*image.size)
            if image.mode == "CMYK":
                raise ImageError("CMYK colours; convert it to RGB")
            grey = image.mode in ("1", "L", "LA")
            orientation = _exif_orientation(image)
            opaque = None
            if image.has_transparency_data:
                opaque = np.asarray(image.convert("RGBA").getchannel("A")) > 0
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (ImageError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:
        # Decoders raise exceptions of many types for damaged bytes.
        what = "truncated" if "truncated" in str(error).lower() else "damaged"
        # Pillow's message has the memory address of the object it reads from, which differs each time.
        words = re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", str(error)).partition("\n")[0]
        raise ImageError(f"{what} {kind}: {words}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if opaque is not None and not opaque.any():
        raise ImageError("no valid data")
    if rendering.bands is not None:
        pixels = pixels[..., find_bands(rendering.bands, [BandInfo()] * pixels.shape[2])]
    valid = np.ones(pixels.shape, np.bool_) if opaque is None else np.broadcast_to(opaque[..., None], pixels.shape)
    if rendering.is_picture:
        return _upright(as_image(np.where(valid, pixels, np.uint8(0))), orientation)
    check_numbers_size(pixels.shape[0] * pixels.shape[1], pixels.shape[2], 1, limits)
    values, valid = np.moveaxis(pixels, -1, 0), np.moveaxis(valid, -1, 0)
    numbers = to_numbers(values, valid, rendering, [BandInfo()] * len(values))
    check_numbers(numbers, rendering)
    return _upright(as_image(np.moveaxis(numbers, 0, -1)), orientation)


def _exif_orientation(image: Any) -> int:
    """The orientation, 1 to 8, of an open Pillow image; 1 (upright) if its EXIF cannot be read."""
    with suppress(Exception):
        return int(image.getexif().get(_ORIENTATION, 1))
    return 1


def _tiff_orientation(data: bytes) -> int:
    """The orientation, 1 to 8, of a TIFF's first image; 1 (upright) if it has none. GDAL does not read it."""
    from PIL.TiffImagePlugin import ImageFileDirectory_v2

    with suppress(Exception):
        # A classic TIFF has a header of 8 bytes, a BigTIFF (version 43) of 16.
        tags = ImageFileDirectory_v2(data[:16] if 43 in data[2:4] else data[:8])
        file = BytesIO(data)
        file.seek(tags.next)
        tags.load(file)
        return int(tags.get(_ORIENTATION, 1))
    return 1


def _upright(pixels: Image, orientation: int) -> Image:
    """Turn and mirror pixels [H, W, C] so that row 0 is the top and column 0 the left side."""
    if not 2 <= orientation <= 8:
        return pixels
    # In pairs: mirrored and turned by no, two, one and three quarters.
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    turns = {2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, turns))
