"""Packed data sets: manifests, bytes, training and evaluation are those of the folder; damage and kills are refused."""

import dataclasses
import itertools
import os
import re
import shutil
import signal
import subprocess
import sys

import lance
import numpy as np
import pyarrow as pa
import pytest
from method_parts import flat, timeless, trained, write_data
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.encoders.networks.reading import read_batches
from orbithash.encoders.sources import packed as packed_module
from orbithash.encoders.sources.image_roots import image_root, local_folder
from orbithash.encoders.sources.packed import lance_place
from orbithash.trainers import library
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import make_manifest
from orbithash.trainers.loop.checkpoint import load_checkpoint
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run import make_run as run_of
from orbithash.trainers.loop.run_folder import check_training, claim_folder, open_run
from orbithash.trainers.methods import get_method
from orbithash.trainers.packing import pack, writer
from orbithash.trainers.scenes import write_scenes

SETTINGS = {"bits": 16, "backbone": "mobilenet_v3_small", "image_size": 32}

# Packs ARGV[1] to ARGV[2], and kills this process when the first batch of rows is written.
KILLED = """
import os, signal, sys
from pathlib import Path
from orbithash.trainers.packing import writer
writer._BATCH_BYTES = 1
writer.pack(Path(sys.argv[1]), sys.argv[2], on_progress=lambda done, total: os.kill(os.getpid(), signal.SIGKILL))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A folder of three classes, 28 images."""
    return write_data(tmp_path_factory.mktemp("data") / "images")


@pytest.fixture(scope="module")
def packed(data):
    """The same images, packed."""
    pack(data, str(data.with_name("images.lance")))
    return image_root(data.with_name("images.lance"))


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    """Scenes with captions and second sources."""
    folder = tmp_path_factory.mktemp("scenes") / "scenes"
    write_scenes(folder, 60, size_px=64)
    return folder


def killed(data, out, **variables):
    done = subprocess.run([sys.executable, "-c", KILLED, str(data), str(out)], env=os.environ | variables, timeout=600)
    assert done.returncode == -signal.SIGKILL


