"""Sources: which files are listed, with which keys and metadata, and the errors."""

import datetime as dt
import json
import os
import random
from pathlib import Path

import numpy as np
import pytest
import rasterio
from rasterio.transform import from_origin

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.sources.folders import find_class_folders, natural
from orbithash.encoders.sources.sources import Item, list_source
from orbithash.encoders.sources.tiles import read_tile

UTC = dt.UTC


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked at")


def write_scene(path, height=100, width=150):
    path.parent.mkdir(parents=True, exist_ok=True)
    place = {"crs": "EPSG:32654", "transform": from_origin(4e5, 4e6, 10, 10)}
    with rasterio.open(
        path, "w", driver="GTiff", count=1, height=height, width=width, dtype="uint8", **place
    ) as dataset:
        dataset.write(np.ones((1, height, width), np.uint8))


def keys(items):
    return [item.key for item in items]


# Folders


def test_a_folder_is_listed_with_everything_in_it(tmp_path):
    touch(
        tmp_path,
        "a.JPG",
        "b.jpeg",
        "deep/er/c.png",
        "deep/d.TIFF",
        "e.tif",
        "notes.txt",
        "f.webp",
        "jpg",
        "g.tif.aux.xml",
    )
    items = list_source(str(tmp_path))
    assert keys(items) == ["a.JPG", "b.jpeg", "deep/d.TIFF", "deep/er/c.png", "e.tif"]
    assert items[3] == Item("deep/er/c.png", str(tmp_path / "deep/er/c.png"))
    assert all(Path(item.path).is_absolute() for item in items)


def test_a_relative_folder_is_the_same_source(tmp_path, monkeypatch):
    touch(tmp_path, "photos/a.jpg")
    expected = list_source(tmp_path / "photos")
    monkeypatch.chdir(tmp_path)
    assert list_source("photos") == list_source("./photos/") == list_source(f"file://{tmp_path}/photos") == expected
    monkeypatch.chdir(tmp_path / "photos")
    assert list_source(".") == expected


def test_numbers_in_names_are_ordered_by_value(tmp_path):
    names = ["a1.png", "a2.png", "a10.png", "a010.png", "b.png", "b/1.png", "10/a.png", "9/a.png"]
    touch(tmp_path, *names)
    assert keys(list_source(tmp_path)) == sorted(names, key=natural)
    assert keys(list_source(tmp_path))[:2] == ["9/a.png", "10/a.png"]
    shuffled = [f"x{n}y{m}" for n in (0, 3, 20, 100) for m in (7, 11, 10**30)]
    random.Random(0).shuffle(shuffled)
    assert sorted(shuffled, key=natural) == [f"x{n}y{m}" for n in (0, 3, 20, 100) for m in (7, 11, 10**30)]
    assert natural("a1") != natural("a01"), "no two keys are equal"


def test_hidden_files_are_left_out(tmp_path):
    touch(tmp_path, "a.jpg", ".b.jpg", ".cache/c.jpg", "._a.jpg")
    assert keys(list_source(tmp_path)) == ["a.jpg"]


def test_links_that_lead_out_are_left_out_and_logged(tmp_path, caplog):
    inside, outside = tmp_path / "in", tmp_path / "out"
    touch(inside, "a.jpg", "sub/b.jpg")
    touch(outside, "secret.jpg")
    (inside / "file.jpg").symlink_to(outside / "secret.jpg")
    (inside / "folder").symlink_to(outside)
    (inside / "alias.jpg").symlink_to("a.jpg")
    (inside / "loop").symlink_to(inside)
    (inside / "gone.jpg").symlink_to("nowhere.jpg")
    (inside / "escape.jpg").symlink_to("../out/secret.jpg")
    assert keys(list_source(inside)) == ["a.jpg", "alias.jpg", "gone.jpg", "sub/b.jpg"]
    assert "left out 3 links that lead out of the folder" in caplog.text
    (tmp_path / "door").symlink_to(inside)
    assert keys(list_source(tmp_path / "door")) == ["a.jpg", "alias.jpg", "gone.jpg", "sub/b.jpg"]


