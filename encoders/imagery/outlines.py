"""Outlines in longitude and latitude (WGS 84), cut at the antimeridian as RFC 7946 (GeoJSON) asks.

Every outline of a row comes from here: of a raster, of a STAC item, of a GeoParquet table, of a client's row. The rule:
longitudes lie between -180 and 180; an edge takes the shorter way around the Earth; a geometry that crosses 180 degrees
is cut there into several parts; a ring around a pole includes the pole; exterior rings run counter-clockwise.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from orbithash.encoders.places.geometry import is_nested_deeply

__all__ = ["Place", "bounding_box", "normalize", "normalize_wkb", "place_of", "project", "wrap_longitude"]

Points = npt.NDArray[np.float64]
"""[N, 2], x and y, or longitude and latitude."""

# An outline that has this many vertices is not refined any more: 32 KB as WKB.
_MAX_VERTICES = 2000
_MAX_HALVINGS = 14

# Degrees, about a tenth of a millimetre: an edge of 360 degrees goes once around the Earth.
_EPSILON = 1e-9

# A larger step along the edge than this share of its length shows that the shorter way around the Earth is wrong.
_MAX_SLIP = 0.25


class Place(NamedTuple):
    """Degrees east and north of a centre, and the outline as WKB; WGS 84."""

    lon: float
    lat: float
    footprint: bytes


def place_of(geometry: Any) -> Place | None:
    """Return the centre and the outline of a geometry in longitude and latitude, or None if it is empty.

    Raises:
        ValueError: coordinates that are not numbers, or beyond 360 degrees east and west or 90 degrees north and south.
    """
    outline = normalize(geometry)
    if outline.is_empty:
        return None
    lon, lat = _centre(outline)
    return Place(lon, lat, outline.wkb)


def normalize(geometry: Any) -> Any:
    """Return a shapely geometry in longitude and latitude by the rule of this module; one that keeps it is unchanged.

    Raises:
        ValueError: as `place_of`.
    """
    import shapely

    geometry = shapely.force_2d(geometry)
    points = shapely.get_coordinates(geometry)
    if not np.isfinite(points).all():
        raise ValueError("a coordinate is not a finite number")
    if len(points) and (np.abs(points) > (360, 90)).any():
        west, south, east, north = geometry.bounds
        raise ValueError(
            f"it reaches from {west:g}, {south:g} to {east:g}, {north:g}; longitudes from -360 to 360 and latitudes "
            "from -90 to 90 degrees are allowed"
        )
    try:
        return _rebuild(geometry, _unwrap)
    except shapely.errors.ShapelyError as error:
        raise ValueError(f"it is not a valid geometry: {_first_line(error)}") from error


def normalize_wkb(footprint: bytes) -> bytes:
    """Return an outline as WKB by the rule of this module; `ValueError` if it is not WKB, or as `place_of`."""
    import shapely

    try:
        # GEOS reads collections by recursion, and ends the process when its stack is full.
        if is_nested_deeply(footprint):
            raise ValueError("its collections are nested too deeply")
        geometry = shapely.from_wkb(footprint)
    except (shapely.errors.ShapelyError, TypeError) as error:
        raise ValueError("it is not WKB") from error
    normal = normalize(geometry)
    return footprint if normal is geometry else bytes(normal.wkb)


def bounding_box(west: float, south: float, east: float, north: float) -> Any:
    """Return the area from `west` eastwards to `east`, as a normalized geometry; it may be wider than 180 degrees.

    Raises:
        ValueError: as `place_of`.
    """
    from shapely.geometry import box

    if max(abs(west), abs(east)) > 360 or max(abs(south), abs(north)) > 90:
        raise ValueError("longitudes from -360 to 360 and latitudes from -90 to 90 degrees are allowed")
    return _cut(box(west, south, east + 360 if west > east else east, north))


def project(geometry: Any, crs: Any, tolerance: float) -> Any:
    """Return a shapely geometry in `crs` (anything rasterio knows) as a normalized one in longitude and latitude.

    Straight edges in `crs` are curves in longitude and latitude: vertices are added until the outline deviates from
    them by at most `tolerance`, in units of `crs`.

    Raises:
        ValueError: a part of the geometry has no longitude and latitude, or `crs` is not one on the Earth.
    """
    import shapely

    system = _System(crs)
    try:
        return _rebuild(shapely.force_2d(geometry), lambda points: _trace(points, system, tolerance))
    except shapely.errors.ShapelyError as error:
        raise ValueError(f"it is not a valid geometry: {_first_line(error)}") from error


def wrap_longitude(lon: float) -> float:
    """Return the same longitude between -180 and 180 degrees; values in that range are unchanged."""
    return lon if -180 <= lon <= 180 else (lon + 180) % 360 - 180


class _System:
    """A coordinate reference system and WGS 84."""

    def __init__(self, crs: Any) -> None:
        from rasterio.crs import CRS
        from rasterio.errors import CRSError

        from orbithash.encoders.imagery.rasters import gdal_errors

        self._failures: tuple[type[Exception], ...] = (*gdal_errors(), ValueError)
        try:
            self._crs = CRS.from_user_input(crs)
            # A grid of degrees has the same place at x and at x + 360.
            self.period = 360.0 if self._crs.is_geographic else math.inf
        except CRSError as error:
            raise ValueError(f"its coordinate reference system is not known: {_first_line(error)}") from error

    def to_degrees(self, points: Points) -> Points:
        """Longitude and latitude; `ValueError` if a point has none."""
        degrees = self._transform(self._crs, "EPSG:4326", points)
        if not np.isfinite(degrees).all():
            raise ValueError("a part of it lies outside the area of its coordinate reference system")
        return degrees

    def from_degrees(self, degrees: Points) -> Points:
        """The inverse of `to_degrees`; not finite for points without a counterpart."""
        try:
            return self._transform("EPSG:4326", self._crs, degrees)
        except ValueError:
            return np.full(degrees.shape, np.inf)

    def _transform(self, source: Any, target: Any, points: Points) -> Points:
        from rasterio.warp import transform

        if not len(points):
            return points
        try:
            return np.column_stack(transform(source, target, points[:, 0], points[:, 1])).astype(np.float64)
        except self._failures as error:
            raise ValueError(f"it cannot be projected: {_first_line(error)}") from error


def _trace(points: Points, system: _System, tolerance: float) -> Points:
    """Longitudes and latitudes along a line [N, 2] of `system`, refined; longitudes are continuous, beyond 180 too."""
    degrees = system.to_degrees(points)
    for _ in range(_MAX_HALVINGS):
        steps = _steps(degrees)
        middles = (points[:-1] + points[1:]) / 2
        along = np.diff(points, axis=0)
        lengths = np.hypot(*along.T)
        off = system.from_degrees(degrees[:-1] + steps / 2) - middles
        if math.isfinite(system.period):
            off[:, 0] -= system.period * np.round(off[:, 0] / system.period)
        with np.errstate(invalid="ignore", divide="ignore"):
            across = np.abs(along[:, 0] * off[:, 1] - along[:, 1] * off[:, 0]) / lengths
            slip = np.abs((along * off).sum(axis=1)) / lengths**2
            split = np.flatnonzero((lengths > 0) & ~((across <= tolerance) & (slip <= _MAX_SLIP)))
        if not len(split) or len(points) + len(split) > _MAX_VERTICES:
            break
        degrees = np.insert(degrees, split + 1, system.to_degrees(middles[split]), axis=0)
        points = np.insert(points, split + 1, middles[split], axis=0)
    return _continuous(degrees, _steps(degrees))


def _unwrap(degrees: Points) -> Points:
    """The points with continuous longitudes; only an edge around the whole Earth is longer than 180 degrees."""
    raw = np.diff(degrees, axis=0)
    around = np.abs(np.abs(raw[:, 0]) - 360) < _EPSILON
    return _continuous(degrees, np.where(around[:, None], raw, _steps(degrees)))


def _steps(degrees: Points) -> Points:
    """Differences of neighbours, the shorter way around the Earth."""
    steps = np.diff(degrees, axis=0)
    far = np.abs(steps[:, 0]) > 180
    steps[far, 0] = (steps[far, 0] + 180) % 360 - 180
    return steps


def _continuous(degrees: Points, steps: Points) -> Points:
    """The points with whole turns added to their longitudes, so that neighbours differ by `steps`."""
    turns = np.cumsum(np.round((steps - np.diff(degrees, axis=0))[:, 0] / 360))
    degrees = degrees.copy()
    degrees[1:, 0] += 360 * turns
    return degrees


def _rebuild(geometry: Any, trace: Callable[[Points], Points]) -> Any:
    """The geometry with each of its lines and rings traced, then cut at the antimeridian."""
    import shapely
    from shapely.geometry import GeometryCollection, LineString, MultiLineString, MultiPoint, MultiPolygon, Point

    if geometry.is_empty:
        return geometry
    kind = geometry.geom_type
    if kind == "Polygon":
        outer = _area(trace(shapely.get_coordinates(geometry.exterior)))
        holes = [_area(trace(shapely.get_coordinates(ring))) for ring in geometry.interiors]
        return shapely.orient_polygons(outer.difference(shapely.union_all(holes)) if holes else outer)
    if kind in ("LineString", "LinearRing"):
        return _cut(LineString(trace(shapely.get_coordinates(geometry))))
    if kind == "Point":
        ((lon, lat),) = trace(shapely.get_coordinates(geometry))
        return Point(wrap_longitude(lon), lat)
    parts = [_rebuild(part, trace) for part in geometry.geoms]
    if kind == "MultiPolygon":
        whole = shapely.union_all(parts) if len(parts) > 1 and not _are_apart(parts) else None
        pieces = [piece for part in ([whole] if whole is not None else parts) for piece in _pieces(part, "Polygon")]
        return shapely.orient_polygons(pieces[0] if len(pieces) == 1 else MultiPolygon(pieces))
    if kind == "MultiPoint":
        return MultiPoint(parts)
    if kind == "MultiLineString":
        return MultiLineString([piece for part in parts for piece in _pieces(part, "LineString")])
    return GeometryCollection(parts)


def _are_apart(polygons: list[Any]) -> bool:
    """Whether no polygon shares area with another, as the parts of a valid MultiPolygon."""
    from shapely.geometry import MultiPolygon

    return bool(MultiPolygon([piece for polygon in polygons for piece in _pieces(polygon, "Polygon")]).is_valid)


def _area(ring: Points) -> Any:
    """The normalized polygon within a closed ring with continuous longitudes."""
    from shapely.geometry import Polygon

    turn = ring[-1, 0] - ring[0, 0]
    if abs(abs(turn) - 360) < _EPSILON:
        # The ring goes around a pole, which an outline in degrees reaches along the meridian of its ends.
        pole = math.copysign(90, ring[:, 1].mean())
        ring = np.concatenate([ring, [[ring[-1, 0], pole], [ring[0, 0], pole]]])
    return _cut(Polygon(ring))


def _cut(geometry: Any) -> Any:
    """A line or polygon with continuous longitudes, cut into parts between -180 and 180 degrees."""
    import shapely
    from shapely.affinity import translate

    west, south, east, north = geometry.bounds
    if west >= -180 and east <= 180 and south >= -90 and north <= 90:
        return geometry
    kind = geometry.geom_type
    if not geometry.is_valid:
        geometry = shapely.make_valid(geometry)
    pieces = []
    for turn in range(math.floor((west + 180) / 360), math.ceil((east - 180) / 360) + 1):
        strip = shapely.box(360 * turn - 180, -90, 360 * turn + 180, 90)
        piece = translate(geometry.intersection(strip), -360 * turn)
        # A strip that only its edge touches, or that rounding reaches, holds nothing of the geometry.
        pieces += [part for part in _pieces(piece, kind) if part.bounds[2] - part.bounds[0] > _EPSILON]
    return shapely.union_all(pieces)


def _pieces(geometry: Any, kind: str) -> list[Any]:
    """The parts of a geometry that are polygons, or lines."""
    if geometry.geom_type == kind:
        return [] if geometry.is_empty else [geometry]
    return [piece for part in getattr(geometry, "geoms", ()) for piece in _pieces(part, kind)]


def _centre(geometry: Any) -> tuple[float, float]:
    """Longitude and latitude of the centroid of a normalized geometry, also of one in parts at the antimeridian."""
    from shapely.affinity import translate
    from shapely.geometry import GeometryCollection

    parts = list(getattr(geometry, "geoms", [geometry]))
    # Counted from 0 to 360 degrees, parts on both sides of 180 lie side by side.
    turned = GeometryCollection(
        [translate(part, 360) if part.bounds[0] < 0 and part.bounds[2] <= 0 else part for part in parts]
    )
    width, turned_width = (bounds[2] - bounds[0] for bounds in (geometry.bounds, turned.bounds))
    centre = (turned if turned_width < width else geometry).centroid
    # Adding zero turns -0.0 into 0.0.
    return wrap_longitude(centre.x) + 0.0, centre.y + 0.0


def _first_line(error: Exception) -> str:
    return (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
