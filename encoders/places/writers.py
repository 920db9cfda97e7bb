"""Write rows to GeoParquet, GeoJSON and CSV."""

import csv
import io
import json
import math
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol, TypedDict

from orbithash.encoders.errors import InputError

__all__ = ["FORMATS", "MEDIA_TYPES", "ByteSink", "PlaceRow", "PlacesWriter", "format_of", "open_writer"]

# By the ending of a file's name.
FORMATS = ("parquet", "geojson", "csv")
MEDIA_TYPES = {
    "parquet": "application/vnd.apache.parquet",
    "geojson": "application/geo+json",
    "csv": "text/csv; charset=utf-8",
}

# Columns of all formats, before the geometry.
_COLUMNS = ("id", "key", "label", "datetime", "lon", "lat", "uri", "caption", "distance", "score")
_TEXTS = ("key", "label", "uri", "caption")
# Begin formulas in spreadsheets.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


class PlaceRow(TypedDict, total=False):
    """One row. A column that is absent or None is empty.

    `footprint` is the outline as WKB; without a valid one, the geometry is the point (lon, lat). `distance` is that of
    a query's code in bits, `score` that of a detector or a rescored answer.
    """

    id: int
    key: str
    label: str | None
    datetime: datetime | None
    lon: float | None
    lat: float | None
    uri: str | None
    caption: str | None
    distance: int | None
    score: float | None
    footprint: bytes | None


class ByteSink(Protocol):
    """A file that is open for writing bytes; it need not be seekable."""

    def write(self, data: bytes, /) -> Any:
        """Write bytes."""


class PlacesWriter(Protocol):
    """Writes rows to a file, which stays open."""

    def write(self, rows: Sequence[PlaceRow]) -> None:
        """Write some rows."""

    def close(self) -> None:
        """Write the end of the file; GeoJSON and GeoParquet cannot be read without it."""


def format_of(path: Path) -> str:
    """Return the format that the name of a file asks for. Raises `InputError` for another ending."""
    name = path.suffix.lower().removeprefix(".")
    name = {"json": "geojson", "geoparquet": "parquet"}.get(name, name)
    if name not in FORMATS:
        endings = ", ".join(f".{each}" for each in FORMATS)
        raise InputError(f"{path.name} has no ending of a file of places; one of {endings} is required")
    return name


def open_writer(format_name: str, file: ByteSink) -> PlacesWriter:
    """Return a writer of one of `FORMATS` to a file."""
    if format_name == "parquet":
        return _GeoParquet(file)
    return _GeoJson(file) if format_name == "geojson" else _Csv(file)


def _geometries(rows: Sequence[PlaceRow]) -> list[Any]:
    """Return the geometry of each row: its valid footprint, else its point, else None."""
    import shapely

    outlines = shapely.from_wkb([row.get("footprint") for row in rows], on_invalid="ignore")
    return [
        _point(row) if outline is None or outline.is_empty else outline
        for row, outline in zip(rows, outlines, strict=True)
    ]


def _point(row: PlaceRow) -> Any:
    import shapely

    lon, lat = row.get("lon"), row.get("lat")
    if lon is None or lat is None or not (math.isfinite(lon) and math.isfinite(lat)):
        return None
    return shapely.Point(lon, lat)


def _time(row: PlaceRow) -> str | None:
    time = row.get("datetime")
    if time is None:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat().replace("+00:00", "Z")


def _number(value: float | None) -> float | None:
    # JSON has no NaN.
    return value if value is not None and math.isfinite(value) else None


class _GeoJson:
    """A FeatureCollection (RFC 7946), one feature a line."""

    def __init__(self, file: ByteSink) -> None:
        self._file = file
        self._before = b'{"type": "FeatureCollection", "features": [\n'

    def write(self, rows: Sequence[PlaceRow]) -> None:
        import shapely

        for row, geometry in zip(rows, _geometries(rows), strict=True):
            properties: dict[str, Any] = {name: row.get(name) for name in _COLUMNS if name != "id"}
            properties |= {"datetime": _time(row)}
            properties |= {"lon": _number(row.get("lon")), "lat": _number(row.get("lat"))}
            properties["score"] = _number(row.get("score"))
            feature = {
                "type": "Feature",
                "id": row.get("id"),
                "geometry": None if geometry is None else json.loads(shapely.to_geojson(geometry)),
                "properties": properties,
            }
            self._file.write(self._before + json.dumps(feature, allow_nan=False).encode())
            self._before = b",\n"

    def close(self) -> None:
        start = b"" if self._before == b",\n" else self._before
        self._file.write(start + b"\n]}\n")


class _Csv:
    """Comma-separated values (RFC 4180) with a header; the geometry is WKT.

    A text that a spreadsheet would take for a formula gets an apostrophe before it.
    """

    def __init__(self, file: ByteSink) -> None:
        self._file = file
        self._write_line([*_COLUMNS, "geometry"])

    def write(self, rows: Sequence[PlaceRow]) -> None:
        for row, geometry in zip(rows, _geometries(rows), strict=True):
            cells: dict[str, Any] = {name: row.get(name) for name in _COLUMNS} | {"datetime": _time(row)}
            for name in _TEXTS:
                if cells[name] is not None and cells[name].startswith(_FORMULA):
                    cells[name] = f"'{cells[name]}"
            self._write_line([*cells.values(), None if geometry is None else geometry.wkt])

    def close(self) -> None:
        """Nothing follows the last line."""

    def _write_line(self, cells: Sequence[Any]) -> None:
        line = io.StringIO()
        csv.writer(line).writerow(cells)
        self._file.write(line.getvalue().encode())


class _GeoParquet:
    """GeoParquet 1.1 with WKB, longitude and latitude in WGS 84. Each call of `write` is a row group."""

    def __init__(self, file: ByteSink) -> None:
        import pyarrow as pa
        import pyarrow.parquet as pq

        geo = {
            "version": "1.1.0",
            "primary_column": "geometry",
            "columns": {"geometry": {"encoding": "WKB", "geometry_types": []}},
        }
        types = {
            "id": pa.uint64(),
            **dict.fromkeys(_TEXTS, pa.string()),
            "datetime": pa.timestamp("us", "UTC"),
            **dict.fromkeys(("lon", "lat", "score"), pa.float64()),
            "distance": pa.int32(),
        }
        fields = [pa.field(name, types[name]) for name in _COLUMNS]
        self._schema = pa.schema([*fields, pa.field("geometry", pa.binary())], metadata={"geo": json.dumps(geo)})
        self._writer: Any = pq.ParquetWriter(file, self._schema, compression="zstd")

    def write(self, rows: Sequence[PlaceRow]) -> None:
        import pyarrow as pa

        if not rows:
            return
        columns: dict[str, list[Any]] = {name: [row.get(name) for row in rows] for name in _COLUMNS}
        columns["geometry"] = [None if each is None else each.wkb for each in _geometries(rows)]
        self._writer.write_table(pa.table(columns, schema=self._schema))

    def close(self) -> None:
        self._writer.close()
