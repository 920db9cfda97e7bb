"""The two simulated sensors: RGB, and panchromatic at twice the resolution."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from orbithash.trainers.scenes.canvas import OVERSAMPLING, Canvas, Field

__all__ = ["photograph"]

Pixels = NDArray[np.uint8]


def photograph(canvas: Canvas) -> tuple[Pixels, Pixels]:
    """Return the two images of one scene: RGB uint8 [S, S, 3] and panchromatic uint8 [2 S, 2 S].

    Haze, gain, spectral weights and noise differ, so neither image can be computed from the other.
    """
    rng = canvas.rng
    ground = np.asarray(canvas.image.reduce(OVERSAMPLING), np.float32)
    grain = canvas.noise(9, 3) * rng.uniform(0.03, 0.06) + canvas.noise(90, 1) * 0.05
    ground = ground * (1 + grain)[..., None]
    return _color(ground, canvas.light.elevation, rng), _panchromatic(ground, rng)


def _color(ground: Field, elevation: float, rng: np.random.Generator) -> Pixels:
    size = ground.shape[0] // 2
    coarse = ground.reshape(size, 2, size, 2, 3).mean(axis=(1, 3), dtype=np.float32)
    low_sun = max(0.0, (45 - elevation) / 45)
    gain = rng.uniform(0.9, 1.1) * np.asarray([1 + 0.06 * low_sun, 1.0, 1 - 0.08 * low_sun], np.float32)
    haze = rng.uniform(0, 0.14) * np.asarray([168, 180, 196], np.float32)
    noise = rng.standard_normal(coarse.shape, np.float32) * 2
    return _eight_bit(coarse * gain * (1 - haze.mean() / 255) + haze + noise)


def _panchromatic(ground: Field, rng: np.random.Generator) -> Pixels:
    # Unlike the eye, a silicon sensor without filters is sensitive to red light.
    luminance = ground @ np.asarray([0.4, 0.37, 0.23], np.float32)
    bright = 255 * (luminance.clip(0, 255) / 255) ** rng.uniform(0.8, 1.05)
    noise = rng.standard_normal(luminance.shape, np.float32) * 3
    return _eight_bit(bright * rng.uniform(0.85, 1.05) + rng.uniform(4, 16) + noise)


def _eight_bit(values: NDArray[np.floating[Any]]) -> Pixels:
    pixels: Pixels = np.clip(values + 0.5, 0, 255).astype(np.uint8)
    return pixels
