"""Tiles: squares that cover a whole scene (GeoTIFF or JPEG 2000), read by window."""

import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.bands import BandInfo
from orbithash.encoders.imagery.mosaic_files import mosaic_of
from orbithash.encoders.imagery.mosaics import is_mosaic
from orbithash.encoders.imagery.rasters import check_blocks, check_numbers_size, open_raster, read_window
from orbithash.encoders.imagery.rendering import Image, Limits, Rendering, Stretch, Window
from orbithash.encoders.ranges import is_integer

__all__ = ["check_tile", "plan_tiles", "read_tile", "split_tile_key", "tile_key"]

_RENDERING = Rendering()
_LIMITS = Limits()
_MAX_TILES = 1_000_000
# What follows the scene in the key or the URI of a tile: column, row, width and height in pixels.
_WINDOW = re.compile(r"#(\d{1,9}),(\d{1,9}),(\d{1,9}),(\d{1,9})\Z")


def check_tile(tile_px: int, limits: Limits = _LIMITS) -> int:
    """Return `tile_px`; `InputError` if an image of that side would be refused."""
    if not is_integer(tile_px):
        raise InputError(f"the tile's side is {tile_px!r}; a whole number of pixels is required")
    try:
        limits.check_size(tile_px, tile_px)
    except ImageError as error:
        raise InputError(f"the tile's side is {tile_px} pixels: {error}") from error
    return tile_px


def plan_tiles(path: Path, tile_px: int) -> list[Window]:
    """Return the windows of `tile_px` x `tile_px` pixels that cover the whole scene, row by row.

    The last window of each row and column is shifted inward to be of full size; it overlaps its neighbour. Windows of a
    mosaic that show none of its files are left out.

    Raises:
        ImageError: not a readable TIFF or JPEG 2000 file or mosaic, smaller than one tile, or of more than a million
            tiles.
    """
    check_tile(tile_px)
    with open_raster(path) as dataset:
        width, height = dataset.width, dataset.height
    if min(width, height) < tile_px:
        raise ImageError(f"{width} x {height} pixels, smaller than a tile of {tile_px} x {tile_px}")
    # The header of a small file can declare a scene whose list of tiles would fill the memory.
    num_tiles = -(-width // tile_px) * -(-height // tile_px)
    if num_tiles > _MAX_TILES:
        raise ImageError(
            f"{width} x {height} pixels are {num_tiles:,} tiles; at most {_MAX_TILES:,} are allowed: use larger tiles"
        )
    rows, columns = _starts(height, tile_px), _starts(width, tile_px)
    windows = [(col, row, tile_px, tile_px) for row in rows for col in columns]
    if not is_mosaic(path):
        return windows
    shown = mosaic_of(path, open_raster).showing(columns, rows, tile_px)
    return [window for window, is_shown in zip(windows, shown.ravel().tolist(), strict=True) if is_shown]


def read_tile(
    path: Path,
    window: Window,
    rendering: Rendering = _RENDERING,
    limits: Limits = _LIMITS,
    stretch: Stretch | None = None,
    stated: Sequence[BandInfo] = (),
) -> Image:
    """Return one tile as an image [height, width, C].

    Only the blocks under the window are decoded; the scene may be of any size.

    Args:
        path: the scene.
        window: a window from `plan_tiles`.
        rendering: bands, and the stretch if `stretch` is None.
        limits: for the tile and for one block of the scene.
        stretch: `stretch_limits` of the scene, which all of its tiles share; None for numbers.
        stated: what metadata outside the file state about its bands.

    Raises:
        ImageError: not readable, a window that is not within the scene, or no valid data in it.
    """
    col, row, width, height = window
    limits.check_size(width, height)
    with open_raster(path) as dataset:
        if col < 0 or row < 0 or col + width > dataset.width or row + height > dataset.height:
            raise ImageError(f"the tile {window} is not within the scene of {dataset.width} x {dataset.height} pixels")
        check_blocks(dataset, limits)
        if not rendering.is_picture:
            check_numbers_size(width * height, rendering.num_bands, np.dtype(dataset.dtypes[0]).itemsize, limits)
        return read_window(dataset, window, rendering, stretch, stated)


def tile_key(scene_key: str, window: Sequence[int]) -> str:
    """Return the key of a tile: `scene.tif#col,row,width,height`."""
    return f"{scene_key}#{','.join(str(number) for number in window)}"


def split_tile_key(text: str) -> tuple[str, Window | None]:
    """Return the key, path or URI of a scene and the window of its tile; None for text that names no tile."""
    match = _WINDOW.search(text)
    if match is None:
        return text, None
    col, row, width, height = map(int, match.groups())
    return text[: match.start()], (col, row, width, height)


def _starts(length: int, tile_px: int) -> list[int]:
    """The first pixel of each tile along one side."""
    starts = list(range(0, length - tile_px + 1, tile_px))
    if starts[-1] + tile_px < length:
        starts.append(length - tile_px)
    return starts