def test_a_folder_of_links_alone_says_why_it_is_empty(tmp_path):
    touch(tmp_path, "out/a.jpg")
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.jpg").symlink_to(tmp_path / "out" / "a.jpg")
    with pytest.raises(InputError, match=r"holds no image \(.jpg.*\), but 1 links that lead out"):
        list_source(tmp_path / "in")


def test_names_of_other_bytes_than_utf8_are_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/caf\xe9.jpg")).write_bytes(b"")
    with pytest.raises(InputError, match=r"caf\\udce9.jpg' is not UTF-8; rename it"):
        list_source(tmp_path)


@pytest.mark.parametrize("base", ["", "images", "Images"])
def test_class_folders_give_labels(tmp_path, base):
    touch(tmp_path / base, "river/r2.jpg", "river/r10.jpg", "beach/b.tif", "empty/notes.txt")
    touch(tmp_path, "overview.png")
    items = {item.key: item.label for item in list_source(tmp_path)}
    prefix = f"{base}/" if base else ""
    assert items == {
        f"{prefix}river/r2.jpg": "river",
        f"{prefix}river/r10.jpg": "river",
        f"{prefix}beach/b.tif": "beach",
        "overview.png": None,
    }
    classes = find_class_folders(tmp_path)
    assert list(classes) == ["beach", "river"]
    assert [path.name for path in classes["river"]] == ["r2.jpg", "r10.jpg"]
    assert all(path.is_absolute() for path in classes["river"])


def test_folders_that_are_no_classes_give_no_labels(tmp_path):
    touch(tmp_path, "images/a.jpg", "images/b.jpg")
    assert [item.label for item in list_source(tmp_path)] == [None, None]
    with pytest.raises(InputError, match="holds 2 images but no class folders; lay them out as"):
        find_class_folders(tmp_path)


