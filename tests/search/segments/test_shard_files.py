"""The local files of a shard: killed at any point, damaged, shared by replicas, or not writable."""

import logging
import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from shard_cases import ChangingArchive, Shards, check_version

from orbithash.search.segments.stop import Stop
from orbithash.search.segments.versions import merging


def shard_folder(root: Path) -> Path:
    [folder] = {path.parent for path in root.rglob("manifest-*")}
    return folder


@contextmanager
def copies_at_each_step(monkeypatch, root: Path, copies: Path):
    """Copy the files before each rename and each removal, as a process that is killed there leaves them."""
    steps = iter(range(10**6))

    def copy():
        if root.exists():
            shutil.copytree(root, copies / str(next(steps)), ignore_dangling_symlinks=True)

    with monkeypatch.context() as patched:
        for owner, name in ((Path, "replace"), (Path, "unlink"), (shutil, "rmtree"), (os, "replace")):
            before = getattr(owner, name)

            def stepped(*args, before=before, **options):
                if str(root) in str(args[0]):
                    copy()
                return before(*args, **options)

            patched.setattr(owner, name, stepped)
        yield
    copy()


def test_files_of_a_process_that_was_killed_at_any_step_are_followed_from(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 20)
    case = ChangingArchive.create(tmp_path / "archive", 4)
    root = tmp_path / "segments"
    with copies_at_each_step(monkeypatch, root, tmp_path / "copies"):
        shards = Shards.of(case, 1, 3, folder=root)
        for _ in range(5):
            shards.follow(case.newest)
            # Merges run in this thread, one after the other.
            shards.merge_all()
            case.change()
        shards.close()
    copies = sorted((tmp_path / "copies").iterdir())
    assert len(copies) > 20
    for copy in copies:
        shards = Shards.of(case, 1, 3, folder=copy)
        shards.follow(case.newest)
        check_version(case, shards, case.newest, num_searches=1)
        shards.close()


KILLED = """
import sys
from pathlib import Path
import orbithash.search.segments.versions.merging as merging
from orbithash.encoders.archive.archive import Archive
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import ShardHost
merging.SMALL_ROWS = 20
path, bits, folder = sys.argv[1:]
newest = Archive.open(path).version
for round in range(10**6):
    host = ShardHost(path, int(bits), Deal(1, 3), 0, folder=Path(folder))
    for version in range(2, newest + 1):
        host.follow(version)
        while host._upkeep.work():
            pass
    host.close()
    print(round, flush=True)
"""


def test_a_killed_process_leaves_files_that_can_be_followed_from(tmp_path):
    case = ChangingArchive.create(tmp_path / "archive", 5)
    for _ in range(8):
        case.change()
    root = tmp_path / "segments"
    arguments = [sys.executable, "-c", KILLED, case.path, str(case.bits), str(root)]
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True) as process:
        # It has begun again when it is killed.
        assert process.stdout.readline() == "0\n"
        process.send_signal(signal.SIGKILL)
    shards = Shards.of(case, 1, 3, folder=root)
    assert shards.follow(case.newest) == len(case.versions[case.newest])
    check_version(case, shards, case.newest)
    shards.close()
    assert not list(root.rglob("*.part"))


def stored(tmp_path, seed=6):
    """Return an archive and the folder of the files of its only shard."""
    case = ChangingArchive.create(tmp_path / "archive", seed)
    case.append(50)
    shards = Shards.of(case, 1, 3, folder=tmp_path / "segments")
    shards.follow(case.newest)
    case.delete(3)
    shards.follow(case.newest)
    shards.close()
    return case, shard_folder(tmp_path / "segments")


def is_read_as_a_whole(monkeypatch, case, root):
    """Open the shard, compare it with a loop, and return whether all rows were read from the archive."""
    reads = []
    shards = Shards.of(case, 1, 3, folder=root)
    source = shards.hosts[0]._source
    monkeypatch.setattr(source, "all_rows", lambda archive: reads.append(1) or type(source).all_rows(source, archive))
    shards.follow(case.newest)
    check_version(case, shards, case.newest)
    shards.close()
    return bool(reads)


def test_sound_files_are_used(tmp_path, monkeypatch):
    case, _ = stored(tmp_path)
    assert not is_read_as_a_whole(monkeypatch, case, tmp_path / "segments")
    case.change()
    assert not is_read_as_a_whole(monkeypatch, case, tmp_path / "segments")


