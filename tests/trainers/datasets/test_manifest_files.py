"""Manifests as files: what is written is read, and everything else is refused in one line."""

import hashlib
import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from orbithash.encoders.errors import InputError
from orbithash.trainers.datasets import MANIFEST, Image, Manifest, make_manifest

KEY = b"orbithash.manifest"


def write_images(root, names):
    for name in names:
        (root / name).mkdir(parents=True)
        for i in range(6):
            (root / name / f"{i}.png").write_text(f"{name} {i}")
    return root


@pytest.fixture
def root(tmp_path):
    return write_images(tmp_path / "data", ["beach", "river"])


@pytest.fixture
def path(tmp_path):
    return tmp_path / "run" / MANIFEST


def test_read_gives_what_was_written(root, path):
    manifest = make_manifest(root)
    manifest.write(path)
    found = Manifest.read(path)
    assert found == manifest
    assert [*found.images] == [*manifest.images]
    assert found.sha256 == manifest.sha256
    assert [file.name for file in path.parent.iterdir()] == [MANIFEST], "no temporary file stays"
    table = pq.read_table(path)
    assert table.num_rows == len(manifest.images)
    assert table["path"].to_pylist() == manifest.images.paths
    assert json.loads(table.schema.metadata[KEY])["classes"] == ["beach", "river"]


def test_names_of_any_letters_survive(tmp_path, path):
    root = write_images(tmp_path / "letters", ["Straße 2", "b\u2028c"])
    manifest = make_manifest(root)
    manifest.write(path)
    assert Manifest.read(path) == manifest
    manifest.check_files(root)


def test_images_without_classes_and_with_all_fields(path):
    image = Image("x", "a.png", (), "train", "0" * 64)
    full = Image("y", "b.png", (0, 2), "test", "1" * 64, ("A beach .", "Sand ."), "c.png", "2" * 64)
    for images in [(), (image,), (image, full)]:
        manifest = Manifest("folder", "random", 0, 0.1, ("a", "b", "c"), images)
        manifest.write(path)
        assert Manifest.read(path) == manifest
        assert tuple(Manifest.read(path).images) == images


def test_the_hash_is_that_of_the_head_and_the_columns(path):
    manifest = Manifest("folder", "random", 0, 0.1, ("a", "b"), (Image("a", "a", (0,), "train", "12" * 32),))
    head = (
        '{"format_version": 4, "dataset": "folder", "protocol": "random", "seed": 0, "validation": 0.1, '
        '"classes": ["a", "b"]}\n'
    )
    assert manifest.sha256 == hashlib.sha256(head.encode() + manifest.images.digest()).hexdigest()
    manifest.write(path)
    # Rewritten by another program, in other chunks and another compression.
    table = pq.read_table(path)
    pq.write_table(pa.concat_tables([table.slice(0, 0), table]), path, compression="gzip", row_group_size=1)
    assert Manifest.read(path).sha256 == manifest.sha256


def damaged(change):
    """Return a function that rewrites a manifest with a changed table and head."""

    def rewrite(path):
        table = pq.read_table(path)
        head = json.loads(table.schema.metadata[KEY])
        changed = change(table, head)
        table = table if changed is None else changed
        pq.write_table(table.replace_schema_metadata({KEY: json.dumps(head).encode()}), path)

    return rewrite


def drop_last_row(table, head):
    return table.slice(0, table.num_rows - 1)


def drop_column(table, head):
    return table.drop_columns(["labels"])


def null_path(table, head):
    paths = pa.array([None, *table["path"].to_pylist()[1:]], table["path"].type)
    return table.set_column(table.schema.names.index("path"), table.schema.field("path"), paths)


def other_class(table, head):
    head["classes"][0] = "coast"


def other_version(table, head):
    head["format_version"] = 5


def no_version(table, head):
    del head["format_version"]


def no_hash(table, head):
    del head["sha256"]


def other_key(table, head):
    head["colour"] = "red"


def no_head(path):
    pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)


def head_is_no_object(path):
    pq.write_table(pq.read_table(path).replace_schema_metadata({KEY: b"5"}), path)


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def empty(path):
    path.write_bytes(b"")


def json_lines(path):
    path.write_text('{"format_version": 3, "dataset": "folder"}\n')


def other_bytes(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 4 : len(content) // 4 + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (damaged(drop_last_row), "its content does not match the hash in its footer"),
        (damaged(drop_column), "its columns are not those of a manifest"),
        (damaged(null_path), "its column path has rows without a value"),
        (damaged(other_class), "its content does not match the hash in its footer"),
        (damaged(other_version), "of format version 5, not 4"),
        (damaged(no_version), "format_version"),
        (damaged(no_hash), "sha256"),
        (damaged(other_key), "colour"),
        (no_head, "that orbithash did not write as a manifest"),
        (head_is_no_object, "damaged"),
        (cut, "damaged"),
        (empty, "damaged"),
        (json_lines, "damaged"),
        (other_bytes, "damaged"),
    ],
)
def test_a_damaged_manifest_is_refused_in_one_line(root, path, damage, words):
    make_manifest(root).write(path)
    damage(path)
    with pytest.raises(InputError, match="the manifest is damaged") as caught:
        Manifest.read(path)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_an_absent_manifest_is_refused(tmp_path):
    for path in (tmp_path / MANIFEST, tmp_path):
        with pytest.raises(InputError, match=r"cannot be read \(.*is this the folder of a run"):
            Manifest.read(path)


def test_a_manifest_of_an_earlier_version_is_named(tmp_path):
    (tmp_path / "manifest.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"manifest.jsonl beside it is of an earlier version.*train the run again"):
        Manifest.read(tmp_path / MANIFEST)
