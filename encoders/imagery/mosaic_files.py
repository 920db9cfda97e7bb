"""Descriptions of mosaics: what of a GDAL VRT is allowed, and lists of GeoTIFFs on one grid."""

import math
import re
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.mosaics import Band, Mosaic, Opener, Rectangle, Source, is_mosaic
from orbithash.encoders.text_files import read_lines

__all__ = ["mosaic_files", "mosaic_of", "mosaic_xml"]

_MAX_BYTES = 16 * 2**20
_MAX_SOURCES = 100_000
_MAX_SIDE = 2**31 - 1
# A file may be shown smaller by this factor at most: all of its pixels may have to be decoded for a few.
_MAX_SHRINKING = 16
# Deviation of a file from the grid of the first one, pixels.
_TOLERANCE = 0.1

# GDAL's names of types by those of numpy.
_TYPES = {
    "uint8": "Byte",
    "int8": "Int8",
    "uint16": "UInt16",
    "int16": "Int16",
    "uint32": "UInt32",
    "int32": "Int32",
    "float32": "Float32",
    "float64": "Float64",
}
# Elements of a band that only describe it.
_STATED = ("ColorInterp", "Description", "NoDataValue", "Offset", "Scale", "UnitType")
_IGNORED_OF_BAND = ("Metadata", "Histograms", "Overview", "HideNoDataValue", "CategoryNames")
_IGNORED = ("Metadata", "OverviewList", "MaskBand", "GCPList", "BlockXSize", "BlockYSize")
_SOURCES = ("SimpleSource", "ComplexSource")
_OF_SOURCE = ("SourceFilename", "SourceBand", "SourceProperties", "SrcRect", "DstRect", "NODATA", "UseMaskBand")


def mosaic_of(path: Path, open_file: Opener) -> Mosaic:
    """Return the mosaic in a VRT, or in a list of GeoTIFFs, one path in a line; it is kept until the file changes.

    Raises:
        ImageError: not such a file, or one with anything that is not allowed in it.
    """
    return _mosaic(path.resolve(), _version(path), open_file)


def mosaic_xml(path: Path, open_file: Opener) -> bytes:
    """Return the VRT of a mosaic (`Mosaic.to_xml`); raises as `mosaic_of`."""
    return _xml(path.resolve(), _version(path), open_file)


def mosaic_files(path: Path, open_file: Opener) -> list[Path]:
    """Return the file of a mosaic and the files that it shows; the first alone if it cannot be read."""
    try:
        return [path, *mosaic_of(path, open_file).files()]
    except ImageError:
        return [path]


