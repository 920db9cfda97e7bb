"""Encoding of thousands of images while the driver or a node dies: every image becomes exactly one row."""

import json

import numpy as np
import pytest
from cluster_parts import family, joining, kill, kill_a_node, wait_for, write_image

from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.networks.model import HashModel

pytestmark = pytest.mark.slow

NUM_IMAGES = 5000


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("many") / "images"
    rng = np.random.default_rng(0)
    for part in range(10):
        (folder / str(part)).mkdir(parents=True)
        for i in range(NUM_IMAGES // 10):
            write_image(folder / str(part) / f"{i}.png", rng, side=20)
    (folder / "broken.png").write_bytes(b"broken")
    return folder


def num_rows(archive):
    has_commits = len(list((archive / "_versions").glob("*.manifest"))) > 1 if archive.exists() else False
    return Archive.open(archive).num_rows if has_commits else 0


def check_complete(archive, images, model):
    """Check that each image has a row, and some rows have the code of the image encoded alone."""
    opened = Archive.open(archive)
    ids, codes = opened.codes()
    keys = opened.take(ids, ["key"])["key"].to_pylist()
    assert len(keys) == NUM_IMAGES
    assert set(keys) == {path.relative_to(images).as_posix() for path in images.rglob("*.png")} - {"broken.png"}
    assert opened.refused().keys() == {"broken.png"}
    loaded = HashModel.load(model)
    for place in range(0, NUM_IMAGES, 250):
        image = read_image(images / keys[place], loaded.preprocessing.rendering)
        np.testing.assert_array_equal(codes[place], loaded.encode([image])[0])


def test_a_node_that_dies(start, nodes, images, model, tmp_path):
    archive = tmp_path / "archive"
    options = ("--workers", "3", "--json")
    process = start("encode", images, "--model", model, "--archive", archive, *options, before=joining(nodes))
    wait_for(lambda: num_rows(archive), process)
    kill_a_node(nodes)
    assert num_rows(archive) < NUM_IMAGES, "the kill met the job in the middle"
    assert process.wait(300) == 0, process.err.read_text()
    assert json.loads(process.out.read_text())["num_encoded"] == NUM_IMAGES
    check_complete(archive, images, model)


def test_a_driver_that_is_killed(ray_cluster, cli, start, images, model, tmp_path):
    archive = tmp_path / "archive"
    process = start("encode", images, "--model", model, "--archive", archive)
    wait_for(lambda: num_rows(archive), process)
    kill(process, *family(process.pid))
    assert 0 < num_rows(archive) < NUM_IMAGES, "the kill met the job in the middle"
    ended = cli("encode", images, "--model", model, "--archive", archive, "--json")
    assert ended.code == 0, ended.err
    summary = json.loads(ended.out)
    # The broken image was refused before the kill or after it.
    assert summary["num_done_before"] + summary["num_encoded"] == NUM_IMAGES
    assert summary["num_refused_before"] + summary["num_refused"] == 1
    assert summary["num_done_before"] > 0
    check_complete(archive, images, model)
