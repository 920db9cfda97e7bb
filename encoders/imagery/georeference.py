"""Where and when an image was taken, as its GeoTIFF tags tell."""

import datetime as dt
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.imagery.patches import band_files
from orbithash.encoders.imagery.rasters import gdal_errors, image_format, is_folder, open_tiff
from orbithash.encoders.imagery.rendering import Window

__all__ = ["Georeference", "read_georeference"]


@dataclass(frozen=True)
class Georeference:
    """Place and time of one image; None where unknown.

    Attributes:
        lon: degrees east of the centre, WGS 84.
        lat: degrees north of the centre, WGS 84.
        footprint: the outline as WKB, in lon and lat of WGS 84: a polygon, or two where it crosses 180 degrees.
        datetime: acquisition, UTC.
    """

    lon: float | None = None
    lat: float | None = None
    footprint: bytes | None = None
    datetime: dt.datetime | None = None


def read_georeference(source: bytes | Path, window: Window | None = None) -> Georeference:
    """Place and time of a TIFF, or the place of a window of it; nothing is known of a JPEG or a PNG.

    All bands of a folder of one TIFF a band show the same place, that of the first.

    Raises:
        ImageError: not a JPEG, PNG or TIFF, or a damaged TIFF.
    """
    if isinstance(source, Path) and is_folder(source):
        source = next(iter(band_files(source).values()))
    if image_format(source) != "TIFF":
        return Georeference()
    with open_tiff(source) as dataset:
        taken = _parse_datetime(dataset.tags().get("TIFFTAG_DATETIME", ""))
        place = _place(dataset, window or (0, 0, dataset.width, dataset.height))
        if place is None:
            return Georeference(datetime=taken)
        return Georeference(*place, taken)


def _place(dataset: Any, window: Window) -> tuple[float, float, bytes] | None:
    """Longitude and latitude of the window's centre and its outline as WKB, or None without a usable georeference."""
    from rasterio.transform import xy
    from rasterio.warp import transform, transform_geom
    from shapely.affinity import translate
    from shapely.geometry import shape

    if dataset.crs is None or dataset.transform.is_identity or dataset.transform.is_degenerate:
        return None
    col, row, width, height = window
    # The centre, then the corners around.
    cols = [col + width * part for part in (0.5, 0, 0, 1, 1, 0)]
    rows = [row + height * part for part in (0.5, 0, 1, 1, 0, 0)]
    xs, ys = xy(dataset.transform, rows, cols, offset="ul")
    unusable: tuple[type[Exception], ...] = (*gdal_errors(), ValueError)
    try:
        (lon,), (lat,) = transform(dataset.crs, "EPSG:4326", xs[:1], ys[:1])
        outline = shape(
            transform_geom(
                dataset.crs, "EPSG:4326", {"type": "Polygon", "coordinates": [list(zip(xs, ys, strict=True))[1:]]}
            )
        )
    except unusable:
        # A local or unknown system of coordinates has no place on Earth.
        return None
    if not all(math.isfinite(number) for number in (lon, lat, *outline.bounds)) or abs(lat) > 90:
        return None
    if lon > 180:
        # Grids that count from 0 to 360 degrees.
        lon, outline = lon - 360, translate(outline, -360)
    return lon, lat, outline.wkb


def _parse_datetime(tag: str) -> dt.datetime | None:
    try:
        return dt.datetime.strptime(tag.strip("\0 "), "%Y:%m:%d %H:%M:%S").replace(tzinfo=dt.UTC)
    except ValueError:
        return None