def _version(path: Path) -> tuple[int, int]:
    """Return the time of the last change and the size of a file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise ImageError(f"the file cannot be read: {error.strerror}") from error
    return stat.st_mtime_ns, stat.st_size


# The tiles of a mosaic are read one after another.
@lru_cache(maxsize=4)
def _xml(path: Path, version: tuple[int, int], open_file: Opener) -> bytes:
    return _mosaic(path, version, open_file).to_xml()


@lru_cache(maxsize=4)
def _mosaic(path: Path, version: tuple[int, int], open_file: Opener) -> Mosaic:
    return (_read_vrt if path.name.lower().endswith(".vrt") else _read_list)(path, open_file)


def _read_vrt(path: Path, open_file: Opener) -> Mosaic:
    """Return the mosaic of a GDAL VRT; raises as `mosaic_of`.

    Allowed are bands made of files in the folder of the VRT, or below it, that are shown as they are.
    """
    root = _parse(path)
    _check(root.tag == "VRTDataset", f"it is a {root.tag}, not a VRTDataset")
    _check_element(root, ("rasterXSize", "rasterYSize"))
    width, height = (_integer(root.get(name), name, _MAX_SIDE) for name in ("rasterXSize", "rasterYSize"))
    elements = list(root)
    for element in elements:
        allowed = ("SRS", "GeoTransform", "VRTRasterBand", *_IGNORED)
        _check(element.tag in allowed, f"an element {element.tag} is not allowed")
    number = 0
    bands, opened = [], _Opened(path.parent, open_file)
    for element in elements:
        if element.tag == "VRTRasterBand":
            number += 1
            _check(element.get("band", str(number)) == str(number), "its bands are not in order")
            # Of gdalbuildvrt -addalpha. Pixels without a file are masked anyway.
            if (element.findtext("ColorInterp") or "").strip() != "Alpha":
                bands.append(_band(element, opened))
    _check(bool(bands) and all(band.sources for band in bands), "a band of it shows no file")
    places = [sorted(source.placed for source in band.sources) for band in bands]
    _check(all(one == places[0] for one in places), "its bands show files in different places")
    _check(
        sum(len(band.sources) for band in bands) <= _MAX_SOURCES, f"it shows more than {_MAX_SOURCES:,} bands of files"
    )
    text = (root.findtext("SRS") or "").strip()
    grid = root.findtext("GeoTransform")
    return Mosaic(width, height, _wkt(text), None if grid is None else _grid(grid), tuple(bands))


def _read_list(path: Path, open_file: Opener) -> Mosaic:
    """Return the mosaic of a text list of GeoTIFFs: one path in a line, relative to the list; `#` begins a comment.

    All files have the same bands, coordinate reference system and size of pixels, and lie on one grid, north up, in
    the folder of the list or below it. Where files overlap, the later one is on top.

    Raises:
        ImageError: as `mosaic_of`.
    """
    try:
        names = [line.strip(" \t") for line in read_lines(path)]
    except ValueError as error:
        raise ImageError(f"the list {error}") from error
    names = [name for name in names if not name.startswith("#")]
    _check(bool(names), "it lists no file")
    _check(len(names) <= _MAX_SOURCES, f"it lists {len(names):,} files; at most {_MAX_SOURCES:,} are allowed")
    opened = _Opened(path.parent, open_file)
    files = [opened.find(name) for name in names]
    first = files[0]
    _check(first.crs != "" and first.grid[1] > 0 > first.grid[5], f"{first.path.name} is not on a map grid, north up")
    left, top = min(file.grid[0] for file in files), max(file.grid[3] for file in files)
    across, down = first.grid[1], first.grid[5]
    places = []
    for file in files:
        problem = file.difference(first)
        _check(not problem, f"{file.path.name} does not fit {first.path.name}: {problem}")
        place = ((file.grid[0] - left) / across, (file.grid[3] - top) / down)
        off = max(abs(value - round(value)) for value in place)
        _check(off <= _TOLERANCE, f"the pixels of {file.path.name} are {off:.2f} pixels off those of {first.path.name}")
        places.append((float(round(place[0])), float(round(place[1])), float(file.size[0]), float(file.size[1])))
    width = int(max(x + size for x, _, size, _ in places))
    height = int(max(y + size for _, y, _, size in places))
    bands = [
        Band(
            first.dtype,
            first.stated[number],
            tuple(
                file.source(number + 1, (0.0, 0.0, float(file.size[0]), float(file.size[1])), place, file.nodata)
                for file, place in zip(files, places, strict=True)
            ),
        )
        for number in range(len(first.stated))
    ]
    return Mosaic(width, height, first.crs, (left, across, 0.0, top, 0.0, down), tuple(bands))


class _File:
    """What the header of a file of a mosaic says."""

    def __init__(self, path: Path, dataset: Any) -> None:
        self.path = path
        self.size = (int(dataset.width), int(dataset.height))
        height, width = dataset.block_shapes[0]
        self.block = (int(width), int(height))
        self.crs = dataset.crs.to_wkt() if dataset.crs is not None else ""
        self.grid: tuple[float, ...] = tuple(map(float, dataset.transform.to_gdal()))
        kinds = set(dataset.dtypes)
        _check(len(kinds) == 1 and kinds <= _TYPES.keys(), f"{path.name} has values of type {', '.join(sorted(kinds))}")
        self.dtype = _TYPES[kinds.pop()]
        self.nodata = None if dataset.nodata is None else repr(float(dataset.nodata))
        colours = [colour.name for colour in dataset.colorinterp]
        _check("palette" not in colours, f"{path.name} has a palette; convert it to RGB")
        fields = zip(colours, dataset.descriptions, dataset.offsets, dataset.scales, dataset.units, strict=True)
        self.stated = [
            tuple(
                (name, str(value))
                for name, value in (
                    ("NoDataValue", self.nodata),
                    ("Description", description),
                    ("UnitType", unit),
                    ("Offset", offset or None),
                    ("Scale", scale if scale != 1 else None),
                    ("ColorInterp", colour.capitalize()),
                )
                if value is not None
            )
            for colour, description, offset, scale, unit in fields
        ]

    def difference(self, other: "_File") -> str:
        """Return why the file cannot lie on the grid of another one; "" if it can."""
        if self.crs != other.crs:
            return "their coordinate reference systems differ"
        if (self.dtype, len(self.stated)) != (other.dtype, len(other.stated)):
            return f"{len(self.stated)} bands of {self.dtype}, and {len(other.stated)} of {other.dtype}"
        if self.nodata != other.nodata:
            return f"their values of no data are {self.nodata} and {other.nodata}"
        sizes, others = self.grid[1:3] + self.grid[4:], other.grid[1:3] + other.grid[4:]
        if any(
            abs(one - two) * max(self.size) > _TOLERANCE * other.grid[1] for one, two in zip(sizes, others, strict=True)
        ):
            return "their pixels differ in size or direction"
        return ""

    def source(self, band: int, taken: Rectangle, placed: Rectangle, nodata: str | None) -> Source:
        """Return a band of the file as a source."""
        return Source(self.path, band, self.size, self.block, self.dtype, taken, placed, nodata)


class _Opened:
    """The files of one mosaic, each opened once and checked; `ImageError` for one that is not allowed."""

    def __init__(self, folder: Path, open_file: Opener) -> None:
        self._folder, self._open_file = folder.resolve(), open_file
        self._files: dict[str, _File] = {}

    def find(self, name: str) -> _File:
        if name not in self._files:
            self._files[name] = self._opened(name)
        return self._files[name]

    def _opened(self, name: str) -> _File:
        from orbithash.encoders.imagery.rendering import Limits

        shown = ascii(name[:200])
        try:
            path = (self._folder / name).resolve()
            is_below, is_file = path.is_relative_to(self._folder), path.is_file()
        except (OSError, ValueError, RuntimeError) as error:
            raise ImageError(f"the mosaic names {shown}, which is not a path") from error
        _check(
            is_below,
            f"the mosaic names {shown}; files in the folder of the mosaic or below it are allowed",
        )
        _check(is_file, f"the mosaic names {shown}, which is not a file in its folder")
        _check(not is_mosaic(path), f"the mosaic names {shown}, another mosaic; GeoTIFFs are allowed")
        try:
            with self._open_file(path) as dataset:
                height, width = dataset.block_shapes[0]
                decoded = width * height * dataset.count * np.dtype(dataset.dtypes[0]).itemsize
                _check(
                    decoded <= Limits().max_decoded_bytes,
                    f"a block of {width} x {height} pixels is too large; rewrite it with internal tiles",
                )
                return _File(path, dataset)
        except ImageError as error:
            raise ImageError(f"its file {shown}: {error}") from error


def _parse(path: Path) -> ElementTree.Element:
    try:
        with path.open("rb") as file:
            data = file.read(_MAX_BYTES + 1)
    except OSError as error:
        raise ImageError(f"the file cannot be read: {error.strerror}") from error
    _check(len(data) <= _MAX_BYTES, f"it has more than {_MAX_BYTES // 2**20} MiB")
    _check(data.startswith(b"<VRTDataset"), f"not a VRT: it begins with {data[:12]!r}")
    # Without a declaration of another encoding it is UTF-8, so that no entity can be declared in other bytes.
    _check(b"<!DOCTYPE" not in data and b"<!ENTITY" not in data, "declarations of entities are not allowed in a VRT")
    try:
        return ElementTree.fromstring(data.decode("utf-8"))
    except (ElementTree.ParseError, ValueError, RecursionError) as error:
        raise ImageError(f"a VRT that is not XML: {error}") from error


def _band(element: ElementTree.Element, opened: _Opened) -> Band:
    # Bands of a subclass are computed: by pixel functions, by programs, by warping.
    _check(element.get("subClass") is None, f"a band is a {element.get('subClass')}; bands of files are allowed")
    _check_element(element, ("dataType", "band", "blockXSize", "blockYSize"))
    dtype = element.get("dataType", "Byte")
    _check(
        dtype in _TYPES.values(), f"a band has values of type {dtype[:40]!r}; {', '.join(_TYPES.values())} are allowed"
    )
    sources, stated = [], []
    for child in element:
        if child.tag in _SOURCES:
            sources.append(_source(child, opened))
        elif child.tag in _STATED:
            if text := (child.text or "").strip():
                stated.append((child.tag, text))
        else:
            _check(child.tag in _IGNORED_OF_BAND, f"an element {child.tag} of a band is not allowed")
    return Band(dtype, tuple(stated), tuple(sources))


def _source(element: ElementTree.Element, opened: _Opened) -> Source:
    parts: dict[str, ElementTree.Element] = {}
    for child in element:
        _check(child.tag in _OF_SOURCE and child.tag not in parts, f"an element {child.tag} of a source is not allowed")
        parts[child.tag] = child
    name = parts["SourceFilename"].text if "SourceFilename" in parts else None
    _check(bool(name), "a source names no file")
    file = opened.find(str(name))
    text = parts["SourceBand"].text if "SourceBand" in parts else "1"
    band = _integer(text, "SourceBand", len(file.stated))
    whole = (0.0, 0.0, float(file.size[0]), float(file.size[1]))
    taken = _rectangle(parts["SrcRect"]) if "SrcRect" in parts else whole
    placed = _rectangle(parts["DstRect"]) if "DstRect" in parts else whole
    shrinking = max(taken[2] / placed[2], taken[3] / placed[3])
    _check(shrinking <= _MAX_SHRINKING, f"a file is shown {shrinking:.0f} times smaller; {_MAX_SHRINKING} is allowed")
    nodata = parts["NODATA"].text if "NODATA" in parts else None
    return file.source(band, taken, placed, None if nodata is None else repr(_float(nodata, "NODATA")))


def _check_element(element: ElementTree.Element, attributes: tuple[str, ...]) -> None:
    for name in element.keys():  # noqa: SIM118 (an element is not a dictionary)
        _check(name in attributes, f"an attribute {name} of {element.tag} is not allowed")


def _rectangle(element: ElementTree.Element) -> Rectangle:
    x, y, width, height = (_float(element.get(name), element.tag) for name in ("xOff", "yOff", "xSize", "ySize"))
    is_within = all(math.isfinite(value) and abs(value) <= _MAX_SIDE for value in (x, y, width, height))
    _check(is_within and width > 0 and height > 0, f"a {element.tag} is not a part of an image")
    return x, y, width, height


def _wkt(text: str) -> str:
    """Return a coordinate reference system as WKT; names of files or addresses are not looked up."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    if not text:
        return ""
    _check(
        re.match(r"EPSG:\d{1,6}\Z|[A-Za-z_]+\[", text) is not None, f"its SRS {text[:40]!r} is neither WKT nor EPSG:N"
    )
    try:
        return str(CRS.from_user_input(text).to_wkt())
    except CRSError as error:
        raise ImageError(f"its SRS {text[:40]!r} is not known") from error


def _grid(text: str) -> tuple[float, ...]:
    numbers = tuple(_floats(text))
    _check(len(numbers) == 6 and all(map(math.isfinite, numbers)), "its GeoTransform is not one of six numbers")
    return numbers


def _floats(text: str) -> Iterator[float]:
    for part in text.split(","):
        yield _float(part, "GeoTransform")


def _float(text: str | None, name: str) -> float:
    try:
        return float(text or "")
    except ValueError as error:
        raise ImageError(f"its {name} is {str(text)[:40]!r}; a number is required") from error


def _integer(text: str | None, name: str, maximum: int) -> int:
    _check(text is not None and re.match(r"\s*\d{1,10}\s*\Z", text) is not None, f"its {name} is {str(text)[:40]!r}")
    number = int(text or 0)
    _check(1 <= number <= maximum, f"its {name} is {number}; 1 to {maximum:,} is allowed")
    return number


def _check(is_allowed: bool, problem: str) -> None:
    if not is_allowed:
        raise ImageError(problem)
