"""Pictures of rows and heat maps: what the service returns, and by which distance."""

import asyncio

import numpy as np
import pytest
from search_parts import StubEncoder, local_shards, small_case, snapshot_of

from orbithash.encoders.codes import outputs_of, pack
from orbithash.encoders.errors import ImageError
from orbithash.search.engine.pictures import heat_map, soft_distances, view_row
from orbithash.search.engine.protocols import Covered, Picture
from orbithash.search.protocol.errors import InvalidQuery, KeyNotFound
from orbithash.search.protocol.queries import Query


def test_soft_distances():
    rng = np.random.default_rng(0)
    code = pack(rng.random(20) < 0.5)
    outputs = rng.integers(-127, 128, (50, 20)).astype(np.int8)
    bits = np.unpackbits(code)[:20]
    for row, distance in zip(outputs.tolist(), soft_distances(code, outputs), strict=True):
        total = sum(map(abs, row))
        apart = sum(abs(value) for value, bit in zip(row, bits, strict=True) if (value >= 0) != bool(bit))
        assert distance == 20 * apart / total
    others = pack(rng.random((30, 20)) < 0.5)
    hamming = np.bitwise_count(others ^ code).sum(axis=1)
    assert (soft_distances(code, outputs_of(others, 20)) == hamming).all()
    assert soft_distances(code, np.zeros((1, 20), np.int8)).tolist() == [0]


class Seeing(StubEncoder):
    """An encoder that may read the images of rows in `readable`."""

    has_views = True

    def __init__(self, readable, error=None):
        super().__init__()
        self.readable, self.error, self.asked = readable, error, []

    async def view(self, source, max_side):
        self.asked.append(source)
        if isinstance(source, bytes) or source in self.readable:
            return Picture(b"picture of " + str(source).encode(), max_side, 1)
        if self.error:
            raise self.error
        return None

    async def cover(self, source, cells):
        if await self.view(source, 1) is None:
            return None
        rng = np.random.default_rng(cells)
        return Covered(rng.integers(-127, 128, (1 + cells**2, 16)).astype(np.int8), (0.0, 0.25, 1.0, 0.75))


def asked(function, encoder, *args):
    case = small_case()
    return asyncio.run(function(snapshot_of(case, local_shards(case), encoder), *args))


def test_the_image_before_the_thumbnail():
    key, uri = "place/4.tif", "file:///place/4.tif"
    answer = asked(view_row, Seeing({uri}), key, 300)
    assert (answer.image, answer.width, answer.is_thumbnail) == (b"picture of file:///place/4.tif", 300, False)
    for encoder in (Seeing(()), Seeing((), ImageError("truncated"))):
        answer = asked(view_row, encoder, key, 300)
        assert answer.is_thumbnail
        assert answer.image.startswith(b"picture of b'")


def test_a_row_without_a_picture():
    with pytest.raises(
        InvalidQuery, match="this row has no thumbnail, and the server may not or cannot read its image"
    ):
        asked(view_row, Seeing(()), "place/3.tif", 300)


def test_wrong_arguments():
    for key, side, error, words in (
        ("absent", 100, KeyNotFound, "no row of the archive has the key 'absent'"),
        ("place/4.tif", 0, InvalidQuery, "from 1 to 4,096, got 0"),
        ("place/4.tif", 5000, InvalidQuery, "from 1 to 4,096, got 5000"),
    ):
        with pytest.raises(error, match=words):
            asked(view_row, Seeing(()), key, side)
    for cells in (0, 1, 17):
        with pytest.raises(InvalidQuery, match="from 2 to 16, got"):
            asked(heat_map, Seeing(()), Query(key="place/4.tif"), "place/4.tif", cells)


def test_a_heat_map():
    encoder = Seeing({"file:///place/4.tif"})
    found = asked(heat_map, encoder, Query(key="place/5.tif"), "place/4.tif", 4)
    outputs = asyncio.run(encoder.cover("file:///place/4.tif", 4)).outputs
    code = small_case().codes[5]
    distances = soft_distances(code, outputs)
    assert np.array_equal(np.array(found.values), (distances[1:] - distances[0]).reshape(4, 4))
    assert (found.num_passes, found.is_thumbnail, found.box) == (17, False, (0.0, 0.25, 1.0, 0.75))
