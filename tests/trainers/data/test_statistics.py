"""Mean and standard deviation per band over the training part."""

import hashlib
import json

import numpy as np
import pytest
import rasterio

from orbithash.encoders.errors import InputError
from orbithash.encoders.files import cache_folder
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.trainers.data import statistics
from orbithash.trainers.data.statistics import band_statistics

SIDE = 16


def write_images(root, values, **options):
    """Write images [N, B, H, W]; return their names and hashes."""
    names = [f"{number}.tif" for number in range(len(values))]
    for name, image in zip(names, values, strict=True):
        shape = {"count": image.shape[0], "height": image.shape[1], "width": image.shape[2], "dtype": image.dtype}
        with rasterio.open(root / name, "w", driver="GTiff", **shape, **options) as dataset:
            dataset.write(image)
    return names, [hashlib.sha256((root / name).read_bytes()).hexdigest() for name in names]


def of_bands(bands, **options):
    return Preprocessing(Rendering(bands, values="raw", **options), SIDE, SIDE)


def test_moments_are_those_of_the_prepared_pixels(tmp_path):
    rng = np.random.default_rng(1)
    # A mean that is large beside the deviation loses digits in sums of squares.
    values = rng.normal(size=(70, 2, SIDE, SIDE)) * [[[3]], [[0.5]]] + [[[1e6]], [[-12]]]
    values[::3, 0, :5] = -9999
    values[7, 1] = -9999
    names, hashes = write_images(tmp_path, values, nodata=-9999)
    moments = band_statistics(names, hashes, of_bands((1, 2)), tmp_path)
    for band, mean, std in zip(range(2), moments.mean, moments.std, strict=True):
        there = values[:, band][values[:, band] != -9999]
        assert mean == pytest.approx(there.mean(), rel=1e-5)
        assert std == pytest.approx(there.astype(np.float32).std(dtype=np.float64), rel=1e-5)


def test_constant_and_empty_bands_do_not_divide_by_zero(tmp_path):
    values = np.full((3, 3, SIDE, SIDE), 0.1, np.float32)
    values[:, 1] = np.nan
    values[:, 2] = np.random.default_rng(0).normal(size=(3, SIDE, SIDE))
    moments = band_statistics(*write_images(tmp_path, values), of_bands((1, 2, 3)), tmp_path)
    assert moments.mean[:2] == (0.1, 0.0)
    assert moments.std[:2] == (1.0, 1.0)
    assert 0.8 < moments.std[2] < 1.2


def test_the_cache_answers_for_the_same_images_and_preprocessing_only(tmp_path, monkeypatch):
    values = np.random.default_rng(2).normal(size=(4, 2, SIDE, SIDE)).astype(np.float32)
    names, hashes = write_images(tmp_path, values)
    moments = band_statistics(names, hashes, of_bands((1, 2)), tmp_path)
    files = set((cache_folder() / "statistics").iterdir())
    for name in names:
        (tmp_path / name).unlink()
    assert band_statistics(names, hashes, of_bands((1, 2)), tmp_path) == moments
    for other_hashes, preprocessing in ((hashes[::-1], of_bands((1, 2))), (hashes, of_bands((2, 1)))):
        with pytest.raises(InputError, match=r"images that cannot be read"):
            band_statistics(names, other_hashes, preprocessing, tmp_path)
    # A damaged cache file is computed anew.
    write_images(tmp_path, values)
    for file in files:
        file.write_text(json.dumps({"mean": 3}))
    assert band_statistics(names, hashes, of_bands((1, 2)), tmp_path) == moments


def test_a_large_part_is_sampled_always_in_the_same_way(tmp_path, monkeypatch):
    monkeypatch.setattr(statistics, "MAX_IMAGES", 5)
    values = np.arange(40, dtype=np.float32).reshape(40, 1, 1, 1) * np.ones((1, 1, SIDE, SIDE), np.float32)
    names, hashes = write_images(tmp_path, values)
    [mean, *_] = band_statistics(names, hashes, of_bands((1,)), tmp_path).mean
    monkeypatch.setenv("ORBITHASH_CACHE", str(tmp_path / "other"))
    assert band_statistics(names, hashes, of_bands((1,)), tmp_path).mean[0] == mean
    assert (mean * 5).is_integer()
    assert mean != values.mean()


def test_refused_images_are_named(tmp_path):
    names, hashes = write_images(tmp_path, np.ones((2, 1, SIDE, SIDE), np.float32))
    (tmp_path / names[1]).write_bytes(b"no image")
    with pytest.raises(InputError, match=r"1\.tif: the file is not the one that was hashed"):
        band_statistics(names, hashes, of_bands((1,)), tmp_path)
    hashes[1] = hashlib.sha256(b"no image").hexdigest()
    with pytest.raises(InputError, match=r"1\.tif: not a JPEG"):
        band_statistics(names, hashes, of_bands((1,)), tmp_path)
    # One line if the first lacks what they all lack.
    with pytest.raises(InputError, match=r"images that cannot be read, the first: 0\.tif: no band 2") as caught:
        band_statistics(names, hashes, of_bands((2,)), tmp_path)
    assert "\n" not in str(caught.value)
