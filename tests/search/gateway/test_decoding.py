"""Decoding of users' images: equal to decoding in process, refused images, limits, and processes that die."""

import asyncio
import hashlib
import multiprocessing.forkserver
import os
import re
import signal
import sys
from pathlib import Path

import numpy as np
import pytest
from images import bomb_tiff, encoded, geotiff, no_images, picture, png, tiff

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.images import read_image
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Rendering
from orbithash.encoders.sources.records import make_thumbnail
from orbithash.search.gateway import decoding
from orbithash.search.gateway.decoding import Decoder
from orbithash.search.protocol.errors import Overloaded

PREPROCESSING = Preprocessing(Rendering(), resize=32, crop=32)
GOOD = encoded(picture(), "PNG")


def run(scenario, **options):
    """Run `scenario(decoder)`, and check that its processes have ended afterwards."""

    async def main():
        decoder = Decoder(**{"num_workers": 1, **options})
        try:
            return await scenario(decoder)
        finally:
            workers = pids(decoder)
            await decoder.close()
            for pid in workers:
                assert not Path(f"/proc/{pid}").exists() or "(zombie)" in Path(f"/proc/{pid}/status").read_text()

    return asyncio.run(main())


def pids(decoder):
    return [] if decoder._pool is None else list(decoder._pool._pool_manager.worker_manager.workers)


async def is_well(decoder):
    """Check that the decoder decodes a good image exactly."""
    pixels = await decoder.prepare([GOOD], PREPROCESSING)
    assert (pixels[0] == PREPROCESSING.prepare(picture())).all()


def heavy_modules():
    return sorted(
        {"torch", "torchvision", "ray", "faiss", "lance", "pyarrow"} & {name.partition(".")[0] for name in sys.modules}
    )


def test_equal_to_decoding_in_process_and_without_torch():
    images = [encoded(picture(i, 40 + i), kind) for i, kind in enumerate(("PNG", "JPEG", "TIFF", "PNG", "JPEG"))]
    images.append(geotiff(picture(9).astype(np.uint16) * 100))
    other = Preprocessing(Rendering(bands=(3, 1)), resize=48, crop=40)

    async def scenario(decoder):
        for preprocessing in (PREPROCESSING, other):
            pixels, thumbnails = await decoder.prepare_rows(images, preprocessing)
            assert (pixels == await decoder.prepare(images, preprocessing)).all()
            for row, image in enumerate(images):
                expected = read_image(image, preprocessing.rendering)
                assert (pixels[row] == preprocessing.prepare(expected)).all()
                assert thumbnails[row] == make_thumbnail(preprocessing.rendering.picture(expected))
        assert (await decoder.prepare([], PREPROCESSING)).shape == (0, 32, 32, 3)
        assert await asyncio.wrap_future(decoder._pool.schedule(heavy_modules)) == []

    run(scenario, num_workers=2)


def test_numbers_are_decoded_as_in_process():
    """Twelve bands as float32, with missing pixels; images that cannot become reflectance are refused."""
    numbers = Preprocessing(Rendering(bands=tuple(range(1, 13)), values="reflectance"), resize=32, crop=32)
    values = np.random.default_rng(0).integers(0, 9000, (40, 44, 12)).astype(np.uint16)
    image = geotiff(values, nodata=int(values[0, 0, 0]))

    async def scenario(decoder):
        pixels, [thumbnail] = await decoder.prepare_rows([image], numbers)
        expected = read_image(image, numbers.rendering)
        assert (pixels.dtype, pixels.shape) == (np.float32, (1, 32, 32, 12))
        np.testing.assert_array_equal(pixels[0], numbers.prepare(expected))
        assert thumbnail == make_thumbnail(numbers.rendering.picture(expected))
        nothing = await decoder.prepare([], numbers)
        assert (nothing.dtype, nothing.shape) == (np.float32, (0, 32, 32, 12))
        for refused, words in (
            (geotiff(values[..., :3]), "no band 12; the image has 3"),
            (geotiff(values.astype(np.uint8)), "uint8 without a scale is no reflectance"),
            (geotiff(values.astype(np.complex64)), "values of type complex64"),
            (geotiff(values * 0, nodata=0), "no valid data"),
            (geotiff(np.full_like(values, 1e300, np.float64)), "no valid data"),
            (GOOD, "no band 12; the image has 3"),
        ):
            with pytest.raises(ImageError, match=words):
                await decoder.prepare([refused], numbers)
        await is_well(decoder)

    run(scenario)


