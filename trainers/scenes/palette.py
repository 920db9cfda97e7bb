"""Colours (RGB, 0 to 255) by the names that captions use."""

from collections.abc import Mapping

import numpy as np

__all__ = [
    "ASPHALT",
    "CARS",
    "CONCRETE",
    "ROOFS",
    "SAND",
    "WATER",
    "WHITE",
    "Color",
    "mixed",
    "pick",
    "scaled",
    "varied",
]

Color = tuple[int, int, int]

WHITE: Color = (238, 238, 234)

ASPHALT = {"dark grey": (72, 73, 76), "grey": (98, 99, 101), "pale grey": (128, 127, 124)}
CONCRETE = {"light grey": (168, 166, 160), "pale": (190, 184, 172), "grey": (146, 145, 142)}
ROOFS = {
    "red": (158, 74, 54),
    "orange": (186, 106, 68),
    "brown": (118, 84, 66),
    "grey": (122, 122, 126),
    "white": (216, 212, 204),
}
SAND = {"golden": (214, 182, 128), "pale": (224, 208, 172), "reddish": (198, 142, 100), "greyish": (188, 176, 156)}
WATER = {
    "turquoise": (44, 132, 142),
    "dark blue": (26, 56, 84),
    "blue": (38, 88, 128),
    "green": (48, 86, 72),
}
CARS: tuple[Color, ...] = (
    (232, 232, 230),
    (206, 208, 212),
    (44, 46, 52),
    (150, 36, 34),
    (38, 66, 122),
    (120, 122, 126),
    (226, 226, 222),
    (196, 174, 60),
)


def mixed(first: Color, second: Color, share: float) -> Color:
    """Return a blend of two colours; `share`, from 0 to 1, is the weight of the second."""
    a, b, c = (round(x + (y - x) * share) for x, y in zip(first, second, strict=True))
    return a, b, c


def scaled(color: Color, factor: float) -> Color:
    """Return the colour with its brightness multiplied by `factor`."""
    red, green, blue = (min(255, max(0, round(value * factor))) for value in color)
    return red, green, blue


def varied(color: Color, rng: np.random.Generator, amount: float = 0.08) -> Color:
    """Return a random similar colour; brightness and channels vary by about the fraction `amount`."""
    brightness = 1 + amount * float(rng.uniform(-1, 1))
    red, green, blue = (
        min(255, max(0, round(value * (brightness + amount * shift / 3))))
        for value, shift in zip(color, rng.uniform(-1, 1, 3).tolist(), strict=True)
    )
    return red, green, blue


def pick(rng: np.random.Generator, colors: Mapping[str, Color]) -> tuple[str, Color]:
    """Return the name of a random colour of the mapping, and the colour slightly varied."""
    name = list(colors)[rng.integers(len(colors))]
    return name, varied(colors[name], rng)
