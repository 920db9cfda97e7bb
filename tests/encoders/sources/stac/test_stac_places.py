"""Places of STAC items: geometries, projections, bounding boxes; items across 180 degrees."""

import json

import numpy as np
import pystac
import pytest
import rasterio
import shapely
from rasterio.transform import from_origin

from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source
from tests.encoders.sources.stac.stac_files import feature, write

# A square of 20 km on the equator of UTM zone 1 north, cut by 180 degrees: 166,021 m east is 180 degrees.
GRID = {"crs": "EPSG:32601", "transform": from_origin(156_021, 20_000, 100, 100)}
BBOX = [156_021, 0, 176_021, 20_000]


def only(tmp_path, content):
    (item,) = list_source(write(tmp_path / "item.json", content))
    return item


def is_across(item):
    """Whether the place is that of the square, within some metres."""
    west, south, east, north = shapely.from_wkb(item.footprint).bounds
    assert (west, east) == (-180, 180)
    assert (south, north) == pytest.approx((0, 0.1806), abs=2e-3)
    parts = sorted(part.bounds[0] for part in shapely.from_wkb(item.footprint).geoms)
    assert parts == pytest.approx([-180, 179.9103], abs=2e-3)
    assert abs(item.lon) == pytest.approx(180, abs=2e-3)
    return True


def projected(**fields):
    return {f"proj:{name}": value for name, value in fields.items()}


CODE = {"proj:code": "EPSG:32601"}
RING = [[156_021, 0], [176_021, 0], [176_021, 20_000], [156_021, 20_000], [156_021, 0]]


@pytest.mark.parametrize(
    ("properties", "asset"),
    [
        ({**CODE, "proj:bbox": BBOX}, {}),
        ({"proj:epsg": 32601, "proj:bbox": [156_021, 0, 3, 176_021, 20_000, 5]}, {}),
        ({**CODE, "proj:geometry": {"type": "Polygon", "coordinates": [RING]}}, {}),
        ({**CODE, "proj:transform": list(GRID["transform"])[:6], "proj:shape": [200, 200]}, {}),
        ({"proj:code": "EPSG:32733", "proj:bbox": [0, 0, 1, 1]}, {**CODE, "proj:bbox": BBOX}),
        ({"proj:wkt2": rasterio.crs.CRS.from_epsg(32601).to_wkt()}, {"proj:bbox": BBOX}),
        ({"proj:projjson": rasterio.crs.CRS.from_epsg(32601).to_dict(projjson=True)}, {"proj:bbox": BBOX}),
    ],
)
def test_an_item_without_geometry_has_the_place_of_its_projection(tmp_path, properties, asset):
    item = only(tmp_path, feature("a", {"image": {"href": "a.tif", **asset}}, None, **properties))
    assert item.problem is None
    assert is_across(item)


def test_an_item_in_utm_zone_1_across_180_degrees_is_where_its_image_is(tmp_path):
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=3, height=200, width=200, dtype="uint8", **GRID
    ) as scene:
        scene.write(np.full((3, 200, 200), 9, np.uint8))
    corners = [[179.9103, 0], [-179.9102, 0], [-179.9102, 0.1806], [179.9103, 0.1806], [179.9103, 0]]
    west_to_east = [[179.9103, 0], [180.0898, 0], [180.0898, 0.1806], [179.9103, 0.1806], [179.9103, 0]]
    geometries = [
        {"type": "Polygon", "coordinates": [corners]},
        {"type": "Polygon", "coordinates": [west_to_east]},
        {"type": "MultiPolygon", "coordinates": [[west_to_east]]},
        None,
    ]
    for geometry in geometries:
        described = feature("a", geometry=geometry, **CODE)
        if geometry is None:
            del described["properties"]["proj:code"]
        (item,) = list_source(write(tmp_path / "item.json", described))
        record = read_record(item, Preprocessing(Rendering(), 32, 32))
        assert is_across(record)


def test_a_bounding_box_is_the_last_resort(tmp_path):
    assert is_across(only(tmp_path, feature("a", geometry=None, _bbox=[179.9103, 0, -179.9103, 0.1806])))
    item = only(tmp_path, feature("a", geometry=None, _bbox=[10, 40, 0, 12, 44, 9], **CODE))
    assert (item.lon, item.lat) == (11, 42)
    item = only(tmp_path, feature("a", geometry=None, **{"proj:code": None, "proj:bbox": BBOX}))
    assert (item.lon, item.footprint, item.problem) == (None, None, None)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({**CODE, "proj:bbox": [1, 2]}, "its proj:bbox is not a list of 4 or 6 numbers"),
        ({**CODE, "proj:bbox": [1, 2, 3, "4"]}, "its proj:bbox is not a list of 4 or 6 numbers"),
        ({**CODE, "proj:bbox": [1, 2, 3, 10**400]}, "its proj:bbox has a number that is not finite"),
        ({**CODE, "proj:bbox": [1e12, 1e12, 2e12, 2e12]}, r"its place in EPSG:32601 \(proj: fields\) is not one"),
        ({"proj:code": "EPSG:999999", "proj:bbox": BBOX}, r"its place in EPSG:999999 \(proj: fields\) is not one"),
        ({"proj:code": 3, "proj:bbox": BBOX}, r"its place in 3 \(proj: fields\) is not one"),
        ({**CODE, "proj:geometry": {"type": "Polygon"}}, "its proj:geometry is not GeoJSON"),
        ({**CODE, "proj:transform": [1, 2], "proj:shape": [1, 2]}, "its proj:transform is not a list of 6 or 9"),
        ({"_bbox": [0, 0, 400, 400]}, "its bbox is not in degrees of WGS 84"),
        ({"_bbox": "world"}, "its bbox is not a list of 4 or 6 numbers"),
    ],
)
def test_an_invalid_projection_refuses_its_item_alone(tmp_path, fields, message):
    bad, good = feature("bad", geometry=None, **fields), feature("good")
    path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": [bad, good]})
    items = {item.key: item for item in list_source(path)}
    assert items["good"].problem is None
    with pytest.raises(ValueError, match=message):
        raise ValueError(items["bad"].problem)


@pytest.mark.parametrize("depth", [100, 300])
def test_deeply_nested_collections_refuse_their_item_alone(tmp_path, depth):
    nested = {"type": "Point", "coordinates": [1, 2]}
    for _ in range(depth):
        nested = {"type": "GeometryCollection", "geometries": [nested]}
    for fields in ({"geometry": nested}, {"geometry": None, **CODE, "proj:geometry": nested}):
        bad, good = feature("bad", **fields), feature("good")
        path = write(tmp_path / "items.json", {"type": "FeatureCollection", "features": [bad, good]})
        items = {item.key: item.problem for item in list_source(path)}
        assert items["good"] is None
        assert "nested too deeply" in items["bad"]


def test_an_item_of_pystac_with_its_projection_extension(tmp_path):
    item = pystac.Item(
        "a", None, None, None, {"start_datetime": "2020-01-01T00:00:00Z", "end_datetime": "2020-01-02T00:00:00Z"}
    )
    projection = pystac.extensions.projection.ProjectionExtension.ext(item, add_if_missing=True)
    projection.apply(code="EPSG:32601", bbox=BBOX, shape=[200, 200])
    item.add_asset("image", pystac.Asset("a.tif", media_type=pystac.MediaType.COG))
    (tmp_path / "item.json").write_text(json.dumps(item.to_dict(include_self_link=False)))
    (found,) = list_source(tmp_path / "item.json")
    assert is_across(found)
