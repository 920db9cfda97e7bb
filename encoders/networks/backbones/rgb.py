"""Red, green and blue among the bands of an image."""

import re
from collections.abc import Sequence

__all__ = ["DEFAULT_RGB", "rgb_channels"]

# Channels of red, green and blue where band names do not say otherwise.
DEFAULT_RGB = (0, 1, 2)

# Names of red, green and blue bands, in lower case without zeros after the letter; the first is Sentinel-2's.
_COLOUR_NAMES = (("b4", "b3", "b2"), ("red", "green", "blue"), ("r", "g", "b"), ("sr_b4", "sr_b3", "sr_b2"))


def rgb_channels(bands: Sequence[int | str] | None) -> tuple[int, int, int] | None:
    """Return the channels of red, green and blue among the bands of an image, None if names show no RGB.

    `bands` are those of `Rendering`: names such as B04, B03, B02 or red, green, blue, or numbers counted from 1, of
    which 1, 2, 3 are red, green and blue. Numbers without these three are taken to begin with RGB, as for pictures.
    """
    if bands is None or not all(isinstance(band, str) for band in bands):
        positions = {band: channel for channel, band in enumerate(bands or ())}
        return (positions[1], positions[2], positions[3]) if {1, 2, 3} <= positions.keys() else DEFAULT_RGB
    found = {re.sub(r"^b0+(?=\d)", "b", str(band).lower()): channel for channel, band in enumerate(bands)}
    for red, green, blue in _COLOUR_NAMES:
        if {red, green, blue} <= found.keys():
            return found[red], found[green], found[blue]
    return None
