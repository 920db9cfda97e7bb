"""Files of the rows behind a gateway, by both clients."""

import asyncio
import json
from datetime import UTC, datetime

import numpy as np
import pyarrow.parquet as pq
import pytest
import shapely
from archive_parts import serving_archive

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.encoders.places.code_description import FOOTER_KEY, CodeDescription
from orbithash.encoders.vectors import VectorSpec
from orbithash.search.client import AsyncClient, Client
from orbithash.search.client import client as blocking
from orbithash.search.protocol.errors import InvalidQuery

NUM_ROWS = 23
OUTLINE = shapely.box(10, 50, 11, 51).wkb


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The address of a gateway over an archive with vectors, outlines and thumbnails, and the archive."""
    folder = tmp_path_factory.mktemp("archive") / "archive"
    random = np.random.default_rng(0)
    keys = [f"k{number:02d}" for number in range(NUM_ROWS)]
    with serving_archive(folder, vector=VectorSpec(3, 0.5)) as (address, *_):
        archive = Archive.open(folder)
        with archive.writing():
            archive.write(
                Archive.table(
                    random.integers(0, 256, (NUM_ROWS, 2), dtype=np.uint8),
                    16,
                    keys,
                    [f"images/{key}.tif" for key in keys],
                    vector=[None, *(bytes([number, 0, 255]) for number in range(1, NUM_ROWS))],
                    label=["beach" if number % 2 else None for number in range(NUM_ROWS)],
                    datetime=[datetime(2024, 5, 1, 12, number, tzinfo=UTC) for number in range(NUM_ROWS)],
                    lon=[10.5] * NUM_ROWS,
                    lat=[50.5] * NUM_ROWS,
                    footprint=[OUTLINE] * NUM_ROWS,
                    thumbnail=[bytes([255, 216, number]) for number in range(NUM_ROWS)],
                )
            )
        with Client(address) as client:
            client.refresh()
        yield address, Archive.open(folder)


def export(kind, address, *words):
    if kind == "blocking":
        with Client(address) as client:
            return client.export(*words)

    async def run():
        async with AsyncClient(address) as client:
            return await client.export(*words)

    return asyncio.run(run())


@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_file_has_what_the_archive_has(served, tmp_path, kind, monkeypatch):
    address, archive = served
    for module in (blocking, __import__("orbithash.search.client.async_client", fromlist=["x"])):
        # Several pages, the last one not full.
        monkeypatch.setattr(module, "PAGE_ROWS", 10)
    assert export(kind, address, tmp_path / "rows.parquet") == NUM_ROWS
    table = pq.read_table(tmp_path / "rows.parquet")
    ids, rows = archive.scan(["key", "code", "vector", "label", "datetime", "footprint", "thumbnail", "uri"])
    assert table["row_id"].to_pylist() == ids.tolist()
    assert table["id"].to_pylist() == rows["key"].to_pylist()
    for name in ("code", "vector", "label", "datetime", "thumbnail", "uri"):
        assert table[name].to_pylist() == rows[name].to_pylist(), name
    assert set(table["geometry"].to_pylist()) == {OUTLINE}
    described = CodeDescription.from_json(table.schema.metadata[FOOTER_KEY.encode()])
    assert described == CodeDescription(16, archive.model_id, vector_dims=3, vector_scale=0.5)


def test_a_filter_chooses_the_rows(served, tmp_path):
    assert export("blocking", served[0], tmp_path / "rows.geojson", "label = 'beach'") == NUM_ROWS // 2
    features = json.loads((tmp_path / "rows.geojson").read_text())["features"]
    assert {feature["properties"]["label"] for feature in features} == {"beach"}


@pytest.mark.parametrize(
    ("name", "filter_text", "error", "message"),
    [
        ("rows.shp", "", InputError, "rows.shp has no ending of a file of places"),
        ("rows.csv", "label =", InvalidQuery, "filter"),
        ("no\0name.csv", "", ValueError, "null"),
        ("file/rows.csv", "", InputError, "cannot be written"),
    ],
)
@pytest.mark.parametrize("kind", ["blocking", "asyncio"])
def test_a_refused_export_leaves_no_file(served, tmp_path, kind, name, filter_text, error, message):
    (tmp_path / "file").write_text("a file, not a folder")
    with pytest.raises(error, match=message):
        export(kind, served[0], f"{tmp_path}/{name}", filter_text)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
