"""Images to 8 bits a band: JPEG, PNG and (Geo)TIFF, from files and from strangers' bytes; folders of one TIFF a band.

Formats are told by their first bytes, never by a file's name. What a header promises is held against `Limits` before a
pixel is decoded. Whatever cannot be read is an `ImageError`; its message leaves out the file or key, which the caller
knows.
"""

import re
import struct
from io import BytesIO
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.patches import read_patch
from orbithash.encoders.imagery.rasters import (
    as_image,
    check_layout,
    image_format,
    is_folder,
    numbered,
    open_tiff,
    read_bytes,
    read_window,
    stretch_limits,
)
from orbithash.encoders.imagery.rendering import Image, Limits, Rendering, Stretch, Window

__all__ = ["Image", "Limits", "Rendering", "Stretch", "Window", "image_format", "read_image", "stretch_limits"]

_RENDERING = Rendering()
_LIMITS = Limits()


def read_image(source: bytes | Path, rendering: Rendering = _RENDERING, limits: Limits = _LIMITS) -> Image:
    """One image, a file or a folder of one TIFF a band, as uint8 [H, W, C] with the bands that `rendering` takes.

    8-bit data are shown as they are, other data by `rendering.stretch`, black where invalid. Grey becomes three equal
    bands, a palette its colours; alpha is dropped.

    Raises:
        ImageError: not readable as an image, without a band that is asked for, or beyond `limits`.
    """
    if isinstance(source, bytes):
        limits.check_bytes(len(source))
        data = source
    elif is_folder(source):
        return read_patch(source, rendering, limits)
    else:
        data = read_bytes(source, limits)
    kind = image_format(data)
    if kind == "JPEG" or (kind == "PNG" and not _is_deep_png(data, limits)):
        return _read_with_pillow(data, kind, rendering, limits)
    with open_tiff(data, "GTiff" if kind == "TIFF" else "PNG") as dataset:
        limits.check_size(dataset.width, dataset.height)
        check_layout(dataset, dataset.width * dataset.height, limits)
        return read_window(dataset, None, rendering, None)


def _is_deep_png(data: bytes, limits: Limits) -> bool:
    """Whether a PNG has 16 bits a sample, by its header, after its size was checked."""
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
            pixels = np.asarray(image.convert("L" if grey else "RGB"))
    except (ImageError, MemoryError):
        raise
    except Pillow.DecompressionBombError as error:
        raise ImageError(f"too many pixels: {error}") from error
    except Exception as error:
        # A decoder fed with a stranger's bytes fails in any type it likes.
        what = "truncated" if "truncated" in str(error).lower() else "damaged"
        # Pillow names the object it reads from by its address.
        words = re.sub(r" ?<[^>]* at 0x[0-9a-f]+>", "", str(error)).partition("\n")[0]
        raise ImageError(f"{what} {kind}: {words}") from error
    pixels = pixels.reshape(*pixels.shape[:2], -1)
    if rendering.bands is not None:
        pixels = pixels[..., [band - 1 for band in numbered(rendering.bands, pixels.shape[2])]]
    return as_image(pixels)
