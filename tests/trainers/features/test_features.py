"""Kept features: what is computed, what is kept, and how ranks share the work."""

import dataclasses
import functools
import hashlib
import os
import re
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.distributed as dist
from method_parts import make_run, write_data
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder
from orbithash.encoders.imagery.images import Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.backbones.build import build_backbone
from orbithash.encoders.networks.card import HeadSpec
from orbithash.encoders.networks.hash_network import HashNetwork
from orbithash.trainers.datasets import Images
from orbithash.trainers.features import features as module
from orbithash.trainers.features.features import FeatureExtractor, caption_features

PREPROCESSING = Preprocessing(Rendering(), 32, 32)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("data") / "first")


@pytest.fixture(scope="module")
def images(data):
    return make_run(data, "dhcl").manifest.part("train")


def sha256_of(file):
    return hashlib.sha256(file.read_bytes()).hexdigest()


def make_network(seed=0, backbone="mobilenet_v3_small"):
    torch.manual_seed(seed)
    return HashNetwork(build_backbone(backbone), HeadSpec(8))


def expected(network, data, paths):
    rows = []
    for path in paths:
        pixels = PREPROCESSING.prepare(read_image(data / path)).astype(np.float64) / 255
        inputs = (pixels - PREPROCESSING.mean) / PREPROCESSING.std
        with torch.no_grad():
            rows.append(network.eval().features(torch.from_numpy(inputs).permute(2, 0, 1)[None].float())[0].numpy())
    return np.stack(rows)


def count_computed(monkeypatch):
    """Record the number of images of each pass of the network."""
    computed = []
    features = module.HashModel.features
    monkeypatch.setattr(
        module.HashModel,
        "features",
        lambda self, images, **options: computed.append(len(images)) or features(self, images, **options),
    )
    return computed


def test_rows_are_the_backbones_features_of_each_image(cache, data, images):
    network = make_network()
    found = FeatureExtractor(network, PREPROCESSING)(data, images)
    assert found.dtype == np.float32
    assert np.allclose(found, expected(network, data, [image.path for image in images]), atol=1e-3)


def test_the_second_source_has_features_of_its_own(cache, data, images):
    network = make_network()
    found = FeatureExtractor(network, PREPROCESSING)(data, images, "second")
    assert np.allclose(found, expected(network, data, [image.second for image in images]), atol=1e-3)


def test_what_is_cached_is_not_computed_again(cache, data, images, monkeypatch):
    computed = count_computed(monkeypatch)
    first = FeatureExtractor(make_network(), PREPROCESSING)(data, images[:5])[:]
    again = FeatureExtractor(make_network(), PREPROCESSING)(data, images[::-1])[:]
    assert sum(computed) == len(images)
    assert (again[::-1][:5] == first).all()
    FeatureExtractor(make_network(), PREPROCESSING)(data, images)
    assert sum(computed) == len(images)


def test_other_weights_sizes_views_and_seeds_are_other_features(cache, data, images, monkeypatch):
    computed = count_computed(monkeypatch)
    larger = dataclasses.replace(PREPROCESSING, resize=40, crop=40)
    found = [
        FeatureExtractor(make_network(), PREPROCESSING)(data, images),
        FeatureExtractor(make_network(seed=1), PREPROCESSING)(data, images),
        FeatureExtractor(make_network(), larger)(data, images),
        FeatureExtractor(make_network(), PREPROCESSING)(data, images, augmentation="blur"),
        FeatureExtractor(make_network(), PREPROCESSING)(data, images, augmentation="blur", seed=1),
    ]
    tables = [np.asarray(table) for table in found]
    assert sum(computed) == len(tables) * len(images)
    assert len({table.tobytes() for table in tables}) == len(tables)


def test_a_changed_file_is_another_row(cache, data, images, tmp_path):
    extractor = FeatureExtractor(make_network(), PREPROCESSING)
    before = extractor(data, images[:1])[:]
    Image.new("RGB", (40, 40), (1, 2, 3)).save(tmp_path / "other.png")
    changed = dataclasses.replace(images[0], path="other.png", sha256=sha256_of(tmp_path / "other.png"))
    after = extractor(tmp_path, Images.of([changed]))
    assert (before != after[:]).any()


