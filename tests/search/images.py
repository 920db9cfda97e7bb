"""Images for tests of decoding: valid images, decompression bombs, and files that are not images."""

import struct
import zlib
from io import BytesIO

import numpy as np
from PIL import Image


def picture(seed=0, side=64):
    """uint8 [side, side, 3], smooth enough for JPEG."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (4, 4, 3), dtype=np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((side, side), Image.Resampling.BICUBIC))


def encoded(pixels, kind):
    buffer = BytesIO()
    Image.fromarray(pixels).save(buffer, kind)
    return buffer.getvalue()


def geotiff(pixels, **profile):
    """By rasterio, of [H, W, C] of any type."""
    import rasterio

    height, width, count = pixels.shape
    with rasterio.MemoryFile() as memory:
        fields = {"width": width, "height": height, "count": count, "dtype": pixels.dtype, **profile}
        with memory.open(driver="GTiff", **fields) as dataset:
            dataset.write(np.moveaxis(pixels, -1, 0))
        return memory.read()


def tiff(entries, data=b"", byte_order="<"):
    """A TIFF of one directory {tag: (type, values)} written by hand; `data` begins at byte 8."""
    sizes = {1: "B", 2: "B", 3: "H", 4: "I"}
    start = 8 + len(data)
    later = start + 2 + 12 * len(entries) + 4
    directory, extra = struct.pack(byte_order + "H", len(entries)), b""
    for tag, (kind, values) in sorted(entries.items()):
        packed = struct.pack(f"{byte_order}{len(values)}{sizes[kind]}", *values)
        directory += struct.pack(byte_order + "HHI", tag, kind, len(values))
        if len(packed) <= 4:
            directory += packed.ljust(4, b"\0")
        else:
            directory += struct.pack(byte_order + "I", later + len(extra))
            extra += packed
    header = (b"II" if byte_order == "<" else b"MM") + struct.pack(byte_order + "HI", 42, start)
    return header + data + directory + struct.pack(byte_order + "I", 0) + extra


def bomb_tiff(side):
    """One strip of zeros of side x side x 3 bytes, deflated a thousand times smaller."""
    squeeze, row = zlib.compressobj(9), bytes(3 * side)
    data = b"".join(squeeze.compress(row) for _ in range(side)) + squeeze.flush()
    return tiff(
        {
            256: (4, [side]),
            257: (4, [side]),
            258: (3, [8, 8, 8]),
            259: (3, [8]),
            262: (3, [2]),
            273: (4, [8]),
            277: (3, [3]),
            278: (4, [side]),
            279: (4, [len(data)]),
            284: (3, [1]),
        },
        data,
    )


def png(width, height, depth=8, rows=b""):
    """A PNG that declares any size, whatever it holds."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    body = chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows, 9)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def no_images(other_file):
    """Name to bytes of what a library might open although it is none of our formats; they name `other_file`."""
    gif = BytesIO()
    Image.fromarray(picture()).save(gif, "GIF")
    pdf = BytesIO()
    Image.fromarray(picture()).save(pdf, "PDF")
    vrt = f"""<VRTDataset rasterXSize="64" rasterYSize="64"><VRTRasterBand dataType="Byte" band="1"><SimpleSource>
<SourceFilename relativeToVRT="0">{other_file}</SourceFilename><SourceBand>1</SourceBand></SimpleSource>
</VRTRasterBand></VRTDataset>"""
    return {
        "gif": gif.getvalue(),
        "pdf": pdf.getvalue(),
        "vrt": vrt.encode(),
        "svg": f'<svg xmlns="http://www.w3.org/2000/svg"><image href="file://{other_file}"/></svg>'.encode(),
        "bmp": encoded(picture(), "BMP"),
        "webp": encoded(picture(), "WEBP"),
        "eps": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n(/etc/passwd) (r) file\n",
        "path": str(other_file).encode(),
        "curl": b"/vsicurl/http://192.0.2.1/image.tif",
        "s3": b"/vsis3/bucket/image.tif",
        "subdataset": f"GTIFF_DIR:1:{other_file}".encode(),
        "vsizip": f"/vsizip/{other_file}".encode(),
        "vsistdin": b"/vsistdin/",
        "derived": f"DERIVED_SUBDATASET:AMPLITUDE:{other_file}".encode(),
        "wms": b"<GDAL_WMS><Service name='TMS'><ServerUrl>http://192.0.2.1/</ServerUrl></Service></GDAL_WMS>",
    }
