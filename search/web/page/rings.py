"""Outlines of areas: their text in the address, their checks, and the outlines of rows."""

import math
import struct
from collections.abc import Sequence
from itertools import combinations, pairwise

__all__ = ["MAX_VERTICES", "Ring", "format_ring", "parse_ring", "ring_of"]

# Of an area in the address, and of the outline of a tile.
MAX_VERTICES = 200
# Kinds of geometry in Well-Known Binary.
_POLYGON, _MULTIPOLYGON = 3, 6
# Polygons of an outline that are looked at.
_MAX_PARTS = 16
# Vertices (longitude, latitude) in degrees, WGS 84; the last is joined to the first.
Ring = tuple[tuple[float, float], ...]


def parse_ring(text: str) -> Ring:
    """Return the outline in a text such as `3 50,4 50,4 51`, longitudes as -180 to 180.

    Raises `ValueError` with a sentence for the user.
    """
    vertices: list[tuple[float, float]] = []
    for part in text.split(",")[: MAX_VERTICES + 2]:
        try:
            lon, lat = map(float, part.split())
        except ValueError:
            lon = lat = math.nan
        if not (abs(lon) <= 540 and abs(lat) <= 90):
            raise ValueError("The area in the address is damaged. Draw it again.")
        vertices.append((_wrapped(lon), lat + 0.0))
    if len(vertices) > 1 and vertices[0] == vertices[-1]:
        vertices.pop()
    if len(vertices) > MAX_VERTICES:
        raise ValueError(f"An area has at most {MAX_VERTICES} corners. Draw a simpler one.")
    if len(set(vertices)) < 3:
        raise ValueError("An area has at least three different corners. Draw it again.")
    path = _path(vertices)
    is_around_pole = path[0] != path[-1]
    if not is_around_pole and not any(_side(path[0], path[1], point) for point in path[2:]):
        raise ValueError("The corners of the area are on one line. Draw it again.")
    if _crosses_itself(path):
        raise ValueError("The outline of the area crosses itself. Draw it again without a crossing.")
    if not is_around_pole and _width(path) >= 360:
        raise ValueError("An area is less than once around the Earth. Draw a smaller one.")
    return tuple(vertices)


def format_ring(ring: Ring) -> str:
    """Return the coordinates of an outline as Well-Known Text, closed.

    Longitudes go on beyond 180 degrees: filters check outlines in the plane, where one that jumps from 180 to -180 may
    cross itself.
    """
    path = _path(ring)
    if path[0] != path[-1]:
        # Around a pole: no way of writing it is without a jump.
        path = [*ring, ring[0]]
    lons = [lon for lon, _ in path]
    # Filters take longitudes from -360 to 360.
    turn = -360 if max(lons) > 360 else 360 if min(lons) < -360 else 0
    return ", ".join(f"{lon + turn!r} {lat!r}" for lon, lat in path)


def ring_of(wkb: bytes | None) -> Ring:
    """Return the outer ring of an outline in Well-Known Binary, with at most `MAX_VERTICES` vertices.

    Of several polygons, it is the first one; those on both sides of 180 degrees are joined, with longitudes above 180.
    Empty for anything else: a row without a valid outline is shown as a point.
    """
    try:
        rings = _outer_rings(wkb or b"")
    except (struct.error, IndexError):
        return ()
    if not rings or not all(abs(lon) <= 360 and abs(lat) <= 90 for ring in rings for lon, lat in ring):
        return ()
    is_cut = len(rings) > 1 and {-180.0, 180.0} <= {lon for ring in rings for lon, _ in ring}
    vertices = list(_joined(rings) if is_cut else rings[0])
    if len(vertices) > 1 and vertices[0] == vertices[-1]:
        vertices.pop()
    step = max(1, math.ceil(len(vertices) / MAX_VERTICES))
    return tuple(vertices[::step])


def _outer_rings(wkb: bytes) -> list[Ring]:
    """Return the outer rings of a polygon or of a multipolygon; empty for other geometries."""
    order = "<" if wkb[0] == 1 else ">"
    kind, count = struct.unpack_from(f"{order}II", wkb, 1)
    start, rings = (9, []) if kind == _MULTIPOLYGON else (0, [])
    for _ in range(min(count, _MAX_PARTS) if kind == _MULTIPOLYGON else 1):
        order = "<" if wkb[start] == 1 else ">"
        kind, num_rings = struct.unpack_from(f"{order}II", wkb, start + 1)
        if kind != _POLYGON or not num_rings:
            return []
        start += 9
        for number in range(num_rings):
            (num_vertices,) = struct.unpack_from(f"{order}I", wkb, start)
            if number == 0 and num_vertices:
                numbers = struct.unpack_from(f"{order}{2 * num_vertices}d", wkb, start + 4)
                rings.append(tuple(zip(numbers[::2], numbers[1::2], strict=True)))
            start += 4 + 16 * num_vertices
    return rings


def _joined(rings: list[Ring]) -> Ring:
    """Return the outline of polygons that were cut at 180 degrees, else the first ring."""
    import shapely

    turned = [tuple((lon + 360, lat) for lon, lat in ring) if max(ring)[0] <= 0 else ring for ring in rings]
    try:
        whole = shapely.union_all([shapely.Polygon(ring) for ring in turned])
    except (shapely.errors.ShapelyError, ValueError):
        return rings[0]
    return tuple(whole.exterior.coords) if whole.geom_type == "Polygon" else rings[0]


def _wrapped(lon: float) -> float:
    return lon + 0.0 if abs(lon) <= 180 else (lon + 180) % 360 - 180


def _path(vertices: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the closed outline with whole turns added to longitudes: each edge takes the shorter way around the Earth.

    The last vertex is the first one, or, around a pole, that many turns from it.
    """
    path = [vertices[0]]
    for lon, lat in (*vertices[1:], vertices[0]):
        path.append((lon + 360 * round((path[-1][0] - lon) / 360), lat))
    return path


def _width(path: list[tuple[float, float]]) -> float:
    lons = [lon for lon, _ in path]
    return max(lons) - min(lons)


def _crosses_itself(path: list[tuple[float, float]]) -> bool:
    """Return whether two edges that are not neighbours meet."""
    edges = list(pairwise(path))
    last = len(edges) - 1
    return any(
        _meet(edges[one], edges[other])
        for one, other in combinations(range(len(edges)), 2)
        if other - one > 1 and (one, other) != (0, last)
    )


Edge = tuple[tuple[float, float], tuple[float, float]]


def _meet(one: Edge, other: Edge) -> bool:
    (a, b), (c, d) = one, other
    if max(a[0], b[0]) < min(c[0], d[0]) or max(c[0], d[0]) < min(a[0], b[0]):
        return False
    if max(a[1], b[1]) < min(c[1], d[1]) or max(c[1], d[1]) < min(a[1], b[1]):
        return False
    return _side(a, b, c) * _side(a, b, d) <= 0 and _side(c, d, a) * _side(c, d, b) <= 0


def _side(a: tuple[float, float], b: tuple[float, float], point: tuple[float, float]) -> int:
    """Return on which side of the line from a to b a point lies: -1, 0 or 1."""
    area = (b[0] - a[0]) * (point[1] - a[1]) - (b[1] - a[1]) * (point[0] - a[0])
    return (area > 0) - (area < 0)
