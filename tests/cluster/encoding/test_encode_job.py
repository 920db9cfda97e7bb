"""Encoding: every image of a folder becomes one row, or a refused item with its reason."""

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
    """Encode into an archive and return the summary."""

    def call(source, archive, *options):
        ended = cli("encode", source, "--model", model, "--archive", archive, "--json", *options)
        assert ended.code == 0, ended.err
        assert "Traceback" not in ended.err
        return json.loads(ended.out)

    return call


def counts(summary):
    """Return the counts of a summary that are not 0."""
    return {name: value for name, value in summary.items() if name.startswith("num_") and value}


def stored(archive):
    """Return the codes by key; no key occurs twice."""
    opened = Archive.open(archive)
    ids, codes = opened.codes()
    keys = opened.take(ids, ["key"])["key"].to_pylist()
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, map(bytes, codes), strict=True))


def encoded_alone(model, folder, keys):
    """Return the codes by key, each image encoded alone, without Ray."""
    loaded = HashModel.load(model)
    return {
        key: bytes(loaded.encode([read_image(folder / key, loaded.preprocessing.rendering)])[0]) for key in sorted(keys)
    }


def test_every_image_is_a_row_or_has_a_reason(encode, cli, bad_images, model, tmp_path):
    source, archive = tmp_path / "images", tmp_path / "archive"
    shutil.copytree(bad_images, source)
    report = tmp_path / "report.html"
    ended = cli("encode", source, "--model", model, "--archive", archive, "--report", report)
    assert ended.code == 0, ended.err
    assert re.match("encoded 2 of 8 images .*, refused 6 .*; the archive has 2 rows\n", ended.out)
    assert all(key in report.read_text() for key in Archive.open(archive).refused())
    for name, words in REASONS.items():
        assert f"refused {name}: {words}" in ended.err
    good = {"good.jpg", "sixteen_bit.png"}
    assert stored(archive) == encoded_alone(model, source, good)
    refused = Archive.open(archive).refused()
    assert refused.keys() == REASONS.keys()
    for key, words in REASONS.items():
        assert refused[key].startswith(words), refused[key]
        assert "\n" not in refused[key]

    # Again: nothing is new. One more file: only that one is encoded.
    before, version = stored(archive), Archive.open(archive).version
    summary = encode(source, archive)
    assert counts(summary) == {"num_listed": 8, "num_done_before": 2, "num_refused_before": 6}
    assert Archive.open(archive).version == version
    write_image(source / "new.png", np.random.default_rng(7))
    summary = encode(source, archive)
    assert counts(summary) == {"num_listed": 9, "num_done_before": 2, "num_refused_before": 6, "num_encoded": 1}
    after = stored(archive)
    assert after == before | encoded_alone(model, source, {"new.png"})
    assert Archive.open(archive).refused() == refused


@pytest.mark.slow
def test_changed_and_repaired_images_are_read_again(encode, cli, model, tmp_path):
    source, archive = tmp_path / "images", tmp_path / "archive"
    source.mkdir()
    for name in ("same", "changed", "broken", "repaired"):
        write_image(source / f"{name}.png", np.random.default_rng(len(name)))
    whole = (source / "repaired.png").read_bytes()
    for name in ("broken", "repaired"):
        (source / f"{name}.png").write_bytes(whole[: len(whole) // 2])
    assert counts(encode(source, archive)) == {"num_listed": 4, "num_encoded": 2, "num_refused": 2}
    before = Archive.open(archive).find(["same.png", "changed.png"])

    write_image(source / "changed.png", np.random.default_rng(70))
    (source / "repaired.png").write_bytes(whole)
    (source / "a\tb.png").write_bytes(whole)
    summary = counts(encode(source, archive))
    expected = {"num_listed": 5, "num_encoded": 2, "num_replaced": 1, "num_done_before": 1, "num_refused_before": 1}
    assert summary == expected | {"num_refused": 1}
    names = {"same.png", "changed.png", "repaired.png"}
    assert stored(archive) == encoded_alone(model, source, names)
    assert Archive.open(archive).find(["same.png", "changed.png"]) == before, "a replaced row keeps its id"

    listed = cli("refused", archive)
    assert listed.out.splitlines()[0].startswith("'a\\tb.png'\ta key has printable characters, no control characters")
    assert listed.out.splitlines()[1].startswith("broken.png\t")
    assert listed.err == "2 refused images\n"
    shown = json.loads(cli("refused", archive, "--json", "--limit", "1").out)
    assert ([one["key"] for one in shown["refused"]], shown["total"]) == (["a\tb.png"], 2)
    assert counts(encode(source, archive, "--retry-refused")) == {
        "num_listed": 5,
        "num_done_before": 3,
        "num_refused": 2,
    }


@pytest.mark.slow
def test_two_sources_with_the_same_names(encode, cli, model, tmp_path):
    archive = tmp_path / "archive"
    for trip, seed in (("trip_a", 1), ("trip_b", 2)):
        (tmp_path / trip).mkdir()
        for number in range(3):
            write_image(tmp_path / trip / f"IMG_{number}.png", np.random.default_rng([seed, number]))
    encode(tmp_path / "trip_a", archive)
    ended = cli("encode", tmp_path / "trip_b", "--model", model, "--archive", archive)
    assert ended.code == 2
    assert "error: the archive has a row 'IMG_0.png' of another image" in ended.err
    assert "Give --prefix NAME" in ended.err
    assert Archive.open(archive).num_rows == 3
    assert encode(tmp_path / "trip_b", archive, "--prefix", "b")["num_encoded"] == 3
    expected = encoded_alone(model, tmp_path / "trip_a", [f"IMG_{number}.png" for number in range(3)])
    other = encoded_alone(model, tmp_path / "trip_b", [f"IMG_{number}.png" for number in range(3)])
    assert stored(archive) == expected | {f"b/{key}": code for key, code in other.items()}


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

    from orbithash.encoders.networks.backbones.build import build_backbone
    from orbithash.encoders.networks.card import read_model_folder, write_card

    # Its hashes are right, but the weights are those of another network.
    card, _, weights = read_model_folder(model)
    other = build_backbone("mobilenet_v3_small").spec
    card = dataclasses.replace(card, network=dataclasses.replace(card.network, backbone=other))
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