def refusal(call, *arguments, **options):
    with pytest.raises(InputError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# The data set itself.


@pytest.mark.parametrize("protocol", ["random", "mhcln", "dhcl", "duch"])
@pytest.mark.parametrize("needs_classes", [True, False])
def test_the_manifest_is_that_of_the_folder(data, packed, protocol, needs_classes):
    options = {"protocol": protocol, "seed": 3, "validation": 0.2, "needs_classes": needs_classes}
    by_folder, by_rows = make_manifest(data, **options), make_manifest(packed, **options)
    assert by_rows == by_folder
    assert (by_rows.sha256, by_rows.images.digest()) == (by_folder.sha256, by_folder.images.digest())


def test_captions_and_second_sources_are_packed(scenes, tmp_path):
    done = pack(scenes, str(tmp_path / "scenes.lance"))
    root = image_root(tmp_path / "scenes.lance")
    manifest = make_manifest(scenes, protocol="duch")
    assert done.dataset == "scenes"
    assert (done.num_images, done.num_files) == (60, 60 + manifest.images.has_second.sum())
    assert manifest.images.has_captions.all()
    assert manifest.images.has_second.any()
    assert make_manifest(root, protocol="duch") == manifest
    manifest.check_files(root)
    names = [name for name in manifest.images.seconds if name is not None]
    assert root.sources(names) == [(scenes / name).read_bytes() for name in names]
    assert done.num_bytes == sum((scenes / name).stat().st_size for name in {*manifest.images.paths, *names})


def test_rows_are_read_in_any_order(data, packed):
    names = make_manifest(data).images.paths
    order = [*np.random.default_rng(0).permutation(len(names)).tolist(), 0, 5, 0]
    assert packed.sources([names[row] for row in order]) == [(data / names[row]).read_bytes() for row in order]
    assert packed.sources([]) == []
    assert packed.hashes([names[1], "absent.png"])[0] == make_manifest(data).images.sha256s[1].tobytes()
    absent = packed.hashes(["absent.png"])[0]
    assert isinstance(absent, FileNotFoundError)
    assert absent.strerror == "No such file or directory"
    assert "has no image absent.png" in refusal(packed.sources, [names[0], "absent.png"])


@pytest.mark.parametrize("limit", ["some files", "one longer file"])
def test_many_batches_are_one_data_set(data, packed, tmp_path, monkeypatch, limit):
    names = make_manifest(data).images.paths
    sizes = [(data / name).stat().st_size for name in names]
    limit = {"some files": sum(sizes[:4]), "one longer file": min(sizes) - 1}[limit]
    monkeypatch.setattr(writer, "_BATCH_BYTES", limit)
    steps = []
    pack(data, str(tmp_path / "x.lance"), on_progress=lambda done, total: steps.append((done, total)))
    ends = [0, *(done for done, total in steps)]
    assert steps[-1] == (28, 28)
    for start, stop in itertools.pairwise(ends):
        assert stop - start == 1 or sum(sizes[start:stop]) <= limit
        assert stop == 28 or sum(sizes[start : stop + 1]) > limit
    root = image_root(tmp_path / "x.lance")
    assert make_manifest(root) == make_manifest(packed)
    assert root.sources(names) == packed.sources(names)


def test_folders_that_are_not_classes_lose_their_labels_as_in_the_folder(tmp_path):
    """A class is too small to be split; the order is that of all paths, with the numbers in them compared as such."""
    for name, count in (("b", 12), ("a10", 3), ("a9", 12)):
        (tmp_path / "in" / name).mkdir(parents=True)
        for i in range(count):
            Image.new("RGB", (8, 8), (i, count, len(name))).save(tmp_path / "in" / name / f"{i}.png")
    pack(tmp_path / "in", str(tmp_path / "x.lance"))
    root = image_root(tmp_path / "x.lance")
    assert make_manifest(root, needs_classes=False) == make_manifest(tmp_path / "in", needs_classes=False)
    assert not make_manifest(root, needs_classes=False).images.is_labelled.any()
    by_folder, by_rows = (refusal(make_manifest, place) for place in (tmp_path / "in", root))
    assert by_rows.partition(": ")[2] == by_folder.partition(": ")[2]


def test_a_set_that_is_packed_again_at_the_same_place_is_read_anew(tmp_path):
    place, found = tmp_path / "x.lance", []
    for number in range(2):
        folder = tmp_path / f"in{number}"
        folder.mkdir()
        for i in range(3):
            Image.new("RGB", (8, 8), (i, number, 0)).save(folder / f"{i}.png")
        shutil.rmtree(place, ignore_errors=True)
        pack(folder, str(place))
        found.append(image_root(place).sources(["1.png"]))
        assert found[-1] == [(folder / "1.png").read_bytes()]
    assert found[0] != found[1]


def test_an_error_opens_the_set_anew(data, packed, tmp_path, monkeypatch):
    """As in a bucket, where no stamp shows that another set was packed."""
    monkeypatch.setattr(packed_module, "_stamp", lambda location: ())
    names, place = make_manifest(data).images.paths, tmp_path / "x.lance"
    shutil.copytree(str(packed), place)
    root = image_root(place)
    assert root.sources(names[:1]) == packed.sources(names[:1])
    shutil.rmtree(place)
    pack(write_data(tmp_path / "in"), str(place))
    refusal(root.sources, names[:1])
    assert root.sources(names) == packed.sources(names)


def test_both_names_of_googles_store_are_lances():
    assert lance_place("gcs://bucket/x.lance") == lance_place("gs://bucket/x.lance") == ("gs://bucket/x.lance", {})


def test_one_image_and_none(tmp_path):
    (tmp_path / "one").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "one" / "a.png")
    assert pack(tmp_path / "one", str(tmp_path / "one.lance")).num_images == 1
    root = image_root(tmp_path / "one.lance")
    assert root.sources(["a.png"]) == [(tmp_path / "one" / "a.png").read_bytes()]
    assert "only 1 images; protocol random needs at least 5" in refusal(make_manifest, root)
    (tmp_path / "none").mkdir()
    refusal(pack, tmp_path / "none", str(tmp_path / "none.lance"))
    assert not (tmp_path / "none.lance").exists()


