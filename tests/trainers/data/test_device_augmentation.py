"""Views made in batches by torch are those that Pillow makes one by one from the same draws."""

import numpy as np
import pytest
import torch
from PIL import Image

from orbithash.encoders.errors import InputError
from orbithash.trainers.config import load_config
from orbithash.trainers.data.augmentation import Augmentation, ViewDraw, _recolour, augment, draw_view
from orbithash.trainers.data.device_augmentation import ViewDraws, views_of
from orbithash.trainers.methods.dhcl import DhclConfig


def pictures(num, side, bands=3, seed=0):
    """Noise on coarse squares: edges, flat areas, saturated and grey colours."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (num, 6, 6, bands)).repeat(-(-side // 6), 1).repeat(-(-side // 6), 2)[:, :side, :side]
    noise = rng.integers(-40, 40, (num, side, side, bands))
    return np.clip(np.where(rng.uniform(size=(num, 1, 1, 1)) < 0.5, coarse, coarse + noise), 0, 255).astype(np.uint8)


def both(images, side, augmentation):
    """The views of images by Pillow and by torch."""
    one_by_one = [augment(x, side, np.random.default_rng([5, i]), augmentation) for i, x in enumerate(images)]
    draws = [draw_view(images.shape[1], np.random.default_rng([5, i]), augmentation) for i in range(len(images))]
    return np.stack(one_by_one), views_of(torch.from_numpy(images), ViewDraws.stack(draws), side, augmentation).numpy()


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(("stored", "side"), [(38, 32), (38, 70), (90, 20)])
@pytest.mark.parametrize("bands", [3, 5])
def test_pictures_are_those_of_pillow(interpolation, stored, side, bands):
    expected, found = both(pictures(24, stored, bands), side, Augmentation(interpolation=interpolation))
    assert found.dtype == np.float32
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_numbers_and_missing_pixels(interpolation):
    rng = np.random.default_rng(0)
    images = rng.normal(1000, 300, (16, 40, 40, 4)).astype(np.float32)
    images[rng.uniform(size=images.shape) < 0.2] = np.nan
    images[0] = np.nan
    images[1, :10] = np.inf
    expected, found = both(images, 32, Augmentation(interpolation=interpolation))
    assert np.isnan(found[0]).all()
    assert np.isfinite(found[1:]).any(axis=(1, 2, 3)).all()
    # Sums in another order, and a quotient, in float32.
    np.testing.assert_allclose(found, expected, rtol=1e-6)


@pytest.mark.parametrize(
    "augmentation",
    [Augmentation(colour_jitter=0.4), Augmentation(grayscale=0.5), Augmentation(colour_jitter=1.0, grayscale=0.2)],
)
def test_colours_are_those_of_pillow(augmentation):
    images = pictures(40, 38)
    expected, found = both(images, 32, augmentation)
    plain, _ = both(images, 32, Augmentation())
    np.testing.assert_array_equal(found, expected)
    assert np.abs(expected.astype(int) - plain).mean() > 2


@pytest.mark.parametrize("turn", [0, 1, -37, 51])
def test_hues_of_all_greens_and_blues(turn):
    levels = np.arange(256, dtype=np.uint8)
    for red in (0, 1, 100, 254, 255):
        colours = np.stack(np.broadcast_arrays(np.uint8(red), levels[:, None], levels), axis=2)
        draw = ViewDraw((0, 0, 256, 256), 0, hue_turn=turn)
        expected = np.asarray(_recolour(Image.fromarray(colours), draw))
        found = views_of(torch.from_numpy(colours[None]), ViewDraws.stack([draw]), 256, Augmentation(colour_jitter=1))
        np.testing.assert_array_equal(found[0].numpy(), expected)


def test_all_orientations():
    image = pictures(1, 20)[0]
    draws = [ViewDraw((0, 0, 20, 20), orientation) for orientation in range(8)]
    found = views_of(torch.from_numpy(np.stack([image] * 8)), ViewDraws.stack(draws), 20, Augmentation())
    for orientation, view in enumerate(found.numpy()):
        turned = np.rot90(image, orientation % 4)
        np.testing.assert_array_equal(view, turned[:, ::-1] if orientation >= 4 else turned)


def test_a_view_does_not_depend_on_its_batch():
    images, augmentation = torch.from_numpy(pictures(9, 38)), Augmentation(colour_jitter=0.3)
    draws = [draw_view(38, np.random.default_rng(i), augmentation) for i in range(9)]
    together = views_of(images, ViewDraws.stack(draws), 32, augmentation)
    for i in range(9):
        alone = views_of(images[i : i + 1], ViewDraws.stack(draws[i : i + 1]), 32, augmentation)
        assert alone[0].equal(together[i])
    assert views_of(images[:0], ViewDraws.stack([]), 32, augmentation).shape == (0, 32, 32, 3)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU that torch can use")
@pytest.mark.parametrize("augmentation", [Augmentation(), Augmentation(colour_jitter=0.4, grayscale=0.2)])
def test_views_on_a_gpu_are_those_on_a_cpu(augmentation):
    images = torch.from_numpy(pictures(40, 38))
    draws = ViewDraws.stack([draw_view(38, np.random.default_rng(i), augmentation) for i in range(40)])
    expected = views_of(images, draws, 32, augmentation)
    found = views_of(images.cuda(), ViewDraws(*(tensor.cuda() for tensor in draws)), 32, augmentation)
    assert found.cpu().equal(expected)


def test_views_of_frozen_features_are_refused():
    with pytest.raises(InputError, match="augment_on is device, and tune is none: frozen features have no views"):
        load_config(DhclConfig, augment_on="device", tune="none")
