"""Place and outline of a STAC item: its geometry, else what the projection extension states, else its bounding box."""

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from orbithash.encoders.imagery.outlines import Place, bounding_box, place_of, project
from orbithash.encoders.places.geometry import MAX_COLLECTIONS

__all__ = ["place_of_item"]

# Deviation of a projected outline from its straight edges, as a part of its extent.
_TOLERANCE = 1 / 2000


def place_of_item(item: Mapping[str, Any], asset: Mapping[str, Any]) -> Place | None:
    """Return the place of an item; None if it states none.

    Without a geometry, `proj:geometry`, `proj:bbox`, or `proj:transform` with `proj:shape` in the coordinate reference
    system of the asset or the item are projected; without these, the place is that of `bbox`.

    Args:
        item: the JSON object of an item.
        asset: its asset that is read; what it states of its projection takes precedence over the item.

    Raises:
        ValueError: a geometry, a projection or a bounding box that is not one of a place on the Earth.
    """
    if (geometry := item.get("geometry")) is not None:
        outline = _shape(geometry, "its geometry is not GeoJSON")
        try:
            return place_of(outline)
        except ValueError as error:
            raise ValueError(f"its geometry is not in degrees of WGS 84: {error}") from error
    properties = item.get("properties")
    found = _projected(asset, properties if isinstance(properties, dict) else {})
    if found is not None or item.get("bbox") is None:
        return found
    west, south, east, north = _corners(item["bbox"], "bbox")
    try:
        return place_of(bounding_box(west, south, east, north))
    except ValueError as error:
        raise ValueError(f"its bbox is not in degrees of WGS 84: {error}") from error


def _projected(asset: Mapping[str, Any], properties: Mapping[str, Any]) -> Place | None:
    """Return the place that the projection extension states; None if it does not state all that is needed."""

    def stated(*names: str) -> Any:
        values = (place.get(f"proj:{name}") for place in (asset, properties) for name in names)
        return next((value for value in values if value is not None), None)

    code, epsg, text = stated("code"), stated("epsg"), stated("wkt2", "projjson")
    crs = (
        code or (f"EPSG:{epsg}" if epsg is not None else None) or (json.dumps(text) if isinstance(text, dict) else text)
    )
    if crs is None:
        return None
    if (geometry := stated("geometry")) is not None:
        outline = _shape(geometry, "its proj:geometry is not GeoJSON")
    elif (bbox := stated("bbox")) is not None:
        outline = _ring([_corners(bbox, "proj:bbox")[i] for i in (0, 1, 0, 3, 2, 3, 2, 1)])
    elif (grid := stated("transform")) is not None and (shape := stated("shape")) is not None:
        a, b, c, d, e, f = _numbers(grid, "proj:transform", (6, 9))[:6]
        height, width = _numbers(shape, "proj:shape", (2,))
        corners = ((0, 0), (0, height), (width, height), (width, 0))
        outline = _ring([value for x, y in corners for value in (a * x + b * y + c, d * x + e * y + f)])
    else:
        return None
    if outline.is_empty:
        return None
    west, south, east, north = outline.bounds
    try:
        return place_of(project(outline, str(crs), _TOLERANCE * max(east - west, north - south)))
    except ValueError as error:
        raise ValueError(f"its place in {str(crs)[:80]} (proj: fields) is not one on the Earth: {error}") from error


def _shape(geometry: Any, message: str) -> Any:
    """Return GeoJSON as a shapely geometry; `ValueError` with the message for anything else."""
    import shapely
    from shapely.geometry import shape

    if _depth(geometry) > MAX_COLLECTIONS:
        raise ValueError(f"{message}: its collections are nested too deeply")
    try:
        return shape(geometry)
    except (shapely.errors.ShapelyError, AttributeError, IndexError, KeyError, TypeError, ValueError) as error:
        raise ValueError(message) from error


def _depth(geometry: Any) -> int:
    """Return how many collections are nested in GeoJSON."""
    depth, level = 0, [geometry]
    while level := [part for one in level if isinstance(one, dict) for part in _list(one.get("geometries"))]:
        depth += 1
    return depth


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _ring(values: Sequence[float]) -> Any:
    from shapely.geometry import Polygon

    return Polygon(list(zip(values[::2], values[1::2], strict=True)))


def _corners(bbox: Any, name: str) -> tuple[float, float, float, float]:
    """Return west, south, east and north of a bounding box of two or three dimensions."""
    numbers = _numbers(bbox, name, (4, 6))
    half = len(numbers) // 2
    return numbers[0], numbers[1], numbers[half], numbers[half + 1]


def _numbers(values: Any, name: str, lengths: Sequence[int]) -> list[float]:
    is_list = isinstance(values, list) and len(values) in lengths
    if not is_list or not all(isinstance(one, int | float) and not isinstance(one, bool) for one in values):
        raise ValueError(f"its {name} is not a list of {' or '.join(map(str, lengths))} numbers")
    try:
        numbers = [float(one) for one in values]
    except OverflowError:
        numbers = [math.inf]
    if not all(map(math.isfinite, numbers)):
        raise ValueError(f"its {name} has a number that is not finite")
    return numbers
