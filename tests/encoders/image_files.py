"""Helpers: small encoded images, and their expected pixels, computed one at a time."""

import io
import struct
import warnings
import zlib

import numpy as np
import pytest
from rasterio.io import MemoryFile
from rasterio.transform import from_origin

from orbithash.encoders.imagery.rasters import reads_jpeg_2000

HEIGHT, WIDTH = 20, 24
PLACE = {"crs": "EPSG:32654", "transform": from_origin(4e5, 4e6, 10, 10)}


def noise(bands, dtype=np.uint8, seed=0, low=0, high=None):
    high = high or (np.iinfo(dtype).max if np.dtype(dtype).kind in "iu" else 1000)
    return np.random.default_rng(seed).uniform(low, high, (bands, HEIGHT, WIDTH)).astype(dtype)


def tiff(values, mask=None, colormap=None, datetime=None, **options):
    """Return a TIFF of values [B, H, W]."""
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    with warnings.catch_warnings(), MemoryFile() as memory:
        warnings.simplefilter("ignore")
        with memory.open(driver="GTiff", **shape, **options) as dataset:
            dataset.write(values)
            if mask is not None:
                dataset.write_mask(mask)
            if colormap is not None:
                dataset.write_colormap(1, colormap)
            if datetime is not None:
                dataset.update_tags(TIFFTAG_DATETIME=datetime)
        return memory.read()


def jpeg_2000(values, codec="JP2", **options):
    """Return a JPEG 2000 file of values [B, H, W], without loss; the test is skipped if GDAL has no driver."""
    if not reads_jpeg_2000():
        pytest.skip("the installed GDAL has no driver for JPEG 2000")
    shape = {"count": values.shape[0], "height": values.shape[1], "width": values.shape[2], "dtype": values.dtype}
    lossless = {"QUALITY": "100", "REVERSIBLE": "YES", "YCBCR420": "NO", "CODEC": codec}
    with warnings.catch_warnings(), MemoryFile(ext=codec.lower()) as memory:
        warnings.simplefilter("ignore")
        with memory.open(driver="JP2OpenJPEG", **shape, **lossless, **options) as dataset:
            dataset.write(values)
        return memory.read()


def encoded(image, kind, **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def png16(values):
    """Return a PNG of uint16 values [H, W, channels], which Pillow cannot write."""
    height, width, channels = values.shape
    colour = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in values)
    return png_of(width, height, 16, colour, zlib.compress(lines))


def png_of(width, height, depth, colour, data):
    def chunk(name, body):
        return struct.pack(">I", len(body)) + name + body + struct.pack(">I", zlib.crc32(name + body))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", data) + chunk(b"IEND", b"")


def slow_stretch(band, valid, low, high):
    """Stretch a band pixel by pixel, with the numbers of Python."""
    shown = np.zeros(band.shape, np.uint8)
    for place in np.ndindex(band.shape):
        if valid[place] and high > low:
            share = (float(band[place]) - low) / (high - low)
            shown[place] = round(min(max(share, 0.0), 1.0) * 255)
    return shown


def assert_shown(got, expected):
    """Assert equality within the rounding of float32."""
    assert (got.dtype, got.shape) == (np.uint8, expected.shape)
    assert np.abs(got.astype(int) - expected.astype(int)).max() <= 1
