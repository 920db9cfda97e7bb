"""Real Sentinel-2, Sentinel-1 and Landsat images as numbers, beside what rasterio reads, up to the network's input."""

import dataclasses

import numpy as np
import pytest
import rasterio
import torch
import torch.nn.functional as F

from orbithash.encoders.errors import InputError
from orbithash.encoders.imagery.images import Rendering, read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.networks.reading import Normaliser, read_batches
from orbithash.encoders.sources.tiles import plan_tiles, read_tile

TWELVE = ("B01", "B02", "B03", "B04", "B05", "B06", "B07", "B08", "B8A", "B09", "B11", "B12")
FINE = ("B02", "B03", "B04", "B08")


def stored(folder, name):
    [path] = folder.glob(f"*_{name}.tif")
    with rasterio.open(path) as dataset:
        return dataset.read(1).astype(np.float64)


def patches(shared, sensor):
    return sorted((shared / "data" / "bigearthnet_sample" / f"BigEarthNet-{sensor}-Example").iterdir())


def test_sentinel_2_is_reflectance_from_the_file_to_the_network(shared):
    """Bands of 10 m are not resampled at all, so they are equal pixel by pixel; others are those of torch."""
    folders = patches(shared, "S2")
    mean, std = tuple(0.01 * n for n in range(1, 13)), tuple(0.1 + 0.01 * n for n in range(12))
    preprocessing = Preprocessing(Rendering(TWELVE, values="reflectance"), 120, 120, mean, std)
    [batch] = read_batches(folders, preprocessing)
    assert (batch.dtype, batch.shape) == (np.float32, (6, 120, 120, 12))
    network_input = Normaliser(preprocessing, torch.device("cpu"))(batch).numpy()
    for row, folder in enumerate(folders):
        for channel, name in enumerate(TWELVE):
            expected = stored(folder, name) / 10_000
            assert 0 < expected.mean() < 1
            if name not in FINE:
                tensor = torch.from_numpy(expected)[None, None]
                expected = F.interpolate(tensor, (120, 120), mode="bilinear", align_corners=False)[0, 0].numpy()
            tolerance = 1e-7 if name in FINE else 1e-6
            np.testing.assert_allclose(batch[row, ..., channel], expected, atol=tolerance)
            standardised = (expected - mean[channel]) / std[channel]
            np.testing.assert_allclose(network_input[row, channel], standardised, atol=1e-5)


def test_wavelengths_are_names_of_sentinel_2(shared):
    folder = patches(shared, "S2")[0]
    by_name = read_image(folder, Rendering(("swir16", "nir", "red"), values="reflectance"))
    np.testing.assert_array_equal(by_name, read_image(folder, Rendering(("B11", "B08", "B04"), values="reflectance")))


def test_sentinel_1_keeps_its_decibels(shared):
    for folder in patches(shared, "S1"):
        got = read_image(folder, Rendering(("VV", "VH"), values="decibel"))
        for channel, name in enumerate(("VV", "VH")):
            np.testing.assert_array_equal(got[..., channel], stored(folder, name).astype(np.float32))
        with pytest.raises(InputError, match="set values=decibel"):
            read_image(folder, Rendering(("VV", "VH"), values="power"))


def test_landsat_by_the_scale_of_its_metadata_file(shared):
    """The radiometric rescaling of collection 1; a scene of one file a band, and its red band as tiles."""
    folder = shared / "data" / "landsat8_sample"
    rendering = Rendering(("B4", "B3", "B2"), values="reflectance", band_scale=(2e-5,), band_offset=(-0.1,))
    got = read_image(folder, rendering)
    for channel, name in enumerate(("B4", "B3", "B2")):
        np.testing.assert_allclose(got[..., channel], stored(folder, name) * 2e-5 - 0.1, atol=1e-6)
    is_scene = stored(folder, "B4") > 0
    assert 0.02 < np.median(got[is_scene]) < 0.3
    with pytest.raises(InputError, match="no band red, nir; the bands are B2, B3, B4"):
        read_image(folder, Rendering(("red", "nir"), values="reflectance"))
    [path] = folder.glob("*_B4.tif")
    alone = dataclasses.replace(rendering, bands=(1,))
    for col, row, width, height in plan_tiles(path, 256)[::9]:
        tile = read_tile(path, (col, row, width, height), alone)
        np.testing.assert_array_equal(tile[..., 0], got[row : row + height, col : col + width, 0])
