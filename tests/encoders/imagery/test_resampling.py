"""Resampling of float32 bands, beside torch's antialiased interpolation and beside windows of missing pixels."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from orbithash.encoders.imagery.resampling import resample, resize_band

RNG = np.random.default_rng(7)


def resized_by_torch(band, side, interpolation):
    """torch.nn.functional.interpolate with antialiasing has the geometry and the filters of Pillow."""
    tensor = torch.from_numpy(band.astype(np.float64))[None, None]
    return F.interpolate(tensor, (side, side), mode=interpolation, align_corners=False, antialias=True)[0, 0].numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("full", "side"), [(120, 60), (60, 120), (97, 32), (33, 33)])
def test_numbers_are_resampled_as_torch_does(full, side, interpolation):
    image = (RNG.normal(size=(full, full, 5)) * [1, 1e-4, 1e4, 30, 1] + [0, 0.2, 0, -12, 5]).astype(np.float32)
    got = resample(image, side, (0, 0, full, full), interpolation)
    assert (got.dtype, got.shape) == (np.float32, (side, side, 5))
    for band in range(5):
        expected = resized_by_torch(image[..., band], side, interpolation)
        np.testing.assert_allclose(got[..., band], expected, atol=1e-5 * np.abs(image[..., band]).max())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_numbers_have_the_geometry_of_pictures(interpolation):
    """Boxes of crops between pixels included; pictures are rounded after each of two passes."""
    picture = RNG.integers(70, 180, (50, 70, 4)).astype(np.uint8)
    for box in ((0, 0, 50, 50), (3.25, 1.5, 40.75, 39), (60.5, 10, 70, 19.5)):
        got = resample(picture.astype(np.float32), 24, box, interpolation)
        assert np.abs(got - resample(picture, 24, box, interpolation)).max() < 1.3


def test_no_pixel_changes_where_the_size_stays():
    image = RNG.normal(size=(40, 40, 12)).astype(np.float32)
    image[3, 4, 5] = np.nan
    np.testing.assert_array_equal(resample(image, 40, (0, 0, 40, 40)), image)


@pytest.mark.parametrize("missing", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("side", [20, 150])
def test_missing_pixels_do_not_spread(missing, interpolation, side):
    """A constant band with holes stays constant, and the holes keep their place and size."""
    band = np.full((60, 60), 0.25, np.float32)
    band[12:30, 33:48] = missing
    got = resize_band(band, (side, side), None, interpolation)
    there = np.isfinite(got)
    np.testing.assert_allclose(got[there], 0.25, rtol=1e-6)
    assert not np.isinf(got).any()
    factor = side / 60
    rows, cols = np.nonzero(~there)
    for low, high, places in ((12, 30, rows), (33, 48, cols)):
        assert abs(places.min() - low * factor) <= 1
        assert abs(places.max() + 1 - high * factor) <= 1


def test_a_band_without_pixels_stays_without():
    assert np.isnan(resize_band(np.full((30, 30), np.nan, np.float32), (20, 20))).all()


def test_huge_numbers_stay_finite():
    band = np.full((30, 30), 3e38, np.float32)
    band[0, 0] = np.nan
    np.testing.assert_allclose(resize_band(band, (20, 20)), 3e38, rtol=1e-6)
