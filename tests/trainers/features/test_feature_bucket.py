"""Features in a bucket behind the local store: what machines with folders of their own share, and what failures do."""

import hashlib
import logging
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from object_store import ENVIRONMENT, no_permission, s3_client, s3_server

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources import remote
from orbithash.trainers.features import store as module
from orbithash.trainers.features.bucket import Bucket
from orbithash.trainers.features.features import Wanted
from orbithash.trainers.features.store import HASH, FeatureStore

KIND = {"network": "a"}
ROWS = 20


@pytest.fixture(scope="module")
def endpoint():
    with s3_server() as address:
        yield address


@pytest.fixture(scope="module")
def client(endpoint):
    return s3_client(endpoint, "shared")


@pytest.fixture(autouse=True)
def node(client, endpoint, monkeypatch, tmp_path, request):
    """Return a function that makes this process one of the node with a number, which has a folder of its own."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(module, "PART_ROWS", 4)
    prefix = hashlib.sha256(request.node.name.encode()).hexdigest()[:8]
    monkeypatch.setenv("ORBITHASH_FEATURES", f"s3://shared/{prefix}?endpoint_override={endpoint}&scheme=http")

    def go_to(number):
        monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / f"node{number}"))
        return tmp_path / f"node{number}" / "features"

    go_to.objects = lambda: {
        item["Key"]: item["Size"]
        for item in client.list_objects_v2(Bucket="shared", Prefix=f"{prefix}/").get("Contents", [])
    }
    go_to.prefix = prefix
    go_to(0)
    return go_to


def features_of(rows):
    return np.asarray(rows, np.float32)[:, None] + np.arange(3, dtype=np.float32) / 8


def wanted(rows, computed):
    """Return rows as something wanted, which records what is computed."""
    rows = np.asarray(rows)
    hashes = np.array([hashlib.sha256(str(row).encode()).digest() for row in rows], HASH)

    def compute(positions):
        computed.extend(rows[positions].tolist())
        yield from (features_of(rows[positions[start : start + 4]]) for start in range(0, len(positions), 4))

    return Wanted(KIND, hashes, 3, compute)


def parts(folder):
    return {path.name: path.stat().st_size for path in folder.rglob("*.arrow")}


def test_nodes_with_folders_of_their_own_compute_each_row_once(node):
    computed = []
    first = wanted(range(12), computed).table()[:]
    assert (first == features_of(range(12))).all()
    other = node(1)
    asked = [*range(6, ROWS)]
    assert (wanted(asked, computed).table()[:] == features_of(asked)).all()
    assert sorted(computed) == list(range(ROWS))
    # Each part is there once, under the name that it has here.
    assert {key.rpartition("/")[2]: size for key, size in node.objects().items()} == parts(other)
    for number in (0, 2):
        folder = node(number)
        assert (wanted(range(ROWS), computed).table()[:] == features_of(range(ROWS))).all()
        assert parts(folder) == parts(other)
    assert len(computed) == ROWS


def test_rows_computed_in_workers_are_missing_nowhere(node):
    computed = []
    positions = wanted(range(ROWS), computed).missing()
    wanted(range(ROWS), computed).keep(positions[:10])
    node(1)
    assert wanted(range(ROWS), computed).missing().tolist() == list(range(10, ROWS))


def test_rows_from_before_the_bucket_are_uploaded(node, monkeypatch):
    uri = os.environ["ORBITHASH_FEATURES"]
    monkeypatch.delenv("ORBITHASH_FEATURES")
    computed = []
    wanted(range(ROWS), computed).table()
    assert node.objects() == {}
    monkeypatch.setenv("ORBITHASH_FEATURES", uri)
    wanted(range(1), computed).table()
    node(1)
    wanted(range(ROWS), computed).table()
    assert len(computed) == ROWS


@pytest.mark.parametrize("damage", ["one byte", "truncated"])
def test_a_damaged_object_is_not_used(node, client, caplog, damage):
    computed = []
    wanted(range(8), computed).table()
    key = min(node.objects())
    content = client.get_object(Bucket="shared", Key=key)["Body"].read()
    changed = {"one byte": content[:-20] + bytes([content[-20] ^ 1]) + content[-19:], "truncated": content[:-7]}[damage]
    client.put_object(Bucket="shared", Key=key, Body=changed)
    folder = node(1)
    with caplog.at_level(logging.WARNING):
        assert (wanted(range(8), computed).table()[:] == features_of(range(8))).all()
    assert len(computed) == 12
    assert f"{key} in the bucket is damaged" in caplog.text
    assert all(
        name == f"{hashlib.sha256(path.read_bytes()).hexdigest()}.arrow"
        for path in folder.rglob("*.arrow")
        for name in [path.name]
    )


def test_a_local_part_that_is_damaged_is_fetched_again(node):
    computed = []
    wanted(range(8), computed).table()
    path = next(node(0).rglob("*.arrow"))
    path.write_bytes(b"x" * path.stat().st_size)
    assert (wanted(range(8), computed).table()[:] == features_of(range(8))).all()
    assert len(computed) == 8


def test_a_bucket_that_fails_midway_is_a_warning_and_loses_nothing(node, monkeypatch, caplog):
    def write(self, kind, name, content):
        raise InputError("the bucket is full")

    computed = []
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Bucket, "write", write)
        assert (wanted(range(ROWS), computed).table()[:] == features_of(range(ROWS))).all()
    assert sum("the bucket is full; features stay in" in line for line in caplog.messages) in (1, 2)
    assert node.objects() == {}
    # A bucket that may only be read is one, too.
    with monkeypatch.context() as patch, caplog.at_level(logging.WARNING):
        patch.setattr(Bucket, "write", write)
        assert (wanted(range(ROWS), computed).table()[:] == features_of(range(ROWS))).all()
    # The next command on this node uploads them.
    wanted(range(1), computed).table()
    node(1)
    assert (wanted(range(ROWS), computed).table()[:] == features_of(range(ROWS))).all()
    assert len(computed) == ROWS


def test_an_upload_of_a_worker_that_fails_is_an_error_and_the_next_worker_uploads(node, monkeypatch):
    def write(self, kind, name, content):
        raise InputError("the bucket is full")

    wanted(range(4), []).table()
    folder, computed = node(1), []
    with monkeypatch.context() as patch:
        patch.setattr(Bucket, "write", write)
        worker = wanted(range(ROWS), computed)
        worker.upload()
        with pytest.raises(InputError, match=r"^the bucket is full$"):
            worker.keep(np.arange(4, ROWS))
        assert len(parts(folder)) == 1
        with pytest.raises(InputError, match=r"^the bucket is full$"):
            wanted(range(ROWS), computed).upload()
    wanted(range(ROWS), computed).upload()
    # Nothing is fetched: a node keeps what its workers compute.
    assert len(parts(folder)) == 1
    assert len(node.objects()) == 2
    node(2)
    assert wanted(range(ROWS), computed).missing().tolist() == list(range(8, ROWS))


def test_a_bucket_that_fails_at_the_start_ends_before_anything_is_computed(node, endpoint, monkeypatch):
    computed = []
    good = os.environ["ORBITHASH_FEATURES"]
    for uri, words in (
        (good.replace("shared", "absent"), "there is no bucket absent; create it first"),
        (good.replace("s3:", "https:"), "a folder, or a URI of s3:// or gs://, is needed"),
        (good.replace("shared", "key:secret@shared"), "is given with a secret"),
    ):
        monkeypatch.setenv("ORBITHASH_FEATURES", uri)
        with pytest.raises(InputError, match=words) as caught:
            wanted(range(4), computed).table()
        assert "\n" not in str(caught.value)
        assert "secret@" not in str(caught.value)
    monkeypatch.setenv("ORBITHASH_FEATURES", good)
    with no_permission(endpoint) as credentials:
        for name, value in credentials.items():
            monkeypatch.setenv(name, value)
        remote._system.cache_clear()
        with pytest.raises(
            InputError, match=r"^ORBITHASH_FEATURES is s3://shared/.*, which cannot be listed: "
        ) as caught:
            wanted(range(4), computed).table()
    remote._system.cache_clear()
    assert "\n" not in str(caught.value)
    assert computed == []


# Keep rows in parts of 4, and kill the process when 2 parts are uploaded and the next is only written here. The process
# is new, because a bucket's client cannot be used after a fork.
UPLOAD_AND_DIE = """
import hashlib, os, signal
import numpy as np
from orbithash.trainers.features import store
from orbithash.trainers.features.bucket import Bucket
write, done = Bucket.write, []
def few(self, kind, name, content):
    if len(done) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    done.append(name)
    write(self, kind, name, content)
