"""Sources: which files are listed, under which key, with what is known about them; and what is refused."""

import datetime as dt
import json
import os
import random
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.sources import Item, find_class_folders, list_source, natural
from orbithash.encoders.imagery.tiles import read_tile

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
        "f.jp2",
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


def test_links_that_lead_out_are_left_out_and_told(tmp_path, caplog):
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
    with pytest.raises(InputError, match=r"holds no image \(.jpg.*\), and 1 links that lead out"):
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


def test_sources_that_hold_nothing_or_are_not_there(tmp_path):
    with pytest.raises(InputError, match=r"holds no image \(.jpg, .jpeg, .png, .tif, .tiff\)"):
        list_source(tmp_path)
    with pytest.raises(InputError, match="nowhere does not exist"):
        list_source(tmp_path / "nowhere")
    touch(tmp_path, "a.csv")
    with pytest.raises(InputError, match=r"neither a folder nor an image, a .txt list, a .parquet table or a STAC"):
        list_source(tmp_path / "a.csv")


@pytest.mark.parametrize("source", ["http://a.b/c.tif", "ftp://a.b/folder", "HTTPS://a.b/c.json", "/vsis3://x"])
def test_remote_sources_are_refused(source):
    with pytest.raises(InputError, match=r"is remote; only local files are read for now|does not exist"):
        list_source(source)


def test_one_image_is_a_source(tmp_path):
    touch(tmp_path, "one.JPG")
    assert list_source(tmp_path / "one.JPG") == [Item("one.JPG", str(tmp_path / "one.JPG"))]


# Lists


def test_a_list_of_paths(tmp_path):
    text = "# my images\n\n./sub//b10.tif\n  b9.jpg  \nmissing.jpg\n/abs/olute.png\n../up.tif\nsub/a#1.tif\n"
    (tmp_path / "list.TXT").write_text("\ufeff" + text, "utf-8")
    items = list_source(tmp_path / "list.TXT")
    assert {item.key: item.path for item in items} == {
        "sub/b10.tif": str(tmp_path / "sub/b10.tif"),
        "b9.jpg": str(tmp_path / "b9.jpg"),
        "missing.jpg": str(tmp_path / "missing.jpg"),
        "/abs/olute.png": "/abs/olute.png",
        "../up.tif": str(tmp_path.parent / "up.tif"),
        "sub/a#1.tif": str(tmp_path / "sub/a#1.tif"),
    }
    assert keys(items) == sorted(keys(items), key=natural)


