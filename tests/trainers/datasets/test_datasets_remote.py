"""Data sets that are plain folders of an object store: manifests and pixels are those of the same local folder."""

import pytest
from method_parts import flat, timeless, trained, write_data
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources import object_folders, remote
from orbithash.encoders.sources.image_roots import image_root
from orbithash.trainers import library
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import hashes, make_manifest
from orbithash.trainers.datasets.class_lists import CLASS_LISTS
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import open_run
from orbithash.trainers.methods import get_method

SETTINGS = {"bits": 16, "backbone": "mobilenet_v3_small", "image_size": 32}


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


class Store:
    """A bucket, and how folders get into it."""

    def __init__(self, endpoint):
        self.client = s3_client(endpoint, "tiles")
        self._endpoint = endpoint

    def uri(self, path):
        return f"s3://tiles/{path}?endpoint_override={self._endpoint}&scheme=http"

    def root(self, path):
        return image_root(self.uri(path))

    def upload(self, folder, path):
        for file in folder.rglob("*"):
            if file.is_file():
                name = file.relative_to(folder).as_posix()
                self.client.put_object(Bucket="tiles", Key=f"{path}/{name}", Body=file.read_bytes())
        return self.root(path)


@pytest.fixture
def store(endpoint, monkeypatch):
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    return Store(endpoint)


@pytest.fixture
def data(tmp_path):
    return write_data(tmp_path / "images")


@pytest.fixture
def objects_read(monkeypatch):
    """The URIs that are read."""
    read, addresses = object_folders.read_object, []

    def recorded(uri, limits):
        addresses.append(uri)
        return read(uri, limits)

    monkeypatch.setattr(object_folders, "read_object", recorded)
    return addresses


def write(root, *names):
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), (number, number // 256, 3)).save(root / name)
    return root


def refusal(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("protocol", ["random", "dhcl", "duch"])
def test_the_manifest_is_that_of_the_local_folder(store, data, protocol):
    root = store.upload(data, f"classes/{protocol}")
    assert make_manifest(root, protocol=protocol, seed=2) == make_manifest(data, protocol=protocol, seed=2)


@pytest.mark.parametrize(
    "names",
    [
        # Numbers in names are compared as such; folders in a class; other folders in between; one folder; odd names.
        [f"2750/a{c}/x{i}.png" for c in (2, 10, 1) for i in range(12)],
        [f"Images/{c}/{i % 2}/{i}.png" for c in "ba" for i in range(8)],
        [f"im{i}.png" for i in range(12)],
        [f"my class #{c}/ä{i}?.png" for c in range(2) for i in range(6)],
        [f"{part}/{i}.png" for part in ("b/c", "a/d/e", "a") for i in range(6)],
    ],
)
def test_layouts_without_labels_and_with_them(store, tmp_path, names):
    folder = write(tmp_path / "in", *names)
    root = store.upload(folder, f"layouts/{tmp_path.name}")
    assert make_manifest(root, needs_classes=False) == make_manifest(folder, needs_classes=False)
    manifest = make_manifest(root, needs_classes=False)
    paths = manifest.images.paths[::-1]
    assert root.sources(paths) == [(folder / path).read_bytes() for path in paths]


def test_a_known_data_set_is_recognised_by_its_classes(store, tmp_path):
    folder = write(tmp_path / "in", *(f"{name}/{i}.png" for name in CLASS_LISTS["ucmd"] for i in range(5)))
    root = store.upload(folder, "ucmd")
    assert make_manifest(root).dataset == "ucmd"
    assert make_manifest(root) == make_manifest(folder)
    assert make_manifest(root, "folder") == make_manifest(folder, "folder")
    assert "these are not the 30 classes of aid" in refusal(make_manifest, root, "aid")


@pytest.mark.usefixtures("one_thread")
def test_training_and_evaluation_are_those_of_the_local_folder(store, data, tmp_path, monkeypatch):
    root, found = store.upload(data, "training"), {}
    for name, place in (("local", data), ("remote", root)):
        monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / f"cache of {name}"))
        config = load_config(get_method("dhcl").Config, **SETTINGS, batch_size=4, epochs=1)
        (tmp_path / name).mkdir()
        run = Run("dhcl", config, make_manifest(place), place)
        history = timeless(trained(run, tmp_path / name, loading="stream").history)
        state = flat(load_checkpoint(tmp_path / name / "epoch1")["method"])
        library.train("itq", str(place), tmp_path / f"itq {name}", **SETTINGS)
        found[name] = (history, state, library.evaluate(tmp_path / f"itq {name}", cutoffs=[5]))
    assert found["remote"] == found["local"]
    assert open_run(tmp_path / "itq remote").root == root


def test_hashes_are_remembered_until_an_object_changes(store, data, objects_read, monkeypatch):
    root = store.upload(data, "hashes")
    monkeypatch.setattr(hashes, "SETTLED_S", -60)
    first = make_manifest(root)
    assert len(objects_read) == len(first.images)
    objects_read.clear()
    assert make_manifest(root) == first
    assert objects_read == []
    name = first.images.paths[3]
    store.client.put_object(Bucket="tiles", Key=f"hashes/{name}", Body=b"other")
    assert "another file than at the time of the split" in refusal(first.check_files, root)
    assert len(objects_read) == 1
    store.client.delete_object(Bucket="tiles", Key=f"hashes/{name}")
    assert f"{name}: absent" in refusal(first.check_files, root)
    assert name in refusal(root.sources, [first.images.paths[0], name])


@pytest.mark.parametrize(
    ("names", "mark"),
    [
        (["scenes.json/a.png"], "scenes.json"),
        (["first/a.png", "second/a.png"], "first and second"),
        (["multispectral/a.png", "panchromatic/a.png"], "multispectral and panchromatic"),
    ],
)
def test_other_layouts_are_to_be_packed(store, tmp_path, names, mark):
    root = store.upload(write(tmp_path / "in", *names), f"other/{mark}")
    message = refusal(make_manifest, root)
    assert f"has {mark}, the layout of a dataset" in message
    assert "`orbithash pack`" in message


def test_what_is_refused(store, data, endpoint, tmp_path, monkeypatch):
    root = store.upload(write(tmp_path / "in", "a/1.png"), "few")
    with pytest.raises(InputError, match="only the class 'a'"):
        make_manifest(root)
    assert "captions are not read" in refusal(make_manifest, root, captions=tmp_path / "c.json")
    assert "dataset scenes is read from a local folder only" in refusal(make_manifest, root, "scenes")
    assert "nothing is there" in refusal(make_manifest, store.root("nowhere"))
    store.client.put_object(Bucket="tiles", Key="texts/a.txt", Body=b"text")
    assert "holds no image" in refusal(make_manifest, store.root("texts"))
    patch = [f"S2A_1/S2A_1_{band}.tif" for band in ("B02", "B03")]
    for key in patch:
        store.client.put_object(Bucket="tiles", Key=f"patches/{key}", Body=b"tiff")
    assert "patches of one TIFF per band" in refusal(make_manifest, store.root("patches"))
    with no_permission(endpoint) as nobody:
        for name, value in nobody.items():
            monkeypatch.setenv(name, value)
        remote._system.cache_clear()
        assert "cannot be listed" in refusal(make_manifest, root)
    remote._system.cache_clear()
