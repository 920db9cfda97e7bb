"""`orbithash features`: what the workers keep, what is skipped, and that training then computes nothing."""

import json
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pytest
from cluster_parts import TINY, family, kill, wait_for, write_image

from orbithash.cluster.features import fill as module
from orbithash.cluster.features.fill import fill_for_training
from orbithash.cluster.features.worker import FeatureWorker
from orbithash.encoders.errors import ImageError, InputError, listed
from orbithash.trainers import library
from orbithash.trainers.features import features as computing
from orbithash.trainers.loop.parts import wanted_features
from orbithash.trainers.loop.run import make_run

SETTINGS = [*(word for word in TINY if word != "--set"), "bits=16"]
# A method that is fitted has fewer settings.
FITTED = ["backbone=mobilenet_v3_small", "image_size=32", "bits=16"]
FITTED_WORDS = ("--method", "itq", *(word for setting in FITTED for word in ("--set", setting)))

# They start workers, which takes long on a busy machine.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "store"))
    return tmp_path / "store"


@pytest.fixture
def images(tmp_path):
    """A folder of 30 images of three classes."""
    rng = np.random.default_rng(0)
    for number, name in enumerate(("beach", "forest", "river")):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(10):
            write_image(tmp_path / "images" / name / f"{i}.png", rng, (80 * number, 100, 200 - 80 * number))
    return tmp_path / "images"


@pytest.fixture
def computed(monkeypatch):
    """The numbers of images of the passes of the network in this process."""
    numbers = []
    features = computing.HashModel.features

    def recorded(self, images, **options):
        numbers.append(len(images))
        return features(self, images, **options)

    monkeypatch.setattr(computing.HashModel, "features", recorded)
    return numbers


@pytest.mark.ray
def test_training_computes_nothing_after_workers_have(ray_cluster, cli, store, images, computed, monkeypatch, tmp_path):
    # Two views of each training image beside the images themselves.
    options = ("--method", "contrastive", "--workers", 2, "--bits", 16, *TINY)
    ended = cli("features", images, *options, "--json")
    assert ended.code == 0, ended.err
    first = json.loads(ended.out)
    run = make_run("contrastive", images, settings=SETTINGS)
    train, validation = (len(run.manifest.part(split)) for split in ("train", "validation"))
    num_views = len(run.build().tables) - 1
    assert num_views > 0
    assert first["num_images"] == first["num_computed"] == (1 + num_views) * train + validation
    assert (first["num_kept_before"], first["folder"]) == (0, str(store))
    assert first["images_per_s"] == pytest.approx(first["num_computed"] / first["seconds"])

    # All is kept: no worker starts, nothing is computed.
    monkeypatch.setattr(module, "_compute", None)
    ended = cli("features", images, *options)
    assert ended.code == 0, ended.err
    line = f"{first['num_images']} features of images: 0 computed, {first['num_images']} kept before; "
    assert ended.out == f"{line}0.0 s, 0.0 images/s; folder: {store}\n"
    library.train("contrastive", images, tmp_path / "run", **dict(word.split("=") for word in SETTINGS))
    assert computed == []

    # The rows are those that one process computes alone.
    kept = {name: np.asarray(rows.table()) for name, rows in wanted_features(run).items()}
    assert computed == []
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "other"))
    for name, rows in wanted_features(run).items():
        np.testing.assert_allclose(kept[name], np.asarray(rows.table()), atol=1e-4)
    assert sum(computed) == first["num_computed"]


