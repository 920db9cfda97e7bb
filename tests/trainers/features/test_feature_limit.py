"""The limit of the store of features: what is pruned, what is not, and what a kill in the middle leaves."""

import hashlib
import logging
import multiprocessing
import os
import signal
from contextlib import suppress

import numpy as np
import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.features import features as computing
from orbithash.trainers.features import limit as module
from orbithash.trainers.features.features import Wanted
from orbithash.trainers.features.store import HASH, FeatureStore

CONTEXT = multiprocessing.get_context("fork")
ROWS = 10


@pytest.fixture(autouse=True)
def root(tmp_path, monkeypatch):
    monkeypatch.setenv("ORBITHASH_FEATURES", str(tmp_path / "features"))
    return tmp_path / "features"


def rows_of(kind, num_rows=ROWS):
    hashes = [hashlib.sha256(f"{kind} {row}".encode()).digest() for row in range(num_rows)]
    return np.array(hashes, HASH), np.arange(num_rows * 4, dtype=np.float32).reshape(-1, 4) + ord(kind)


def write(kind, used=None, num_parts=1):
    """Keep a kind of rows in parts, last used at a time; return its folder."""
    store = FeatureStore({"network": kind})
    for part in range(num_parts):
        store.add(*(array[part::num_parts] for array in rows_of(kind)))
    if used is not None:
        os.utime(store.folder, (used, used))
    return store.folder


def kept(kind):
    """Return which rows of a kind are kept, and check that they are right."""
    store = FeatureStore({"network": kind})
    hashes, features = rows_of(kind)
    found = store.find(hashes)
    if (found >= 0).any():
        assert (store.table(found[found >= 0])[:] == features[found >= 0]).all()
    return np.flatnonzero(found >= 0).tolist()


def limit_to(monkeypatch, num_bytes):
    monkeypatch.setenv("ORBITHASH_FEATURES_GB", str(num_bytes / 1e9))


def size(folder):
    return sum(file.stat().st_size for file in folder.iterdir())


def test_the_least_recently_used_kinds_go_until_the_new_one_fits(root, monkeypatch, caplog):
    times = {"b": 300, "c": 100, "d": 400, "e": 200}
    folders = {kind: write(kind, used) for kind, used in times.items()}
    one = size(folders["b"])
    (root / "notes").mkdir()
    (root / "notes" / "a.arrow").write_bytes(b"mine")
    limit_to(monkeypatch, 3.5 * one)
    # Reading is a use as well.
    assert kept("c") == list(range(ROWS))
    with caplog.at_level(logging.WARNING):
        new = write("n")
    # Oldest first, as few as are needed: 5 kinds, of which 3 fit.
    assert {kind for kind, folder in folders.items() if not folder.exists()} == {"e", "b"}
    assert [str(folders[kind]) in line for kind, line in zip("eb", caplog.messages, strict=True)] == [True, True]
    assert "last used on 1970-01-01" in caplog.messages[0]
    assert [kept(kind) for kind in "cdn"] == [list(range(ROWS))] * 3
    assert sum(map(size, (folders["c"], folders["d"], new))) <= 3.5 * one
    assert (root / "notes" / "a.arrow").read_bytes() == b"mine"


def test_without_a_limit_and_below_it_nothing_goes(monkeypatch):
    folders = [write(kind) for kind in "ab"]
    limit_to(monkeypatch, 1e9)
    write("c")
    assert all(folder.exists() for folder in folders)


def test_a_kind_that_does_not_fit_alone_is_refused_before_anything_goes(monkeypatch):
    other = write("a")
    limit_to(monkeypatch, 1.5 * size(other))
    store = FeatureStore({"network": "b"})
    with pytest.raises(InputError, match=r"features need 0\.1 GB and ORBITHASH_FEATURES_GB is .*; raise it$") as caught:
        store.make_room(10**8)
    assert "\n" not in str(caught.value)
    assert kept("a") == list(range(ROWS))
    assert not list(store.folder.glob("*.arrow"))


def test_ranks_find_room_for_the_rows_of_all_before_they_compute(monkeypatch):
    """Half of the rows, those of this rank, would fit."""
    computed = []
    hashes, _ = rows_of("a", 1000)
    wanted = Wanted({"network": "a"}, hashes, 4, lambda positions: computed.extend(positions) or iter(()))
    limit_to(monkeypatch, 0.8 * wanted.num_bytes(1000))
    monkeypatch.setattr(computing, "rank", lambda: 0)
    monkeypatch.setattr(computing, "world_size", lambda: 2)
    with pytest.raises(InputError, match=r"features need 4\.8e-05 GB and"):
        wanted.table()
    assert computed == []


