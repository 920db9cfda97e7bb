"""Geometry columns of Parquet files: GeoParquet, GeoArrow, and the geometry types of Parquet.

See https://geoparquet.org/releases/v1.1.0/ for the metadata and the encodings of geometries.
"""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.outlines import Place, place_of, project
from orbithash.encoders.places.geometry import is_nested_deeply

__all__ = ["GeometryColumn", "Places"]

_log = logging.getLogger(__name__)

_NATIVE = {
    name.lower(): name for name in ("Point", "LineString", "Polygon", "MultiPoint", "MultiLineString", "MultiPolygon")
}
_ENCODINGS = ("wkb", *_NATIVE)
# Names under which other programs write geometries without any metadata.
_USUAL_NAMES = ("geometry", "geom", "wkb_geometry")
# Deviation of a projected outline from its straight edges, as a part of its extent.
_TOLERANCE = 1 / 2000


@dataclass(frozen=True)
class Places:
    """Centres and outlines of N geometries.

    Attributes:
        lon: degrees east, WGS 84, float64 [N]; NaN for null and for an invalid geometry.
        lat: degrees north, float64 [N].
        footprint: outlines as WKB, object [N]; None without one.
        problems: what is wrong with an invalid geometry, by its position.
    """

    lon: npt.NDArray[np.float64]
    lat: npt.NDArray[np.float64]
    footprint: npt.NDArray[Any]
    problems: dict[int, str]


@dataclass(frozen=True)
class GeometryColumn:
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
    def find(file: Any, path: Path, has_place: bool) -> "GeometryColumn | None":
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
            return GeometryColumn(name, encoding, _foreign(description.get("crs")))
        except (ValueError, AttributeError, TypeError, KeyError) as error:
            raise InputError(f"{path}: the geometry column cannot be read: {error}") from error

    def places(self, column: Any) -> list[Place | ValueError | None]:
        """Return the place of each geometry of an Arrow array; None for null, a `ValueError` for an invalid one."""
        return [self._place(value) for value in getattr(column, "storage", column).to_pylist()]

    def place_arrays(self, column: Any) -> Places:
        """Return the places of all geometries of an Arrow array, as `places` does; fast for most points and polygons.

        Points and polygons without holes in longitude and latitude, away from 180 degrees, are computed together.
        """
        import shapely

        storage = getattr(column, "storage", column)
        num = len(storage)
        places = Places(np.full(num, np.nan), np.full(num, np.nan), np.full(num, None), {})
        remaining = np.flatnonzero(storage.is_valid().to_numpy(zero_copy_only=False))
        if self.encoding == "wkb" and self.crs is None:
            # GEOS ends the process at a nesting of some thousand collections; those rows are refused below.
            outlines = [None if one is None or is_nested_deeply(one) else one for one in storage.to_pylist()]
            geometries = shapely.from_wkb(np.array(outlines, object), on_invalid="ignore")
            simple = _are_simple(geometries)
            areas = shapely.orient_polygons(shapely.force_2d(geometries[simple]))
            centres = shapely.centroid(areas)
            # Adding zero turns -0.0 into 0.0.
            places.lon[simple], places.lat[simple] = shapely.get_x(centres) + 0.0, shapely.get_y(centres) + 0.0
            places.footprint[simple] = shapely.to_wkb(areas)
            remaining = remaining[~simple[remaining]]
        for row, place in zip(remaining.tolist(), self.places(storage.take(remaining)), strict=True):
            if isinstance(place, Place):
                places.lon[row], places.lat[row], places.footprint[row] = place
            elif place is not None:
                places.problems[row] = str(place)
        return places

    def _place(self, value: Any) -> Place | ValueError | None:
        import shapely
        from shapely.geometry import shape

        if value is None:
            return None
        if self.encoding == "wkb" and is_nested_deeply(value):
            return ValueError("its geometry has collections that are nested too deeply")
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


def _are_simple(geometries: npt.NDArray[Any]) -> npt.NDArray[np.bool_]:
    """Return which geometries are points, or polygons without holes, that every rule of `outlines` leaves unchanged."""
    import shapely

    bounds = shapely.bounds(geometries)
    kinds = shapely.get_type_id(geometries)
    # Comparisons with NaN, the bounds of no geometry and of an empty one, are false.
    within = (np.abs(bounds) <= (180, 90, 180, 90)).all(axis=1) & (bounds[:, 2] - bounds[:, 0] < 180)
    is_area = (kinds == shapely.GeometryType.POLYGON) & (shapely.get_num_interior_rings(geometries) == 0)
    simple: npt.NDArray[np.bool_] = within & (is_area | (kinds == shapely.GeometryType.POINT))
    return simple


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
