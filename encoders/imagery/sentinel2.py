"""Scale and offset of Sentinel-2's reflectance, from the metadata of its products.

From processing baseline 04.00 (January 2022) on, 1000 is added to the stored numbers, so that dark surfaces are not cut
off at 0. Read are MTD_MSIL1C.xml or MTD_MSIL2A.xml in a patch folder or beside it, else the baseline in the folder's
name or in that of the product (.SAFE) that it lies in. Baseline 99.99 marks products that users processed themselves,
as those of BigEarthNet version 2; it says nothing about the offset.
"""

import math
import re
from pathlib import Path
from xml.etree import ElementTree

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo

__all__ = ["stated_scaling"]

# Normalised names of the bands; the number of each in metadata is its place here.
_BANDS = ("b1", "b2", "b3", "b4", "b5", "b6", "b7", "b8", "b8a", "b9", "b10", "b11", "b12")
_METADATA = ("MTD_MSIL2A.xml", "MTD_MSIL1C.xml")
_MAX_METADATA_BYTES = 2**22
_PRODUCT = re.compile(r"S2[A-D]_MSIL(?:1C|2A)_\w*?_N(\d{4})_")
_FIRST_WITH_OFFSET, _OF_USERS = 400, 9999
_QUANTIFICATION, _OFFSET = 10_000, -1000


def stated_scaling(folder: Path) -> dict[str, BandInfo]:
    """Return scale and offset of the bands of a patch folder by `normalised_name`, empty if nothing states them.

    Raises:
        ImageError: metadata that cannot be read.
    """
    folder = folder.absolute()
    products = [parent for parent in folder.parents if parent.suffix.upper() == ".SAFE"][:1]
    for place in (folder, folder.parent, *products):
        for name in _METADATA:
            if (place / name).is_file():
                return _of_metadata(place / name)
    for place in (folder, *products):
        match = _PRODUCT.match(place.name)
        if match and _FIRST_WITH_OFFSET <= int(match[1]) < _OF_USERS:
            return {band: BandInfo((), 1 / _QUANTIFICATION, _OFFSET / _QUANTIFICATION) for band in _BANDS}
    return {}


def _of_metadata(path: Path) -> dict[str, BandInfo]:
    try:
        with path.open("rb") as file:
            text = file.read(_MAX_METADATA_BYTES + 1)
        if len(text) > _MAX_METADATA_BYTES:
            raise ValueError(f"more than {_MAX_METADATA_BYTES:,} bytes")
        root = ElementTree.fromstring(text)
        divisor, offsets = float(_QUANTIFICATION), {}
        for element in root.iter():
            if element.tag in ("BOA_QUANTIFICATION_VALUE", "QUANTIFICATION_VALUE"):
                divisor = float(element.text or "")
            elif element.tag in ("BOA_ADD_OFFSET", "RADIO_ADD_OFFSET"):
                offsets[int(element.attrib["band_id"])] = float(element.text or "")
        if not (math.isfinite(divisor) and divisor > 0 and all(map(math.isfinite, offsets.values()))):
            raise ValueError("a number is not finite, or the quantification value is not above 0")
    except (OSError, ElementTree.ParseError, KeyError, ValueError) as error:
        raise ImageError(f"{path.name}: the offset of reflectance cannot be read ({error})") from error
    return {band: BandInfo((), 1 / divisor, offsets.get(number, 0.0) / divisor) for number, band in enumerate(_BANDS)}