def test_an_image_that_is_refused_says_why():
    async def scenario(decoder):
        for image, words in (
            (b"text", "not a JPEG, PNG or TIFF: begins"),
            # JPEG 2000, which `read_image` reads elsewhere.
            (b"\0\0\0\x0cjP  \r\n\x87\n" + bytes(99), "not a JPEG, PNG or TIFF: begins"),
            (b"\xff\x4f\xff\x51" + bytes(99), "not a JPEG, PNG or TIFF: begins"),
            (GOOD[:-30], "truncated|damaged"),
            (png(50_000, 50_000), "50000 x 50000 pixels; at most 50,000,000"),
            (png(50_000, 50_000, depth=16), "50000 x 50000 pixels; at most 50,000,000"),
            (png(2**31 - 1, 2**31 - 1), "pixels; at most"),
        ):
            with pytest.raises(ImageError, match=words) as caught:
                await decoder.prepare([GOOD, image], PREPROCESSING)
            assert "\n" not in str(caught.value)
        await is_well(decoder)

    run(scenario)


def test_a_deflate_bomb_is_refused_by_its_declared_size():
    bomb = bomb_tiff(8_000)
    assert len(bomb) < 200_000, "of 192 MB"

    async def scenario(decoder):
        with pytest.raises(ImageError, match="8000 x 8000 pixels; at most"):
            await decoder.prepare([bomb], PREPROCESSING)
        await is_well(decoder)

    run(scenario)


def test_memory_has_a_limit():
    async def scenario(decoder):
        # 3 x 16 million pixels decode to 48 MB, and more in between.
        large = png(4000, 4000, rows=bytes(4000 * (1 + 3 * 4000)))
        for image in (large, bomb_tiff(4000), large, large):
            with pytest.raises(ImageError, match=r"memory|decoder") as caught:
                await decoder.prepare([image], PREPROCESSING)
            assert "\n" not in str(caught.value)
            # The memory of the earlier images is free again: 9 MB are read.
            with pytest.raises(ImageError, match="not a JPEG"):
                await decoder.prepare([bytes(9 * 2**20)], PREPROCESSING)
            await is_well(decoder)

    run(scenario, max_memory_bytes=32 * 2**20)


def test_the_limit_does_not_count_the_modules_that_a_fork_server_of_others_lacks():
    multiprocessing.forkserver._forkserver._stop()
    other = multiprocessing.get_context("forkserver").Process(target=print)
    other.start()
    other.join()
    test_memory_has_a_limit()


def test_the_limit_is_added_to_the_memory_of_a_new_process():
    async def scenario(decoder):
        await is_well(decoder)
        (pid,) = pids(decoder)
        limits = Path(f"/proc/{pid}/limits").read_text()
        (line,) = (line for line in limits.splitlines() if line.startswith("Max address space"))
        assert int(line.split()[3]) > 2**30

    run(scenario, max_memory_bytes=2**30)


def stuck(image, preprocessing, with_thumbnail):
    if image == b"stuck":
        # Like a hanging decoder in native code: Python's signal handlers do not run.
        hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
    if image == b"dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if image == b"crashes":
        os.abort()
    return decoding_decode(image, preprocessing, with_thumbnail)


decoding_decode = decoding._decode


def test_time_has_a_limit(monkeypatch):
    monkeypatch.setattr(decoding, "_decode", stuck)

    async def scenario(decoder):
        await is_well(decoder)
        running_pool, is_scheduled = decoder._running_pool, asyncio.Event()

        async def observed():
            pool = await running_pool()
            is_scheduled.set()
            return pool

        monkeypatch.setattr(decoder, "_running_pool", observed)
        decoder.timeout_s = 0.5
        stuck_image = asyncio.create_task(decoder.prepare([b"stuck"], PREPROCESSING))
        # From here on the short limit applies to this image alone; the others have time on every machine.
        await is_scheduled.wait()
        decoder.timeout_s = 60
        await asyncio.gather(is_well(decoder), is_well(decoder))
        with pytest.raises(ImageError, match=r"decoding took more than .* s; send a smaller image"):
            await stuck_image
        await is_well(decoder)

    run(scenario, timeout_s=60)


@pytest.mark.parametrize("image", [b"dies", b"crashes"])
def test_a_process_that_dies_takes_one_image_with_it(monkeypatch, image):
    monkeypatch.setattr(decoding, "_decode", stuck)

    async def scenario(decoder):
        for _ in range(3):
            outcomes = await asyncio.gather(
                decoder.prepare([image], PREPROCESSING), is_well(decoder), is_well(decoder), return_exceptions=True
            )
            assert isinstance(outcomes[0], ImageError), outcomes
            assert "crashed on this image" in str(outcomes[0])
            assert outcomes[1:] == [None, None]

    run(scenario, num_workers=2)


