"""`upsert` of codes made elsewhere, and of items that are tiles of scenes."""

import json

import numpy as np
import pyarrow as pa
import pytest
from archive_parts import serving_archive

from orbithash.encoders.places.code_description import CodeDescription
from orbithash.search.client import Client
from tests.encoders.sources.codes.code_files import code_column, write_codes

BITS, MODEL = 16, "m" * 32
CODES = np.arange(10, dtype=np.uint8).reshape(5, 2)


@pytest.fixture
def served(tmp_path):
    with serving_archive(tmp_path / "archive") as (address, _, _):
        yield address


def table(path, description=None, **columns):
    columns = {
        "code": code_column(CODES),
        "label": ["a", None, "b", None, "c"],
        "lon": [1.5] * 5,
        "lat": [2.0] * 5,
        **columns,
    }
    return write_codes(path, description=description or CodeDescription(BITS, MODEL), **columns)


def test_codes_become_rows_as_they_are(cli, served, tmp_path):
    path = table(tmp_path / "a.parquet", thumbnail=[b"jpeg"] + [None] * 4, uri=["u"] + [None] * 4, stamp=["s"] * 5)
    assert json.loads(cli("upsert", path, "--address", served, "--json").out) == {"written": 5, "refused": {}}
    with Client(served) as client:
        rows = client.get([f"row{n}" for n in range(5)], include=("code", "uri", "thumbnail"))
    assert [rows[f"row{n}"].code for n in range(5)] == [code.tobytes() for code in CODES]
    first, second = rows["row0"], rows["row1"]
    assert (first.label, first.lon, first.uri, first.thumbnail) == ("a", 1.5, "u", b"jpeg")
    assert (second.label, second.uri) == (None, str(path))


def test_a_row_that_cannot_be_used_is_refused_alone(cli, served, tmp_path):
    codes = pa.array([[1, 2], None, [3, 4], [5, 6], [7, 8]], pa.list_(pa.uint8(), 2))
    outlines = pa.array([None, None, b"no outline", None, None], pa.binary())
    done = json.loads(
        cli("upsert", table(tmp_path / "a.parquet", code=codes, footprint=outlines), "--address", served, "--json").out
    )
    assert (done["written"], sorted(done["refused"])) == (3, ["row1", "row2"])


def test_codes_of_another_model_are_refused(cli, served, tmp_path):
    path = table(tmp_path / "a.parquet", CodeDescription(BITS, "other"))
    done = cli("upsert", path, "--address", served)
    assert done.code == 2
    assert f"has 16-bit codes of the model other; the gateway serves 16-bit codes of {MODEL}" in done.err


def test_codes_without_a_description_need_options(cli, served, tmp_path):
    path = write_codes(tmp_path / "a.parquet", description=False, code=code_column(CODES))
    assert "has no column path or uri" in cli("upsert", path, "--address", served).err
    options = ("--codes", f"bits=16,order=msb,model={MODEL}")
    assert json.loads(cli("upsert", path, *options, "--address", served, "--json").out)["written"] == 5


def test_a_tile_of_a_scene_is_not_sent(cli, served, tmp_path):
    (tmp_path / "a.tif").write_bytes(b"II*\0")
    (tmp_path / "b.png").write_bytes(b"")
    (tmp_path / "list.txt").write_text("a.tif#0,0,64,64\nb.png\n")
    done = json.loads(cli("upsert", tmp_path / "list.txt", "--address", served, "--json").out)
    assert "it is a tile of a scene, which cannot be sent alone" in done["refused"]["a.tif#0,0,64,64"]