@pytest.mark.parametrize("suffix", [".codes", ".columns", "manifest-0"])
@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty", "missing"])
def test_damaged_files_are_found_and_read_from_the_archive(suffix, damage, tmp_path, monkeypatch, caplog):
    case, folder = stored(tmp_path)
    for path in [path for path in folder.iterdir() if path.name.endswith(suffix)]:
        content = path.read_bytes()
        path.unlink()
        match damage:
            case "flipped":
                changed = bytearray(content)
                changed[int(np.random.default_rng(0).integers(len(content)))] ^= 4
                path.write_bytes(changed)
            case "truncated":
                path.write_bytes(content[: len(content) // 2])
            case "empty":
                path.write_bytes(b"")
        if path.exists():
            path.chmod(0o600)
    with caplog.at_level(logging.WARNING):
        assert is_read_as_a_whole(monkeypatch, case, tmp_path / "segments")
    messages = [record.getMessage() for record in caplog.records if "read from the archive" in record.getMessage()]
    # Without a manifest, the shard is new.
    assert len(messages) == (0 if (suffix, damage) == ("manifest-0", "missing") else 1)
    assert not any("\n" in message for message in messages)
    assert not is_read_as_a_whole(monkeypatch, case, tmp_path / "segments")


def test_files_of_an_archive_that_was_replaced_are_not_used(tmp_path, monkeypatch):
    case, _ = stored(tmp_path)
    shutil.rmtree(case.path)
    other = ChangingArchive.create(tmp_path / "archive", 6)
    other.append(50)
    other.delete(3)
    assert other.newest == case.newest
    assert is_read_as_a_whole(monkeypatch, other, tmp_path / "segments")


def test_replicas_share_files_and_keep_those_of_the_other(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 20)
    case = ChangingArchive.create(tmp_path / "archive", 8)
    root = tmp_path / "segments"
    replicas = [Shards.of(case, 1, 3, folder=root) for _ in range(2)]
    for _ in range(4):
        for replica in replicas:
            replica.follow(case.newest)
            replica.merge_all()
        case.change()
    folder = shard_folder(root)
    assert len(list(folder.glob("manifest-[0-9]"))) == 2
    for replica in replicas:
        replica.follow(case.newest)
        check_version(case, replica, case.newest)
        replica.close()
    again = [Shards.of(case, 1, 3, folder=root) for _ in range(2)]
    for replica in again:
        replica.follow(case.newest)
        check_version(case, replica, case.newest)
        replica.close()


def test_a_folder_that_cannot_be_used_leaves_rows_in_memory(tmp_path, caplog):
    case = ChangingArchive.create(tmp_path / "archive", 9)
    (tmp_path / "file").write_bytes(b"")
    shards = Shards.of(case, 2, 3, folder=tmp_path / "file")
    for _ in range(3):
        shards.follow(case.newest)
        check_version(case, shards, case.newest)
        case.change()
    assert "keeps rows in memory" in caplog.text
    shards.close()


@pytest.mark.parametrize("count", range(1, 8))
def test_a_disk_that_fills_up_leaves_rows_in_memory(count, tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 20)
    case = ChangingArchive.create(tmp_path / "archive", 10)
    left = iter(range(count))
    replace = Path.replace

    def full(path, target):
        if next(left, None) is None:
            raise OSError(28, "No space left on device")
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", full)
    shards = Shards.of(case, 1, 3, folder=tmp_path / "segments")
    for _ in range(4):
        shards.follow(case.newest)
        shards.merge_all()
        check_version(case, shards, case.newest, num_searches=1)
        case.change()
    shards.close()


def test_files_that_nothing_uses_are_removed(tmp_path, monkeypatch):
    monkeypatch.setattr(merging, "SMALL_ROWS", 1)
    case = ChangingArchive.create(tmp_path / "archive", 11)
    for _ in range(6):
        shards = Shards.of(case, 1, 3, folder=tmp_path / "segments")
        shards.follow(case.newest)
        case.append(40)
        shards.follow(case.newest)
        shards.merge_all()
        num_segments = shards.hosts[0].status().num_segments
        assert shards.hosts[0].count(case.newest, "", Stop()) == len(case.versions[case.newest])
        shards.close()
        assert len(list(shard_folder(tmp_path / "segments").glob("*.codes"))) == num_segments


def test_folders_of_other_shards_are_removed_when_they_are_old(tmp_path):
    case, folder = stored(tmp_path)
    week = 8 * 24 * 3600

    def serve(num_shards):
        shards = Shards.of(case, num_shards, 3, folder=tmp_path / "segments")
        shards.follow(case.newest)
        return shards

    serve(2).close()
    assert folder.exists()
    used = serve(1)
    for path in [*folder.iterdir(), folder]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - week))
    shutil.rmtree(folder.with_name(folder.name.replace("-1-3-0", "-2-3-0")))
    serve(2).close()
    assert (folder / "manifest-0").exists(), "a process uses it"
    used.close()
    for path in [*folder.iterdir(), folder]:
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime - week))
    case.delete(1)
    serve(2).close()
    assert not folder.exists()
