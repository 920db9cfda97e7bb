"""STAC item collections: which asset is read, places, times, items that are refused."""

import datetime as dt
import json

import numpy as np
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.rasters import image_formats, one_of, reads_jpeg_2000
from orbithash.encoders.sources.sources import Item, list_source

UTC = dt.UTC
FORMATS = one_of(image_formats())


def keys(items):
    return [item.key for item in items]


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


COG = "image/tiff; application=geotiff; profile=cloud-optimized"
RGB = [{"name": "B1", "common_name": colour} for colour in ("red", "green", "blue", "nir")]


def image(href, *roles, kind=COG, **fields):
    return {"href": href, "type": kind, **({"roles": list(roles)} if roles else {}), **fields}


@pytest.mark.parametrize(
    ("assets", "expected"),
    [
        # Visual images first, by role or key, wherever they stand.
        ({"aot": image("aot.tif", "data", "reflectance"), "visual": image("v.tif", "visual")}, "v.tif"),
        ({"thumbnail": image("t.jpg", kind="image/jpeg"), "visual": image("v.tif")}, "v.tif"),
        ({"B04": image("B04.tif", "data"), "TCI_10m": image("tci.tif")}, "tci.tif"),
        ({"B04": image("B04.tif", "data"), "x": image("x.tif", "Visual", "data")}, "x.tif"),
        ({"visual-mask": image("m.tif", "data-mask"), "data": image("d.tif", "data")}, "d.tif"),
        # Then bands that hold red, green and blue, of STAC 1.0 and 1.1.
        ({"o": image("o.png", "overview"), "image": image("i.tif", "data", **{"eo:bands": RGB})}, "i.tif"),
        (
            {
                "o": image("o.png", "overview"),
                "image": image("i.tif", bands=[{"eo:common_name": c} for c in ("blue", "green", "red")]),
            },
            "i.tif",
        ),
        # Then overviews, data, other images.
        ({"B04": image("B04.tif", "data"), "overview": image("o.tif", "overview")}, "o.tif"),
        ({"B04": image("B04.tif", "data"), "L2A_PVI": image("o.tif", "overview")}, "o.tif"),
        ({"a": image("a.tif"), "b": image("b.tif", "data")}, "b.tif"),
        ({"scl": image("scl.tif", "data"), "b": image("b.tif", "data")}, "b.tif"),
        ({"cloud": image("c.tif", "data", "cloud"), "b": image("b.tif")}, "b.tif"),
        # A thumbnail, a mask or a single band if there is nothing else.
        ({"thumbnail": image("t.jpg", "thumbnail", kind="image/jpeg"), "b": image("b.tif")}, "b.tif"),
        ({"a": image("a.png", "thumbnail"), "b": image("b.png", "overview")}, "b.png"),
        ({"thumbnail": image("t.jpg", "thumbnail", kind="image/jpeg")}, "t.jpg"),
        ({"vv": image("vv.tif", "data"), "thumbnail": image("t.jpg", "thumbnail")}, "vv.tif"),
        ({"scl": image("scl.tif", "data"), "thumbnail": image("t.jpg", "thumbnail")}, "scl.tif"),
        # A GeoTIFF before other formats of the same image.
        ({"visual-png": image("v.png", "visual", kind="image/png"), "visual": image("v.tif", "visual")}, "v.tif"),
        # Formats: by media type, else by the ending of the name.
        ({"m": {"href": "m.xml", "roles": ["data"]}, "b": {"href": "b.JPG"}}, "b.JPG"),
        ({"m": {"href": "m", "type": "image/png"}, "thumb": {"href": "b.JPG"}}, "m"),
        ({"j": {"href": "j.tif", "type": "image/webp"}, "b": {"href": "b.tif", "roles": None}}, "b.tif"),
        ({"b": image("b", kind="application/octet-stream"), "c": image("c.tif", kind="binary/octet-stream")}, "c.tif"),
        ({"b": image("b", kind="image/vnd.stac.geotiff; cloud-optimized=true")}, "b"),
        ({"b": image("b", kind="image/jpg")}, "b"),
        ({"b": image("b", kind="IMAGE/TIFF")}, "b"),
        # What cannot be read is passed over.
        ({"data": image("https://x/full.tif", "data"), "visual": image("v.tif", "visual")}, "v.tif"),
        ({"visual": image("https://x/v.tif", "visual"), "data": image("d.tif", "data")}, "d.tif"),
        ({"broken": 1, "none": {"type": COG}, "b": image("b.tif")}, "b.tif"),
    ],
)
def test_which_asset_is_read(tmp_path, assets, expected):
    for order in (assets, dict(reversed(assets.items()))):
        (item,) = list_source(write_stac(tmp_path, feature(assets=order)))
        assert item.problem is None
        assert item.path == str(tmp_path / expected)


