"""Columns of files of places, and rows as Arrow tables.

A file has the key of a row as its `id`, as STAC and most programs expect, and the id of the row in the archive as
`row_id`.
"""

from collections.abc import Sequence
from datetime import datetime
from typing import Any, TypedDict

import pyarrow as pa

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import CodeDescription

__all__ = ["ALWAYS", "ARCHIVE_COLUMNS", "FOUND_COLUMNS", "PlaceRow", "check_columns", "row_schema", "rows_table"]

# What a writer needs of each row: its key and its place.
ALWAYS = ("key", "lon", "lat", "footprint")
# Columns of files of an archive, and of files of an answer, in their order.
ARCHIVE_COLUMNS = ("id", "label", "datetime", "lon", "lat", "uri", "caption", "code", "vector", "thumbnail", "stamp")
FOUND_COLUMNS = ("id", "label", "datetime", "lon", "lat", "uri", "caption", "distance", "score")


class PlaceRow(TypedDict, total=False):
    """One row. A column that is absent or None is empty.

    `id` is the id of the row in its archive. `footprint` is the outline as WKB; without a valid one, the geometry is
    the point (lon, lat). `code` and `vector` are bytes. `distance` is that of a query's code in bits, `score` that of a
    detector or a rescored answer.
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
    code: bytes | None
    vector: bytes | None
    thumbnail: bytes | None
    stamp: str | None


def row_schema(columns: Sequence[str], description: CodeDescription | None) -> pa.Schema:
    """Return the types of these columns and of `ALWAYS`; `code` and `vector` need a description of the codes."""
    types = {
        "id": pa.uint64(),
        **dict.fromkeys(("key", "label", "uri", "caption", "stamp"), pa.string()),
        "datetime": pa.timestamp("us", "UTC"),
        **dict.fromkeys(("lon", "lat", "score"), pa.float64()),
        "distance": pa.int32(),
        **dict.fromkeys(("footprint", "thumbnail"), pa.binary()),
    }
    if description is not None:
        types["code"] = pa.list_(pa.uint8(), description.num_bytes)
        if description.vector_dims is not None:
            types["vector"] = pa.list_(pa.int8(), description.vector_dims)
    return pa.schema([(name, types[name]) for name in dict.fromkeys((*ALWAYS, *columns))])


def check_columns(names: Sequence[str], description: CodeDescription) -> tuple[str, ...]:
    """Return the chosen columns of an archive in the order of a file.

    `row_id` names the column `id` of an archive; `id`, `geometry` and `bbox` are always written.

    Raises:
        InputError: another name, or `vector` for an archive without vectors.
    """
    allowed = [_file_name(name) for name in ARCHIVE_COLUMNS if name != "vector" or description.vector_dims]
    chosen = {name.strip() for name in names} - {"id", "geometry", "bbox", ""}
    if unknown := sorted(chosen - set(allowed)):
        raise InputError(
            f"no column {', '.join(unknown)} to export; id and geometry are always written, and beside them "
            f"{', '.join(allowed)} are allowed"
        )
    return tuple(name for name in ARCHIVE_COLUMNS if _file_name(name) in chosen)


def _file_name(column: str) -> str:
    return "row_id" if column == "id" else column


def rows_table(rows: Sequence[PlaceRow], schema: pa.Schema) -> pa.Table:
    """Return rows as a table with the columns of a schema of `row_schema`."""
    arrays = []
    for field in schema:
        values: list[Any] = [row.get(field.name) for row in rows]
        if pa.types.is_fixed_size_list(field.type):
            signed = field.type.value_type == pa.int8()
            values = [None if one is None else memoryview(one).cast("b" if signed else "B").tolist() for one in values]
        arrays.append(pa.array(values, field.type))
    return pa.table(arrays, schema=schema)
