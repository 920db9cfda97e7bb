"""Place and time of an image, from the tags of its GeoTIFF or JPEG 2000 file."""

import datetime as dt
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.mosaics import is_mosaic
from orbithash.encoders.imagery.patches import band_files
from orbithash.encoders.imagery.rasters import SCENE_FORMATS, gdal_errors, image_format, is_folder, open_raster
from orbithash.encoders.imagery.rendering import Window

__all__ = ["Georeference", "check_projections", "read_georeference"]

# The outline of a raster deviates from its edges by at most this part of a pixel, and of its longer side.
_PIXEL_SHARE, _SIDE_SHARE = 0.25, 1 / 2000


@dataclass(frozen=True)
class Georeference:
    """Place and time of one image; None if unknown.

    Attributes:
        lon: degrees east of the centre, WGS 84.
        lat: degrees north of the centre, WGS 84.
        footprint: the outline as WKB, in longitude and latitude of WGS 84: a polygon, or several if it crosses 180
            degrees (see `orbithash.encoders.imagery.outlines`).
        datetime: acquisition, UTC.
    """

    lon: float | None = None
    lat: float | None = None
    footprint: bytes | None = None
    datetime: dt.datetime | None = None


def check_projections() -> None:
    """Raise `InputError` if PROJ cannot project, in which case no image would get a place.

    The usual cause is `PROJ_LIB` or `PROJ_DATA` set to the `proj.db` of another installation.
    """
    from rasterio.crs import CRS
    from rasterio.warp import transform

    failures: tuple[type[Exception], ...] = (*gdal_errors(), ValueError)
    problem = "it computes wrong coordinates"
    try:
        # The origin of UTM zone 31 is at 3 degrees east on the equator.
        (lon,), (lat,) = transform(CRS.from_epsg(32631), CRS.from_epsg(4326), [500_000], [0])
        if math.isclose(lon, 3, abs_tol=1e-6) and math.isclose(lat, 0, abs_tol=1e-6):
            return
    except failures as error:
        problem = str(error).splitlines()[0]
    variables = [f"{name}={os.environ[name]}" for name in ("PROJ_DATA", "PROJ_LIB") if name in os.environ]
    remedy = f"unset {' and '.join(variables)}" if variables else "reinstall rasterio"
    raise InputError(f"PROJ cannot project coordinates, so no image would get a place: {problem}; {remedy}")


def read_georeference(source: bytes | Path, window: Window | None = None) -> Georeference:
    """Return place and time of a TIFF or JPEG 2000 file, a mosaic, or a window; for a JPEG or a PNG both are unknown.

    All bands of a patch folder show the same place; the first one is read.

    Raises:
        ImageError: of no format that is read (`image_formats`), or a damaged TIFF or JPEG 2000 file.
        InputError: PROJ cannot project (`check_projections`).
    """
    if isinstance(source, Path) and is_folder(source):
        source = next(iter(band_files(source).values()))
    is_scene = isinstance(source, Path) and is_mosaic(source)
    if not is_scene and image_format(source) not in SCENE_FORMATS:
        return Georeference()
    with open_raster(source) as dataset:
        taken = _parse_datetime(dataset.tags().get("TIFFTAG_DATETIME", ""))
        lon, lat, footprint = _place(dataset, window or (0, 0, dataset.width, dataset.height))
        return Georeference(lon, lat, footprint, taken)


def _place(dataset: Any, window: Window) -> tuple[float | None, float | None, bytes | None]:
    """Longitude and latitude of the window's centre and its outline as WKB; None without a usable georeference."""
    from shapely.geometry import Point, Polygon

    from orbithash.encoders.imagery.outlines import project

    grid = dataset.transform
    if dataset.crs is None or grid.is_identity or grid.is_degenerate:
        return None, None, None
    column, row, width, height = window

    def at(across: float, down: float) -> tuple[float, float]:
        x, y = column + across * width, row + down * height
        return grid.a * x + grid.b * y + grid.c, grid.d * x + grid.e * y + grid.f

    sides = math.hypot(grid.a, grid.d), math.hypot(grid.b, grid.e)
    tolerance = min(_PIXEL_SHARE * min(sides), _SIDE_SHARE * max(sides[0] * width, sides[1] * height))
    try:
        centre = project(Point(at(0.5, 0.5)), dataset.crs, tolerance)
    except ValueError:
        # Either a local coordinate system, which has no place on the Earth, or a broken installation of PROJ.
        check_projections()
        return None, None, None
    if abs(centre.y) > 90:
        return None, None, None
    try:
        outline = project(Polygon([at(0, 0), at(0, 1), at(1, 1), at(1, 0)]), dataset.crs, tolerance)
    except ValueError:
        # The corners of an image of the whole disc of the Earth have no place.
        return centre.x, centre.y, None
    return centre.x, centre.y, None if outline.is_empty else outline.wkb


def _parse_datetime(tag: str) -> dt.datetime | None:
    try:
        return dt.datetime.strptime(tag.strip("\0 "), "%Y:%m:%d %H:%M:%S").replace(tzinfo=dt.UTC)
    except ValueError:
        return None
