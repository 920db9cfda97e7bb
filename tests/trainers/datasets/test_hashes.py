"""Hashes of files: those of hashlib, read once as long as a file does not change."""

import hashlib
import os

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.sources import object_folders
from orbithash.encoders.sources.object_folders import RemoteFolder
from orbithash.trainers.datasets import hashes, make_manifest
from orbithash.trainers.datasets.hashes import hash_files, verified


@pytest.fixture
def root(tmp_path):
    """Return a folder of 40 files and a folder with one file per band."""
    root = tmp_path / "data"
    for name, count in {"beach": 20, "river": 15, "forest": 5}.items():
        (root / name).mkdir(parents=True)
        for i in range(count):
            (root / name / f"{name}{i}.png").write_text(f"{name} {i}")
    return root


@pytest.fixture
def hashed(monkeypatch, tmp_path):
    """Return the names of the files that were read to hash them."""
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(hashes, "SETTLED_S", -1.0)
    names, hash_block = [], hashes._hash_block

    def noted(paths, above=None):
        names.extend(path.rpartition("/")[2] for path in paths)
        return hash_block(paths, above)

    monkeypatch.setattr(hashes, "_hash_block", noted)
    return names


def sha256(content):
    return hashlib.sha256(content).digest()


def write_patch(root):
    """Write a folder with two bands, a hidden file and a folder; return its hash."""
    (root / "patch" / "inner").mkdir(parents=True)
    for name in ("B02.tif", "B01.tif", ".hidden"):
        (root / "patch" / name).write_text(name)
    first, second = (f"{name}\0{sha256(name.encode()).hex()}\0" for name in ("B01.tif", "B02.tif"))
    return sha256((first + second).encode())


def test_hashes_are_those_of_hashlib(root, hashed):
    # More than a buffer, exactly one, none, and more files than a thread takes at once.
    sizes = [hashes._BUFFER_BYTES * 2 + 1, hashes._BUFFER_BYTES, 0, *range(1, hashes._BLOCK + 2)]
    for number, size in enumerate(sizes):
        (root / f"{number}.bin").write_bytes(bytes([number % 256]) * size)
    expected = [sha256(bytes([number % 256]) * size) for number, size in enumerate(sizes)]
    paths = [f"{number}.bin" for number in range(len(sizes))]
    for _ in range(2):
        assert hash_files(root, paths) == expected
    assert sorted(hashed) == sorted(paths), "read once"
    assert hash_files(root, paths[::-2]) == expected[::-2]


def test_a_folder_is_its_files_by_name(root, hashed):
    expected = write_patch(root)
    assert hash_files(root, ["patch", "beach/beach1.png", "patch"])[::2] == [expected, expected]
    hashed.clear()
    assert hash_files(root, ["patch"]) == [expected]
    assert hashed == []
    (root / "patch" / "B03.tif").write_text("3")
    (found,) = hash_files(root, ["patch"])
    assert (found != expected, hashed) == (True, ["B03.tif"])
    (root / "patch" / "B03.tif").unlink()
    assert hash_files(root, ["patch"]) == [expected]


def test_paths_that_cannot_be_read_are_errors_of_their_own(root, hashed):
    expected = sha256(b"beach 1")
    (root / "dangling").symlink_to(root / "absent")
    found = hash_files(root, ["absent", "beach/beach1.png", "beach/beach1.png/x", "dangling"])
    assert [type(one) for one in found] == [FileNotFoundError, bytes, NotADirectoryError, FileNotFoundError]
    assert found[1] == expected
    assert hash_files(root, []) == []
    assert [type(one) for one in hash_files(root / "absent", ["a", "b"])] == [FileNotFoundError] * 2


def test_a_file_that_goes_between_two_looks_is_an_error_and_is_not_remembered(root, hashed, monkeypatch):
    noted = hashes._hash_block
    monkeypatch.setattr(hashes, "_hash_block", lambda *given: (root / "patch" / "B01.tif").unlink() or noted(*given))
    write_patch(root)
    found = hash_files(root, ["patch", "beach/beach1.png"])
    assert isinstance(found[0], FileNotFoundError)
    monkeypatch.undo()
    assert found[1] == sha256(b"beach 1")


def test_unchanged_files_are_hashed_once(root, hashed, tmp_path):
    manifest = make_manifest(root)
    assert len(hashed) == 40
    hashed.clear()
    assert make_manifest(root, protocol="dhcl").images[0].sha256 == manifest.images[0].sha256
    manifest.check_files(root)
    (tmp_path / "link").symlink_to(root)
    manifest.check_files(tmp_path / "link")
    assert hashed == []


def test_files_that_one_command_does_not_look_at_stay_remembered(root, hashed):
    everything = [f"beach/beach{i}.png" for i in range(20)]
    hash_files(root, everything[:10])
    hash_files(root, everything[8:])
    hashed.clear()
    assert hash_files(root, everything) == [sha256(f"beach {i}".encode()) for i in range(20)]
    assert hashed == []


