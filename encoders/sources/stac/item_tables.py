"""STAC items in Parquet files, in the layout of stac-geoparquet.

See https://github.com/radiantearth/stac-geoparquet-spec: a row is an item, its properties are columns, its assets are
structs.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import Place
from orbithash.encoders.places.geometry import is_nested_deeply
from orbithash.encoders.sources.geometry_columns import GeometryColumn
from orbithash.encoders.sources.stac.bands import OFFSET_APPLIED
from orbithash.encoders.sources.stac.documents import Feature
from orbithash.encoders.sources.tables import column_values, type_problem, unreadable

__all__ = ["ItemTable", "PlacedFeature", "is_item_table"]

# Columns that are fields of an item and not of its properties.
_FIELDS = ("id", "collection", "bbox", "assets")
_TIMES = ("datetime", "start_datetime")
_PROPERTIES = (*_TIMES, "label", "caption", *OFFSET_APPLIED)
_BATCH_ROWS = 2**12


@dataclass(frozen=True)
class PlacedFeature(Feature):
    """A row as an item. `place` is that of its geometry column: None for null, a `ValueError` for an invalid one."""

    place: Place | ValueError | None


def is_item_table(path: Path) -> bool:
    """Return whether a Parquet file has the columns of stac-geoparquet: ids and assets.

    Raises:
        InputError: it is not a Parquet file.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq
    import pyarrow.types as types

    try:
        schema = pq.read_schema(path)
    except (pa.ArrowException, OSError) as error:
        raise unreadable(path, error) from error
    if not {"id", "assets"} <= set(schema.names):
        return False
    kind = schema.field("assets").type
    # Writers without a common schema of all assets store maps or JSON.
    return bool(types.is_struct(kind) or types.is_map(kind) or types.is_string(kind) or types.is_large_string(kind))


class ItemTable:
    """A Parquet file whose rows are items."""

    def __init__(self, path: Path) -> None:
        """Open the file. Raises `InputError` if it is not Parquet, or for columns of times or places of other types."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        self.path = path
        try:
            self._file = pq.ParquetFile(path)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(path, error) from error
        schema = self._file.schema_arrow
        for name in (name for name in _TIMES if name in schema.names):
            if problem := type_problem("datetime", schema.field(name).type):
                raise InputError(f"{path}: {problem.replace('datetime', name, 1)}")
        self._geometry = GeometryColumn.find(self._file, path, has_place=False)

    def ids(self) -> Iterator[str]:
        """Yield the ids of all rows; "" for null."""
        for batch in self._batches(["id"]):
            yield from ("" if name is None else str(name) for name in batch["id"].to_pylist())

    def features(self) -> Iterator[PlacedFeature]:
        """Yield all rows as items; some thousand are in memory at a time."""
        names = self._file.schema_arrow.names
        projection = [name for name in names if name.startswith("proj:")]
        columns = [name for name in (*_FIELDS, *_PROPERTIES, *projection) if name in names]
        for batch in self._batches([*columns, *([self._geometry.name] if self._geometry else [])]):
            places = self._geometry.places(batch[self._geometry.name]) if self._geometry else [None] * len(batch)
            values = [
                column_values("datetime", batch[name]) if name in _TIMES else batch[name].to_pylist()
                for name in columns
            ]
            for place, *row in zip(places, *values, strict=True):
                yield PlacedFeature(_item(dict(zip(columns, row, strict=True))), self.path, place)

    def _batches(self, columns: list[str]) -> Iterator[Any]:
        import pyarrow as pa

        try:
            yield from self._file.iter_batches(_BATCH_ROWS, columns=columns)
        except (pa.ArrowException, OSError) as error:
            raise unreadable(self.path, error) from error


def _item(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as the JSON object of an item, whose times are `datetime` or the `ValueError` of an invalid one."""
    properties = {name: _plain(value) for name, value in row.items() if name not in _FIELDS and value is not None}
    for name in [name for name, value in properties.items() if isinstance(value, bytes)]:
        properties[name] = _geometry_json(properties[name])
    bbox = row.get("bbox")
    if isinstance(bbox, dict):
        bbox = list(bbox.values()) if None not in bbox.values() else None
    return {
        "type": "Feature",
        "id": None if row["id"] is None else str(row["id"]),
        "collection": row.get("collection"),
        "bbox": bbox,
        "properties": properties,
        "assets": _assets(row["assets"]),
    }


def _assets(value: Any) -> Any:
    """Return assets by key: structs have all keys of the file, maps are lists of pairs, texts are JSON."""
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return None
    if isinstance(value, list):
        value = dict(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return a value without the null fields of its structs."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items() if one is not None}
    return [_plain(one) for one in value] if isinstance(value, list) else value


def _geometry_json(wkb: bytes) -> Any:
    """Return a geometry as GeoJSON; an empty object, which is not a geometry, for bytes that are not WKB."""
    import shapely

    geometry = None if is_nested_deeply(wkb) else shapely.from_wkb(wkb, on_invalid="ignore")
    return {} if geometry is None else json.loads(shapely.to_geojson(geometry))
