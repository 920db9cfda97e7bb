"""Mosaics: several GeoTIFFs that are read as one scene, described by a GDAL VRT or by a list of their paths.

GDAL reads a VRT, which can name files anywhere, addresses on the web and programs. What it gets is therefore written
here, from the parts of the description that place files of one folder side by side; everything else is refused.
"""

import math
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import numpy.typing as npt

__all__ = [
    "MOSAIC_SUFFIXES",
    "Band",
    "Mosaic",
    "Opener",
    "Rectangle",
    "Source",
    "is_mosaic",
]

MOSAIC_SUFFIXES = (".vrt", ".mosaic")

# Opens one file by `open_raster`, which is in a module that uses this one.
Opener = Callable[[Path], AbstractContextManager[Any]]

Rectangle = tuple[float, float, float, float]
"""First column, first row, width and height, pixels."""


@dataclass(frozen=True)
class Source:
    """A band of a file and its place in the mosaic.

    Attributes:
        path: absolute path of the file.
        band: number of the band in the file, from 1.
        size: columns and rows of the file.
        block: columns and rows of its blocks.
        dtype: GDAL's name of its values' type.
        taken: the part of the file that is shown.
        placed: where it is shown in the mosaic.
        nodata: value that means no data, as text; None without one.
    """

    path: Path
    band: int
    size: tuple[int, int]
    block: tuple[int, int]
    dtype: str
    taken: Rectangle
    placed: Rectangle
    nodata: str | None


@dataclass(frozen=True)
class Band:
    """One band of a mosaic: GDAL's name of its type, and what describes it, as texts by the name of an element."""

    dtype: str
    stated: tuple[tuple[str, str], ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True)
class Mosaic:
    """A description that was checked.

    Attributes:
        width: columns.
        height: rows.
        crs: coordinate reference system as WKT; "" without one.
        grid: the six numbers of GDAL's geotransform; None without one.
        bands: bands in order.
    """

    width: int
    height: int
    crs: str
    grid: tuple[float, ...] | None
    bands: tuple[Band, ...]

    def files(self) -> list[Path]:
        """Return the files, each once."""
        return list(dict.fromkeys(source.path for band in self.bands for source in band.sources))

    def showing(self, columns: Sequence[int], rows: Sequence[int], side: int) -> npt.NDArray[np.bool_]:
        """Return in which windows a file is shown, bool [R, C].

        Args:
            columns: first columns of the windows, ascending [C].
            rows: first rows, ascending [R].
            side: columns and rows of each window.
        """
        placed = np.array(sorted({source.placed for source in self.bands[0].sources}))
        # Each file begins at one corner of a range of windows and ends at the other.
        changes = np.zeros((len(rows) + 1, len(columns) + 1), np.int64)
        left, top = (np.searchsorted(starts, placed[:, i] - side, "right") for i, starts in ((0, columns), (1, rows)))
        right, bottom = (
            np.searchsorted(starts, placed[:, i] + placed[:, i + 2], "left") for i, starts in ((0, columns), (1, rows))
        )
        # A file outside of the mosaic ends before it begins.
        right, bottom = np.maximum(left, right), np.maximum(top, bottom)
        for row, col, step in ((top, left, 1), (top, right, -1), (bottom, left, -1), (bottom, right, 1)):
            np.add.at(changes, (row, col), step)
        shown: npt.NDArray[np.bool_] = changes.cumsum(axis=0).cumsum(axis=1)[:-1, :-1] > 0
        return shown

    def to_xml(self) -> bytes:
        """Return the mosaic as a VRT with absolute paths, in which pixels without a file are masked."""
        root = ElementTree.Element("VRTDataset", rasterXSize=str(self.width), rasterYSize=str(self.height))
        if self.crs:
            ElementTree.SubElement(root, "SRS").text = self.crs
        if self.grid is not None:
            ElementTree.SubElement(root, "GeoTransform").text = ", ".join(map(repr, self.grid))
        for number, band in enumerate(self.bands, 1):
            element = ElementTree.SubElement(root, "VRTRasterBand", dataType=band.dtype, band=str(number))
            for name, text in band.stated:
                ElementTree.SubElement(element, name).text = text
            for source in band.sources:
                _add_source(element, source, str(source.band), source.nodata)
        if all("NoDataValue" in dict(band.stated) for band in self.bands):
            # Each band masks its own pixels, also those without a file.
            return bytes(ElementTree.tostring(root, encoding="utf-8"))
        mask = ElementTree.SubElement(ElementTree.SubElement(root, "MaskBand"), "VRTRasterBand", dataType="Byte")
        for source in self.bands[0].sources:
            # The mask of a file counts its own value of no data; where it masks a pixel, files below are seen.
            _add_source(mask, source, f"mask,{source.band}", "0")
        return bytes(ElementTree.tostring(root, encoding="utf-8"))


def is_mosaic(path: Path) -> bool:
    """Return whether the name of a file is that of a mosaic."""
    return path.name.lower().endswith(MOSAIC_SUFFIXES)


def _add_source(element: ElementTree.Element, source: Source, band: str, nodata: str | None) -> None:
    found = ElementTree.SubElement(element, "SimpleSource" if nodata is None else "ComplexSource")
    ElementTree.SubElement(found, "SourceFilename", relativeToVRT="0").text = os.fspath(source.path)
    ElementTree.SubElement(found, "SourceBand").text = band
    ElementTree.SubElement(
        found,
        "SourceProperties",
        RasterXSize=str(source.size[0]),
        RasterYSize=str(source.size[1]),
        DataType="Byte" if band.startswith("mask") else source.dtype,
        BlockXSize=str(source.block[0]),
        BlockYSize=str(source.block[1]),
    )
    for name, rectangle in (("SrcRect", source.taken), ("DstRect", source.placed)):
        x, y, width, height = map(_number, rectangle)
        ElementTree.SubElement(found, name, xOff=x, yOff=y, xSize=width, ySize=height)
    if nodata is not None:
        ElementTree.SubElement(found, "NODATA").text = nodata


def _number(value: float) -> str:
    return repr(int(value)) if math.isfinite(value) and value == int(value) else repr(value)
