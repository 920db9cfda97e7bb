"""What a file of places holds as a whole: numbers of rows, extent, time span."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

import numpy as np

from orbithash.encoders.places.geometry import Geometries

__all__ = ["Contents", "time_text"]

# By the type ids of GEOS.
_TYPES = {
    0: "Point",
    1: "LineString",
    2: "LineString",
    3: "Polygon",
    4: "MultiPoint",
    5: "MultiLineString",
    6: "MultiPolygon",
    7: "GeometryCollection",
}


@dataclass
class Contents:
    """Summary of rows, which grows with `add`.

    Attributes:
        rows: number of rows.
        without_place: rows without a geometry.
        without_time: rows without a time.
        unusable_outlines: rows whose footprint is no valid outline; their geometry is their point, or null.
        geometry_types: names of the types that occur.
        bbox: [west, south, east, north] of all geometries; None without any.
        first, last: the earliest and the latest time, UTC; None without any.
    """

    rows: int = 0
    without_place: int = 0
    without_time: int = 0
    unusable_outlines: int = 0
    geometry_types: set[str] = field(default_factory=set)
    bbox: list[float] | None = None
    first: datetime | None = None
    last: datetime | None = None

    @property
    def is_stac(self) -> bool:
        """Whether each row has what a STAC item must have: a place and a time."""
        return self.rows > 0 and not self.without_place and not self.without_time

    def add(self, geometries: Geometries, times: Sequence[datetime | None]) -> None:
        """Count rows."""
        import shapely

        known = [time if time.tzinfo else time.replace(tzinfo=UTC) for time in times if time is not None]
        is_missing = shapely.is_missing(geometries.shapes)
        present = geometries.shapes[~is_missing]
        bounds = shapely.total_bounds(present).tolist() if len(present) else None
        self.merge(
            Contents(
                len(times),
                int(is_missing.sum()),
                len(times) - len(known),
                geometries.num_unusable,
                {_TYPES[kind] for kind in np.unique(shapely.get_type_id(present)).tolist()},
                bounds,
                min(known, default=None),
                max(known, default=None),
            )
        )

    def merge(self, other: "Contents") -> None:
        """Add the rows of another summary."""
        self.rows += other.rows
        self.without_place += other.without_place
        self.without_time += other.without_time
        self.unusable_outlines += other.unusable_outlines
        self.geometry_types |= other.geometry_types
        boxes = [box for box in (self.bbox, other.bbox) if box is not None]
        if boxes:
            west, south, east, north = zip(*boxes, strict=True)
            self.bbox = [min(west), min(south), max(east), max(north)]
        self.first = min((time for time in (self.first, other.first) if time), default=None)
        self.last = max((time for time in (self.last, other.last) if time), default=None)

    def to_json(self) -> dict[str, Any]:
        """Return the summary as JSON values."""
        return {
            "rows": self.rows,
            "without_place": self.without_place,
            "without_time": self.without_time,
            "unusable_outlines": self.unusable_outlines,
            "geometry_types": sorted(self.geometry_types),
            "bbox": self.bbox,
            "first": time_text(self.first),
            "last": time_text(self.last),
        }

    @classmethod
    def from_json(cls, fields: dict[str, Any]) -> "Contents":
        """Return the summary of `to_json`."""
        first, last = (fields[name] and datetime.fromisoformat(fields[name]) for name in ("first", "last"))
        return cls(**{**fields, "geometry_types": set(fields["geometry_types"]), "first": first, "last": last})


def time_text(time: datetime | None) -> str | None:
    """Return a time in the form of RFC 3339, in UTC; None for an unknown one."""
    if time is None:
        return None
    return (time if time.tzinfo else time.replace(tzinfo=UTC)).astimezone(UTC).isoformat().replace("+00:00", "Z")
