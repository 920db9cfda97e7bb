"""Pictures of rows, and which parts of a row's image make it near a query."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, unpack
from orbithash.encoders.errors import InputError
from orbithash.search.engine.owners import read_hits
from orbithash.search.engine.query_codes import encode_query
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound, SearchError
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rankings import HeatMap, View, check_cells, check_side
from orbithash.v1 import search_pb2

__all__ = ["heat_map", "soft_distances", "view_row"]

logger = logging.getLogger(__name__)

# Seconds until a shard that reads a row has failed.
_TIMEOUT_S = 10.0

Result = TypeVar("Result")


class _Images(NamedTuple):
    """The images of a row: its uri, and its thumbnail, which may be empty."""

    uri: str
    thumbnail: bytes


async def view_row(snapshot: Snapshot, key: str, max_side: int) -> View:
    """Return a picture of the row with this key: of its image if it may and can be read, else of its thumbnail.

    Raises `KeyNotFound`, and `InvalidQuery` for sides out of range and a row without a picture.
    """
    check_side(max_side)
    images = await _images_of(snapshot, key)
    picture, is_thumbnail = await _first(images, lambda source: snapshot.encoder.view(source, max_side))
    return View(picture.image, picture.width, picture.height, is_thumbnail)


async def heat_map(snapshot: Snapshot, query: Query, key: str, cells: int) -> HeatMap:
    """Return by how much the row moves away from the query, in bits, when each cell of its image is covered.

    The distance is that of `soft_distances`. The network runs once for the image and once for each cell.

    Raises as `view_row`, and as searches by the query.
    """
    check_cells(cells)
    query.check()
    if snapshot.encoder.embedding is not None:
        raise InvalidQuery(("key", "this model takes vectors instead of images, so it cannot cover parts of them"))
    images = await _images_of(snapshot, key)
    encoded = await encode_query(query, snapshot)
    covered, is_thumbnail = await _first(images, lambda source: snapshot.encoder.cover(source, cells))
    distances = soft_distances(encoded.codes[0], covered.outputs)
    values = (distances[1:] - distances[0]).reshape(cells, cells)
    return HeatMap(
        tuple(tuple(row) for row in values.tolist()),
        len(distances),
        is_thumbnail,
        snapshot.archive.model_id,
        covered.box,
    )


def soft_distances(code: Codes, outputs: npt.NDArray[np.int8]) -> npt.NDArray[np.float64]:
    """Return the distances in bits, float64 [N], of outputs int8 [N, K] from a code uint8 [ceil(K/8)].

    Each bit counts in proportion to the magnitude of its output. If all magnitudes are equal, this is the Hamming
    distance.
    """
    num_bits = outputs.shape[1]
    magnitudes = np.abs(outputs.astype(np.int64))
    differs = unpack(code, num_bits) != (outputs >= 0)
    sums = np.maximum(magnitudes.sum(axis=1), 1)
    distances: npt.NDArray[np.float64] = num_bits * (differs * magnitudes).sum(axis=1) / sums
    return distances


async def _images_of(snapshot: Snapshot, key: str) -> _Images:
    found = await asyncio.to_thread(snapshot.archive.find, [key])
    if key not in found:
        raise KeyNotFound(f"no row of the archive has the key {key!r}")
    (row,) = await read_hits(snapshot, np.array([found[key]], np.uint64), ("uri", "thumbnail"), _TIMEOUT_S)
    hit = search_pb2.Hit.FromString(row)
    return _Images(hit.uri or hit.key, hit.thumbnail)


async def _first(images: _Images, use: Callable[[bytes | str], Awaitable[Result | None]]) -> tuple[Result, bool]:
    """Return what `use` returns for the image of a row, else for its thumbnail, and whether that was the thumbnail."""
    try:
        result = await use(images.uri)
        if result is not None:
            return result, False
    except SearchError:
        raise
    except InputError as error:
        logger.info("an image of a row cannot be read, so its thumbnail is shown: %s", error)
    if images.thumbnail:
        try:
            result = await use(images.thumbnail)
        except SearchError:
            raise
        except InputError as error:
            raise InvalidQuery(("key", f"the thumbnail of this row cannot be read: {error}")) from error
        if result is not None:
            return result, True
    raise InvalidQuery(("key", "this row has no thumbnail, and the server may not or cannot read its image"))
