"""Files of places are read back by other programs, whatever the rows hold."""

import csv
import io
import json
from datetime import UTC, datetime
from pathlib import Path

import geopandas
import pyarrow.parquet as pq
import pytest
import shapely

from orbithash.encoders.errors import InputError
from orbithash.encoders.places.writers import FORMATS, format_of, open_writer

SQUARE = shapely.box(10, 50, 10.5, 50.25)
ROWS = [
    {"id": 1, "key": "a.tif", "label": "harbor", "lon": 10.25, "lat": 50.125, "footprint": SQUARE.wkb, "distance": 3},
    {"id": 2**63, "key": '=HYPERLINK("x")', "label": "<b>\n\"'", "lon": -180.0, "lat": 90.0, "score": -0.5},
    {"id": 3, "key": "ünï,code", "datetime": datetime(2024, 5, 1, 12, 30, tzinfo=UTC), "footprint": b"no geometry"},
    {"id": 4, "key": "nowhere", "caption": "+1", "lon": float("nan"), "lat": 1.0, "score": float("nan")},
    {
        "id": 5,
        "key": "empty",
        "footprint": shapely.Polygon().wkb,
        "lon": 1.0,
        "lat": 2.0,
        "datetime": datetime(2020, 1, 1),
    },
]
GEOMETRIES = [SQUARE, shapely.Point(-180, 90), None, None, shapely.Point(1, 2)]


class Pipe(io.RawIOBase):
    """A file that cannot be read or positioned, like the body of a response."""

    def __init__(self):
        self.parts = []

    def writable(self):
        return True

    def write(self, data):
        self.parts.append(bytes(data))
        return len(data)


def written(format_name, *portions):
    pipe = Pipe()
    writer = open_writer(format_name, pipe)
    for rows in portions:
        writer.write(rows)
    writer.close()
    assert not pipe.closed
    return b"".join(pipe.parts)


@pytest.mark.parametrize("portions", [(), ([],), (ROWS,), (ROWS[:2], [], ROWS[2:])])
def test_all_formats_hold_the_rows(portions):
    rows = [row for portion in portions for row in portion]
    geometries = GEOMETRIES[: len(rows)]

    features = json.loads(written("geojson", *portions))
    assert features["type"] == "FeatureCollection"
    assert [feature["id"] for feature in features["features"]] == [row["key"] for row in rows]
    assert [feature["properties"]["row_id"] for feature in features["features"]] == [row["id"] for row in rows]
    shapes = [
        feature["geometry"] and shapely.from_geojson(json.dumps(feature["geometry"]))
        for feature in features["features"]
    ]
    assert shapes == geometries

    parquet = written("parquet", *portions)
    table = pq.read_table(io.BytesIO(parquet))
    assert table["id"].to_pylist() == [row["key"] for row in rows]
    assert table["row_id"].to_pylist() == [row["id"] for row in rows]
    assert table["label"].to_pylist() == [row.get("label") for row in rows]
    frame = geopandas.read_parquet(io.BytesIO(parquet))
    assert frame.crs == "OGC:CRS84"
    assert [None if shape is None else shape for shape in frame.geometry] == geometries

    lines = list(csv.DictReader(io.StringIO(written("csv", *portions).decode(), newline="")))
    assert [line["row_id"] for line in lines] == [str(row["id"]) for row in rows]
    assert [line["geometry"] for line in lines] == ["" if shape is None else shape.wkt for shape in geometries]


def test_times_and_texts():
    lines = list(csv.DictReader(io.StringIO(written("csv", ROWS).decode(), newline="")))
    assert lines[1]["id"] == '\'=HYPERLINK("x")', "no formula"
    assert lines[1]["label"] == ROWS[1]["label"]
    assert lines[3]["caption"] == "'+1"
    features = json.loads(written("geojson", ROWS))["features"]
    for times in ([line["datetime"] for line in lines], [f["properties"]["datetime"] or "" for f in features]):
        assert times == ["", "", "2024-05-01T12:30:00Z", "", "2020-01-01T00:00:00Z"]
    assert features[3]["properties"]["score"] is None


def test_geojson_without_its_end_is_no_json():
    pipe = Pipe()
    open_writer("geojson", pipe).write(ROWS)
    with pytest.raises(json.JSONDecodeError):
        json.loads(b"".join(pipe.parts))


def test_the_format_of_a_name():
    for name in FORMATS:
        assert format_of(Path(f"places.{name}")) == name
    assert format_of(Path("a.JSON")) == "geojson"
    with pytest.raises(InputError, match=r"places\.txt has no ending of a file of places; one of \.parquet"):
        format_of(Path("places.txt"))
