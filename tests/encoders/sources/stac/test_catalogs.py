"""Static catalogs of STAC: links that are followed, circles, missing files, other machines; pages of an API."""

from collections import Counter

import pystac
import pytest

from orbithash.cluster.encoding.stages import item_table
from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import count_source, iter_source, list_source
from tests.encoders.sources.stac.stac_files import catalog, feature, write


def read(path, **options):
    left_out, groups = Counter(), Counter()
    items = list(iter_source(path, left_out=left_out, groups=groups, **options))
    return {item.key: item for item in items}, left_out, groups


def test_links_are_followed_from_file_to_file(tmp_path):
    root = write(
        tmp_path / "catalog.json", catalog("root", ("child", "./a/collection.json"), ("child", "b/catalog.json"))
    )
    write(tmp_path / "a/collection.json", catalog("A", ("item", "one/one.json"), kind="Collection"))
    write(tmp_path / "a/one/one.json", feature("one", {"image": {"href": "../../tif/one.tif"}}))
    write(tmp_path / "b/catalog.json", catalog("B", ("item", "./two%20x.json"), ("parent", "../catalog.json")))
    write(tmp_path / "b/two x.json", feature("two"))
    items, left_out, groups = read(root)
    assert {key: item.path for key, item in items.items()} == {
        "one": str(tmp_path / "tif/one.tif"),
        "two": str(tmp_path / "b/a.tif"),
    }
    assert (left_out, groups) == (Counter(), Counter(A=1, B=1))
    assert count_source(root) == 2
    assert set(read(tmp_path / "a/collection.json")[0]) == {"one"}


def test_catalogs_of_pystac_are_read(tmp_path):
    root = pystac.Catalog("root", "", catalog_type=pystac.CatalogType.SELF_CONTAINED)
    for number in range(3):
        item = pystac.Item.from_dict(feature(f"item{number}"))
        item.assets["image"].href = str(tmp_path / f"{number}.tif")
        root.add_item(item)
    root.normalize_and_save(str(tmp_path / "stac"), catalog_type=pystac.CatalogType.SELF_CONTAINED)
    items, left_out, _ = read(tmp_path / "stac/catalog.json")
    assert [items[f"item{number}"].path for number in range(3)] == [str(tmp_path / f"{n}.tif") for n in range(3)]
    assert not left_out


@pytest.mark.timeout(20)
def test_circles_and_several_links_to_a_file_end(tmp_path):
    root = write(
        tmp_path / "catalog.json",
        catalog("root", ("child", "a.json"), ("child", "./catalog.json"), ("item", "i.json"), ("item", "loop/i.json")),
    )
    write(tmp_path / "a.json", catalog("a", ("child", "catalog.json"), ("item", "./i.json"), ("child", "loop/a.json")))
    write(tmp_path / "i.json", feature())
    (tmp_path / "loop").symlink_to(tmp_path)
    items, left_out, _ = read(root)
    assert (list(items), left_out) == (["item"], Counter())


def test_what_cannot_be_followed_is_counted_with_an_example(tmp_path):
    links = [
        ("item", "good.json"),
        ("child", "absent/catalog.json"),
        ("item", "absent.json"),
        ("item", "https://example.org/item.json"),
        ("child", "s3://bucket/catalog.json"),
        ("item", "broken.json"),
        ("item", "list.json"),
        ("items", "https://example.org/items"),
        ("license", "https://example.org/licence"),
        ("item", None),
    ]
    mirror = {"mirror": {"href": "items.parquet", "roles": ["collection-mirror"]}, "x": 1, "y": {"roles": 1}}
    root = write(tmp_path / "catalog.json", catalog("root", *links, assets=mirror))
    write(tmp_path / "good.json", feature("good"))
    (tmp_path / "broken.json").write_text("{")
    write(tmp_path / "list.json", [1])
    items, left_out, _ = read(root)
    assert list(items) == ["good"]
    assert left_out == {
        "copies of all items in one file (encode that file instead), such as items.parquet": 1,
        f"links of catalogs to files that do not exist, such as {tmp_path}/absent/catalog.json": 2,
        "links of catalogs to other machines (copy the files here), such as https://example.org/item.json": 2,
        f"files that catalogs link to and that are not readable as JSON, such as {tmp_path}/broken.json": 1,
        f"files that catalogs link to and that are not STAC, such as {tmp_path}/list.json": 1,
        "links of catalogs to the items of an API (save its pages as files), such as https://example.org/items": 1,
    }