# Training and evaluation.


def run_on(root, method, **settings):
    given = SETTINGS | {"batch_size": 4, "epochs": 2} if method == "dhcl" else SETTINGS
    return Run(method, load_config(get_method(method).Config, **given, **settings), make_manifest(root), root)


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("loading", ["memory", "stream"])
def test_losses_and_checkpoints_are_those_of_the_folder(data, packed, loading, tmp_path):
    found = {}
    for name, root in (("folder", data), ("packed", packed)):
        (tmp_path / name).mkdir()
        history = trained(run_on(root, "dhcl"), tmp_path / name, loading=loading).history
        state = load_checkpoint(tmp_path / name / "epoch2")["method"]
        found[name] = (timeless(history), flat(state))
    assert found["packed"] == found["folder"]


@pytest.mark.usefixtures("one_thread")
def test_a_run_and_its_evaluation_are_those_of_the_folder(data, packed, tmp_path, monkeypatch):
    metrics, weights = [], []
    for name, root in (("folder", data), ("packed", packed)):
        monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / f"cache of {name}"))
        model = library.train("itq", str(root), tmp_path / name, **SETTINGS)
        weights.append(flat(model.network.state_dict()))
        metrics.append(library.evaluate(tmp_path / name, cutoffs=[5]))
        page = (tmp_path / name / "evaluation" / "report.html").read_text()
        assert page.count("data:image/") > 10
    assert metrics[1] == metrics[0]
    assert weights[1] == weights[0]
    assert open_run(tmp_path / "packed").root == packed
    # A run of the folder is evaluated on the packed images, and the other way round.
    assert library.evaluate(tmp_path / "folder", str(packed), cutoffs=[5]) == metrics[0]
    assert library.evaluate(tmp_path / "packed", data, cutoffs=[5]) == metrics[0]


def test_statistics_of_bands_are_those_of_the_folder(data, packed, tmp_path, monkeypatch):
    found = []
    for name, root in (("folder", data), ("packed", packed)):
        monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / name))
        config = run_of("itq", root, settings=["values=raw", *(f"{key}={SETTINGS[key]}" for key in SETTINGS)]).config
        found.append((config.band_mean, config.band_std))
    assert found[1] == found[0]


def test_a_resumed_run_must_have_the_same_images(data, packed, scenes, tmp_path):
    run = run_on(data, "dhcl")
    claim_folder(run, tmp_path / "run")
    check_training(dataclasses.replace(run, root=packed, manifest=make_manifest(packed)), tmp_path / "run")
    pack(scenes, str(tmp_path / "other.lance"))
    other = image_root(tmp_path / "other.lance")
    with pytest.raises(InputError, match="the data or their split are not the same"):
        check_training(
            dataclasses.replace(run, root=other, manifest=make_manifest(other, protocol="duch")), tmp_path / "run"
        )
    with pytest.raises(InputError, match="not the data of this run's manifest"):
        run.manifest.check_files(other)


# What is refused.


