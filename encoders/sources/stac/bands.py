"""What STAC states about the bands of an asset: names, scale and offset."""

import math
from collections.abc import Mapping
from typing import Any

from orbithash.encoders.imagery.bands import BandInfo

__all__ = ["OFFSET_APPLIED", "stated_bands"]

# Of Earth Search: the offset was subtracted from the stored numbers, whatever `raster:bands` says.
OFFSET_APPLIED = ("earthsearch:boa_offset_applied", "sentinel:boa_offset_applied")


def stated_bands(asset: Mapping[str, Any], properties: Mapping[str, Any]) -> tuple[BandInfo, ...]:
    """Return the bands of an asset in order: `bands` (STAC 1.1), or `eo:bands` beside `raster:bands` (1.0).

    Scale and offset of the whole asset count for bands that state none. Values of wrong types are left out.

    Args:
        asset: one asset of an item.
        properties: the properties of the item.
    """
    lists = [_objects(asset.get(name)) for name in ("bands", "eo:bands", "raster:bands")]
    described = lists[:1] if lists[0] else [entries for entries in lists[1:] if entries]
    if len({len(entries) for entries in described}) != 1:
        return ()
    is_applied = any(properties.get(name) is True for name in OFFSET_APPLIED)
    return tuple(_info(entries, asset, is_applied) for entries in zip(*described, strict=True))


def _info(entries: tuple[Mapping[str, Any], ...], asset: Mapping[str, Any], is_offset_applied: bool) -> BandInfo:
    names = [entry.get(key) for entry in entries for key in ("name", "common_name", "eo:common_name")]
    found: dict[str, float] = {}
    for key in ("scale", "offset"):
        stated = [_number(place.get(name)) for place in (*entries, asset) for name in (f"raster:{key}", key)]
        if numbers := [number for number in stated if number is not None]:
            found[key] = numbers[0]
    if is_offset_applied and "offset" in found:
        found["offset"] = 0.0
    return BandInfo(tuple(dict.fromkeys(name for name in names if isinstance(name, str) and name)), **found)


def _number(value: Any) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf


def _objects(value: Any) -> list[Mapping[str, Any]]:
    """The entries of a list of JSON objects; empty for anything else."""
    return value if isinstance(value, list) and all(isinstance(entry, dict) for entry in value) else []