def test_changed_files_are_hashed_again(root, hashed):
    manifest = make_manifest(root)
    hashed.clear()
    path = root / "beach" / "beach3.png"
    before = path.stat()
    # Of the same length and modification time.
    path.write_text("BEACH 3")
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(InputError, match=r"beach/beach3.png: another file than at the time of the split"):
        manifest.check_files(root)
    assert hashed == ["beach3.png"]


@pytest.mark.parametrize("column", hashes._STATUS)
def test_each_part_of_the_status_says_that_a_file_has_changed(root, hashed, tmp_path, column):
    paths = ["beach/beach1.png", "beach/beach2.png"]
    expected = hash_files(root, paths)
    hashed.clear()
    (file,) = (tmp_path / "cache" / "hashes").iterdir()
    table = pq.read_table(file)
    values = [value + (path == b"beach/beach2.png") for value, path in zip(*columns(table, column), strict=True)]
    position = table.schema.names.index(column)
    pq.write_table(table.set_column(position, table.schema.field(column), pa.array(values)), file)
    assert hash_files(root, paths) == expected
    assert hashed == ["beach2.png"]


def columns(table, name):
    return table[name].to_pylist(), table["path"].to_pylist()


def test_hashes_of_files_that_have_just_changed_are_not_remembered(root, hashed, monkeypatch):
    monkeypatch.setattr(hashes, "SETTLED_S", 1e6)
    manifest = make_manifest(root)
    hashed.clear()
    manifest.check_files(root)
    assert len(hashed) == 40


def flip(content):
    middle = len(content) // 3
    return content[:middle] + bytes(byte ^ 255 for byte in content[middle : middle + 60]) + content[middle + 60 :]


@pytest.mark.parametrize("damage", [lambda _: b"", lambda _: b"[]", lambda content: content[:-9], flip])
def test_a_damaged_or_unwritable_cache_is_ignored(root, hashed, tmp_path, damage):
    manifest = make_manifest(root)
    (file,) = (tmp_path / "cache" / "hashes").iterdir()
    file.write_bytes(damage(file.read_bytes()))
    assert make_manifest(root) == manifest
    manifest.check_files(root)
    file.unlink()
    file.parent.rmdir()
    file.parent.write_text("a file in the place of the folder")
    assert make_manifest(root) == manifest


def test_a_cache_of_another_table_is_ignored(root, hashed, tmp_path):
    manifest = make_manifest(root)
    (file,) = (tmp_path / "cache" / "hashes").iterdir()
    pq.write_table(pa.table({"path": ["beach/beach1.png"]}), file)
    assert make_manifest(root) == manifest


def test_names_that_are_no_text(root, hashed):
    path = root / "beach" / os.fsdecode(b"\xff.png")
    path.write_bytes(b"x")
    for _ in range(2):
        assert hash_files(root, [f"beach/{path.name}"]) == [sha256(b"x")]
    assert len(hashed) == 1


def test_an_outage_of_a_store_loses_no_hash(monkeypatch, tmp_path):
    names, read = [f"{number}.png" for number in range(3000)], []

    def read_object(uri, limits):
        name = uri.rpartition("/")[2]
        read.append(name)
        if len(read) == 2500:
            raise InputError("no answer; run the command again to resume")
        return name.encode()

    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(object_folders, "read_object", read_object)
    monkeypatch.setattr(object_folders, "walk_objects", lambda uri: ((name, uri, "7-7") for name in names))
    root = RemoteFolder("s3://bucket/tiles")
    with pytest.raises(InputError, match="no answer"):
        hash_files(root, names)
    done = set(read)
    assert hash_files(root, [*names, "absent.png"])[:-1] == [sha256(name.encode()) for name in names]
    # Threads may be ahead of the one that fails, within a block.
    num_again = len(read) - len(set(read))
    assert len(done) >= 2500
    assert num_again <= object_folders._BLOCK
    (absent,) = hash_files(root, ["absent.png"])
    assert isinstance(absent, FileNotFoundError)
    assert absent.strerror == "No such file or directory"


@pytest.mark.parametrize(
    "change", [lambda patch: (patch / "B02.tif").write_bytes(b"x"), lambda patch: (patch / "B02.tif").unlink()]
)
def test_folders_are_verified_by_all_of_their_files(tmp_path, change):
    patch = tmp_path / "patch"
    patch.mkdir()
    for name in ("B02.tif", "B03.tif"):
        (patch / name).write_bytes(name.encode())
    (sha256,) = hash_files(tmp_path, ["patch"])
    assert verified(patch, sha256) == patch
    change(patch)
    with pytest.raises(ImageError, match="is not the one that was hashed"):
        verified(patch, sha256)