def test_class_folders_are_refused_where_there_are_none(tmp_path):
    with pytest.raises(InputError, match="holds no image"):
        find_class_folders(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        find_class_folders(tmp_path / "nowhere")
    touch(tmp_path, "a.jpg")
    with pytest.raises(InputError, match=r"a.jpg is not a folder"):
        find_class_folders(tmp_path / "a.jpg")
    touch(tmp_path, "x/y/z/deep.jpg")
    with pytest.raises(InputError, match="holds 2 images but no class folders"):
        find_class_folders(tmp_path)


def test_generated_scenes_list_the_first_source_alone(tmp_path):
    touch(tmp_path, "images/river/river_0000.tif", "second/river/river_0000.tif", "images/beach/beach_0000.tif")
    sentences = [{"raw": "A river .", "tokens": []}, {"raw": "Water .", "tokens": []}]
    entry = {"filename": "images/river/river_0000.tif", "sentences": sentences}
    (tmp_path / "captions.json").write_text(json.dumps({"dataset": "scenes", "images": [entry]}))
    assert len(list_source(tmp_path)) == 3
    (tmp_path / "scenes.json").write_text("{}")
    beach, river = list_source(tmp_path)
    assert (beach.key, beach.label, beach.caption) == ("images/beach/beach_0000.tif", "beach", None)
    assert (river.key, river.label, river.caption) == ("images/river/river_0000.tif", "river", "A river .")
    assert list(find_class_folders(tmp_path)) == ["beach", "river"]


@pytest.mark.parametrize("text", ["{", "[]", '{"images": 1}', '{"images": [{"sentences": [{}]}]}', "\xff", "[" * 10**5])
def test_damaged_captions_are_refused(tmp_path, text):
    touch(tmp_path, "a.jpg")
    (tmp_path / "captions.json").write_text(text, "latin-1")
    with pytest.raises(InputError, match=r"captions.json is not"):
        list_source(tmp_path)


def test_empty_and_missing_sources(tmp_path):
    with pytest.raises(InputError, match=r"holds no image \(.jpg, .jpeg, .png, .tif, .tiff"):
        list_source(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        list_source(tmp_path / "nowhere")
    touch(tmp_path, "a.csv")
    with pytest.raises(InputError, match=r"neither a folder nor an image, a .txt list, a .parquet table or a STAC"):
        list_source(tmp_path / "a.csv")


@pytest.mark.parametrize("source", ["http://a.b/c.tif", "ftp://a.b/folder", "HTTPS://a.b/c.json", "/vsis3://x"])
def test_remote_sources_are_refused(source):
    with pytest.raises(InputError, match=r"is remote; of remote images only s3:// and gs:// are read|does not exist"):
        list_source(source)


def test_one_image_is_a_source(tmp_path):
    touch(tmp_path, "one.JPG")
    assert list_source(tmp_path / "one.JPG") == [Item("one.JPG", str(tmp_path / "one.JPG"))]


# Tiles


def test_scenes_are_cut(tmp_path, caplog):
    write_scene(tmp_path / "river" / "s10.tif", 100, 150)
    write_scene(tmp_path / "river" / "s9.tiff", 64, 64)
    touch(tmp_path, "river/quicklook.jpg")
    items = list_source(tmp_path, 64)
    assert keys(items) == [
        "river/s9.tiff#0,0,64,64",
        "river/s10.tif#0,0,64,64",
        "river/s10.tif#0,36,64,64",
        "river/s10.tif#64,0,64,64",
        "river/s10.tif#64,36,64,64",
        "river/s10.tif#86,0,64,64",
        "river/s10.tif#86,36,64,64",
    ]
    assert items[2] == Item(items[2].key, str(tmp_path / "river/s10.tif"), "river", window=(0, 36, 64, 64))
    assert "left out 1 images that are not scenes (.tif, .tiff" in caplog.text
    assert keys(list_source(tmp_path / "river" / "s9.tiff", 64)) == ["s9.tiff#0,0,64,64"]
    (tmp_path / "list.txt").write_text("river/s9.tiff\n")
    assert keys(list_source(tmp_path / "list.txt", 32))[-1] == "river/s9.tiff#32,32,32,32"


@pytest.mark.parametrize("damage", ["broken", "small", "missing"])
def test_scenes_that_cannot_be_cut_are_refused_when_read(tmp_path, damage):
    write_scene(tmp_path / "good.tif", 64, 64)
    if damage == "broken":
        touch(tmp_path, "bad.tif")
    elif damage == "small":
        write_scene(tmp_path / "bad.tif", 63, 64)
    else:
        (tmp_path / "bad.tif").symlink_to("gone.tif")
    bad, good = list_source(tmp_path, 64)
    assert (bad.key, good.key) == ("bad.tif#0,0,64,64", "good.tif#0,0,64,64")
    read_tile(Path(good.path), good.window)
    reason = {
        "broken": "not a JPEG, PNG",
        "small": "is not within the scene of 64 x 63",
        "missing": "no such file",
    }
    with pytest.raises(ImageError, match=reason[damage]):
        read_tile(Path(bad.path), bad.window)


def test_cutting_what_holds_no_scene_is_refused(tmp_path):
    touch(tmp_path, "a.jpg")
    with pytest.raises(InputError, match="lists no image"):
        list_source(tmp_path, 64)
    with pytest.raises(InputError, match="the tile's side is 3 pixels"):
        list_source(tmp_path, 3)


# Real data


def test_real_class_folders(shared):
    root = shared / "data" / "ucmd"
    classes = find_class_folders(root)
    assert len(classes) == 21
    assert {len(files) for files in classes.values()} == {100}
    assert [path.name for path in classes["beach"][:2]] == ["beach00.jpg", "beach01.jpg"]
    items = list_source(root)
    assert len(items) == 2100
    assert {item.label for item in items} == set(classes)
    assert items[0].key == "Images/agricultural/agricultural00.jpg"


def test_real_scenes_are_cut(shared):
    items = list_source(shared / "data" / "landsat8_sample", 512)
    assert len(items) == 3 * 4 * 4
    assert len({item.path for item in items}) == 3
