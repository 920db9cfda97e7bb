"""Records: images that are decoded, placed and prepared for the network."""

import dataclasses
import datetime as dt
from functools import lru_cache
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import PIL.Image

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.georeference import read_georeference
from orbithash.encoders.imagery.images import Image, Limits, Rendering, Stretch, read_image, stretch_limits
from orbithash.encoders.imagery.mosaics import is_mosaic
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Pixels
from orbithash.encoders.sources.listings import Item
from orbithash.encoders.sources.remote import is_remote, read_object
from orbithash.encoders.sources.tiles import read_tile, tile_key

__all__ = ["MAX_THUMBNAIL_PX", "Record", "encode_picture", "make_thumbnail", "read_item", "read_record"]

MAX_THUMBNAIL_PX = 128


@dataclasses.dataclass(frozen=True)
class Record:
    """A row of the archive without its code, and the prepared image `pixels`, [crop, crop, C]."""

    pixels: Pixels
    uri: str
    datetime: dt.datetime | None
    lon: float | None
    lat: float | None
    footprint: bytes | None
    thumbnail: bytes


def read_record(item: Item, preprocessing: Preprocessing) -> Record:
    """Read the image, patch folder or tile of an item.

    Place and time that the item states take precedence over those in the file.

    Raises:
        ImageError: the item is refused.
        InputError: an object store does not answer or gives no permission, or PROJ cannot project; the image may be
            sound.
    """
    if item.problem is not None:
        raise ImageError(item.problem)
    rendering, source = preprocessing.rendering, _source_of(item)
    image = _read(item, source, rendering)
    uri = item.path if item.window is None else tile_key(item.path, item.window)
    place = read_georeference(source, item.window)
    return Record(
        pixels=preprocessing.prepare(image),
        uri=uri,
        datetime=item.datetime or place.datetime,
        lon=place.lon if item.lon is None else item.lon,
        lat=place.lat if item.lat is None else item.lat,
        footprint=item.footprint or place.footprint,
        thumbnail=make_thumbnail(rendering.picture(image)),
    )


def read_item(item: Item, rendering: Rendering) -> Image:
    """Read the image, patch folder or tile of an item as `read_image` returns it; raises as `read_record`."""
    return _read(item, _source_of(item), rendering)


def _source_of(item: Item) -> Path | bytes:
    return read_object(item.path, Limits()) if is_remote(item.path) else Path(item.path)


def _read(item: Item, source: Path | bytes, rendering: Rendering) -> Image:
    if item.window is None and isinstance(source, Path) and is_mosaic(source):
        raise ImageError("a mosaic is read by tiles only: give --tile")
    if item.window is None:
        return read_image(source, rendering, stated=item.bands)
    if isinstance(source, bytes):
        raise ImageError("only scenes in files of this machine are cut into tiles: copy it first")
    stretch = _scene_stretch(source, rendering, item.bands)
    return read_tile(source, item.window, rendering, Limits(), stretch, item.bands)


@lru_cache(maxsize=8)
def _scene_stretch(path: Path, rendering: Rendering, stated: tuple[BandInfo, ...]) -> Stretch | None:
    """The stretch that all tiles of a scene share. Cached, because the tiles of a scene are read one after another."""
    return stretch_limits(path, rendering, stated=stated)


def make_thumbnail(image: npt.NDArray[np.uint8]) -> bytes:
    """Return a JPEG with sides of at most `MAX_THUMBNAIL_PX` pixels from a picture uint8 [H, W, 3]."""
    return encode_picture(image, MAX_THUMBNAIL_PX, 80, PIL.Image.Resampling.BILINEAR)[0]


def encode_picture(
    image: npt.NDArray[np.uint8],
    max_side: int,
    quality: int,
    resampling: PIL.Image.Resampling = PIL.Image.Resampling.LANCZOS,
) -> tuple[bytes, int, int]:
    """Return a JPEG, its width and its height from a picture uint8 [H, W, 3], which is made smaller if necessary."""
    picture = PIL.Image.fromarray(image)
    picture.thumbnail((max_side, max_side), resampling)
    buffer = BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue(), *picture.size