def test_files_are_looked_at_after_each_hundredth_of_the_limit(monkeypatch):
    one = size(write("a", used=100))
    limit_to(monkeypatch, 250.5 * one)
    looks, sizes = [], module._size
    monkeypatch.setattr(module, "_size", lambda kind: looks.append(kind) or sizes(kind))
    store = FeatureStore({"network": "b"})
    for part in range(10):
        hashes, features = rows_of("b", ROWS * 10)
        store.add(hashes[part::10], features[part::10])
    # Two kinds at the first part of each three: two hundredths and a half are free after it.
    assert len(looks) == 2 * 4
    # Close to the limit, what is free decides.
    assert module.make_room(store.folder, 150 * one) == pytest.approx(2.505 * one)
    assert module.make_room(store.folder, 240 * one) == pytest.approx(0.5 * one, abs=9)


def test_kinds_that_cannot_be_read_are_left(monkeypatch):
    """As those of other users may be."""
    other = write("a", used=100)
    one = size(other)
    scandir = os.scandir

    def refused(path):
        if str(path) == str(other):
            raise PermissionError(13, "Permission denied")
        return scandir(path)

    limit_to(monkeypatch, 1.5 * one)
    monkeypatch.setattr(module.os, "scandir", refused)
    folder = write("b", used=200)
    monkeypatch.undo()
    assert size(other) == size(folder) == one


@pytest.mark.parametrize("value", ["much", "0", "-1", "nan", "inf"])
def test_a_limit_that_is_none_is_refused(monkeypatch, value):
    monkeypatch.setenv("ORBITHASH_FEATURES_GB", value)
    with pytest.raises(InputError, match=f"ORBITHASH_FEATURES_GB is '{value}'; a number of GB above 0 is needed"):
        write("a")


def hold(pipe):
    """Keep a table of a kind, without its store, until told to end."""
    store = FeatureStore({"network": "a"})
    table = store.table(store.find(rows_of("a")[0])).reshape(2, -1).select(slice(None))
    del store
    pipe.send("open")
    pipe.recv()
    pipe.send((table[:].reshape(-1, 4) == rows_of("a")[1]).all())


def test_what_another_process_reads_is_not_pruned(monkeypatch):
    folder = write("a", used=100)
    limit_to(monkeypatch, 1.5 * size(folder))
    mine, other = CONTEXT.Pipe()
    process = CONTEXT.Process(target=hold, args=(other,))
    process.start()
    assert mine.recv() == "open"
    with pytest.raises(InputError, match="beside others that are in use, and ORBITHASH_FEATURES_GB is") as caught:
        write("b")
    assert "\n" not in str(caught.value)
    mine.send("end")
    assert mine.recv()
    process.join()
    write("b")
    assert not folder.exists()
    assert kept("b") == list(range(ROWS))


def prune_and_die(num_files):
    """Write a kind, for which another must go, and kill this process after some of its files are gone."""
    unlink, done = os.unlink, []

    def few(path, **options):
        if len(done) == num_files:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(path)
        unlink(path, **options)

    module.os.unlink = few
    write("b")


@pytest.mark.parametrize("num_files", [0, 2, 5])
def test_a_kill_while_pruning_leaves_right_rows_and_the_next_one_goes_on(monkeypatch, num_files):
    folder = write("a", used=100, num_parts=5)
    limit = 1.2 * size(folder)
    limit_to(monkeypatch, limit)
    process = CONTEXT.Process(target=prune_and_die, args=(num_files,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    # `kept` compares the rows.
    assert len(kept("a")) == ROWS - 2 * num_files
    write("b", num_parts=5)
    assert kept("b") == list(range(ROWS))
    assert sum(size(kind) for kind in folder.parent.iterdir() if kind.is_dir()) <= limit


def write_often(number, barrier, written):
    """Write and read one of six kinds after the other, while others do so, too; count the writes."""
    barrier.wait()
    for step in range(30):
        kind = "abcdef"[(2 * number + step) % 6]
        # Others may be in use just now.
        with suppress(InputError):
            write(kind)
            with written:
                written.value += 1
        kept(kind)


def test_processes_that_prune_each_other_never_see_wrong_rows(monkeypatch):
    # Each of three uses one kind at a time, whose size counts twice while it is written again.
    limit_to(monkeypatch, 4.5 * size(write("a")))
    barrier, written = CONTEXT.Barrier(3), CONTEXT.Value("i", 0)
    processes = [CONTEXT.Process(target=write_often, args=(number, barrier, written)) for number in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0, 0]
    assert written.value > 45


def test_a_folder_that_cannot_be_written_is_read(monkeypatch):
    folder = write("a")
    (folder / ".lock").unlink()
    folder.chmod(0o555)
    try:
        assert kept("a") == list(range(ROWS))
    finally:
        folder.chmod(0o755)
