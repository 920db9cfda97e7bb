"""Parquet tables of images."""

import datetime as dt
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import Place, wrap_longitude
from orbithash.encoders.places.code_description import FOOTER_KEY
from orbithash.encoders.sources.embeddings.layouts import has_vectors
from orbithash.encoders.sources.geometry_columns import GeometryColumn
from orbithash.encoders.sources.listings import Item, file_key, located, parse_time, report

__all__ = ["column_values", "list_table", "type_problem", "unreadable"]

_TEXTS = ("path", "uri", "key", "label", "caption")
_NUMBERS = ("lon", "lat")
_EPOCH = dt.datetime(1970, 1, 1, tzinfo=dt.UTC)
_PER_SECOND = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}


def list_table(path: Path) -> Iterator[Item]:
    """Yield the images of a Parquet file; some thousand rows are in memory at a time.

    Column `path` (or `uri`) is relative to the file's folder. Optional: `key` (default: the path; in files of
    `orbithash export`, whose footer describes codes, the column `id`), `label`, `caption`,
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
        raise unreadable(path, error) from error
    schema = file.schema_arrow
    present = [name for name in (*_TEXTS, "datetime", *_NUMBERS) if name in schema.names]
    is_export = FOOTER_KEY.encode() in (schema.metadata or {})
    if is_export and "key" not in present and "id" in schema.names:
        present.append("id")
    place = next((name for name in ("path", "uri") if name in present), None)
    if place is None:
        hint = "; its vectors need a model that was trained on vectors" if has_vectors(schema) else ""
        raise InputError(f"{path} has no column path or uri; it has {', '.join(schema.names)}{hint}")
    geometry = GeometryColumn.find(file, path, has_place=set(_NUMBERS) <= set(present))
    columns = [*present, *([geometry.name] if geometry else [])]
    if problems := [problem for name in present if (problem := type_problem(name, schema.field(name).type))]:
        raise report(problems, path)

    def rows() -> Iterator[tuple[str, Item]]:
        first = 0
        try:
            for batch in file.iter_batches(columns=columns):
                yield from _rows(batch, place, geometry, first, path)
                first += len(batch)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(path, error) from error

    return located(rows(), path)


def unreadable(path: Path, error: Exception) -> InputError:
    """Return the error for a file that is not Parquet, or damaged."""
    return InputError(f"{path} is not a readable Parquet file: {str(error).splitlines()[0]}")


def type_problem(name: str, kind: Any) -> str:
    """Return why values of the Arrow type `kind` cannot be those of column `name`; "" if they can."""
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
    batch: Any, place: str, geometry: GeometryColumn | None, first: int, path: Path
) -> Iterator[tuple[str, Item]]:
    """The path and the item of each row of a batch, the first of which has the number `first` in the table."""
    columns: dict[str, list[Any]] = {name: [None] * len(batch) for name in (*_TEXTS, "datetime", *_NUMBERS, "place")}
    for name in batch.schema.names:
        if geometry is not None and name == geometry.name:
            columns["place"] = geometry.places(batch[name])
        else:
            columns[name] = column_values(name, batch[name])
    for number, row in enumerate(zip(*columns.values(), strict=True), first):
        fields = dict(zip(columns, row, strict=True))
        fields["key"] = fields["key"] or fields.pop("id", None)
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


def column_values(name: str, column: Any) -> list[Any]:
    """Return the values of a column as Python objects, with a `ValueError` in place of one that is invalid.

    Args:
        name: `datetime`, `lon`, `lat` or the name of a column of texts.
        column: an Arrow array.
    """
    import pyarrow as pa
    import pyarrow.types as types

    kind = _value_type(column.type)
    column = column.cast(kind)
    if types.is_null(kind):
        return [None] * len(column)
    if name in (*_TEXTS, "id"):
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
