"""Write GeoParquet 1.1: WKB in longitude and latitude (CRS84), a box of each row, ZSTD, row groups of equal size.

With a description of the codes, the footer holds it under the key `orbithash`, and the keys `emb` (the convention of
geoembeddings.org) and `stac-geoparquet`; the latter only if each row has a place and a time, which STAC requires.
"""

import base64
import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from orbithash.encoders.places.code_description import FOOTER_KEY, CodeDescription
from orbithash.encoders.places.columns import PlaceRow, row_schema, rows_table
from orbithash.encoders.places.contents import Contents
from orbithash.encoders.places.geometry import Geometries, table_geometries
from orbithash.encoders.places.stac import STAC_VERSION, Catalog, collection_of, embedding_fields

__all__ = ["ROW_GROUP_BYTES", "GeoParquetWriter"]

# Bytes of the columns of a row group, before compression. Other programs skip and read whole groups.
ROW_GROUP_BYTES = 128 * 2**20

_SIDES = ("xmin", "ymin", "xmax", "ymax")
_BBOX = pa.struct([(name, pa.float64()) for name in _SIDES])
_STAC = pa.schema(
    [
        ("stac_version", pa.string()),
        ("stac_extensions", pa.list_(pa.string())),
        ("collection", pa.string()),
        ("assets", pa.struct([("image", pa.struct([("href", pa.string()), ("roles", pa.list_(pa.string()))]))])),
        ("links", pa.list_(pa.struct([(name, pa.string()) for name in ("href", "rel", "type", "title")]))),
    ]
)
# Values that repeat; and those whose smallest and largest help readers to skip groups.
_REPEATED = ("label", "stac_version", "collection")
_COMPARED = ("id", "row_id", "label", "datetime", "lon", "lat", "distance", "score")