def test_lists_that_are_refused(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("# nothing\n\n")
    with pytest.raises(InputError, match="lists no image"):
        list_source(path)
    path.write_text("a.jpg\n./a.jpg\nb.jpg\nb.jpg\nc.jpg\n")
    with pytest.raises(InputError, match="found 2 problems") as error:
        list_source(path)
    assert "'a.jpg' is there more than once" in str(error.value)
    assert "'c.jpg'" not in str(error.value)
    path.write_text("".join(f"http://x/{i}.jpg\n" for i in range(30)))
    with pytest.raises(InputError, match="only local files are read for now") as error:
        list_source(path)
    assert "and 20 more" in str(error.value)
    path.write_bytes(b"caf\xe9.jpg\n")
    with pytest.raises(InputError, match=r"list.txt is not UTF-8 text"):
        list_source(path)


# Parquet


def write_table(file, /, **columns):
    pq.write_table(pa.table(columns), file)
    return file


def test_a_table_with_every_column(tmp_path):
    zone = pa.timestamp("ns", "Europe/Berlin")
    moment = dt.datetime(2020, 6, 1, 12, tzinfo=UTC)
    path = write_table(
        tmp_path / "table.parquet",
        uri=["b.tif", f"file://{tmp_path}/a.tif"],
        key=["two", None],
        label=pa.array(["river", None]).dictionary_encode(),
        caption=["A river .", None],
        datetime=pa.array([moment, None], zone),
        lon=[179.5, float("nan")],
        lat=pa.array([-90, None], pa.int64()),
        other=[1, 2],
    )
    first, second = list_source(path)
    assert first == Item(f"file://{tmp_path}/a.tif", str(tmp_path / "a.tif"))
    assert second == Item("two", str(tmp_path / "b.tif"), "river", "A river .", moment, 179.5, -90.0)


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (pa.array([dt.datetime(2020, 6, 1, 12)], pa.timestamp("ms")), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
        (pa.array([dt.date(2020, 6, 1)]), dt.datetime(2020, 6, 1, tzinfo=UTC)),
        (pa.array(["2020-06-01T12:00:00Z"]), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
        (pa.array(["2020-06-01T14:00:00+02:00"]), dt.datetime(2020, 6, 1, 12, tzinfo=UTC)),
    ],
)
def test_times_in_a_table_become_utc(tmp_path, values, expected):
    (item,) = list_source(write_table(tmp_path / "t.parquet", path=["a.tif"], datetime=values))
    assert item.datetime == expected
    assert item.datetime.utcoffset() == dt.timedelta(0)


def test_path_goes_before_uri_and_numbers_become_labels(tmp_path):
    (item,) = list_source(write_table(tmp_path / "t.parquet", path=["a.tif"], uri=["http://x/a.tif"], label=[3]))
    assert (item.key, item.label) == ("a.tif", "3")


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"file": ["a.tif"]}, "has no column path or uri; it has file"),
        ({"path": ["a.tif", None, ""]}, "found 2 problems"),
        ({"path": ["a.tif"], "lon": [181.0], "lat": [0.0]}, "row 0 has lon 181.0 and lat 0.0"),
        ({"path": ["a.tif"], "lat": [float("inf")]}, "row 0 has lon None and lat inf"),
        ({"path": ["a.tif"], "lon": ["east"], "datetime": ["noon"]}, "found 2 problems"),
        ({"path": ["a.tif"], "label": [[1]]}, "column label of type list"),
        ({"path": ["s3://b/a.tif"]}, "s3://b/a.tif is remote"),
        ({"path": ["a.tif", "b.tif"], "key": ["same", "same"]}, "the key 'same' is there more than once"),
        ({"path": pa.array([], pa.string())}, "lists no image"),
    ],
)
def test_tables_that_are_refused(tmp_path, columns, message):
    with pytest.raises(InputError, match=message):
        list_source(write_table(tmp_path / "t.parquet", **columns))


def test_what_is_no_parquet_is_refused(tmp_path):
    for data in (b"", b"PAR1", b"text" * 100):
        (tmp_path / "t.parquet").write_bytes(data)
        with pytest.raises(InputError, match="is not a readable Parquet file"):
            list_source(tmp_path / "t.parquet")


# STAC

SQUARE = {"type": "Polygon", "coordinates": [[[10, 40], [12, 40], [12, 44], [10, 44], [10, 40]]]}


def feature(name="item", assets=None, geometry=SQUARE, **properties):
    assets = {"image": {"href": "a.tif", "type": "image/tiff; application=geotiff"}} if assets is None else assets
    return {
        "type": "Feature",
        "stac_version": "1.0.0",
        "id": name,
        "geometry": geometry,
        "properties": {"datetime": "2015-05-02T01:31:04.5Z", **properties},
        "assets": assets,
    }


def write_stac(tmp_path, *features):
    path = tmp_path / "items.json"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    return path


def test_stac_items(tmp_path):
    second = feature(
        "S2/10", {"B": {"href": "./sub/b.png"}}, None, datetime=None, start_datetime="2020-01-01T02:00:00+02:00"
    )
    first, other = list_source(write_stac(tmp_path, second, feature("S2/9")))
    assert first == Item(
        "S2/9",
        str(tmp_path / "a.tif"),
        datetime=dt.datetime(2015, 5, 2, 1, 31, 4, 500_000, tzinfo=UTC),
        lon=11.0,
        lat=42.0,
        footprint=first.footprint,
    )
    assert shapely.from_wkb(first.footprint).equals(shapely.box(10, 40, 12, 44))
    assert other == Item("S2/10", str(tmp_path / "sub/b.png"), datetime=dt.datetime(2020, 1, 1, tzinfo=UTC))


def test_one_stac_item_is_a_source(tmp_path):
    (tmp_path / "item.geojson").write_text(json.dumps(feature(datetime=None)))
    (item,) = list_source(tmp_path / "item.geojson")
    assert (item.key, item.datetime) == ("item", None)