def test_processes_that_die_idle_are_replaced():
    async def scenario(decoder):
        for _ in range(2):
            await is_well(decoder)
            for pid in pids(decoder):
                os.kill(pid, signal.SIGKILL)
            # Before pebble notices, and afterwards.
            await is_well(decoder)
            killed = pids(decoder)
            for pid in killed:
                os.kill(pid, signal.SIGKILL)
            while decoder._pool.active and set(killed) & set(pids(decoder)):
                await asyncio.sleep(0.01)
            await is_well(decoder)

    run(scenario, num_workers=2)


@pytest.mark.timeout(120)
def test_a_cancelled_call_frees_its_process(monkeypatch):
    monkeypatch.setattr(decoding, "_decode", stuck)

    async def scenario(decoder):
        await is_well(decoder)
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.3):
                await decoder.prepare([b"stuck"], PREPROCESSING)
        # The only process would be busy for longer than this test may take.
        await is_well(decoder)

    run(scenario, timeout_s=600)


@pytest.mark.parametrize("limits", [{"max_waiting": 4}, {"max_waiting_bytes": 4 * len(GOOD)}], ids=["images", "bytes"])
def test_waiting_images_are_limited_in_number_and_in_bytes(limits):
    async def scenario(decoder):
        with pytest.raises(Overloaded, match="0 images of 0 bytes wait"):
            await decoder.prepare([GOOD] * 5, PREPROCESSING)
        # What has been decoded waits no longer, and refused images neither.
        for _ in range(2):
            assert len(await decoder.prepare([GOOD] * 4, PREPROCESSING)) == 4
            with pytest.raises(ImageError):
                await decoder.prepare([b"text"], PREPROCESSING)

    run(scenario, **limits)


def test_a_long_list_does_not_hold_up_one_image():
    async def scenario(decoder):
        await is_well(decoder)
        rows = asyncio.create_task(decoder.prepare_rows([GOOD] * 300, PREPROCESSING))
        # The list has begun: it waits in front of this image.
        await asyncio.sleep(0)
        await is_well(decoder)
        assert not rows.done()
        assert len((await rows)[0]) == 300

    run(scenario)


@pytest.fixture
def other_file(tmp_path):
    path = tmp_path / "other.tif"
    path.write_bytes(geotiff(picture()))
    return path


def test_other_formats_and_names_of_other_files(other_file):
    async def scenario(decoder):
        for name, data in no_images(other_file).items():
            with pytest.raises(ImageError, match="not a JPEG, PNG or TIFF") as caught:
                await decoder.prepare([data], PREPROCESSING)
            # The message may quote the first bytes of the file.
            assert "\n" not in str(caught.value), name
            assert len(str(caught.value)) < 200, name

    run(scenario)


def strip(values):
    return {
        256: (4, [32]),
        257: (4, [32]),
        258: (3, [8]),
        259: (3, [1]),
        262: (3, [1]),
        277: (3, [1]),
        278: (4, [32]),
        **values,
    }


def test_a_tiff_that_points_elsewhere(other_file, tmp_path):
    """TIFF tags that could lead GDAL or libtiff to other files or beyond the end of the data are harmless."""
    beside = str(other_file).encode() + b"\0"
    pixels = bytes(range(256)) * 4
    good = strip({273: (4, [8]), 279: (4, [1024])})
    # GDAL's own XML in a tag: a mask, an overview and a band of another file.
    xml = (
        f'<GDALMetadata><Item name="OVERVIEW_FILE" domain="OVERVIEWS">{other_file}</Item>'
        f'<Item name="SOURCE" sample="0">{other_file}</Item></GDALMetadata>\0'
    ).encode()

    async def scenario(decoder):
        plain = await decoder.prepare([tiff(good, pixels)], PREPROCESSING)
        for tag in (270, 285, 305, 42112):
            data = tiff({**good, tag: (2, list(xml if tag == 42112 else beside))}, pixels)
            assert (await decoder.prepare([data], PREPROCESSING) == plain).all(), tag
        for values in (
            {273: (4, [2**31]), 279: (4, [1024])},
            {273: (4, [8]), 279: (4, [2**32 - 1])},
            {273: (4, [8]), 279: (4, [1024]), 330: (4, [8])},
            {273: (2, list(beside)), 279: (4, [1024])},
        ):
            data = tiff(strip(values), pixels)
            (outcome,) = await asyncio.gather(decoder.prepare([data], PREPROCESSING), return_exceptions=True)
            if isinstance(outcome, ImageError):
                assert not re.search(rf"{tmp_path}|vsimem|0x|\n", str(outcome)), outcome
            else:
                assert outcome.shape == (1, 32, 32, 3)
        await is_well(decoder)

    run(scenario)


def test_a_started_decoder_has_its_processes_before_the_first_image():
    async def scenario(decoder):
        await decoder.start()
        started = pids(decoder)
        assert len(started) == 1
        await is_well(decoder)
        assert pids(decoder) == started

    run(scenario)
