"""Bands by number and by name, and what the metadata of an image state about them."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from orbithash.encoders.errors import ImageError

__all__ = ["BandInfo", "find_bands", "is_sentinel_2", "named", "normalised_name"]

# Names of the bands of Sentinel-2 by wavelength, as STAC's `common_name` and catalogues write them. Other sensors use
# the same numbers for other wavelengths, so these names apply to Sentinel-2 only.
_SENTINEL_2 = {
    "coastal": "b1",
    "blue": "b2",
    "green": "b3",
    "red": "b4",
    **dict.fromkeys(("rededge1", "rededge071"), "b5"),
    **dict.fromkeys(("rededge2", "rededge075"), "b6"),
    **dict.fromkeys(("rededge3", "rededge078"), "b7"),
    "nir": "b8",
    "nir08": "b8a",
    "nir09": "b9",
    "cirrus": "b10",
    **dict.fromkeys(("swir16", "swir1"), "b11"),
    **dict.fromkeys(("swir22", "swir2"), "b12"),
}
# Of names in a message.
_MAX_NAMES, _MAX_NAME = 20, 40
_SENTINEL_2_FILE = re.compile(r"S2[A-D]_")


@dataclass(frozen=True)
class BandInfo:
    """What metadata state about one band.

    Attributes:
        names: such as B04 and red; empty: no name.
        scale: value = number * scale + offset; None: not stated.
        offset: in the unit of the values; None: not stated.
    """

    names: tuple[str, ...] = ()
    scale: float | None = None
    offset: float | None = None

    def completed(self, other: "BandInfo") -> "BandInfo":
        """Return this info with the names of `other` too, and with its scale and offset where none are stated here."""
        names = tuple(dict.fromkeys((*self.names, *other.names)))
        if self.scale is None and self.offset is None:
            return BandInfo(names, other.scale, other.offset)
        return BandInfo(names, self.scale, self.offset)

    def check(self) -> None:
        """Raise `ImageError` for a stated scale or offset that cannot be applied."""
        for what, value in (("scale", self.scale), ("offset", self.offset)):
            if value is not None and (not math.isfinite(value) or (what == "scale" and value == 0)):
                raise ImageError(f"its metadata state the {what} {value:g}; set band_scale and band_offset")


def named(names: Sequence[str]) -> str:
    """Return names of bands as one line for a message; long names and long lists are cut."""
    # Names come from files and may contain anything.
    lines = [" ".join(name.split())[:_MAX_NAME] for name in names[:_MAX_NAMES]]
    more = [f"and {len(names) - _MAX_NAMES} more"] if len(names) > _MAX_NAMES else []
    return ", ".join([*lines, *more])


def normalised_name(name: str) -> str:
    """Return a band name in lower case without zeros before its number: b4 for B04."""
    return re.sub(r"^b0+(?=\d)", "b", name.lower())


def is_sentinel_2(names: Sequence[str], file_name: str = "") -> bool:
    """Return whether bands are those of Sentinel-2: one is B8A, or the file or folder is named like its products."""
    return any(normalised_name(name) == "b8a" for name in names) or bool(_SENTINEL_2_FILE.match(file_name))


def find_bands(requested: Sequence[int | str], bands: Sequence[BandInfo], file_name: str = "") -> list[int]:
    """Return the positions, from 0, of the requested bands among those of an image.

    Names match without regard to case and to zeros before the number (B04 is B4). Of Sentinel-2, names of wavelengths
    such as `nir` match too.

    Raises:
        ImageError: a band does not exist.
    """
    names = [name for band in bands for name in band.names]
    numbers = [band for band in requested if isinstance(band, int)]
    if numbers:
        assert len(numbers) == len(requested), "`Rendering` has numbers or names"
        if max(numbers) > len(bands):
            raise ImageError(f"no band {max(numbers)}; the image has {len(bands)}")
        return [number - 1 for number in numbers]
    if not names:
        raise ImageError(
            f"bands {','.join(map(str, requested))} are names, and the bands of this file have none (descriptions of "
            "the bands of a GeoTIFF, names in STAC): state numbers"
        )
    sentinel_2 = is_sentinel_2(names, file_name)
    positions = {name: _find(str(name), bands, sentinel_2) for name in dict.fromkeys(requested)}
    absent = [str(name) for name, position in positions.items() if position is None]
    if absent:
        raise ImageError(f"no band {', '.join(absent)}; the bands are {named(names)}")
    return [position for name in requested if (position := positions[name]) is not None]


def _find(name: str, bands: Sequence[BandInfo], sentinel_2: bool) -> int | None:
    """The position of a band: of equal names, else of names that are equal when normalised, else by wavelength."""
    normalised = normalised_name(name)
    by_wavelength = _SENTINEL_2.get(normalised, normalised)
    for matches in (
        [name in band.names for band in bands],
        [normalised in map(normalised_name, band.names) for band in bands],
        [
            sentinel_2 and by_wavelength in (_SENTINEL_2.get(n, n) for n in map(normalised_name, band.names))
            for band in bands
        ],
    ):
        if sum(matches) > 1:
            raise ImageError(f"band {name} occurs {sum(matches)} times; state numbers")
        if any(matches):
            return matches.index(True)
    return None