@pytest.mark.parametrize(
    ("assets", "expected"),
    [
        ({"a": {"href": "a.tif"}, "b": {"href": "b.tif", "roles": ["data"]}}, "b.tif"),
        ({"a": {"href": "a.tif", "roles": ["overview"]}, "b": {"href": "b.tif", "roles": ["x", "visual"]}}, "b.tif"),
        ({"a": {"href": "a.png", "roles": ["thumbnail"]}, "b": {"href": "b.png", "roles": ["overview"]}}, "b.png"),
        ({"m": {"href": "m.xml", "roles": ["data"]}, "b": {"href": "b.JPG"}}, "b.JPG"),
        ({"m": {"href": "m", "type": "image/png"}, "b": {"href": "b.JPG"}}, "m"),
        ({"j": {"href": "j.tif", "type": "image/jp2"}, "b": {"href": "b.tif", "roles": None}}, "b.tif"),
    ],
)
def test_which_asset_is_read(tmp_path, assets, expected):
    (item,) = list_source(write_stac(tmp_path, feature(assets=assets)))
    assert item.path == str(tmp_path / expected)


def test_an_item_across_180_degrees_is_centred_there(tmp_path):
    halves = [
        [[[178, 0], [180, 0], [180, 2], [178, 2], [178, 0]]],
        [[[-180, 0], [-176, 0], [-176, 2], [-180, 2], [-180, 0]]],
    ]
    (item,) = list_source(write_stac(tmp_path, feature(geometry={"type": "MultiPolygon", "coordinates": halves})))
    assert (item.lon, item.lat) == pytest.approx((-179, 1))


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature(assets={})], "item item has no JPEG, PNG or TIFF asset"),
        ([feature(assets={"a": {"href": "https://x/a.tif"}})], "https://x/a.tif is remote; only local files"),
        ([feature(assets={"a": {"href": "s3://x/a.tif"}})], "s3://x/a.tif is remote"),
        ([feature(name=None)], "item 0 has no id"),
        ([feature(datetime="yesterday")], "datetime is 'yesterday'; a time such as"),
        ([feature(datetime=2015)], "datetime is 2015"),
        ([feature(geometry={"type": "Polygon"})], "its geometry is not GeoJSON"),
        ([feature(geometry={"type": "Point", "coordinates": [200, 0]})], "its geometry reaches from 200"),
        ([feature(geometry=[1])], "its geometry is not GeoJSON"),
        ([feature(), feature()], "the key 'item' is there more than once"),
        ([feature(name=None), feature(assets={})], "found 2 problems"),
        ([{"type": "Thing"}], "is not a STAC item collection"),
        ([1], "is not a STAC item collection"),
        ([], "lists no image"),
    ],
)
def test_stac_that_is_refused(tmp_path, features, message):
    with pytest.raises(InputError, match=message):
        list_source(write_stac(tmp_path, *features))


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"type": "FeatureCollection"}', "[" * 10**5])
def test_json_that_is_no_stac_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"is not (readable as JSON|a STAC item collection)"):
        list_source(tmp_path / "a.json")


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
    assert "left out 1 images that are not TIFF scenes" in caplog.text
    assert keys(list_source(tmp_path / "river" / "s9.tiff", 64)) == ["s9.tiff#0,0,64,64"]
    (tmp_path / "list.txt").write_text("river/s9.tiff\n")
    assert keys(list_source(tmp_path / "list.txt", 32))[-1] == "river/s9.tiff#32,32,32,32"


def test_tiles_of_a_stac_item_have_its_time_but_not_its_place(tmp_path):
    write_scene(tmp_path / "a.tif", 64, 128)
    items = list_source(write_stac(tmp_path, feature()), 64)
    assert keys(items) == ["item#0,0,64,64", "item#64,0,64,64"]
    assert {item.datetime.year for item in items} == {2015}
    assert {(item.lon, item.lat, item.footprint) for item in items} == {(None, None, None)}


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
    reason = {"broken": "not a JPEG, PNG or TIFF", "small": "leaves the scene of 64 x 63", "missing": "no such file"}
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