@pytest.mark.skipif(not reads_jpeg_2000(), reason="the installed GDAL has no driver for JPEG 2000")
def test_jpeg_2000_is_read_if_there_is_no_tiff_of_the_same_image(tmp_path):
    jp2, png = image("v.jp2", "visual", kind="image/jp2"), image("v.png", "visual", kind="image/png")
    for assets, expected in (
        ({"visual": jp2, "visual-png": png}, "v.jp2"),
        ({"visual-jp2": jp2, "visual": image("v.tif", "visual")}, "v.tif"),
        ({"b": image("b.J2K", kind="application/octet-stream")}, "b.J2K"),
    ):
        for order in (assets, dict(reversed(assets.items()))):
            (item,) = list_source(write_stac(tmp_path, feature(assets=order)))
            assert item.path == str(tmp_path / expected)


def test_an_asset_in_an_object_store_is_read_from_there(tmp_path):
    (item,) = list_source(write_stac(tmp_path, feature(assets={"visual": image("s3://bucket/v.tif", "visual")})))
    assert item.path == "s3://bucket/v.tif"


def test_an_asset_can_be_chosen_by_its_key(tmp_path):
    assets = {"visual": image("v.tif", "visual"), "B04": image("B04.tif", "data"), "meta": {"href": "x.xml"}}
    path = write_stac(tmp_path, feature("one", assets), feature("two"))
    first, second = list_source(path, asset="B04")
    assert first.path == str(tmp_path / "B04.tif")
    assert second.problem == "it has no asset B04; its assets are: image"
    with pytest.raises(InputError, match=r"one: it has no JPEG, PNG.* asset.*\n.*two: it has no asset meta"):
        list_source(path, asset="meta")
    (tmp_path / "list.txt").write_text("a.tif\n")
    for source in (tmp_path / "list.txt", tmp_path):
        with pytest.raises(InputError, match=r"--asset B04 names an asset of STAC items, and .* is not a STAC .json"):
            list_source(source, asset="B04")


def test_a_choice_among_single_bands_is_left_to_the_user(tmp_path):
    assets = {name: image(f"{name}.tif", "data") for name in ("B02", "B03", "B8A")}
    path = write_stac(tmp_path, feature(assets=assets))
    with pytest.raises(InputError, match=r"its images are single bands \(B02, B03, B8A\); choose one by its name"):
        list_source(path)
    (item,) = list_source(path, asset="B8A")
    assert item.path == str(tmp_path / "B8A.tif")


def test_an_item_across_180_degrees_is_centred_there(tmp_path):
    halves = [
        [[[178, 0], [180, 0], [180, 2], [178, 2], [178, 0]]],
        [[[-180, 0], [-176, 0], [-176, 2], [-180, 2], [-180, 0]]],
    ]
    (item,) = list_source(write_stac(tmp_path, feature(geometry={"type": "MultiPolygon", "coordinates": halves})))
    assert (item.lon, item.lat) == pytest.approx((-179, 1))


def test_an_item_across_180_degrees_in_one_polygon_is_cut(tmp_path):
    ring = [[179.27, -16.0], [-178.9, -16.0], [-178.9, -17.8], [179.27, -17.8], [179.27, -16.0]]
    (item,) = list_source(write_stac(tmp_path, feature(geometry={"type": "Polygon", "coordinates": [ring]})))
    assert (item.lon, item.lat) == pytest.approx((-179.815, -16.9))
    outline = shapely.from_wkb(item.footprint)
    assert outline.equals(shapely.union(shapely.box(179.27, -17.8, 180, -16), shapely.box(-180, -17.8, -178.9, -16)))
    (item,) = list_source(write_stac(tmp_path, feature(geometry={"type": "Point", "coordinates": [200, 0]})))
    assert item.lon == -160