@pytest.mark.parametrize("augmentation", [None, "blur"])
def test_a_hash_may_end_with_zeros(cache, images, tmp_path, augmentation):
    for number in range(10_000):
        Image.new("RGB", (16, 16), (number % 256, number // 256, 0)).save(tmp_path / "x.png")
        if sha256_of(tmp_path / "x.png").endswith("00"):
            break
    named = dataclasses.replace(images[0], path="x.png", sha256=sha256_of(tmp_path / "x.png"))
    found = FeatureExtractor(make_network(), PREPROCESSING)(tmp_path, Images.of([named]), augmentation=augmentation)
    # Blur leaves one colour as it is.
    assert np.allclose(found, expected(make_network(), tmp_path, ["x.png"]), atol=1e-2)


@pytest.mark.parametrize("source", ["image", "second"])
@pytest.mark.parametrize("augmentation", [None, "blur"])
def test_a_file_that_changes_after_it_was_hashed_is_kept_under_no_hash(
    cache, data, images, tmp_path, monkeypatch, source, augmentation
):
    # The second source is beside the first.
    shutil.copytree(data.parent, tmp_path / "data")
    root = tmp_path / "data" / data.name
    name = images[2].path if source == "image" else images[2].second
    content = (root / name).read_bytes()
    Image.new("RGB", (40, 40), (1, 2, 3)).save(root / name)
    extractor = FeatureExtractor(make_network(), PREPROCESSING)
    with pytest.raises(InputError, match=rf"{re.escape(name)}: the file is not the one that was hashed"):
        extractor(root, images, source, augmentation)
    (root / name).write_bytes(content)
    found = extractor(root, images, source, augmentation)[:]
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "clean"))
    clean = FeatureExtractor(make_network(), PREPROCESSING)(data, images, source, augmentation)
    assert (clean[:] == found).all()


def test_all_refused_images_are_listed_and_nothing_is_kept(cache, data, images, tmp_path):
    (tmp_path / "one.png").write_bytes(b"no image")
    hashes = {"one.png": sha256_of(tmp_path / "one.png"), "two.png": "2" * 64}
    bad = [dataclasses.replace(images[0], path=name, sha256=sha256) for name, sha256 in hashes.items()]
    with pytest.raises(InputError, match=r"(?s)one\.png: not a JPEG.*two\.png: there is no such file"):
        FeatureExtractor(make_network(), PREPROCESSING)(tmp_path, Images.of(bad))
    assert not list((cache_folder() / "features").rglob("*.arrow"))


class Letters:
    """A text encoder whose features are counts of letters."""

    sha256 = "letters"
    num_features = 3

    def __init__(self):
        self.seen = []

    def encode(self, sentences):
        self.seen += sentences
        return np.array([[sentence.count(letter) for letter in "abc"] for sentence in sentences], np.float32)


def test_captions_have_a_row_each_and_few_are_repeated(cache):
    encoder = Letters()
    found = caption_features(encoder, [["a", "bb"], ["cc"], ["a", "abc"]])[:]
    assert found.tolist() == [[[1, 0, 0], [0, 2, 0]], [[0, 0, 2], [0, 0, 2]], [[1, 0, 0], [1, 1, 1]]]
    assert sorted(encoder.seen) == ["a", "abc", "bb", "cc"]
    caption_features(encoder, [["abc"]])
    assert len(encoder.seen) == 4


def work(rank, root, folder, num_stores):
    """Two ranks with one store each, or one for both, and caches of their own; the second rank's store has rows."""
    torch.set_num_threads(1)
    images = make_run(root, "dhcl").manifest.part("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBITHASH_CACHE", str(folder / f"cache{rank}"))
        patch.setenv("ORBITHASH_FEATURES", str(folder / f"store{rank % num_stores}"))
        extractor = FeatureExtractor(make_network(), PREPROCESSING)
        if rank == 1:
            extractor(root, images[:3])
        dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
        dist.barrier()
        found = {"computed": count_computed(patch)}
        for _ in range(3):
            found["rows"] = extractor(root, images)[:]
        dist.destroy_process_group()
        found["in store"] = extractor(root, images)[:]
        torch.save(found, folder / f"{rank}.pt")


@pytest.mark.parametrize("num_stores", [1, 2])
def test_ranks_share_the_work_and_each_store_has_every_row(cache, data, images, tmp_path, num_stores):
    torch.multiprocessing.spawn(work, (data, tmp_path, num_stores), nprocs=2)
    alone = FeatureExtractor(make_network(), PREPROCESSING)(data, images)[:]
    by_one, by_other = (torch.load(tmp_path / f"{rank}.pt", weights_only=False) for rank in (0, 1))
    assert (by_one["rows"] == by_other["rows"]).all()
    for found in (by_one, by_other):
        assert np.allclose(found["rows"], alone, atol=1e-4)
        assert (found["in store"] == found["rows"]).all()
    # Computed in the first of three calls, half by each rank; what one of them had is computed by neither.
    counts = sum(by_one["computed"]), sum(by_other["computed"])
    assert sum(counts) == len(images) - 3
    assert counts[0] - counts[1] in (0, 1)


