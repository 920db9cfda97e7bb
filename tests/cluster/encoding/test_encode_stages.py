"""The stages of encoding alone, without Ray."""

import dataclasses

import numpy as np
import rasterio

from orbithash.cluster.encoding.stages import decode, item_table, rows_within
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.sources import Item

NUMBERS = Preprocessing(Rendering(("red", "nir"), values="reflectance"), 20, 20)


def test_bands_of_the_source_reach_the_decoder(tmp_path):
    values = np.random.default_rng(0).integers(1, 9000, (2, 20, 20)).astype(np.uint16)
    with rasterio.open(
        tmp_path / "a.tif", "w", driver="GTiff", count=2, height=20, width=20, dtype="uint16"
    ) as dataset:
        dataset.write(values)
    stated = (BandInfo(("B08", "nir"), 1e-4, -0.1), BandInfo(("red",), 2e-4, None))
    item = Item("a", str(tmp_path / "a.tif"), bands=stated)
    good, bad = decode(item_table([item, dataclasses.replace(item, key="b", bands=())]), NUMBERS).to_pylist()
    assert good["reason"] is None
    pixels = np.frombuffer(good["pixels"], np.float32).reshape(20, 20, 2)
    np.testing.assert_allclose(pixels[..., 0], values[1] * 2e-4, rtol=1e-6)
    np.testing.assert_allclose(pixels[..., 1], values[0] * 1e-4 - 0.1, atol=1e-6)
    assert bad["pixels"] is None
    assert bad["reason"].startswith("bands red,nir are names, and the bands of this file have none")


def test_numbers_take_four_bytes_a_value_of_a_batch():
    pictures = dataclasses.replace(NUMBERS, rendering=Rendering(("red", "nir")), resize=1024, crop=1024)
    numbers = dataclasses.replace(NUMBERS, resize=1024, crop=1024)
    assert (rows_within(1000, pictures), rows_within(1000, numbers)) == (16, 4)
