"""JPEG, PNG, (Geo)TIFF and JPEG 2000 images as 8-bit bands: from files, from untrusted bytes, and from patch folders.

The format is detected from the first bytes, never from the file name. The header is checked against `Limits` before any
pixel is decoded. An image that cannot be read raises `ImageError`; the message leaves out the file or key, which the
caller knows.

Masked pixels are black at every bit depth: nodata, alpha of zero, transparent colours, and the mask inside a TIFF.
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
import numpy.typing as npt

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.patches import read_patch
from orbithash.encoders.imagery.rasters import (
    as_image,
    check_layout,
    image_format,
    is_folder,
    numbered,
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
) -> Image:
    """Return one image as uint8 [H, W, C] with the bands that `rendering` takes.

    8-bit data are shown unchanged, other data by `rendering.stretch`; masked and invalid pixels are black. A grey image
    becomes three equal bands, a palette image its colours; alpha is dropped. An image without georeference is turned
    upright by its EXIF (or TIFF) orientation.

    Args:
        source: the encoded image, its file, or a patch folder (one TIFF per band).
        rendering: bands and stretch.
        limits: maximum sizes.
        formats: the formats that are allowed, of `JPEG`, `PNG`, `TIFF` and `JPEG 2000`. Default: all that can be read.

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
        check_layout(dataset, dataset.width * dataset.height, limits)
        image = read_window(dataset, None, rendering, None)
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
    if opaque is not None:
        if not opaque.any():
            raise ImageError("no valid data")
        pixels = np.where(opaque[..., None], pixels, np.uint8(0))
    if rendering.bands is not None:
        pixels = pixels[..., [band - 1 for band in numbered(rendering.bands, pixels.shape[2])]]
    return _upright(as_image(pixels), orientation)


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


def _upright(pixels: npt.NDArray[np.uint8], orientation: int) -> Image:
    """Turn and mirror pixels [H, W, C] so that row 0 is the top and column 0 the left side."""
    if not 2 <= orientation <= 8:
        return pixels
    # In pairs: mirrored and turned by no, two, one and three quarters.
    if orientation in (2, 4, 5, 7):
        pixels = pixels[:, ::-1]
    turns = {2: 0, 3: 2, 4: 2, 5: 1, 6: 3, 7: 3, 8: 1}[orientation]
    return np.ascontiguousarray(np.rot90(pixels, turns))
