"""Folders of images: which files are images, which folders are classes, and what is said about all others."""

import json
from collections import Counter

import pytest

from orbithash.encoders.errors import InputError
from orbithash.encoders.sources.folders import class_paths, find_class_folders, find_layout, patch_error
from orbithash.encoders.sources.sources import list_source


def touch(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"not looked at")


def labels(root, **options):
    return {item.key: item.label for item in list_source(root, **options)}


def captions(path, **sentences):
    images = [{"filename": name, "sentences": [{"raw": text}]} for name, text in sentences.items()]
    path.write_text(json.dumps({"images": images}))


@pytest.mark.parametrize(
    ("folders", "base", "classes"),
    [
        # An archive that was unpacked into a folder of its own, or twice.
        (["EuroSAT/2750/River", "EuroSAT/2750/Forest"], "EuroSAT/2750", "Forest River"),
        (["a/b/Images/x", "a/b/Images/y"], "a/b/Images", "x y"),
        (["images/x", "images/y", "second/x", "second/y"], "images", "x y"),
        # Some images of a class deeper.
        (["river/2019", "river/2020", "lake", "forest"], "", "forest lake river"),
        # The class may be the first or the second folder.
        (["2019/river", "2019/lake", "2020/river"], "", ""),
        (["river/2019", "lake/2019", "river/2020"], "", ""),
        (["Images"], "", ""),
        (["beach"], "", "beach"),
        ([""], "", ""),
        # A class may have the name of a part of a split.
        (["harbor", "test", "river"], "", "harbor river test"),
    ],
)
def test_layouts(folders, base, classes):
    sizes = {tuple(filter(None, folder.split("/"))): 5 for folder in folders}
    layout = find_layout(sizes)
    assert "/".join(layout.base) == base
    assert " ".join(layout.classes) == classes
    assert layout.split == ()


SPLITS = [
    ("train", "test"),
    ("Train", "Val"),
    ("training_set", "test_set", "more"),
    ("train2017", "val2017", "test2017"),
    ("query", "test", "database"),
    ("test",),
]


@pytest.mark.parametrize("parts", SPLITS)
def test_parts_of_a_split_are_not_classes(tmp_path, parts):
    touch(tmp_path, *(f"{part}/{number}.jpg" for part in parts for number in range(6)))
    with pytest.raises(InputError, match=f"has the folders .*{parts[0]}.*look like the parts of a split"):
        find_class_folders(tmp_path)
    assert set(labels(tmp_path).values()) == {None}


def test_classes_in_parts_of_a_split(tmp_path):
    touch(tmp_path, *(f"data/{part}/{name}/{part}.jpg" for part in ("train", "test") for name in ("lake", "river")))
    with pytest.raises(InputError, match=r"data has the folders test, train.*as test.*/<class>/\*.tif"):
        find_class_folders(tmp_path)
    assert labels(tmp_path) == {
        f"data/{part}/{name}/{part}.jpg": name for part in ("train", "test") for name in ("lake", "river")
    }


def test_images_deeper_in_a_class_belong_to_it(tmp_path):
    touch(tmp_path, "lake/1.jpg", "lake/2.jpg", "river/2019/1.jpg", "river/2020/07/2.jpg", "forest/1.jpg")
    classes = find_class_folders(tmp_path)
    assert {name: [path.name for path in paths] for name, paths in classes.items()} == {
        "forest": ["1.jpg"],
        "lake": ["1.jpg", "2.jpg"],
        "river": ["1.jpg", "2.jpg"],
    }
    assert labels(tmp_path)["river/2020/07/2.jpg"] == "river"


def test_classes_at_an_uncertain_depth_are_refused_with_the_count(tmp_path):
    touch(tmp_path, "2019/river/1.jpg", "2019/lake/1.jpg", "2020/river/1.jpg")
    with pytest.raises(InputError, match="holds 3 images but no class folders, in folders 2 levels below"):
        find_class_folders(tmp_path)
    assert set(labels(tmp_path).values()) == {None}


def test_images_beside_the_classes_are_counted(tmp_path, caplog):
    touch(tmp_path, "overview.jpg", "maps/a/b.jpg", *(f"Images/{name}/{i}.jpg" for name in "ab" for i in range(3)))
    assert list(find_class_folders(tmp_path)) == ["a", "b"]
    assert "left out 2 images outside of the class folders" in caplog.text


