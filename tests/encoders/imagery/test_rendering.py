"""Renderings: validation, JSON, and the stretch of a scene."""

import json

import numpy as np
import pytest
from image_files import HEIGHT, WIDTH, noise, tiff

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.images import Rendering, stretch_limits


@pytest.mark.parametrize(
    ("bands", "stretch", "messages"),
    [
        ((), "percentile:2:98", ["bands is ()"]),
        ((1, "B02"), "percentile:2:98", ["bands is (1, 'B02')"]),
        (("B02", ""), "percentile:2:98", ["bands is ('B02', '')"]),
        ((0, 1, 2), "percentile:2:98", ["bands is (0, 1, 2)"]),
        ((True,), "percentile:2:98", ["bands is (True,)"]),
        ((1.0,), "percentile:2:98", ["bands is (1.0,)"]),
        (None, "gamma:2", ["stretch is 'gamma:2'"]),
        (None, "percentile:2", ["allowed are percentile:LO:HI and range:LO:HI"]),
        (None, "percentile:98:2", ["percentiles rise from 0 to 100"]),
        (None, "percentile:0:101", ["percentiles rise"]),
        (None, "percentile:nan:98", ["percentiles rise"]),
        (None, "range:5:5", ["the limits of a range rise"]),
        (None, "range:0:inf", ["the limits of a range rise"]),
        ((0,), "range:a:b", ["found 2 problems", "bands is (0,)", "stretch is 'range:a:b'"]),
    ],
)
def test_a_rendering_reports_all_its_problems(bands, stretch, messages):
    with pytest.raises(InputError) as error:
        Rendering(bands, stretch)
    for message in messages:
        assert message in str(error.value)


@pytest.mark.parametrize(
    "rendering", [Rendering(), Rendering((4, 3, 2), "range:-0.5:1e4"), Rendering((1,)), Rendering(("B8A", "B02"))]
)
def test_json_round_trip_of_a_rendering(rendering):
    assert Rendering.from_json(json.loads(json.dumps(rendering.to_json()))) == rendering


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"band": [1]}, "unknown key 'band'; the keys are bands, stretch"),
        ({"bands": 1}, "bands is 1; a list of numbers or names"),
        ({"bands": [[1]]}, r"bands is \(\[1\],\)"),
        ({"stretch": 2}, "stretch is 2; text"),
    ],
)
def test_a_rendering_refuses_other_json(data, message):
    with pytest.raises(InputError, match=message):
        Rendering.from_json(data)


def test_the_stretch_of_a_scene_is_computed_from_its_valid_pixels(tmp_path):
    values = noise(3, np.uint16)
    values[:, :4] = 0
    path = tmp_path / "scene.tif"
    path.write_bytes(tiff(values, nodata=0))
    got = stretch_limits(path, Rendering())
    for (low, high), band in zip(got, values, strict=True):
        np.testing.assert_allclose((low, high), np.percentile(band[band > 0], [2, 98]), rtol=1e-6)
    assert stretch_limits(path, Rendering((2,), "range:1:9")) == ((1.0, 9.0),)
    path.write_bytes(tiff(noise(3)))
    assert stretch_limits(path, Rendering()) is None
    path.write_bytes(tiff(np.zeros((1, HEIGHT, WIDTH), np.uint16), nodata=0))
    with pytest.raises(ImageError, match="no valid data"):
        stretch_limits(path, Rendering())


def test_the_stretch_of_a_large_scene_is_computed_on_a_grid(tmp_path):
    values = np.zeros((1, 2048, 4096), np.uint16)
    values[:] = np.arange(4096)
    path = tmp_path / "scene.tif"
    path.write_bytes(tiff(values, compress="deflate"))
    ((low, high),) = stretch_limits(path, Rendering(stretch="percentile:10:90"))
    assert abs(low - 409.5) < 4
    assert abs(high - 3685.5) < 4
    assert stretch_limits(path, Rendering(stretch="percentile:10:90")) == ((low, high),)