@pytest.mark.ray
def test_workers_read_packed_images(ray_cluster, cli, store, images, computed, tmp_path):
    packed = tmp_path / "images.lance"
    ended = cli("pack", images, "--out", packed, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["num_images"] == 30
    ended = cli("features", packed, *FITTED_WORDS, "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out)["num_computed"] > 0
    # The features are those that training from the folder asks for.
    library.train("itq", images, tmp_path / "run", **dict(word.split("=") for word in FITTED))
    assert computed == []


@pytest.mark.slow
@pytest.mark.ray
def test_a_job_that_is_killed_continues(ray_cluster, start, store, images):
    # A pause after each share, in the workers, so that the kill meets the job in the middle.
    slow = f"""
import os, time
from orbithash.cluster.features import fill, worker
class Paused(worker.FeatureWorker):
    def __call__(self, shares):
        done = super().__call__(shares)
        time.sleep(600)
        return done
fill.FeatureWorker = Paused
fill.READ_BATCH_SIZE = 4
os.environ["ORBITHASH_FEATURES"] = {str(store)!r}
"""
    process = start("features", images, *FITTED_WORDS, before=slow)
    wait_for(lambda: list(store.glob("*/[!.]*.arrow")), process)
    kill(process, *family(process.pid))
    run = make_run("itq", images, settings=FITTED)
    num_missing = sum(len(rows.missing()) for rows in wanted_features(run).values())
    done = fill_for_training(run)
    assert (done.num_kept_before, done.num_computed) == (done.num_images - num_missing, num_missing)
    # One share of each worker that had come so far.
    assert done.num_kept_before >= 4
    assert num_missing > 0
    assert not any(len(rows.missing()) for rows in wanted_features(run).values())


@pytest.mark.ray
def test_all_refused_images_are_named_and_the_others_are_kept(ray_cluster, store, images, monkeypatch):
    monkeypatch.setattr(module, "READ_BATCH_SIZE", 2)
    run = make_run("itq", images, settings=FITTED)
    broken = [run.manifest.part("train").paths[row] for row in (0, 7)]
    before = {path: (images / path).read_bytes() for path in broken}
    for path in broken:
        (images / path).write_bytes(b"broken")
    with pytest.raises(InputError, match="(?s)" + ".*".join(broken)):
        fill_for_training(run, 2)
    # Each broken image and the other one of its share.
    assert sum(len(rows.missing()) for rows in wanted_features(run).values()) == 4
    for path, content in before.items():
        (images / path).write_bytes(content)
    assert fill_for_training(run).num_computed == 4


@pytest.mark.ray
def test_a_refused_image_is_named_once_for_all_tables_and_shares(ray_cluster, store, images, monkeypatch):
    monkeypatch.setattr(module, "READ_BATCH_SIZE", 2)
    # Several tables of the same images.
    run = make_run("contrastive", images, settings=SETTINGS)
    broken = [path for split in ("train", "validation") for path in run.manifest.part(split).paths][:12]
    for path in broken:
        (images / path).write_bytes(b"broken")
    with pytest.raises(InputError) as caught:
        fill_for_training(run, 2)
    first, *lines = str(caught.value).splitlines()
    assert first == f"{images}: images that cannot be read: found 11 problems:"
    named = [line.removeprefix("  - ").partition(":")[0] for line in lines]
    assert named == [*sorted(broken)[:10], "and 2 more"]


@pytest.fixture
def worker(store, monkeypatch):
    """Return a function that makes a worker in this process, given what keeping rows of its one table does."""
    monkeypatch.setattr("ray.get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "node"))
    done = []

    def make(keep):
        wanted = SimpleNamespace(keep=keep, upload=lambda: done.append("upload"))
        return FeatureWorker(lambda device: {"image": wanted}, str(store), 0)

    make.done = done
    return make


def test_only_refused_images_are_problems_of_a_share(worker):
    shares = pa.Table.from_pylist([{"table": "image", "positions": [3, 5]}], schema=module.SHARE)

    def fail(error):
        raise error

    assert worker.done == []
    refused = listed(["one.png: damaged", "two.png: damaged"], "images", ImageError)
    (done,) = worker(lambda positions: fail(refused))(shares).to_pylist()
    assert (done["first"], done["num_rows"], done["where"]) == (3, 2, "images")
    assert done["problems"] == ["one.png: damaged", "two.png: damaged"]
    assert worker.done == ["upload"]
    # A full store, or a bucket of images that does not answer, would be so for all shares.
    with pytest.raises(InputError, match="the store is full"):
        worker(lambda positions: fail(InputError("the store is full")))(shares)


def test_a_store_without_room_ends_before_workers_start(store, images, monkeypatch):
    run = make_run("itq", images, settings=FITTED)
    num_bytes = sum(rows.num_bytes(len(rows)) for rows in wanted_features(run).values())
    monkeypatch.setattr(module, "connected", None)
    monkeypatch.setenv("ORBITHASH_FEATURES_GB", str(0.99 * num_bytes / 1e9))
    with pytest.raises(InputError, match=r"features need .* and ORBITHASH_FEATURES_GB is") as caught:
        fill_for_training(run)
    assert "\n" not in str(caught.value)


def test_nodes_need_a_folder_that_they_share(store, monkeypatch):
    import ray

    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": True}, {"Alive": False}])
    module._check_shared()
    monkeypatch.delenv("ORBITHASH_FEATURES")
    monkeypatch.delenv("ORBITHASH_CACHE", raising=False)
    with pytest.raises(InputError, match="the cluster has 2 nodes and ORBITHASH_FEATURES is not set"):
        module._check_shared()
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True}, {"Alive": False}])
    module._check_shared()


@pytest.mark.ray
def test_a_folder_that_the_driver_does_not_see(ray_cluster, store, images, monkeypatch, tmp_path):
    # The worker writes elsewhere, as a node with a folder of its own would.
    class Elsewhere(module.FeatureWorker):
        def __init__(self, plan, folder, num_gpus):
            super().__init__(plan, str(tmp_path / "own"), num_gpus)

    monkeypatch.setattr(module, "FeatureWorker", Elsewhere)
    monkeypatch.setattr(module, "READ_BATCH_SIZE", 2)
    # After the first share, not at the end.
    with pytest.raises(
        InputError, match=": 2 features that a worker has written are not visible here; set ORBITHASH_F"
    ):
        fill_for_training(make_run("itq", images, settings=FITTED))


def test_what_is_refused(cli, store, images, monkeypatch):
    monkeypatch.setattr(computing.torch.cuda, "is_available", lambda: False)
    for options, words in (
        (("--workers", 0), "--workers is 0; at least 1 is needed"),
        (("--gpus-per-worker", 1.5), "a part of one GPU such as 0.25"),
        (("--gpus-per-worker", 1, "--set", "encoding_precision=bfloat16"), "this process has no GPU to look"),
        (("--method", "dhcl", "--bits", 64), "dhcl trains its backbone, so no features of images are kept"),
    ):
        ended = cli("features", images, *FITTED_WORDS, *options)
        assert ended.code == 2
        assert words in ended.err
    assert not store.exists()
