"""Strangers' images are decoded in processes of their own, which have a limit of memory and of time for each.

What breaks one of these processes is refused as an image and changes nothing for the others. The processes import no
torch, and know neither the archive nor any secret beyond what they inherit.
"""

import asyncio
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pebble

from orbithash.encoders.errors import ImageError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.search.protocol.errors import Overloaded

__all__ = ["Decoder", "Pixels"]

logger = logging.getLogger(__name__)

Pixels = npt.NDArray[np.uint8]

# Decoders leak and fragment memory; a process that begins anew is ready within a tenth of a second.
_MAX_TASKS = 1000
_MAX_START_S = 10.0

_OUT_OF_MEMORY = 77


class Decoder:
    """Makes encoded image files the network's input. Belongs to one event loop; starts with the first image, or before.

    Attributes:
        num_workers: processes, which is also how many images are decoded at a time.
        timeout_s: the time of one image.
        max_memory_bytes: what decoding one image may allocate.
        max_waiting: images that may wait for a process before more are refused as `Overloaded`.
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        max_memory_bytes: int = 2 * 2**30,
        max_waiting: int = 4096,
    ) -> None:
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.max_memory_bytes = max_memory_bytes
        self.max_waiting = max_waiting
        self._num_waiting = 0
        # Images wait here and not in the pool, where those of callers that went away would still be sent around.
        self._turns = asyncio.Semaphore(num_workers)
        self._pool: pebble.ProcessPool | None = None

    async def prepare(self, images: Sequence[bytes], preprocessing: Preprocessing) -> Pixels:
        """uint8 [N, crop, crop, C] of encoded image files; `ImageError` for the first that is refused."""
        decoded = await self._decode(images, preprocessing, with_thumbnail=False)
        return _stacked([pixels for pixels, _ in decoded], preprocessing)

    async def prepare_rows(self, images: Sequence[bytes], preprocessing: Preprocessing) -> tuple[Pixels, list[bytes]]:
        """As `prepare`, and the thumbnail of each."""
        decoded = await self._decode(images, preprocessing, with_thumbnail=True)
        return _stacked([pixels for pixels, _ in decoded], preprocessing), [thumbnail for _, thumbnail in decoded]

    async def start(self) -> None:
        """Starts the processes, so that the first image need not wait for them."""
        await asyncio.wrap_future((await self._running_pool()).schedule(_nothing))

    async def close(self) -> None:
        """Ends the processes, whatever they do."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(_stop, pool)

    async def _decode(
        self, images: Sequence[bytes], preprocessing: Preprocessing, with_thumbnail: bool
    ) -> list[tuple[Pixels, bytes]]:
        if self._num_waiting + len(images) > self.max_waiting:
            raise Overloaded(f"{self._num_waiting} images wait to be decoded; try again later", retry_after_s=1.0)
        decoded: list[tuple[Pixels, bytes]] = []
        self._num_waiting += len(images)
        try:
            # Few at a time, so that one image does not wait for all of a long list.
            for start in range(0, len(images), self.num_workers):
                part = images[start : start + self.num_workers]
                outcomes = await asyncio.gather(
                    *(self._decode_one(image, preprocessing, with_thumbnail) for image in part), return_exceptions=True
                )
                for outcome in outcomes:
                    if isinstance(outcome, BaseException):
                        raise outcome
                    decoded.append(outcome)
        finally:
            self._num_waiting -= len(images)
        return decoded

    async def _decode_one(
        self, image: bytes, preprocessing: Preprocessing, with_thumbnail: bool
    ) -> tuple[Pixels, bytes]:
        async with self._turns:
            try:
                return await self._run(image, preprocessing, with_thumbnail)
            except BrokenProcessPool:
                # A process that died while it had nothing to do takes pebble's pool with it, not this image's fault.
                return await self._run(image, preprocessing, with_thumbnail)

    async def _run(self, *args: Any) -> tuple[Pixels, bytes]:
        future = (await self._running_pool()).schedule(_decode, args, timeout=self.timeout_s)
        try:
            # pebble's time begins when a process takes the image; one that dies just then says nothing of it.
            async with asyncio.timeout(self.timeout_s + _MAX_START_S):
                decoded: tuple[Pixels, bytes] | ImageError = await asyncio.wrap_future(future)
        except BrokenProcessPool:
            raise
        except TimeoutError as error:
            raise ImageError(f"decoding took more than {self.timeout_s:g} s; send a smaller image") from error
        except pebble.ProcessExpired as error:
            if error.exitcode == _OUT_OF_MEMORY:
                raise ImageError(
                    f"decoding took more memory than {self.max_memory_bytes:,} bytes; send a smaller image"
                ) from error
            logger.warning("a process that decoded an image died (exit code %s)", error.exitcode)
            raise ImageError(
                f"decoding it ended the decoder, which may use {self.max_memory_bytes:,} bytes of memory; send a "
                "smaller image, written anew by another program"
            ) from error
        if isinstance(decoded, ImageError):
            raise decoded
        return decoded

    async def _running_pool(self) -> pebble.ProcessPool:
        pool = self._pool
        if pool is not None and pool.active:
            return pool
        if pool is not None:
            logger.warning("the decoding processes died and are started anew")
        started = self._pool = self._new_pool()
        # The question starts it, which takes a moment.
        await asyncio.to_thread(_is_active, started)
        if pool is not None:
            await asyncio.to_thread(_stop, pool)
        return started

    def _new_pool(self) -> pebble.ProcessPool:
        # Not forked from this process, which has threads. The server of forks has imported once what all need.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, "orbithash.encoders.imagery.records", "rasterio"])
        return pebble.ProcessPool(
            self.num_workers, _MAX_TASKS, initializer=_limit, initargs=[self.max_memory_bytes], context=context
        )


def _is_active(pool: pebble.ProcessPool) -> bool:
    return bool(pool.active)


def _stop(pool: pebble.ProcessPool) -> None:
    pool.stop()  # type: ignore[no-untyped-call]
    pool.join()


def _stacked(pixels: list[Pixels], preprocessing: Preprocessing) -> Pixels:
    side = preprocessing.crop
    return np.stack(pixels) if pixels else np.empty((0, side, side, preprocessing.channels), np.uint8)


def _limit(max_memory_bytes: int) -> None:
    """In each process, at its start."""
    # pebble's own handler waits for the interpreter, which a decoder does not return to.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # A picture of the process holds strangers' images.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _nothing() -> None:
    """In a process: shows that it is there."""


def _decode(image: bytes, preprocessing: Preprocessing, with_thumbnail: bool) -> tuple[Pixels, bytes] | ImageError:
    """In a process: the network's input of an encoded image, and its thumbnail, b"" where it is not wanted.

    A refusal is returned: an error that is raised keeps what was decoded in memory until the next image is there.
    """
    from orbithash.encoders.imagery.images import read_image
    from orbithash.encoders.imagery.records import make_thumbnail

    rendering = preprocessing.rendering
    try:
        pixels = read_image(image, rendering)
        thumbnail = make_thumbnail(rendering.picture(pixels)) if with_thumbnail else b""
        return preprocessing.prepare(pixels), thumbnail
    except ImageError as error:
        return ImageError(str(error))
    except MemoryError:
        # There may be too little left for the next image, too.
        os._exit(_OUT_OF_MEMORY)