Bucket.write, store.PART_ROWS = few, 4
hashes = np.array([hashlib.sha256(str(row).encode()).digest() for row in range(20)], store.HASH)
features = np.arange(20, dtype=np.float32)[:, None] + np.arange(3, dtype=np.float32) / 8
store.FeatureStore({"network": "a"}).add(hashes, features)
"""


def test_a_kill_while_uploading_loses_one_part_elsewhere_and_none_here(node):
    process = subprocess.run([sys.executable, "-c", UPLOAD_AND_DIE], check=False)
    assert process.returncode == -signal.SIGKILL
    assert len(node.objects()) == 2
    folder, computed = node(0), []
    assert len(parts(folder)) == 3
    node(1)
    assert wanted(range(ROWS), computed).missing().tolist() == list(range(8, ROWS))
    node(0)
    assert (wanted(range(ROWS), computed).table()[:] == features_of(range(ROWS))).all()
    assert computed == list(range(12, ROWS))
    assert {key.rpartition("/")[2] for key in node.objects()} == parts(folder).keys()


def test_what_is_fetched_fits_into_the_limit(node, monkeypatch):
    wanted(range(ROWS), []).table()
    size = sum(node.objects().values())
    node(1)
    monkeypatch.setenv("ORBITHASH_FEATURES_GB", str(0.9 * size / 1e9))
    with pytest.raises(InputError, match=r"features need .* GB and ORBITHASH_FEATURES_GB is"):
        wanted(range(ROWS), []).table()
    monkeypatch.setenv("ORBITHASH_FEATURES_GB", str(1.1 * size / 1e9))
    computed = []
    wanted(range(ROWS), computed).table()
    assert computed == []


def test_two_stores_of_a_machine_fetch_a_part_once(node, monkeypatch):
    wanted(range(ROWS), []).table()
    node(1)
    read, fetched = Bucket.read, []
    monkeypatch.setattr(Bucket, "read", lambda self, kind, name: fetched.append(name) or read(self, kind, name))
    stores = [FeatureStore(KIND) for _ in range(2)]
    with module.ThreadPoolExecutor(2) as pool:
        list(pool.map(FeatureStore.share, stores))
    assert len(fetched) == len(set(fetched)) == len(node.objects())
