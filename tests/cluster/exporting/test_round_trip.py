"""An archive that is exported and imported again has the same rows, bit for bit; only the ids of rows are new."""

import datetime as dt
import struct
import tempfile
from pathlib import Path

import numpy as np
import pytest
import shapely
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from orbithash.cluster.encoding.codes import import_codes
from orbithash.cluster.exporting.export import ExportOptions, export
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import num_bytes
from orbithash.encoders.keys import key_problem
from orbithash.encoders.vectors import VectorSpec

BOX = shapely.box(4, 50, 5, 51)
OUTLINES = [
    BOX.wkb,
    shapely.reverse(BOX).wkb,
    shapely.Point(3, 4).wkb,
    shapely.Point(-0.0, 0.0).wkb,
    shapely.MultiPolygon([shapely.box(179, 0, 180, 1), shapely.box(-180, 0, -179, 1)]).wkb,
    shapely.box(-180, 80, 180, 90).wkb,
    shapely.force_3d(BOX, 7).wkb,
    shapely.to_wkb(BOX, byte_order=0),
    shapely.to_wkb(shapely.set_srid(BOX, 4326), include_srid=True),
    shapely.Polygon().wkb,
    shapely.Point(float("nan"), 1).wkb,
    shapely.GeometryCollection([BOX, shapely.Point(1, 2)]).wkb,
    b"not WKB",
    b"",
]

TEXTS = st.none() | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TIMES = st.none() | st.datetimes(dt.datetime(1, 1, 2), dt.datetime(9999, 12, 30), timezones=st.just(dt.UTC))
KEYS = st.text(min_size=1, max_size=20).filter(lambda key: key_problem(key) is None)


@st.composite
def rows(draw, dims):
    """Draw one row without its code."""
    return {
        "key": draw(KEYS),
        "uri": draw(st.sampled_from(["", "/data/a.tif", "s3://b/ä #0,0,64,64", "https://x/y?z=1"]) | KEYS),
        "label": draw(TEXTS),
        "caption": draw(TEXTS),
        "datetime": draw(TIMES),
        "lon": draw(st.none() | st.floats(-180, 180)),
        "lat": draw(st.none() | st.floats(-90, 90)),
        "footprint": draw(st.none() | st.sampled_from(OUTLINES)),
        "thumbnail": draw(st.none() | st.binary(max_size=30)),
        "stamp": draw(TEXTS),
        "vector": draw(st.none() | st.binary(min_size=dims, max_size=dims)) if dims else None,
    }


@st.composite
def archives(draw):
    """Draw bits, the specification of vectors, rows, and a seed for their codes."""
    dims = draw(st.sampled_from([0, 1, 5]))
    spec = VectorSpec(dims, draw(st.floats(1e-6, 1e6))) if dims else None
    found = draw(st.lists(rows(dims), max_size=6, unique_by=lambda row: row["key"]))
    return draw(st.integers(8, 70)), spec, found, draw(st.integers(0, 2**32 - 1))


def write_archive(path, bits, spec, found, seed):
    archive = Archive.create(path, bits, "0123456789abcdef" * 2, spec)
    codes = np.packbits(np.random.default_rng(seed).integers(0, 2, (len(found), bits), np.uint8), axis=1)
    assert codes.shape == (len(found), num_bytes(bits))
    if found:
        archive.write(Archive.table(codes, bits, **{name: [row[name] for row in found] for name in found[0]}))
    return archive


def content(path):
    """Return the columns, their metadata, and the rows by key with numbers as bytes."""
    archive = Archive.open(path)
    found = {row["key"]: row for row in archive.scan(archive.schema.names)[1].to_pylist()}
    for row in found.values():
        for name in ("lon", "lat"):
            row[name] = None if row[name] is None else struct.pack("<d", row[name])
    return archive.schema.remove_metadata(), archive.schema.metadata, found


ODD = {
    "key": "key",
    "uri": "",
    "label": "",
    "caption": "=1+1\n\0",
    "datetime": dt.datetime(2020, 1, 1, 0, 0, 0, 1, tzinfo=dt.UTC),
    "lon": -0.0,
    "lat": None,
    "footprint": b"",
    "thumbnail": b"",
    "stamp": "",
    "vector": None,
}


@pytest.mark.parametrize("form", ["codes.parquet", "stac"])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize=True)
@given(described=archives())
@example(described=(8, None, [], 0))
@example(described=(9, VectorSpec(1, 0.1), [{**ODD, "vector": b"\x80"}, {**ODD, "key": "b", "lon": None}], 1))
@example(
    described=(64, None, [{**ODD, "key": str(n), "footprint": one, "lon": 1.0} for n, one in enumerate(OUTLINES)], 2)
)
def test_export_and_import_lose_nothing(form, described):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_archive(folder / "archive", *described)
        export(str(folder / "archive"), folder / form)
        import_codes(folder / form, str(folder / "again"))
        assert content(folder / "again") == content(folder / "archive")


def test_parts_are_one_archive_again(tmp_path):
    places = [(n % 360 - 180.0, n % 90 - 45.0) for n in range(500)]
    found = [
        {**ODD, "key": f"k{n}", "lon": lon, "lat": lat, "thumbnail": bytes(2000)} for n, (lon, lat) in enumerate(places)
    ]
    write_archive(tmp_path / "archive", 16, None, found, 3)
    options = ExportOptions(format_name="stac", part_bytes=200_000, row_group_bytes=50_000)
    assert export(str(tmp_path / "archive"), tmp_path / "out", options).files > 2
    for number, source in enumerate(("out", "out/collection.json")):
        import_codes(tmp_path / source, str(tmp_path / f"again{number}"))
        assert content(tmp_path / f"again{number}") == content(tmp_path / "archive")
