"""Items of lists on their way into an archive: reasons of refused ones, places, a broken installation of PROJ."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from orbithash.cluster.cli.gateway.changes import _row
from orbithash.cluster.encoding.stages import decode, item_table
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rasters import image_formats, one_of
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source

PREPROCESSING = Preprocessing(Rendering(), 32, 32)


def write_scene(path, crs, west, north, step):
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=40, width=40, dtype="uint8", crs=crs,
        transform=from_origin(west, north, step, step),
    ) as scene:  # fmt: skip
        scene.write(np.full((1, 40, 40), 7, np.uint8))


def test_a_bad_stac_item_leaves_its_reason_and_the_others_are_decoded(tmp_path):
    write_scene(tmp_path / "a.tif", "EPSG:32631", 500_000, 5_000_000, 10)
    good = {"type": "Feature", "id": "good", "geometry": None, "properties": {}, "assets": {"data": {"href": "a.tif"}}}
    bad = {**good, "id": "bad", "assets": {"meta": {"href": "a.xml"}}}
    (tmp_path / "items.json").write_text(json.dumps({"type": "FeatureCollection", "features": [bad, good]}))
    rows = decode(item_table(list_source(tmp_path / "items.json")), PREPROCESSING).to_pylist()
    assert [row["key"] for row in rows if row["pixels"]] == ["good"]
    assert {row["key"]: row["reason"] for row in rows} == {
        "bad": f"it has no {one_of(image_formats())} asset; its assets are: meta",
        "good": None,
    }


@pytest.mark.parametrize(
    ("crs", "west"), [("EPSG:4326", -181), ("EPSG:4326", 179), ("EPSG:4326", 181), ("EPSG:32660", 800_000)]
)
def test_a_place_is_the_same_by_encode_and_by_upsert(tmp_path, crs, west):
    write_scene(tmp_path / "a.tif", crs, west, -17 if crs == "EPSG:4326" else 100_000, 0.05 if west < 1000 else 5000)
    (item,) = list_source(tmp_path / "a.tif")
    record, row = read_record(item, PREPROCESSING), _row(item)
    assert (row.lon, row.lat, row.footprint) == (record.lon, record.lat, record.footprint)
    assert -180 <= record.lon <= 180
    row.check()


@pytest.mark.parametrize("variable", ["PROJ_LIB", "PROJ_DATA"])
def test_encode_stops_before_the_first_image_if_proj_cannot_project(tmp_path, model, variable):
    write_scene(tmp_path / "a.tif", "EPSG:32631", 500_000, 5_000_000, 10)
    (tmp_path / "elsewhere").mkdir()
    command = ["encode", tmp_path / "a.tif", "--model", model, "--archive", tmp_path / "archive"]
    environment = {name: value for name, value in os.environ.items() if name not in ("PROJ_LIB", "PROJ_DATA")}
    done = subprocess.run(
        [sys.executable, "-m", "orbithash.cluster.cli.main", *map(str, command)],
        env=environment | {variable: str(tmp_path / "elsewhere")},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "error: PROJ cannot project coordinates, so no image would get a place" in done.stderr
    assert f"unset {variable}={tmp_path / 'elsewhere'}" in done.stderr
    assert not (tmp_path / "archive").exists()
