"""Small mosaics for tests."""

import numpy as np
import rasterio
from rasterio.transform import from_origin

WEST, NORTH, STEP = 500_000, 5_000_000, 10


def write_tif(path, values, col=0, row=0, crs="EPSG:32631", nodata=None, step=STEP, **options):
    """Write values [C, H, W] as a GeoTIFF whose first pixel is at a column and row of the grid of the mosaic."""
    grid = from_origin(WEST + col * STEP, NORTH - row * STEP, step, step)
    count, height, width = values.shape
    path.parent.mkdir(parents=True, exist_ok=True)
    with rasterio.open(
        path,
        "w",
        driver="GTiff",
        count=count,
        height=height,
        width=width,
        dtype=values.dtype,
        crs=crs,
        transform=grid,
        nodata=nodata,
        **options,
    ) as scene:
        scene.write(values)
    return path


def numbers(height, width, seed=0, dtype="uint16", count=1):
    """Return random values [count, height, width] from 1 to 200."""
    return np.random.default_rng(seed).integers(1, 201, (count, height, width)).astype(dtype)


def write_list(path, *names):
    """Write a mosaic as a list."""
    path.write_text("# files of the scene\n" + "\n".join(names) + "\n")
    return path


def source(name, number=1, col=0, row=0, width=64, height=64, kind="SimpleSource", more="", band="1", scale=1):
    """Return the XML of a source that shows a whole file of a size."""
    return (
        f'<{kind}><SourceFilename relativeToVRT="1">{name}</SourceFilename><SourceBand>{band}</SourceBand>'
        f'<SrcRect xOff="0" yOff="0" xSize="{width}" ySize="{height}"/>'
        f'<DstRect xOff="{col}" yOff="{row}" xSize="{width / scale}" ySize="{height / scale}"/>{more}</{kind}>'
    )


def write_vrt(path, *sources, width=128, height=64, band='dataType="UInt16" band="1"', inner="", more="", start=""):
    """Write a VRT of one band."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f'{start}<VRTDataset rasterXSize="{width}" rasterYSize="{height}">'
        f"<SRS>EPSG:32631</SRS><GeoTransform>{WEST}, {STEP}, 0, {NORTH}, 0, -{STEP}</GeoTransform>{more}"
        f"<VRTRasterBand {band}>{inner}{''.join(sources)}</VRTRasterBand></VRTDataset>"
    )
    return path
