"""Parquet tables of images, with their geometry columns: GeoParquet, GeoArrow, and the geometry types of Parquet.

See https://geoparquet.org/releases/v1.1.0/ for the metadata and the encodings of geometries.
"""

import datetime as dt
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import Place, place_of, project, wrap_longitude
from orbithash.encoders.sources.listings import Item, file_key, located, parse_time, report

__all__ = ["list_table"]

_log = logging.getLogger(__name__)

_TEXTS = ("path", "uri", "key", "label", "caption")
_NUMBERS = ("lon", "lat")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}

_NATIVE = {
    name.lower(): name for name in ("Point", "LineString", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon")
}
_ENCODINGS = ("wkb", *_NATIVE)
# Names under which other programs write geometries without any metadata.
_USUAL_NAMES = ("geometry", "geom", "wkb_geometry")
# Deviation of a projected outline from its straight edges, as a part of its extent.
_TOLERANCE = 1 / 2000


def list_table(path: Path) -> Iterator[Item]:
    """Yield the images of a Parquet file; some thousand rows are in memory at a time.

    Column `path` (or `uri`) is relative to the file's folder. Optional: `key` (default: the path), `label`, `caption`,
    `datetime` (timestamps of any unit, dates, or ISO 8601 text; UTC without a zone), `lon` and `lat` (degrees), and the
    primary geometry column of GeoParquet, in its own coordinate reference system. `lon` and `lat` take precedence over
    the centre of the geometry. A row that cannot be used has a problem, and the others are read.

    Raises:
        InputError: not a Parquet file, columns of unusable types, or no row that can be used.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(path, error) from error
    schema = file.schema_arrow
    present = [name for name in (*_TEXTS, "datetime", *_NUMBERS) if name in schema.names]
    place = next((name for name in ("path", "uri") if name in present), None)
    if place is None:
        raise InputError(f"{path} has no column path or uri; it has {', '.join(schema.names)}")
    geometry = _GeometryColumn.find(file, path, has_place=set(_NUMBERS) <= set(present))
    columns = [*present, *([geometry.name] if geometry else [])]
    if problems := [problem for name in present if (problem := _type_problem(name, schema.field(name).type))]:
        raise report(problems, path)

    def rows() -> Iterator[tuple[str, Item]]:
        first = 0
        try:
            for batch in file.iter_batches(columns=columns):
                yield from _rows(batch, place, geometry, first, path)
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise _unreadable(path, error) from error

    return located(rows(), path)


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}")


def _type_problem(name: str, kind: Any) -> str:
    """Why values of the Arrow type `kind` cannot be those of column `name`; "" if they can."""
    import pyarrow.types as types

    kind = _value_type(kind)
    is_text = types.is_string(kind) or types.is_large_string(kind) or types.is_string_view(kind)
    is_number = types.is_integer(kind) or types.is_floating(kind) or types.is_decimal(kind)
    if is_text or types.is_null(kind):
        return ""
    if name == "datetime":
        if types.is_timestamp(kind) or types.is_date(kind):
            return ""
        advice = "a number has no unit: " if is_number else ""
        return (
            f"column datetime of type {kind}: {advice}store timestamps (in pandas by to_datetime with its unit), "
            "dates, or text such as 2015-05-02T01:31:00Z"
        )
    if name in _NUMBERS:
        return "" if is_number else f"column {name} of type {kind}: numbers are allowed"
    is_scalar = is_number or types.is_boolean(kind)
    return "" if is_scalar else f"column {name} of type {kind}: text or numbers are allowed"


def _value_type(kind: Any) -> Any:
    import pyarrow.types as types

    return kind.value_type if types.is_dictionary(kind) else kind


def _rows(
    batch: Any, place: str, geometry: "_GeometryColumn | None", first: int, path: Path
) -> Iterator[tuple[str, Item]]:
    """The path and the item of each row of a batch, the first of which has the number `first` in the table."""
    columns: dict[str, list[Any]] = {name: [None] * len(batch) for name in (*_TEXTS, "datetime", *_NUMBERS, "place")}
    for name in batch.schema.names:
        if geometry is not None and name == geometry.name:
            columns["place"] = geometry.places(batch[name])
        else:
            columns[name] = _values(name, batch[name])
    for number, row in enumerate(zip(*columns.values(), strict=True), first):
        fields = dict(zip(columns, row, strict=True))
        where, key = fields[place], fields["key"] or (file_key(fields[place]) if fields[place] else f"row {number}")
        try:
            if not where:
                raise ValueError(f"row {number} has no {place}")
            yield where, _item(key, fields)
        except ValueError as error:
            yield "", Item(key, "", problem=str(error))


def _item(key: str, fields: dict[str, Any]) -> Item:
    """The item of a row; `ValueError` for a value that cannot be used."""
    for value in fields.values():
        if isinstance(value, ValueError):
            raise value
    lon, lat = (None if value is None or value != value else value for value in (fields["lon"], fields["lat"]))
    if (lon is not None and abs(lon) > 360) or (lat is not None and abs(lat) > 90):
        raise ValueError(f"lon {lon} and lat {lat}; degrees from -360 to 360 and from -90 to 90 are allowed")
    place: Place | None = fields["place"]
    if place is not None and lon is None and lat is None:
        lon, lat = place.lon, place.lat
    return Item(
        key,
        "",
        label=fields["label"],
        caption=fields["caption"],
        datetime=fields["datetime"],
        lon=None if lon is None else wrap_longitude(lon),
        lat=lat,
        footprint=None if place is None else place.footprint,
    )


def _values(name: str, column: Any) -> list[Any]:
    """The values of a column as Python objects; a `ValueError` in place of one that is invalid."""
    import pyarrow as pa
    import pyarrow.types as types

    kind = _value_type(column.type)
    column = column.cast(kind)
    if types.is_null(kind):
        return [None] * len(column)
    if name in _TEXTS:
        return list(column.cast(pa.string()).to_pylist())
    if name in _NUMBERS:
        convert: Callable[[Any], Any] = _number
    elif types.is_timestamp(kind):
        per_second, column = _PER_SECOND[kind.unit], column.cast(pa.int64())
        convert = lambda value: _time(value, per_second)  # noqa: E731
    elif types.is_date(kind):
        column = column.cast(pa.date32()).cast(pa.int32())
        convert = lambda days: _time(days * 86_400, 1)  # noqa: E731
    else:
        convert = lambda text: parse_time(text) if text.strip() else None  # noqa: E731

    def tried(value: Any) -> Any:
        try:
            return None if value is None else convert(value)
        except ValueError as error:
            return error

    return [tried(value) for value in column.to_pylist()]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{value!r} is not a number of degrees") from error


def _time(value: int, per_second: int) -> dt.datetime:
    """The time `value / per_second` seconds after 1970, to the microsecond below."""
    try:
        return _EPOCH + dt.timedelta(microseconds=value * 10**6 // per_second)
    except OverflowError as error:
        raise ValueError("its datetime lies beyond the years 1 to 9999") from error


@dataclass(frozen=True)
class _GeometryColumn:
    """The primary geometry column of a table.

    Attributes:
        name: of the column.
        encoding: `wkb`, or the GeoArrow type of all geometries in lower case, such as `polygon`.
        crs: the coordinate reference system as text that rasterio knows; None for longitude and latitude of WGS 84.
    """

    name: str
    encoding: str
    crs: str | None

    @staticmethod
    def find(file: Any, path: Path, has_place: bool) -> "_GeometryColumn | None":
        """Return the column of an open `ParquetFile`, or None without one.

        Args:
            file: the open file.
            path: for messages.
            has_place: the table has columns `lon` and `lat`, so that a geometry in an unknown coordinate reference
                system can be left out.

        Raises:
            InputError: damaged metadata, an unknown encoding, or an unknown coordinate reference system.
        """
        try:
            found = _described(file)
            if found is None:
                for name in set(_USUAL_NAMES) & set(file.schema_arrow.names):
                    _log.warning("%s: column %s is not read, because it has no GeoParquet metadata", path, name)
                return None
            name, description = found
            if name not in file.schema_arrow.names:
                raise ValueError(f"there is no column {name}")
            encoding = str(description.get("encoding", "")).lower()
            if encoding not in _ENCODINGS:
                raise ValueError(f"encoding {description.get('encoding')!r} is not one of {', '.join(_ENCODINGS)}")
            if "crs" in description and description["crs"] is None:
                if has_place:
                    _log.warning("%s: column %s is not read, because its reference system is unknown", path, name)
                    return None
                raise ValueError(
                    "its coordinate reference system is unknown (null); set it, or give columns lon and lat"
                )
            return _GeometryColumn(name, encoding, _foreign(description.get("crs")))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise InputError(f"{path}: the geometry column cannot be read: {error}") from error

    def places(self, column: Any) -> list[Place | ValueError | None]:
        """Return the place of each geometry of an Arrow array; None for null, a `ValueError` for an invalid one."""
        return [self._place(value) for value in getattr(column, "storage", column).to_pylist()]

    def _place(self, value: Any) -> Place | ValueError | None:
        import shapely
        from shapely.geometry import shape

        if value is None:
            return None
        try:
            if self.encoding == "wkb":
                geometry = shapely.from_wkb(value)
            else:
                geometry = shape({"type": _NATIVE[self.encoding], "coordinates": _coordinates(value)})
        except (shapely.errors.ShapelyError, TypeError, ValueError, KeyError, IndexError):
            return ValueError(f"its geometry is not a geometry in the encoding {self.encoding}")
        try:
            if self.crs is not None and not geometry.is_empty:
                west, south, east, north = geometry.bounds
                geometry = project(geometry, self.crs, _TOLERANCE * max(east - west, north - south))
            return place_of(geometry)
        except ValueError as error:
            return ValueError(f"its geometry has no place on the Earth: {error}")


def _described(file: Any) -> tuple[str, Mapping[str, Any]] | None:
    """Name of the geometry column and its description as in the metadata of GeoParquet."""
    schema = file.schema_arrow
    metadata = (schema.metadata or {}).get(b"geo")
    if metadata is not None:
        described = json.loads(metadata)
        name = described["primary_column"]
        return name, described["columns"][name]
    for field in schema:
        tags = field.metadata or {}
        extension = getattr(field.type, "extension_name", tags.get(b"ARROW:extension:name", b"").decode())
        if extension.startswith("geoarrow."):
            crs = json.loads(tags.get(b"ARROW:extension:metadata") or b"{}").get("crs", "OGC:CRS84")
            return field.name, {"encoding": extension.removeprefix("geoarrow."), "crs": crs}
    for column in file.schema:
        kind = json.loads(column.logical_type.to_json())
        if kind.get("Type") in ("Geometry", "Geography"):
            return column.path, {"encoding": "wkb", "crs": kind.get("crs") or "OGC:CRS84"}
    return None


def _foreign(crs: Any) -> str | None:
    """A coordinate reference system as text for rasterio; None if it is WGS 84, whose x is always longitude here."""
    from rasterio.crs import CRS
    from rasterio.errors import CRSError

    if crs is None:
        return None
    text = crs if isinstance(crs, str) else json.dumps(crs)
    # Parquet's own geometry types name a system by its EPSG number.
    text = f"EPSG:{text.removeprefix('srid:')}" if text.startswith("srid:") else text
    try:
        known = CRS.from_user_input(text)
    except CRSError as error:
        raise ValueError(f"its coordinate reference system {text[:80]} is not known") from error
    return None if known.to_epsg() == 4326 or known == CRS.from_user_input("OGC:CRS84") else text


def _coordinates(value: Any) -> Any:
    """Coordinates of GeoJSON from those of GeoArrow: points are structs of x and y, or lists of numbers."""
    if isinstance(value, dict):
        return value["x"], value["y"]
    return [_coordinates(part) for part in value] if value and isinstance(value[0], list | dict) else value