def fail(rank, root, folder):
    """Two ranks, of which one finds an image that it cannot read."""
    dist.init_process_group("gloo", init_method=f"file://{folder}/init", rank=rank, world_size=2)
    images = [*make_run(root, "dhcl").manifest.part("train")]
    images[1] = dataclasses.replace(images[1], path="absent.png", sha256="1" * 64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBITHASH_CACHE", str(folder / "cache"))
        with pytest.raises(InputError, match=r"absent\.png"):
            FeatureExtractor(make_network(), PREPROCESSING)(root, Images.of(images))
    dist.destroy_process_group()


def test_an_image_that_one_rank_refuses_is_an_error_on_all(data, tmp_path):
    torch.multiprocessing.spawn(fail, (data, tmp_path), nprocs=2)


def compute_late(root, folder, number, barrier, counts):
    """Compute features of some images at the same time as other processes, and count them."""
    torch.set_num_threads(1)
    images = make_run(root, "dhcl").manifest.part("train")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ORBITHASH_CACHE", str(folder / "cache"))
        computed = count_computed(patch)
        # In the first a part is one image, so that the others see some of its work; all need the last images.
        patch.setattr(module, "PART_ROWS", 1)
        patch.setattr(module, "read_batches", functools.partial(module.read_batches, batch_size=1))
        barrier.wait()
        found = FeatureExtractor(make_network(), PREPROCESSING)(root, images[number:])[:]
        counts.put((number, sum(computed), found))


def test_processes_at_once_compute_each_row_once(cache, data, images, tmp_path):
    context = torch.multiprocessing.get_context("spawn")
    barrier, counts = context.Barrier(3), context.Queue()
    processes = [
        context.Process(target=compute_late, args=(data, tmp_path, number, barrier, counts)) for number in range(3)
    ]
    for process in processes:
        process.start()
    # Not for ever, if one of them fails.
    found = [counts.get(timeout=300) for _ in processes]
    for process in processes:
        process.join()
    assert sum(computed for _, computed, _ in found) == len(images)
    alone = expected(make_network(), data, [image.path for image in images])
    for number, _, rows in found:
        assert np.allclose(rows, alone[number:], atol=1e-3)


def test_a_process_that_is_killed_while_it_computes_keeps_nobody_waiting(cache, data, images):
    reading, writing = os.pipe()
    if not (process := os.fork()):
        release = FeatureExtractor(make_network(), PREPROCESSING).wanted(data, images)._store.claim()
        os.write(writing, b"1" if release else b"0")
        signal.pause()
    assert os.read(reading, 1) == b"1"
    store = FeatureExtractor(make_network(), PREPROCESSING).wanted(data, images)._store
    assert store.claim() is None
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    release = store.claim()
    release()
    assert store.claim() is not None


def test_a_run_that_keeps_no_row_for_long_is_not_waited_for(cache, data, images, monkeypatch, caplog):
    """Rows arrive while the other has its turn: the run waits. Then none does, and it computes the rest."""
    extractor = FeatureExtractor(make_network(), PREPROCESSING)
    other = extractor.wanted(data, images)
    release = other._store.claim()
    clock, pauses = [0.0], []

    def sleep(seconds):
        clock[0] += seconds
        pauses.append(seconds)
        if len(pauses) in (5, 10, 15):
            other.keep(np.array([len(pauses) // 5]))

    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    monkeypatch.setattr(module, "_PATIENCE_S", 60.0)
    computed = count_computed(monkeypatch)
    found = extractor(data, images)[:]
    assert sum(computed) == len(images)
    assert max(pauses) == 10.0
    # The last row came with the 15th pause.
    assert 60 < sum(pauses[15:]) <= 70
    assert caplog.messages[-1].endswith("none of them came in 60 s; computing them here")
    assert np.allclose(found, expected(make_network(), data, [image.path for image in images]), atol=1e-3)
    release()


def test_the_turn_lasts_until_ranks_have_exchanged_rows(cache, data, images, monkeypatch):
    claims = []
    monkeypatch.setattr(module, "_exchange", lambda store, needed: claims.append(store.claim()))
    extractor = FeatureExtractor(make_network(), PREPROCESSING)
    extractor(data, images[:2])
    assert claims == [None]
    extractor.wanted(data, images)._store.claim()()


def stop_after(monkeypatch, num_batches):
    """Let the network fail after some batches of one image, as a killed process would."""
    done = []
    features = module.HashModel.features

    def few(self, images, **options):
        if len(done) == num_batches:
            raise KeyboardInterrupt
        done.append(len(images))
        return features(self, images, **options)

    monkeypatch.setattr(module.HashModel, "features", few)


def test_work_goes_on_where_it_stopped(cache, data, images, monkeypatch):
    monkeypatch.setattr(module, "PART_ROWS", 2)
    monkeypatch.setattr(module, "read_batches", functools.partial(module.read_batches, batch_size=1))
    with monkeypatch.context() as patch:
        stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            FeatureExtractor(make_network(), PREPROCESSING)(data, images)
    progress = []
    computed = count_computed(monkeypatch)
    found = FeatureExtractor(make_network(), PREPROCESSING)(data, images, on_progress=progress.append)
    # Two parts of two rows were whole.
    assert computed == [1] * (len(images) - 4)
    assert progress == list(range(4, len(images) + 1))
    assert np.allclose(found, expected(make_network(), data, [image.path for image in images]), atol=1e-3)


def test_features_alone_are_those_of_a_pass_of_one_image(cache, data, images):
    network = make_network()
    extractor = FeatureExtractor(network, PREPROCESSING)
    together, alone = extractor(data, images)[:], extractor(data, images, alone=True)[:]
    for row, image in enumerate(images):
        prepared = PREPROCESSING.prepare(read_image(data / image.path))[None]
        assert (extractor._model.features(prepared)[0] == alone[row]).all()
    assert np.allclose(together, alone, atol=1e-4)