def test_what_is_no_packed_data_set(data, packed, tmp_path):
    assert "is absent; `orbithash pack` makes one" in refusal(make_manifest, image_root(tmp_path / "x.lance"))
    (tmp_path / "empty.lance").mkdir()
    assert "holds no packed data set" in refusal(make_manifest, image_root(tmp_path / "empty.lance"))
    lance.write_dataset(pa.table({"path": ["a"]}), tmp_path / "other.lance")
    assert "that `orbithash pack` did not make" in refusal(make_manifest, image_root(tmp_path / "other.lance"))
    schema = pa.schema([("path", pa.string())], metadata={"orbithash.packed.format_version": "0"})
    lance.write_dataset(pa.table({"path": ["a"]}, schema=schema), tmp_path / "old.lance")
    assert "is of format version 0, and 1 is read" in refusal(make_manifest, image_root(tmp_path / "old.lance"))
    assert "is packed as folder; omit --dataset" in refusal(make_manifest, packed, "aid")
    assert "so omit --captions" in refusal(make_manifest, packed, captions=data / "captions.json")
    assert "only s3:// and gs:// are read" in refusal(image_root, "https://host/x.lance")
    secret = refusal(image_root, "s3://bucket/x.lance?secret_key=abc")
    assert "with a secret" in secret
    assert "abc" not in secret