def test_what_a_mac_and_a_network_drive_add_is_not_read(tmp_path):
    touch(tmp_path, *(f"MyData/{name}/{i}.jpg" for name in ("forest", "river") for i in range(3)))
    touch(tmp_path, "__MACOSX/MyData/river/._0.jpg", "__MACOSX/MyData/river/0.jpg", "MyData/.DS_Store")
    touch(tmp_path, "MyData/river/Thumbs.db", "MyData/river/@eaDir/0.jpg/SYNOPHOTO_THUMB_M.jpg", "MyData/river/._1.jpg")
    expected = {f"MyData/{name}/{i}.jpg": name for name in ("forest", "river") for i in range(3)}
    assert labels(tmp_path) == expected
    assert {name: len(paths) for name, paths in find_class_folders(tmp_path).items()} == {"forest": 3, "river": 3}


def test_formats_that_are_not_read_are_counted_and_named(tmp_path, caplog):
    touch(tmp_path, "ok.png", "a.BMP", "sub/b.bmp", "c.webp", "notes.txt", "a.png.aux.xml")
    list_source(tmp_path)
    assert "left out 2 files of a format that is not read (.bmp)" in caplog.text
    assert "left out 1 files of a format that is not read (.webp)" in caplog.text
    assert "txt" not in caplog.text
    (tmp_path / "ok.png").unlink()
    with pytest.raises(InputError, match=r"holds no image .* but 2 files of a format that is not read \(.bmp\)"):
        list_source(tmp_path)


@pytest.mark.parametrize("inside", ["BigEarthNet-S2/S2A_T33UUP/S2A_T33UUP_00_57", "S2A_00", "one/S1A_22", ""])
def test_patches_of_single_bands_are_refused(tmp_path, inside):
    root = tmp_path / "patch"
    name = inside.rpartition("/")[2] or "patch"
    bands = ("VV", "VH") if "S1A" in name else ("B02", "B03", "B8A")
    touch(root / inside, *(f"{name}_{band}.tif" for band in bands))
    for find in (find_class_folders, list_source):
        with pytest.raises(InputError, match=r"patches of one TIFF per band \(.*version 2: give the folder that holds"):
            find(root)


def test_messages_of_a_bucket_leave_the_address_of_its_store_out():
    root = "s3://bucket/tiles?endpoint_override=127.0.0.1:9000&scheme=http"
    with pytest.raises(InputError, match="lay them out as tiles/<class>/"):
        class_paths(root, {(): ["a.png"]}, Counter())
    with pytest.raises(InputError, match=r"^s3://bucket/tiles/in has the folders test, train: .* as tiles/<class>/"):
        class_paths(root, {("in", "train"): ["a.png"], ("in", "test"): ["b.png"]}, Counter())
    bands = ["tiles_B02.tif", "tiles_B03.tif"]
    assert "patches of one TIFF per band" in str(patch_error(root, (), bands))


def test_captions_by_bare_names_and_by_paths(tmp_path):
    touch(tmp_path, "data/airport/1.jpg", "data/airport/2.jpg", "data/beach/2.jpg", "data/beach/3.jpg", "data/x/4.jpg")
    captions(
        tmp_path / "captions.json", **{"1.jpg": "One.", "2.jpg": "Which?", "beach/3.jpg": "Three.", "5.jpg": "No."}
    )
    found = {item.key: item.caption for item in list_source(tmp_path)}
    assert found == {
        "data/airport/1.jpg": "One.",
        "data/airport/2.jpg": None,
        "data/beach/2.jpg": None,
        "data/beach/3.jpg": "Three.",
        "data/x/4.jpg": None,
    }
    # The same file where the data lies, and given by name.
    (tmp_path / "captions.json").rename(tmp_path / "data" / "captions.json")
    assert {item.key: item.caption for item in list_source(tmp_path)} == found
    (tmp_path / "data" / "captions.json").rename(tmp_path / "sentences.json")
    assert {item.caption for item in list_source(tmp_path)} == {None}
    assert {item.key: item.caption for item in list_source(tmp_path, captions=tmp_path / "sentences.json")} == found


def test_captions_belong_to_a_folder(tmp_path):
    touch(tmp_path, "1.jpg")
    with pytest.raises(InputError, match=r"1.jpg is not a folder; --captions belongs to a folder of images"):
        list_source(tmp_path / "1.jpg", captions=tmp_path / "captions.json")


@pytest.mark.parametrize("prefix", ["trip_b", "trip_b/", "2024/b"])
def test_a_prefix_is_put_before_all_keys(tmp_path, prefix):
    touch(tmp_path, "a/1.jpg")
    assert labels(tmp_path, prefix=prefix) == {f"{prefix.rstrip('/')}/a/1.jpg": "a"}


def test_names_that_cannot_be_keys_are_items_with_a_problem(tmp_path):
    touch(tmp_path, "a\nb.png", "a\tb.png", "Screenshot 3.05\u202fPM.png", "v\u00a013.png")
    problems = {item.key: item.problem for item in list_source(tmp_path)}
    assert [key for key, problem in problems.items() if problem] == ["a\tb.png", "a\nb.png"]
    assert "control characters" in problems["a\nb.png"]
