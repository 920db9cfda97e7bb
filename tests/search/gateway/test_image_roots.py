"""Which images of rows may be read, and the pictures that are made of them."""

import asyncio
import io

import numpy as np
import pytest
from images import encoded, geotiff, picture
from PIL import Image

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.gateway.image_roots import ImageRoots


@pytest.fixture
def folder(tmp_path):
    """A folder `shown` with an image, beside a file that must not be read and links to it."""
    (tmp_path / "secret.png").write_bytes(encoded(picture(), "PNG"))
    (tmp_path / "shown-not").mkdir()
    (tmp_path / "shown-not" / "a.png").write_bytes(encoded(picture(), "PNG"))
    shown = tmp_path / "shown"
    shown.mkdir()
    (shown / "a#1.png").write_bytes(encoded(picture(1), "PNG"))
    (shown / "link.png").symlink_to(tmp_path / "secret.png")
    (shown / "loop.png").symlink_to(shown / "loop.png")
    return shown


def test_only_below_the_roots(folder):
    roots = ImageRoots([str(folder), "s3://bucket/tiles"])
    assert roots
    inside = [
        f"{folder}/a#1.png",
        f"{folder}/sub/absent.tif",
        "s3://bucket/tiles/a.tif",
        f"{folder}/scene.tif#0,64,32,32",
    ]
    for uri in inside:
        assert roots.find(uri) is not None, uri
    tile = roots.find(inside[-1])
    assert (tile.path, tile.window) == (f"{folder}/scene.tif", (0, 64, 32, 32))
    assert roots.find(inside[0]).window is None
    outside = [
        *(f"{folder}/../secret.png", f"{folder}/link.png", f"{folder}/loop.png", f"{folder}-not/a.png", "a#1.png", ""),
        *("s3://bucket/tiles/../secret.tif", "s3://bucket/tiles-not/a.tif", "s3://other/tiles/a.tif"),
        *("https://example.org/a.tif", "/vsicurl/https://example.org/a.tif", f"{folder}/a\0.png"),
        *("file:///etc/passwd", "GTIFF_RAW:/etc/passwd", f"{folder}/" + "a" * 5000 + "/../../secret.png"),
    ]
    for uri in outside:
        assert roots.find(uri) is None, uri
    assert not ImageRoots()
    assert ImageRoots().find(inside[0]) is None


def test_wrong_roots(tmp_path):
    for root, words in (
        (tmp_path / "absent", "is not a folder"),
        ("https://example.org", "only s3:// and gs://"),
        ("s3://key:secret@bucket/a", "is given with a secret"),
    ):
        with pytest.raises(InputError, match=words):
            ImageRoots([str(root)])


def decoded(scenario):
    async def main():
        decoder = Decoder(1)
        try:
            return await scenario(decoder)
        finally:
            await decoder.close()

    return asyncio.run(main())


def test_pictures_of_files_and_of_tiles(tmp_path):
    pixels = np.concatenate([picture(2, 64), picture(3, 64)], axis=1)
    (tmp_path / "scene.tif").write_bytes(geotiff(pixels))
    (tmp_path / "text.png").write_text("no image")
    roots = ImageRoots([str(tmp_path)])

    async def scenario(decoder):
        whole = await decoder.picture(roots.find(f"{tmp_path}/scene.tif"), Rendering(), 64)
        tile = await decoder.picture(roots.find(f"{tmp_path}/scene.tif#64,0,64,64"), Rendering(), 1024)
        thumbnail = await decoder.picture(encoded(pixels, "JPEG"), Rendering(), 1024)
        for name, words in (
            ("text.png", "not a JPEG, PNG"),
            ("absent.png", "there is no such file"),
            ("scene.tif#100,0,64,64", "is not within"),
        ):
            with pytest.raises(ImageError, match=words):
                await decoder.picture(roots.find(f"{tmp_path}/{name}"), Rendering(), 64)
        prepared = await decoder.prepare_one(
            roots.find(f"{tmp_path}/scene.tif#64,0,64,64"), Preprocessing(Rendering(), resize=32, crop=32)
        )
        return whole, tile, thumbnail, prepared

    whole, tile, thumbnail, (prepared, width, height) = decoded(scenario)
    assert (whole.width, whole.height) == (64, 32)
    assert (tile.width, tile.height) == (64, 64)
    shown = np.asarray(Image.open(io.BytesIO(tile.image))).astype(int)
    assert np.abs(shown - picture(3, 64)).mean() < 4
    assert (thumbnail.width, thumbnail.height) == (128, 64)
    assert (prepared == Preprocessing(Rendering(), resize=32, crop=32).prepare(picture(3, 64))).all()
    assert (width, height) == (64, 64)