def test_an_item_with_an_empty_geometry_has_no_place(tmp_path):
    (item,) = list_source(write_stac(tmp_path, feature(geometry={"type": "Polygon", "coordinates": []})))
    assert (item.lon, item.footprint, item.problem) == (None, None, None)


@pytest.mark.parametrize(
    ("bad", "key", "message"),
    [
        (feature("bad", {}), "bad", f"it has no {FORMATS} asset; its assets are: none"),
        (feature("bad", {"meta": {"href": "x.xml"}}), "bad", f"it has no {FORMATS} asset; its assets are: meta"),
        (feature("bad", {"a": {"href": "https://x/a.tif"}}), "bad", "https://x/a.tif is remote; of remote images only"),
        (feature("bad", {"a": {"href": "s3://k:s@x/a.tif"}}), "bad", "is given with a secret"),
        (feature("bad", [1]), "bad", "it has no JPEG"),
        (feature(None), "item 1", "it has no id"),
        (feature(7), "item 1", "it has no id"),
        (feature("bad", datetime="yesterday"), "bad", "datetime is 'yesterday'; a time such as"),
        (feature("bad", datetime=2015), "bad", "datetime is 2015"),
        (feature("bad", geometry={"type": "Polygon"}), "bad", "its geometry is not GeoJSON"),
        (feature("bad", geometry=[1]), "bad", "its geometry is not GeoJSON"),
        (feature("bad", geometry={"type": "Point", "coordinates": [0, 95]}), "bad", "its geometry is not in degrees"),
        (
            feature("bad", geometry={"type": "Point", "coordinates": [4e5, 4e6]}),
            "bad",
            "its geometry is not in degrees",
        ),
        (feature("good", geometry=None), "item 1: good", "the id good occurs more than once"),
        ({"type": "Thing"}, "item 1", "it is not an object of type Feature"),
        (1, "item 1", "it is not an object of type Feature"),
    ],
)
def test_one_bad_item_is_refused_alone(tmp_path, bad, key, message):
    path = write_stac(tmp_path, feature("good"), bad, feature("last", properties={}))
    items = {item.key: item for item in list_source(path)}
    assert set(items) == {"good", key, "last"}
    assert items["good"].problem is items["last"].problem is None
    assert message in items[key].problem
    assert items[key].path == str(path)


def test_ids_are_unique_in_a_collection(tmp_path):
    def of(collection, name="scene"):
        return {**feature(name), "collection": collection}

    items = list_source(write_stac(tmp_path, of("l1c"), of("l2a"), of("l1c", "other"), of("l1c", "other")))
    assert sorted(keys(items)) == ["l1c/other", "l1c/scene", "l2a/scene"], "an item that is there twice is read once"
    assert {item.problem for item in items} == {None}
    (item,) = list_source(write_stac(tmp_path, of("l1c")))
    assert item.key == "scene"


@pytest.mark.parametrize(
    ("features", "message"),
    [
        ([feature(assets={})], f"item: it has no {FORMATS} asset"),
        ([feature(name=None), feature(assets={})], "found 2 problems"),
        ([{"type": "Thing"}], "is not a STAC item collection"),
        ([1], "is not a STAC item collection"),
        ([], "lists no image"),
    ],
)
def test_a_collection_without_a_usable_item_is_refused(tmp_path, features, message):
    with pytest.raises(InputError, match=message):
        list_source(write_stac(tmp_path, *features))


@pytest.mark.parametrize("text", ["", "{}", "[]", "1", '{"type": "FeatureCollection"}', "[" * 10**5])
def test_json_that_is_not_stac_is_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(InputError, match=r"is not (readable as JSON|a STAC item collection)"):
        list_source(tmp_path / "a.json")


def test_tiles_of_a_stac_item_have_its_time_but_not_its_place(tmp_path):
    grid = {"crs": "EPSG:32654", "transform": from_origin(4e5, 4e6, 10, 10)}
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=1, height=64, width=128, dtype="uint8", **grid
    ) as scene:
        scene.write(np.ones((1, 64, 128), np.uint8))
    items = list_source(write_stac(tmp_path, feature(), feature("bad", {})), 64)
    assert sorted(keys(items)) == ["bad", "item#0,0,64,64", "item#64,0,64,64"]
    good = [item for item in items if item.problem is None]
    assert {item.datetime.year for item in good} == {2015}
    assert {(item.lon, item.lat, item.footprint) for item in good} == {(None, None, None)}
