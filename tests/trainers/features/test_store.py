"""The store of features: parts on the disk, and what becomes of damage, full disks and several writers."""

import hashlib
import multiprocessing
import os
import resource
import threading
import time
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import hashes as hashing
from orbithash.trainers.features import store as module
from orbithash.trainers.features.store import HASH, FeatureStore
from orbithash.trainers.locks import alone_in, claim

KIND = {"network": "a"}


@pytest.fixture(autouse=True)
def small_parts(tmp_path, monkeypatch):
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "features"))
    monkeypatch.setattr(module, "PART_ROWS", 4)


def hashes_of(hexadecimal):
    return np.array([bytes.fromhex(digits) for digits in hexadecimal], HASH)


def rows_of(numbers, dims=3):
    """Return hashes and features that follow from numbers."""
    hexadecimal = [hashlib.sha256(str(number).encode()).hexdigest() for number in numbers]
    return hashes_of(hexadecimal), np.array([[number + d / 8 for d in range(dims)] for number in numbers], np.float32)


def kept(numbers):
    """Return a dict from each number to its row in a newly opened store, for those that are kept."""
    store = FeatureStore(KIND)
    found = store.find(rows_of(numbers)[0])
    known = [number for number, row in zip(numbers, found, strict=True) if row >= 0]
    return dict(zip(known, store.table(found[found >= 0])[:].tolist(), strict=True))


def oracle(numbers):
    return dict(zip(numbers, rows_of(numbers)[1].tolist(), strict=True))


def test_rows_are_found_by_hash_in_any_order_over_many_parts():
    store = FeatureStore(KIND)
    assert store.num_features == 0
    assert (store.find(rows_of([1, 2])[0]) == -1).all()
    for numbers in (range(10), [20], range(30, 35)):
        store.add(*rows_of(numbers))
    asked = [34, 5, 99, 20, 0, 5]
    assert (store.find(rows_of(asked)[0]) == -1).all()
    store.refresh()
    assert store.num_features == 3
    rows = store.find(rows_of(asked)[0])
    assert rows[2] == -1
    there = [number for number in asked if number != 99]
    assert store.table(rows[rows >= 0])[:].tolist() == rows_of(there)[1].tolist()
    assert kept([*range(10), 20, 99]) == oracle([*range(10), 20])


def test_a_hash_that_ends_in_zeros_is_found():
    hashes = hashes_of(["ab" + "00" * 31, "00" * 32])
    store = FeatureStore(KIND)
    store.add(hashes, np.eye(2, dtype=np.float32))
    store.refresh()
    assert store.table(store.find(hashes))[:].tolist() == [[1, 0], [0, 1]]
    assert store.find(hashes_of(["ab" + "00" * 30 + "01"])).tolist() == [-1]


@pytest.mark.parametrize("damage", ["empty", "truncated", "garbage", "one byte"])
def test_a_damaged_part_is_ignored_and_can_be_written_again(damage):
    FeatureStore(KIND).add(*rows_of(range(10)))
    # One of the features of a row in the middle: no structure of the file is broken.
    value = rows_of([5])[1][0, 2].tobytes()
    file = next(path for path in FeatureStore(KIND).folder.glob("*.arrow") if value in path.read_bytes())
    content = file.read_bytes()
    place = content.index(value)
    changed = content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :]
    file.write_bytes({"empty": b"", "truncated": content[:-7], "garbage": b"x" * len(content)}.get(damage, changed))
    assert len(kept(range(10))) == 6
    FeatureStore(KIND).add(*rows_of(range(10)))
    assert kept(range(10)) == oracle(range(10))


def test_an_unchanged_part_is_read_whole_once(monkeypatch):
    read = []
    read_and_hash = hashing._read_and_hash
    monkeypatch.setattr(
        hashing, "_read_and_hash", lambda paths, above: read.extend(paths) or read_and_hash(paths, above)
    )
    # Also parts that are new.
    monkeypatch.setattr(hashing, "SETTLED_S", -60)
    FeatureStore(KIND).add(*rows_of(range(10)))
    files = {path.name: path for path in FeatureStore(KIND).folder.glob("*.arrow")}
    assert sorted(read) == sorted(files)
    read.clear()
    assert kept(range(10)) == oracle(range(10))
    assert read == []
    # Damage is found as before, though size and modification time are the same.
    name, path = next(iter(files.items()))
    times, content = (path.stat().st_atime_ns, path.stat().st_mtime_ns), path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    os.utime(path, ns=times)
    known = kept(range(10))
    assert read == [name]
    assert known == {number: row for number, row in oracle(range(10)).items() if number in known}
    assert len(known) in (6, 8)


