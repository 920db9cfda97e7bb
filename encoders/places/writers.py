"""Write rows to GeoParquet, GeoJSON, STAC item collections and CSV."""

import base64
import csv
import io
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import STAC_FIELD, CodeDescription
from orbithash.encoders.places.columns import FOUND_COLUMNS, PlaceRow, row_schema, rows_table
from orbithash.encoders.places.contents import Contents, time_text
from orbithash.encoders.places.geometry import item_bbox, table_geometries
from orbithash.encoders.places.geoparquet import ROW_GROUP_BYTES, GeoParquetWriter
from orbithash.encoders.places.stac import STAC_VERSION, Catalog

__all__ = ["FORMATS", "MEDIA_TYPES", "ByteSink", "PlaceRow", "PlacesWriter", "format_of", "open_writer"]

# By the ending of a file's name.
FORMATS = ("parquet", "geojson", "csv")
MEDIA_TYPES = {
    "parquet": "application/vnd.apache.parquet",
    "geojson": "application/geo+json",
    "csv": "text/csv; charset=utf-8",
    "items": "application/geo+json",
}

_TEXTS = ("id", "label", "uri", "caption", "stamp")
# Begin formulas in spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class ByteSink(Protocol):
    """A file that is open for writing bytes; it need not be seekable."""

    def write(self, data: bytes, /) -> Any:
        """Write bytes."""


class PlacesWriter(Protocol):
    """Writes rows to a file, which stays open.

    Attributes:
        contents: summary of the rows that were written.
    """

    contents: Contents

    def write(self, rows: Sequence[PlaceRow]) -> None:
        """Write some rows."""

    def write_table(self, rows: pa.Table) -> None:
        """Write rows with the columns of `row_schema`, in any order; others are left out."""

    def close(self) -> None:
        """Write the end of the file; all formats but CSV cannot be read without it."""


def format_of(path: Path) -> str:
    """Return the format that the name of a file asks for. Raises `InputError` for another ending."""
    name = path.suffix.lower().removeprefix(".")
    name = {"json": "geojson", "geoparquet": "parquet"}.get(name, name)
    if name not in FORMATS:
        endings = ", ".join(f".{each}" for each in FORMATS)
        raise InputError(f"{path.name} has no ending of a file of places; one of {endings} is required")
    return name


def open_writer(
    format_name: str,
    file: ByteSink,
    description: CodeDescription | None = None,
    *,
    columns: Sequence[str] = FOUND_COLUMNS,
    catalog: Catalog | None = None,
    row_group_bytes: int = ROW_GROUP_BYTES,
) -> PlacesWriter:
    """Return a writer to a file.

    Args:
        format_name: one of `MEDIA_TYPES`.
        file: the file, which stays open.
        description: what codes and vectors of the rows are; needed for the columns `code` and `vector`.
        columns: columns of the rows, in the order of the file.
        catalog: the STAC collection of the rows, of GeoParquet and of items.
        row_group_bytes: bytes of a row group of GeoParquet, which are kept in memory.
    """
    if format_name == "parquet":
        return GeoParquetWriter(file, columns, description, catalog, row_group_bytes)
    kinds = {"geojson": _GeoJson, "items": _Items, "csv": _Csv}
    return kinds[format_name](file, columns, description, catalog)


class _TextWriter:
    """Writes rows one by one."""

    def __init__(
        self, file: ByteSink, columns: Sequence[str], description: CodeDescription | None, catalog: Catalog | None
    ) -> None:
        self.contents = Contents()
        self._file = file
        self._columns = columns
        self._schema = row_schema(columns, description)
        self._description = description
        self._catalog = catalog
        self._open()

    def write(self, rows: Sequence[PlaceRow]) -> None:
        self.write_table(rows_table(rows, self._schema))

    def write_table(self, rows: pa.Table) -> None:
        if not len(rows):
            return
        rows = rows.select(self._schema.names).cast(self._schema)
        geometries = table_geometries(rows)
        values = rows.to_pylist()
        self.contents.add(geometries, [row.get("datetime") for row in values])
        for row, shape in zip(values, geometries.shapes, strict=True):
            self._write_row(row["key"], {_NAMES.get(name, name): _plain(row[name]) for name in self._columns}, shape)

    def close(self) -> None:
        """Write the end of the file."""

    def _open(self) -> None:
        """Write the beginning of the file."""

    def _write_row(self, key: str, cells: dict[str, Any], shape: Any) -> None:
        """Write a row: its columns by their names in the file, and its shapely geometry or None."""
        raise NotImplementedError


_NAMES = {"id": "row_id"}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: a time as RFC 3339, a code as hexadecimal digits, a picture as base64."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if hasattr(value, "isoformat"):
        return time_text(value)
    return base64.b64encode(value).decode() if isinstance(value, bytes) else value


class _GeoJson(_TextWriter):
    """A FeatureCollection (RFC 7946), one feature a line."""

    def _open(self) -> None:
        member = {} if self._description is None else {STAC_FIELD: self._description.to_json()}
        self._before = json.dumps({"type": "FeatureCollection", **member})[:-1].encode() + b', "features": [\n'

    def _write_row(self, key: str, cells: dict[str, Any], shape: Any) -> None:
        self._file.write(self._before + json.dumps(self._feature(key, cells, shape), allow_nan=False).encode())
        self._before = b",\n"

    def _feature(self, key: str, cells: dict[str, Any], shape: Any) -> dict[str, Any]:
        if cells.get("code") is not None:
            cells["code"] = bytes(cells["code"]).hex()
        return {"type": "Feature", "id": key, "geometry": _geometry(shape), "properties": cells}

    def close(self) -> None:
        start = b"" if self._before == b",\n" else self._before
        self._file.write(start + b"\n]}\n")


def _geometry(shape: Any) -> Any:
    import shapely

    return None if shape is None else json.loads(shapely.to_geojson(shape))


class _Items(_GeoJson):
    """A STAC item collection, one item a line; the fields that STAC does not have begin with `orbithash:`."""

    def _feature(self, key: str, cells: dict[str, Any], shape: Any) -> dict[str, Any]:
        feature = super()._feature(key, cells, shape)
        own = ("row_id", "code", "vector", "thumbnail", "stamp", "distance", "score")
        uri = cells.pop("uri", None)
        properties = {"datetime": cells.pop("datetime", None)}
        properties |= {
            f"orbithash:{name}" if name in own else name: value for name, value in cells.items() if value is not None
        }
        return {
            "type": "Feature",
            "stac_version": STAC_VERSION,
            "stac_extensions": [],
            "id": key,
            "geometry": feature["geometry"],
            **({} if shape is None else {"bbox": item_bbox(shape)}),
            "properties": properties,
            "links": [],
            "assets": {} if uri is None else {"image": {"href": uri, "roles": ["data"]}},
        }


class _Csv(_TextWriter):
    """Comma-separated values (RFC 4180) with a header; the geometry is WKT.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """

    def _open(self) -> None:
        self._write_line(["id", *(_NAMES.get(name, name) for name in self._columns), "geometry"])

    def _write_row(self, key: str, cells: dict[str, Any], shape: Any) -> None:
        if cells.get("code") is not None:
            cells["code"] = bytes(cells["code"]).hex()
        line = {"id": key, **cells}
        for name in _TEXTS:
            if (text := line.get(name)) is not None and text.startswith(_FORMULA):
                line[name] = f"'{text}"
        self._write_line([*line.values(), None if shape is None else shape.wkt])

    def _write_line(self, cells: Sequence[Any]) -> None:
        line = io.StringIO()
        csv.writer(line).writerow(cells)
        self._file.write(line.getvalue().encode())