def test_nothing_is_read_from_a_network(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a network was used"))
    assets = {"a": {"href": "https://127.0.0.1:9/a.tif"}, "b": {"href": "b.tif", "roles": ["thumbnail"]}}
    root = write(tmp_path / "catalog.json", catalog("root", ("item", "i.json"), ("item", "https://127.0.0.1:9/j.json")))
    write(tmp_path / "i.json", feature("i", assets))
    items, left_out, _ = read(root)
    assert (items["i"].path, left_out.total()) == (str(tmp_path / "b.tif"), 1)


def test_absolute_links_of_a_published_catalog_lead_to_its_copy(tmp_path):
    site = "https://example.org/data"
    root = write(
        tmp_path / "catalog.json",
        catalog(
            "root", ("self", f"{site}/catalog.json"), ("child", f"{site}/a/catalog.json"), ("item", f"{site}/x.json")
        ),
    )
    write(tmp_path / "a/catalog.json", catalog("a", ("self", f"{site}/a/catalog.json"), ("item", f"{site}/i.json")))
    write(tmp_path / "i.json", feature("i"))
    items, left_out, _ = read(root)
    assert list(items) == ["i"]
    assert left_out == {f"links of catalogs to other machines (copy the files here), such as {site}/x.json": 1}


def test_an_id_of_several_collections_gets_the_name_of_its_collection(tmp_path):
    links = [("item", f"{name}.json") for name in ("a", "b", "c", "d")]
    root = write(tmp_path / "catalog.json", catalog("root", *links))
    write(tmp_path / "a.json", feature("scene", _collection="l1c"))
    write(tmp_path / "b.json", feature("scene", _collection="l2a"))
    write(tmp_path / "c.json", feature("scene", _collection="l2a"))
    write(tmp_path / "d.json", feature("scene", {}, _collection="l2a"))
    items, _, _ = read(root)
    assert set(items) == {"l1c/scene", "l2a/scene", "item 3: scene"}, "c has the content of b"
    assert items["item 3: scene"].problem.startswith("the id scene occurs more than once")
    assert items["item 3: scene"].path == str(tmp_path / "d.json"), "its stamp is that of its own file"


def test_pages_of_an_api_are_one_source(tmp_path):
    def page(*names, number=0):
        links = [{"rel": "next", "href": f"https://example.org/search?page={number + 1}"}]
        return {"type": "FeatureCollection", "features": [feature(name) for name in names], "links": links}

    write(tmp_path / "page-0.json", page("a", "b"))
    write(tmp_path / "sub/page-1.json", page("b", "c", number=1))
    (tmp_path / "pages.txt").write_text("# saved pages\npage-0.json\nsub/page-1.json\n")
    items, left_out, groups = read(tmp_path / "pages.txt")
    assert {key: item.path for key, item in items.items()} == {
        "a": str(tmp_path / "a.tif"),
        "b": str(tmp_path / "a.tif"),
        "c": str(tmp_path / "sub/a.tif"),
    }
    (note,) = left_out
    assert (left_out[note], groups) == (2, {"page-0.json": 2, "page-1.json": 2})
    assert note.startswith("links to the next page of an API, which are not followed")
    assert note.endswith("such as https://example.org/search?page=1")
    (tmp_path / "pages.txt").write_text("page-0.json\na.tif\n")
    with pytest.raises(InputError, match=r"a.tif is not a STAC .json; a list holds either images or STAC files"):
        list_source(tmp_path / "pages.txt")
    (tmp_path / "pages.txt").write_text("page-0.json\nabsent.json\n")
    with pytest.raises(InputError, match=r"absent.json is not readable as JSON"):
        list_source(tmp_path / "pages.txt")


def test_a_catalog_without_items_is_an_empty_source(tmp_path):
    root = write(tmp_path / "catalog.json", catalog("root", ("child", "absent.json")))
    with pytest.raises(InputError, match="lists no image"):
        list_source(root)


def test_names_of_catalogs_can_be_shown(tmp_path):
    for name, shown in (("a\n\x1b[1m", r"'a\n\x1b[1m'"), ("\ud800", r"'\ud800'"), ("", "c.json"), (3, "c.json")):
        root = write(tmp_path / "c.json", catalog(name, ("item", "i.json")))
        write(tmp_path / "i.json", feature("i"))
        assert read(root)[2] == {shown: 1}


def test_an_asset_can_be_chosen_in_a_catalog(tmp_path):
    root = write(tmp_path / "catalog.json", catalog("root", ("item", "i.json")))
    write(tmp_path / "i.json", feature("i", {"B04": {"href": "B04.tif"}, "B03": {"href": "B03.tif"}}))
    items, _, _ = read(root, asset="B03")
    assert items["i"].path == str(tmp_path / "B03.tif")


def test_a_tile_of_a_scene_is_an_asset(tmp_path):
    (tmp_path / "a.tif").write_bytes(b"")
    (tmp_path / "b.tif#0,0,64,64").write_bytes(b"")
    write(
        tmp_path / "items.json",
        {
            "type": "FeatureCollection",
            "features": [
                feature(
                    "tile", {"image": {"href": "a.tif#64,0,32,16", "roles": ["data"]}}, label="pond", caption="A pond"
                ),
                feature("file", {"image": {"href": "b.tif#0,0,64,64", "type": "image/tiff"}}, label=3),
            ],
        },
    )
    items, _, _ = read(tmp_path / "items.json", tile_px=None)
    tile, file = items["tile"], items["file"]
    assert (tile.path, tile.window, tile.label, tile.caption) == (
        str(tmp_path / "a.tif"),
        (64, 0, 32, 16),
        "pond",
        "A pond",
    )
    assert (file.path, file.window, file.label) == (str(tmp_path / "b.tif#0,0,64,64"), None, None)
    assert read(tmp_path / "items.json", tile_px=64)[0]["tile"].window == (64, 0, 32, 16)


BAD_NAMES = ["a\0.json", "x" * 5000 + ".json", "\ud800.json", "a" * 300 + "/b.json", "file://\0", "%00.json"]


@pytest.mark.parametrize("name", BAD_NAMES)
def test_names_that_no_file_system_allows(tmp_path, name):
    root = write(tmp_path / "catalog.json", catalog("root", ("item", name), ("child", name), ("item", "good.json")))
    good = feature("good", {"image": {"href": "a.tif"}})
    bad = {"image": {"href": name.replace("json", "tif"), "type": "image/tiff", "alternate": {"x": {"href": "\0.tif"}}}}
    write(tmp_path / "good.json", {"type": "FeatureCollection", "features": [good, feature("bad", bad)]})
    items, left_out, _ = read(root)
    assert left_out.total() == 2
    assert items["good"].problem is None
    item = items["bad"]
    if item.problem is None:
        with pytest.raises(ImageError):
            read_record(item, Preprocessing(Rendering(), 32, 32))


def test_texts_that_utf_8_cannot_hold_refuse_their_item_alone(tmp_path):
    half = "\ud800"
    features = [
        feature("good"),
        feature(half),
        feature("label", label=half),
        feature("caption", caption=half),
        feature("object", {"image": {"href": f"s3://bucket/{half}.tif"}}),
        feature("web", {"image": {"href": f"https://example.org/{half}.tif"}}),
        feature("time", datetime=half),
    ]
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": features})
    items = list(iter_source(path))
    assert [item.key for item in items if item.problem is None] == ["good"]
    # As the driver sends them to its workers.
    assert item_table(items)["key"].to_pylist()[1] == "\\ud800"