def test_places_and_folders_that_are_not_packed(data, tmp_path):
    assert "ends in .lance, such as images.lance" in refusal(pack, data, str(tmp_path / "x"))
    (tmp_path / "taken.lance").mkdir()
    assert "exists; give another --out" in refusal(pack, data, str(tmp_path / "taken.lance"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refusal(pack, data, str(tmp_path / "file" / "x.lance"))
    assert "does not exist" in refusal(pack, tmp_path / "absent", str(tmp_path / "x.lance"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "taken.lance"]


def test_a_file_that_changes_while_it_is_packed(data, tmp_path, monkeypatch):
    hashed = writer.hashed_images

    def hash_and_change(found, root):
        images = hashed(found, root)
        (root / images[3].path).write_bytes(b"other")
        return images

    root = write_data(tmp_path / "images")
    monkeypatch.setattr(writer, "hashed_images", hash_and_change)
    assert "has changed while it was packed" in refusal(pack, root, str(tmp_path / "x.lance"))
    assert not [path for path in tmp_path.iterdir() if "lance" in path.name]


def test_of_two_at_once_the_quicker_one_makes_the_set(data, tmp_path):
    out = tmp_path / "x.lance"

    def quicker(written, total):
        pack(data, str(out), on_progress=lambda *_: None)
        before.append({path: path.stat().st_mtime_ns for path in out.rglob("*")})

    before = []
    assert "exists; give another --out" in refusal(pack, data, str(out), on_progress=quicker)
    assert before == [{path: path.stat().st_mtime_ns for path in out.rglob("*")}]
    assert [path.name for path in tmp_path.iterdir()] == ["x.lance"]


def changed(packed, tmp_path, change):
    """Return a copy of a packed data set whose largest file `change` has changed."""
    copy = tmp_path / "copy.lance"
    shutil.copytree(str(packed), copy)
    file = max((copy / "data").iterdir(), key=lambda path: path.stat().st_size)
    file.write_bytes(change(file.read_bytes()))
    return image_root(copy)


def test_damaged_bytes_are_found_where_they_are_read(data, packed, tmp_path):
    names = make_manifest(data).images.paths
    content = (data / names[4]).read_bytes()

    def flip(whole):
        assert whole.count(content) == 1
        place = whole.index(content) + len(content) // 2
        return whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]

    root = changed(packed, tmp_path, flip)
    assert root.sources(names[:4]) == packed.sources(names[:4])
    assert f"is damaged: {names[4]} is not the file that was packed" in refusal(root.sources, names)
    with pytest.raises(InputError, match=f"{names[4]} is not the file that was packed"):
        trained(dataclasses.replace(run_on(data, "dhcl"), root=root))
    # At once, and not as a refused image, which may be sound.
    with pytest.raises(InputError, match=f"^{re.escape(str(root))} is damaged"):
        list(read_batches(names, run_on(data, "dhcl").preprocessing(), root=root))


@pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
def test_a_truncated_data_set_is_refused(packed, tmp_path, share):
    root = changed(packed, tmp_path, lambda whole: whole[: int(len(whole) * share)])
    message = refusal(make_manifest, root)
    assert message.startswith(f"{root} cannot be read, it may be damaged: ")
    assert message.endswith("; pack it again")
    # Names of Rust's types say nothing.
    assert not re.search(r"External error|LanceError|\.rs:", message)


@pytest.mark.parametrize(
    ("column", "value"),
    [
        ("labels", [3]),
        ("labels", [-1]),
        ("path", "../../etc/passwd"),
        ("path", "/etc/passwd"),
        ("path", "another row's"),
        ("second", "a/../../b.png"),
        ("classes", '"abc"'),
        ("classes", "[1, 2, 3]"),
    ],
)
def test_rows_that_are_no_manifest_are_refused(packed, tmp_path, column, value):
    table = lance.dataset(str(packed)).to_table()
    if column == "classes":
        table = table.replace_schema_metadata(table.schema.metadata | {b"orbithash.packed.classes": value.encode()})
    else:
        values = table[column].to_pylist()
        values[5] = values[6] if value == "another row's" else value
        field = table.schema.field(column)
        table = table.set_column(table.schema.names.index(column), field, pa.array(values, field.type))
    lance.write_dataset(table, tmp_path / "x.lance")
    assert "is damaged" in refusal(make_manifest, image_root(tmp_path / "x.lance"))


def test_a_local_path_is_asked_for_plainly():
    message = refusal(local_folder, image_root("s3://b/x.parquet"), "tables of embeddings")
    assert message.startswith("s3://b/x.parquet is remote; tables of embeddings must be local files: ")


def test_a_killed_pack_leaves_nothing_to_train_on(data, packed, tmp_path):
    killed(data, tmp_path / "x.lance")
    assert [path.name[-5:] for path in tmp_path.iterdir()] == [".part"]
    assert "is absent" in refusal(make_manifest, image_root(tmp_path / "x.lance"))
    pack(data, str(tmp_path / "x.lance"))
    assert [path.name for path in tmp_path.iterdir()] == ["x.lance"]
    assert make_manifest(image_root(tmp_path / "x.lance")) == make_manifest(packed)


# In an object store.


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture
def s3(endpoint, monkeypatch):
    """Return a function from a path to its URI, and a client; the environment has credentials."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    client = s3_client(endpoint, "sets")
    return lambda path: f"s3://{path}?endpoint_override={endpoint}&scheme=http", client


def objects(client):
    return {entry["Key"] for entry in client.list_objects_v2(Bucket="sets").get("Contents", [])}


def test_a_packed_set_in_a_bucket_is_that_of_the_folder(data, packed, s3, endpoint, tmp_path, monkeypatch):
    uri, client = s3
    place = uri("sets/a/images.lance")
    killed(data, place)
    # As if it had been killed after one of its files.
    client.put_object(Bucket="sets", Key="a/images.lance/data/left.lance", Body=b"rows")
    assert "holds no packed data set, or one that was not finished" in refusal(make_manifest, image_root(place))
    pack(data, place)
    assert sum("/data/" in key for key in objects(client)) == 1
    assert "a/images.lance/data/left.lance" not in objects(client)
    root = image_root(place)
    assert make_manifest(root) == make_manifest(packed)
    names = make_manifest(data).images.paths
    assert root.sources(names[::-1]) == packed.sources(names[::-1])
    assert "exists; give another --out" in refusal(pack, data, place)
    library.train("itq", place, tmp_path / "run", **SETTINGS)
    assert str(open_run(tmp_path / "run").root) == place
    # The address from the environment.
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{endpoint}")
    assert image_root("s3://sets/a/images.lance").sources(names[:2]) == packed.sources(names[:2])
    assert "holds no packed data set" in refusal(make_manifest, image_root(uri("absent/images.lance")))
    with no_permission(endpoint) as nobody:
        for name, value in nobody.items():
            monkeypatch.setenv(name, value)
        assert "no permission" in refusal(make_manifest, image_root(uri("sets/a/other.lance")))
