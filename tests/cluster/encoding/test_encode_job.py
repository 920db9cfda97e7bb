"""Encoding: all of a folder arrives or is told of, whatever dies on the way, and never twice."""

import json
import re
import shutil

import numpy as np
import pytest
import rasterio
from cluster_parts import REASONS, write_image
from rasterio.warp import transform_bounds

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel

pytestmark = pytest.mark.ray


@pytest.fixture
def encode(ray_cluster, cli, model):
    """Encodes into an archive and returns the summary."""

    def call(source, archive, *options):
        ended = cli("encode", source, "--model", model, "--archive", archive, "--json", *options)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        return json.loads(ended.out)

    return call


def stored(archive):
    """Key to code; no key is there twice."""
    opened = Archive.open(archive)
    ids, codes = opened.codes()
    keys = opened.take(ids, ["key"])["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, map(bytes, codes), strict=True))


def encoded_alone(model, folder, keys):
    """Key to code, each image by itself, without Ray."""
    loaded = HashModel.load(model)
    return {
        key: bytes(loaded.encode([read_image(folder / key, loaded.preprocessing.rendering)])[0]) for key in sorted(keys)
    }


def test_every_image_is_a_row_or_has_a_reason(encode, cli, bad_images, model, tmp_path):
    source, archive = tmp_path / "images", tmp_path / "archive"
    shutil.copytree(bad_images, source)
    ended = cli("encode", source, "--model", model, "--archive", archive)
    assert ended.code == 0, ended.err
    assert re.match("encoded 2 of 8 images .*, refused 6 .*; the archive has 2 rows\n", ended.out)
    for name, words in REASONS.items():
        assert f"refused {name}: {words}" in ended.err
    good = {"good.jpg", "sixteen_bit.png"}
    assert stored(archive) == encoded_alone(model, source, good)
    refused = Archive.open(archive).refused()
    assert refused.keys() == REASONS.keys()
    for key, words in REASONS.items():
        assert refused[key].startswith(words), refused[key]
        assert "\n" not in refused[key]

    # Again: nothing is new. One more file: that one alone.
    before, version = stored(archive), Archive.open(archive).version
    summary = encode(source, archive)
    assert (summary["num_done_before"], summary["num_encoded"], summary["num_refused"]) == (8, 0, 0)
    assert Archive.open(archive).version == version
    write_image(source / "new.png", np.random.default_rng(7))
    summary = encode(source, archive)
    assert (summary["num_listed"], summary["num_done_before"], summary["num_encoded"]) == (9, 8, 1)
    after = stored(archive)
    assert after == before | encoded_alone(model, source, {"new.png"})
    assert Archive.open(archive).refused() == refused


def test_codes_and_columns_of_scenes(encode, scenes, model, tmp_path):
    summary = encode(scenes, tmp_path / "archive", "--workers", "1:2")
    keys = {path.relative_to(scenes).as_posix() for path in (scenes / "images").rglob("*.tif")}
    assert summary["num_encoded"] == summary["rows_in_archive"] == len(keys) == 40
    assert summary["worker_s"].keys() == summary["worker_images_per_s"].keys() == {"decode", "encode", "write"}
    for stage, seconds in summary["worker_s"].items():
        assert seconds > 0
        assert summary["worker_images_per_s"][stage] == pytest.approx(40 / seconds)
    codes = stored(tmp_path / "archive")
    assert codes == encoded_alone(model, scenes, keys)
    assert len(set(codes.values())) > 10, "the test's model tells scenes apart"

    archive = Archive.open(tmp_path / "archive")
    rows = archive.take(archive.codes()[0], ["key", "uri", "label", "caption", "lon", "lat", "thumbnail"]).to_pylist()
    sentences = {
        image["filename"]: image["sentences"][0]["raw"]
        for image in json.loads((scenes / "captions.json").read_text())["images"]
    }
    for row in rows:
        assert row["uri"] == str(scenes / row["key"])
        assert row["label"] == row["key"].split("/")[1]
        assert row["caption"] == sentences[row["key"]]
        with rasterio.open(scenes / row["key"]) as dataset:
            west, south, east, north = transform_bounds(dataset.crs, "EPSG:4326", *dataset.bounds)
        assert west < row["lon"] < east
        assert south < row["lat"] < north
        assert row["thumbnail"].startswith(b"\xff\xd8")


def test_a_worker_that_cannot_load_the_model_is_one_line(ray_cluster, cli, scenes, model, tmp_path):
    import dataclasses
    import hashlib

    from orbithash.encoders.networks.card import read_model_folder, write_card

    # Whole by its hashes, but the weights are another network's.
    card, _, weights = read_model_folder(model)
    card = dataclasses.replace(card, network=dataclasses.replace(card.network, backbone="mobilenet_v3_small"))
    folder = tmp_path / "misfit"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    write_card(card, hashlib.sha256(weights).hexdigest(), folder)
    ended = cli("encode", scenes, "--model", folder, "--archive", tmp_path / "archive")
    assert ended.code == 2
    assert ended.err.endswith(f"error: {folder}: model.safetensors does not fit the network of model.json\n")
    assert not (tmp_path / "archive").exists()


def test_tiles_of_a_satellite_scene(encode, shared, tmp_path):
    bands = [shared / "data" / "landsat8_sample" / f"LC81070352015122LGN00_B{band}.tif" for band in (4, 3, 2)]
    scene = tmp_path / "scene.tif"
    with rasterio.open(bands[0]) as first:
        profile = first.profile | {"count": 3, "photometric": "RGB"}
        bounds, size = transform_bounds(first.crs, "EPSG:4326", *first.bounds), (first.width, first.height)
    with rasterio.open(scene, "w", **profile) as stacked:
        for i, path in enumerate(bands, 1):
            with rasterio.open(path) as band:
                stacked.write(band.read(1), i)

    summary = encode(scene, tmp_path / "archive", "--tile", "256")
    archive = Archive.open(tmp_path / "archive")
    refused = archive.refused()
    assert summary["num_listed"] == archive.num_rows + len(refused)
    assert archive.num_rows > 0
    covered = np.zeros(size[::-1], bool)
    rows = archive.take(archive.codes()[0], ["key", "lon", "lat", "footprint"]).to_pylist()
    for key in [row["key"] for row in rows] + list(refused):
        column, row, width, height = map(int, re.fullmatch(r"scene\.tif#(\d+),(\d+),(\d+),(\d+)", key).groups())
        assert column + width <= size[0]
        assert row + height <= size[1]
        covered[row : row + height, column : column + width] = True
    assert covered.all(), "every pixel is in a tile that was encoded or refused"
    west, south, east, north = bounds
    for row in rows:
        assert west < row["lon"] < east
        assert south < row["lat"] < north
        assert row["footprint"]
    assert len({(row["lon"], row["lat"]) for row in rows}) == len(rows), "each tile has its own place"