def test_of_rows_that_are_there_twice_the_older_counts():
    store = FeatureStore(KIND)
    hashes, features = rows_of(range(3))
    for number in range(3):
        before = set(store.folder.glob("*.arrow"))
        store.add(hashes, features + number)
        (new,) = set(store.folder.glob("*.arrow")) - before
        # The digests, in whose order a folder may be listed, say nothing about age.
        os.utime(new, ns=(10**18 - number, 10**18 - number))
    store.refresh()
    assert (store.table(store.find(hashes))[:] == features + 2).all()


def num_open():
    return sum(1 for _ in Path("/proc/self/fd").iterdir())


def test_parts_hold_no_files_open():
    FeatureStore(KIND).add(*rows_of(range(100)))
    before = num_open()
    store = FeatureStore(KIND)
    # The lock of the folder.
    assert num_open() == before + 1
    assert (store.find(rows_of(range(100))[0]) >= 0).all()


def test_too_many_open_files_are_not_damage():
    store = FeatureStore(KIND)
    store.add(*rows_of(range(4)))
    (part,) = store.folder.glob("*.arrow")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    opened = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (num_open() + 20, limits[1]))
        with suppress(OSError):
            while True:
                opened.append(os.open("/dev/null", os.O_RDONLY))
        with pytest.raises(InputError, match="ulimit -n"):
            module._mapped(part)
    finally:
        for file in opened:
            os.close(file)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


def test_too_many_mapped_files_are_not_damage():
    """The limit of address space has the same error as that of the number of mappings, which only root may change."""
    store = FeatureStore(KIND)
    # Larger than what Python and Arrow have reserved.
    store.add(rows_of([1])[0], np.zeros((1, 2**24), np.float32))
    (part,) = store.folder.glob("*.arrow")
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    try:
        resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, limits[1]))
        with pytest.raises(InputError, match=r"vm\.max_map_count"):
            module._mapped(part)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, limits)


@pytest.mark.parametrize("given", ["{}/a", "file://{}/a", "FILE://{}/a", "a"])
def test_the_folder_is_absolute_for_a_path_and_a_uri(given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ORBITHASH_FEATURES", given.format(tmp_path))
    assert module.store_uri() is None
    folder = module.store_folder()
    monkeypatch.chdir("/")
    assert folder == tmp_path / "a"
    FeatureStore(KIND).add(*rows_of([1]))


def test_kinds_have_folders_of_their_own():
    FeatureStore(KIND).add(*rows_of([1]))
    assert FeatureStore({"network": "b"}).find(rows_of([1])[0]).tolist() == [-1]


def test_a_part_of_another_width_is_ignored():
    store = FeatureStore(KIND)
    store.add(*rows_of([1, 2]))
    store.refresh()
    store.add(*rows_of([3], dims=5))
    store.refresh()
    assert store.find(rows_of([1, 2, 3])[0]).tolist() == [0, 1, -1]


def test_a_full_disk_names_the_variable_and_leaves_nothing_half_written(monkeypatch):
    store = FeatureStore(KIND)
    store.add(*rows_of(range(4)))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    # Writing beyond this size fails, after part of the content was written.
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(InputError, match="set ORBITHASH_FEATURES to a folder on a disk with free space") as caught:
            store.add(*rows_of(range(4, 8)))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in str(caught.value)
    assert len(list(store.folder.glob("[!.]*"))) == 1
    assert [path.name for path in store.folder.glob(".*")] == [".lock"]
    assert kept(range(8)) == oracle(range(4))


def write_some(first, barrier):
    """Add rows one part at a time while another process does the same; half of the rows are those of the other."""
    store = FeatureStore(KIND)
    barrier.wait()
    for number in range(first, first + 20):
        store.add(*rows_of([number]))
        store.refresh()


def test_two_writers_at_once_lose_no_row():
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(2)
    writers = [context.Process(target=write_some, args=(first, barrier)) for first in (0, 10)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert [writer.exitcode for writer in writers] == [0, 0]
    assert kept(range(40)) == oracle(range(30))
    assert len(list(FeatureStore(KIND).folder.glob("*.arrow"))) == 30


def test_who_waits_for_a_lock_is_told_so(tmp_path, caplog):
    def enter():
        with alone_in(tmp_path / ".share", "fetches"):
            pass

    enter()
    assert caplog.messages == []
    release = claim(tmp_path / ".share")
    thread = threading.Thread(target=enter)
    thread.start()
    while not caplog.messages and thread.is_alive():
        time.sleep(0.01)
    release()
    thread.join()
    assert caplog.messages == [f"{tmp_path}: waiting for another process, which fetches"]
