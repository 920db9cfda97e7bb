"""Which items of a source are new, changed, done or refused; without a model."""

import os
import shutil

import numpy as np
import pytest

from orbithash.cluster.encoding.items import Source, new_items
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.archive.stamps import file_version, make_stamp
from orbithash.encoders.errors import InputError


@pytest.fixture
def archive(tmp_path):
    return Archive.create(tmp_path / "archive", 8, "model")


@pytest.fixture
def images(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    for name in ("a.png", "b.png", "c.png"):
        (folder / name).write_bytes(f"content of {name}".encode())
    return folder


def look_up(source, archive, *, retry_refused=False, **options):
    (portion,) = new_items(Source(str(source), **options).items(), archive, retry_refused)
    return portion


def keys(portion):
    return [item.key for item in portion.items]


def store(archive, items):
    """Commit a row for each item, as the stages do."""
    codes = np.zeros((len(items), 1), np.uint8)
    stamps = [make_stamp(item.path, item.version) for item in items]
    table = Archive.table(codes, 8, [item.key for item in items], [item.path for item in items], stamp=stamps)
    archive.commit(Archive.write_fragments(archive.path, table))


def keep_times(path, change):
    """Make a change that restores the modification time of a file."""
    before = path.stat()
    change()
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_rows_of_unchanged_files_are_done(archive, images):
    store(archive, look_up(images, archive).items)
    portion = look_up(images, archive)
    assert (keys(portion), portion.num_done) == ([], 3)


def test_changed_files_replace_their_rows(archive, images):
    store(archive, look_up(images, archive).items)
    (images / "a.png").write_bytes(b"other")
    # Of the same length, and with the same modification time.
    keep_times(images / "b.png", lambda: (images / "b.png").write_bytes(b"CONTENT of b.png"))
    portion = look_up(images, archive)
    assert (keys(portion), portion.replacing, portion.num_done) == (["a.png", "b.png"], {"a.png", "b.png"}, 1)


def test_touched_and_copied_files_are_done(archive, images, tmp_path):
    store(archive, look_up(images, archive).items)
    (images / "a.png").touch()
    assert look_up(images, archive).num_done == 3
    shutil.copytree(images, tmp_path / "copy")
    assert look_up(tmp_path / "copy", archive).num_done == 3
    images.rename(tmp_path / "moved")
    assert look_up(tmp_path / "moved", archive).num_done == 3


def test_another_source_with_the_same_names_is_refused(archive, images, tmp_path):
    store(archive, look_up(images, archive).items)
    other = tmp_path / "other"
    other.mkdir()
    for name in ("b.png", "z.png"):
        (other / name).write_bytes(b"CONTENT of b.png")
    # Sizes and times are equal.
    stat = (images / "b.png").stat()
    os.utime(other / "b.png", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match=r"a row 'b.png' of another image, .*images/b.png; this one is .*other/b.png"):
        look_up(other, archive)
    assert keys(look_up(other, archive, prefix="o")) == ["o/b.png", "o/z.png"]
    (other / "list.txt").write_text("b.png\n")
    with pytest.raises(InputError, match="Give --prefix NAME"):
        look_up(other / "list.txt", archive)


def test_refused_items_are_tried_again_when_they_change(archive, images):
    first = look_up(images, archive)
    stamps = {item.key: make_stamp(item.path, item.version) for item in first.items}
    archive.refuse([(key, "broken") for key in stamps], stamps)
    (images / "a.png").touch()
    (images / "b.png").write_bytes(b"repaired")
    portion = look_up(images, archive)
    assert (keys(portion), portion.retried, portion.num_refused, portion.num_done) == (["b.png"], {"b.png"}, 2, 0)
    assert keys(look_up(images, archive, retry_refused=True)) == ["a.png", "b.png", "c.png"]


def test_missing_files_of_a_list_are_tried_when_they_come(archive, images, tmp_path):
    (tmp_path / "list.txt").write_text("images/a.png\nlater.png\n")
    items = look_up(tmp_path / "list.txt", archive).items
    assert [make_stamp(item.path, item.version) is None for item in items] == [False, True]
    archive.refuse([("later.png", "no such file")], {"later.png": None})
    assert look_up(tmp_path / "list.txt", archive).num_refused == 1
    (tmp_path / "later.png").write_bytes(b"here")
    assert look_up(tmp_path / "list.txt", archive).retried == {"later.png"}


def test_a_row_whose_file_broke_and_was_restored(archive, images):
    content = (images / "a.png").read_bytes()
    store(archive, look_up(images, archive).items)
    (images / "a.png").write_bytes(b"broken")
    portion = look_up(images, archive)
    assert portion.replacing == {"a.png"}
    archive.refuse([("a.png", "broken")], {"a.png": make_stamp(portion.items[0].path, portion.items[0].version)})
    portion = look_up(images, archive)
    assert (keys(portion), portion.num_done, portion.num_refused) == ([], 2, 1)
    (images / "a.png").write_bytes(content)
    portion = look_up(images, archive)
    assert (portion.num_done, portion.resolved) == (3, {"a.png"})


@pytest.mark.parametrize(("uri", "is_done"), [("here", True), ("a.png", True), ("elsewhere/a.png", False)])
def test_rows_of_a_gateway_have_no_stamp(archive, images, uri, is_done):
    uri = str(images / "a.png") if uri == "here" else uri
    archive.upsert(Archive.table(np.zeros((1, 1), np.uint8), 8, ["a.png"], [uri]))
    if is_done:
        assert look_up(images, archive).num_done == 1
    else:
        with pytest.raises(InputError, match=r"another image, elsewhere/a.png"):
            look_up(images, archive)


def test_patches_are_compared_by_all_their_bands(archive, tmp_path):
    patch = tmp_path / "patch"
    patch.mkdir()
    for band in ("B02", "B03"):
        (patch / f"patch_{band}.tif").write_bytes(band.encode())
    (tmp_path / "list.txt").write_text("patch\n")
    store(archive, look_up(tmp_path / "list.txt", archive).items)
    assert look_up(tmp_path / "list.txt", archive).num_done == 1
    (patch / "patch_B02.tif").rename(patch / "patch_B04.tif")
    assert look_up(tmp_path / "list.txt", archive).replacing == {"patch"}


def test_versions_of_files_that_do_not_exist(tmp_path):
    assert file_version(str(tmp_path / "nowhere")) is None
    assert make_stamp(str(tmp_path / "nowhere"), None) is None


def test_deleted_rows_are_encoded_again(archive, images):
    store(archive, look_up(images, archive).items)
    archive.delete(["b.png"])
    assert keys(look_up(images, archive)) == ["b.png"]
