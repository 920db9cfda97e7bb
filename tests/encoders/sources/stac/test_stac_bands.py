"""Names, scale and offset of bands from STAC, up to the record."""

import json

import numpy as np
import pytest
import rasterio

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import read_record
from orbithash.encoders.sources.sources import list_source
from orbithash.encoders.sources.stac.bands import stated_bands

RED, NIR = BandInfo(("B04", "red"), 1e-4, -0.1), BandInfo(("B08", "nir"), 1e-4, -0.1)
NAMES = [{"name": "B04", "common_name": "red"}, {"name": "B08", "common_name": "nir"}]
RASTER = [{"nodata": 0, "scale": 1e-4, "offset": -0.1}] * 2
STAC_1_1 = [
    {"name": name, "eo:common_name": common, "raster:scale": 1e-4, "raster:offset": -0.1}
    for name, common in (("B04", "red"), ("B08", "nir"))
]


@pytest.mark.parametrize(
    ("asset", "properties", "expected"),
    [
        ({"eo:bands": NAMES, "raster:bands": RASTER}, {}, (RED, NIR)),
        ({"bands": STAC_1_1}, {}, (RED, NIR)),
        ({"bands": [{"name": "B04"}, {"name": "B08"}], "raster:scale": 2, "raster:offset": 1}, {}, None),
        ({"eo:bands": NAMES}, {}, (BandInfo(RED.names), BandInfo(NIR.names))),
        ({"raster:bands": RASTER}, {}, (BandInfo((), 1e-4, -0.1),) * 2),
        # Earth Search states an offset that was subtracted already.
        (
            {"eo:bands": NAMES, "raster:bands": RASTER},
            {"earthsearch:boa_offset_applied": True},
            (BandInfo(RED.names, 1e-4, 0), BandInfo(NIR.names, 1e-4, 0)),
        ),
        ({"eo:bands": NAMES, "raster:bands": RASTER}, {"earthsearch:boa_offset_applied": False}, (RED, NIR)),
        ({}, {}, ()),
        ({"eo:bands": NAMES, "raster:bands": RASTER[:1]}, {}, ()),
        ({"bands": "B04"}, {}, ()),
        ({"bands": [3, None]}, {}, ()),
        ({"bands": [{"name": 3, "raster:scale": "1", "raster:offset": True}]}, {}, (BandInfo(),)),
        ({"bands": [{"raster:scale": 10**400}]}, {}, (BandInfo((), float("inf")),)),
    ],
)
def test_bands_of_an_asset(asset, properties, expected):
    if expected is None:
        expected = (BandInfo(("B04",), 2, 1), BandInfo(("B08",), 2, 1))
    assert stated_bands(asset, properties) == expected


def write_item(folder, asset, **properties):
    values = np.random.default_rng(0).integers(1, 9000, (2, 20, 20)).astype(np.uint16)
    with rasterio.open(folder / "a.tif", "w", driver="GTiff", count=2, height=20, width=20, dtype="uint16") as dataset:
        dataset.write(values)
    item = {
        "type": "Feature",
        "id": "item",
        "geometry": None,
        "properties": {"datetime": "2020-01-01T00:00:00Z", **properties},
        "assets": {"image": {"href": "a.tif", "type": "image/tiff", **asset}},
    }
    (folder / "item.json").write_text(json.dumps({"type": "FeatureCollection", "features": [item]}))
    [listed] = list_source(folder / "item.json")
    return listed, values


def test_an_item_is_read_by_the_names_and_the_scale_of_stac(tmp_path):
    item, values = write_item(tmp_path, {"eo:bands": NAMES, "raster:bands": RASTER})
    assert item.bands == (RED, NIR)
    preprocessing = Preprocessing(Rendering(("nir", "red"), values="reflectance"), 20, 20)
    record = read_record(item, preprocessing)
    np.testing.assert_allclose(record.pixels, np.moveaxis(values[::-1], 0, -1) * 1e-4 - 0.1, atol=1e-6)


def test_an_unusable_scale_refuses_the_item(tmp_path):
    item, _ = write_item(tmp_path, {"bands": [{"name": "a", "raster:scale": 0}, {"name": "b"}]})
    with pytest.raises(ImageError, match="its metadata state the scale 0; set band_scale and band_offset"):
        read_record(item, Preprocessing(Rendering(("a", "b"), values="reflectance"), 20, 20))
