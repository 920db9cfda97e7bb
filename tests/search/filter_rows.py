"""Rows for tests of filters, and segments that hold them."""

import struct
from datetime import UTC, datetime, timedelta

import numpy as np
import pyarrow as pa
import shapely

from orbithash.encoders.archive.storage import schema_of
from orbithash.search.segments.columns import ArchiveColumns
from orbithash.search.segments.files import build_segment, write_segment
from orbithash.search.segments.filters.expressions import COLUMNS
from orbithash.search.segments.ids import SortedIds

DAY = datetime(2024, 5, 1, tzinfo=UTC)
SCHEMA = pa.schema([schema_of(8, "").field(name) for name in COLUMNS])

# Footprints that are not the outline of a row: not WKB, cut off, and a curve, which shapely does not read.
UNREADABLE = (
    b"not WKB",
    shapely.to_wkb(shapely.box(0, 0, 1, 1))[:-3],
    struct.pack("<BII6d", 1, 8, 3, 0, 0, 1, 1, 2, 0),
)


def make_rows(num_rows=400, seed=0):
    """Return rows in which about a third of the values of each column are null, and some are of rare kinds."""
    rng = np.random.default_rng(seed)

    def maybe(value):
        return value if rng.random() < 0.7 else None

    def footprint():
        kind = rng.random()
        if kind < 0.4:
            return shapely.to_wkb(shapely.box(rng.uniform(-20, 20), 0, rng.uniform(20, 40), 5))
        if kind < 0.45:
            return shapely.to_wkb(shapely.union(shapely.box(175, -10, 180, 10), shapely.box(-180, -10, -178, 10)))
        if kind < 0.5:
            return UNREADABLE[rng.integers(len(UNREADABLE))]
        return shapely.to_wkb(shapely.Polygon()) if kind < 0.53 else None

    rows = []
    for number in range(num_rows):
        place = rng.random() < 0.8
        lon, lat = (float(rng.uniform(-180, 180)), float(rng.uniform(-90, 90))) if place else (None, None)
        lon, lat = [(lon, lat), (lon, lat), (lon, lat), (float("nan"), lat), (lon, None)][number % 50 % 11 % 5]
        rows.append(
            {
                "key": f"scenes/{2020 + number % 6}/{number}.tif",
                "uri": f"s3://bucket/{number}",
                "label": maybe(["beach", "harbor", "river's bend", "Äcker_%", "川"][number % 5]),
                "caption": maybe(f"caption {number}" if number % 7 else "Über den Flüssen 川 100%\nzweite Zeile"),
                "datetime": maybe(DAY + timedelta(hours=int(rng.integers(-100, 100)), microseconds=number)),
                "lon": lon,
                "lat": lat,
                "footprint": footprint(),
            }
        )
    return rows


def table_of(rows):
    return pa.Table.from_pylist(rows, SCHEMA)


def segment_of(table, folder=None):
    """Return a segment of rows with ids from 0 and random codes of 8 bits, in memory or in files."""
    codes = np.random.default_rng(0).integers(0, 256, len(table), np.uint8)
    codes = pa.FixedSizeListArray.from_arrays(pa.array(codes), 1)
    ids = np.arange(len(table), dtype=np.uint64)
    batches = [(ids, table.append_column("code", codes))]
    return build_segment(batches, 8) if folder is None else write_segment(folder, batches, 8)


def archive_columns(table):
    """Return the columns of a segment that reads them when they are needed."""
    ids = np.arange(len(table), dtype=np.uint64)
    return ArchiveColumns(SortedIds.of(ids), COLUMNS, lambda names, among=None: (ids, table.select(names)))


def outline(row):
    """Return the outline of a row, or the point at its centre, or None."""
    if row["footprint"] is not None and row["footprint"] not in UNREADABLE:
        return shapely.from_wkb(row["footprint"])
    is_known = all(row[axis] is not None and row[axis] == row[axis] for axis in ("lon", "lat"))
    return shapely.Point(row["lon"], row["lat"]) if is_known else None