class GeoParquetWriter:
    """Writes rows in groups of about `row_group_bytes`; the memory that it takes is that of a group.

    Attributes:
        contents: summary of the rows that were written.
    """

    def __init__(
        self,
        file: Any,
        columns: Sequence[str],
        description: CodeDescription | None = None,
        catalog: Catalog | None = None,
        row_group_bytes: int = ROW_GROUP_BYTES,
    ) -> None:
        """Start a file; `catalog` makes each row a STAC item, if the columns have a time and an image."""
        import pyarrow.parquet as pq

        self.contents = Contents()
        self._rows = row_schema(columns, description)
        self._description = description
        self._catalog = catalog if {"datetime", "uri"} <= set(columns) else None
        self._row_group_bytes = row_group_bytes
        self._schema = self._file_schema(columns)
        self._writer: Any = pq.ParquetWriter(
            file,
            self._schema,
            compression="zstd",
            store_schema=False,
            use_dictionary=[name for name in _REPEATED if name in self._schema.names],
            write_statistics=[
                *(name for name in _COMPARED if name in self._schema.names),
                *(f"bbox.{name}" for name in _SIDES),
            ],
        )
        self._waiting: list[pa.Table] = []
        self._num_bytes = 0

    def write(self, rows: Sequence[PlaceRow]) -> None:
        """Write some rows."""
        self.write_table(rows_table(rows, self._rows))

    def write_table(self, rows: pa.Table) -> None:
        """Write rows with the columns of `row_schema`, in any order; others are left out."""
        if not len(rows):
            return
        rows = rows.select(self._rows.names).cast(self._rows)
        geometries = table_geometries(rows)
        times = rows["datetime"].to_pylist() if "datetime" in rows.schema.names else [None] * len(rows)
        self.contents.add(geometries, times)
        table = self._file_table(rows, geometries)
        while len(table):
            # The number of rows that fill the group, by the mean size of these.
            row_bytes = max(1.0, table.nbytes / len(table))
            count = min(len(table), max(1, int((self._row_group_bytes - self._num_bytes) / row_bytes)))
            self._waiting.append(table.slice(0, count))
            self._num_bytes += int(count * row_bytes)
            table = table.slice(count)
            if len(table) or self._num_bytes >= self._row_group_bytes:
                self._write_group()

    def close(self) -> None:
        """Write the last group and the footer."""
        if self._waiting:
            self._write_group()
        footer = {name: json.dumps(value) for name, value in self._footer().items()}
        # Arrow takes the metadata of a table from its own schema in the footer, which it would write at the beginning.
        schema = base64.b64encode(self._schema.with_metadata(footer).serialize())
        self._writer.add_key_value_metadata({**footer, "ARROW:schema": schema})
        self._writer.close()

    def _write_group(self) -> None:
        table = pa.concat_tables(self._waiting)
        self._waiting, self._num_bytes = [], 0
        self._writer.write_table(table, row_group_size=len(table))

    def _file_schema(self, columns: Sequence[str]) -> pa.Schema:
        named = {"id": "row_id"}
        fields = [pa.field("id", pa.string(), nullable=False)]
        fields += [self._rows.field(name).with_name(named.get(name, name)) for name in columns]
        fields.append(pa.field("geometry", pa.binary()))
        if self._description is not None:
            fields += [pa.field("has_footprint", pa.bool_()), pa.field("footprint", pa.binary())]
        fields.append(pa.field("bbox", _BBOX))
        if self._catalog is not None:
            fields += list(_STAC)
        return pa.schema(fields)

    def _file_table(self, rows: pa.Table, geometries: Geometries) -> pa.Table:
        columns = {
            name: rows["id" if name == "row_id" else name] for name in self._schema.names if name in _named(rows)
        }
        columns["id"] = rows["key"]
        columns["geometry"] = pa.array(geometries.wkb, pa.binary())
        columns["bbox"] = _boxes(geometries)
        if self._description is not None:
            has_footprint = rows["footprint"].is_valid().combine_chunks()
            columns["has_footprint"] = has_footprint
            # Only outlines that the geometry does not reproduce.
            kept = pa.array(geometries.keeps_footprint)
            columns["footprint"] = pc.if_else(kept, pa.scalar(None, pa.binary()), rows["footprint"].combine_chunks())
        if self._catalog is not None:
            columns |= _stac_columns(rows, self._catalog)
        return pa.table([columns[name] for name in self._schema.names], schema=self._schema)

    def _footer(self) -> dict[str, Any]:
        geometry: dict[str, Any] = {
            "encoding": "WKB",
            "geometry_types": sorted(self.contents.geometry_types),
            "covering": {"bbox": {name: ["bbox", name] for name in _SIDES}},
        }
        if self.contents.bbox is not None:
            geometry["bbox"] = self.contents.bbox
        footer: dict[str, Any] = {
            "geo": {"version": "1.1.0", "primary_column": "geometry", "columns": {"geometry": geometry}}
        }
        if self._description is not None:
            footer |= {FOOTER_KEY: self._description.to_json(), "emb": embedding_fields(self._description)}
        if self._catalog is not None and self._description is not None and self.contents.is_stac:
            collection = collection_of(self._catalog, self._description, self.contents)
            footer["stac-geoparquet"] = {"version": "1.1.0", "collections": {self._catalog.id: collection}}
        return footer


def _named(rows: pa.Table) -> set[str]:
    """Return the names in a file of the columns of rows."""
    return {*rows.schema.names, "row_id"} - {"id", "key", "footprint"}


def _boxes(geometries: Geometries) -> pa.Array:
    import shapely

    bounds = shapely.bounds(geometries.shapes)
    is_missing = shapely.is_missing(geometries.shapes)
    values = [pa.array(np.ascontiguousarray(column)) for column in bounds.T]
    return pa.StructArray.from_arrays(values, fields=list(_BBOX), mask=pa.array(is_missing))


def _stac_columns(rows: pa.Table, catalog: Catalog) -> dict[str, Any]:
    count = len(rows)
    roles = pa.array([["data"]] * count, pa.list_(pa.string()))
    image = pa.StructArray.from_arrays([rows["uri"].combine_chunks(), roles], names=["href", "roles"])
    return {
        "stac_version": pa.array([STAC_VERSION] * count),
        "stac_extensions": pa.array([[]] * count, _STAC.field("stac_extensions").type),
        "collection": pa.array([catalog.id] * count),
        "assets": pa.StructArray.from_arrays([image], names=["image"]),
        "links": pa.array([[]] * count, _STAC.field("links").type),
    }
