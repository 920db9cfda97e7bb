"""Decoding of users' images in separate processes, with limits on memory and on the time of each image.

An image that breaks one of these processes is refused and does not affect the others. The processes do not import
torch. They have no access to the archive, and to no secrets except those that they inherit.
"""

import asyncio
import importlib
import logging
import multiprocessing
import os
import resource
import signal
from collections.abc import Callable, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import numpy as np
import pebble

from orbithash.encoders.errors import ImageError, InputError
from orbithash.encoders.imagery.preprocessing import Preprocessing
from orbithash.encoders.imagery.rendering import Image, Pixels, Rendering
from orbithash.encoders.sources.listings import Item
from orbithash.search.engine.protocols import Picture
from orbithash.search.protocol.errors import Overloaded

__all__ = ["Decoder", "Pixels"]

logger = logging.getLogger(__name__)

# Tasks after which a process is replaced: decoders leak and fragment memory.
_MAX_TASKS = 1000
_MAX_START_S = 10.0

# Fewer than `read_image` can read: every decoder that users can reach is one more to attack.
_FORMATS = ("JPEG", "PNG", "TIFF")

# Of the JPEG of a picture that people look at in full size.
_QUALITY = 90

# What decoding imports.
_READERS = ("orbithash.encoders.imagery.images", "orbithash.encoders.sources.records", "rasterio")

# Exit code of a process that reached its memory limit.
_OUT_OF_MEMORY = 77


class Decoder:
    """Turns encoded image files into the network's input. Belongs to one event loop.

    Attributes:
        num_workers: number of processes, and of images that are decoded at a time.
        timeout_s: time limit of one image, in seconds.
        max_memory_bytes: memory that decoding one image may allocate.
        max_waiting: number of images that may wait; more are refused as `Overloaded`.
        max_waiting_bytes: size of all files that may wait, in bytes.
    """

    def __init__(
        self,
        num_workers: int = 2,
        timeout_s: float = 10.0,
        max_memory_bytes: int = 2 * 2**30,
        max_waiting: int = 4096,
        max_waiting_bytes: int = 512 * 2**20,
    ) -> None:
        self.num_workers = num_workers
        self.timeout_s = timeout_s
        self.max_memory_bytes = max_memory_bytes
        self.max_waiting = max_waiting
        self.max_waiting_bytes = max_waiting_bytes
        self._num_waiting = self._num_waiting_bytes = 0
        # Images wait here and not in the pool, which would still decode those of callers that have gone.
        self._turns = asyncio.Semaphore(num_workers)
        self._pool: pebble.ProcessPool | None = None

    async def prepare(self, images: Sequence[bytes], preprocessing: Preprocessing) -> Pixels:
        """Return the prepared images [N, crop, crop, C] of encoded image files.

        Raises `ImageError` for the first image that is refused, and `Overloaded`.
        """
        decoded = await self._decode(images, preprocessing, with_thumbnail=False)
        return _stacked([pixels for pixels, _ in decoded], preprocessing)

    async def prepare_rows(self, images: Sequence[bytes], preprocessing: Preprocessing) -> tuple[Pixels, list[bytes]]:
        """Do the same as `prepare`, and return the thumbnail of each image too."""
        decoded = await self._decode(images, preprocessing, with_thumbnail=True)
        return _stacked([pixels for pixels, _ in decoded], preprocessing), [thumbnail for _, thumbnail in decoded]

    async def prepare_one(self, source: bytes | Item, preprocessing: Preprocessing) -> tuple[Pixels, int, int]:
        """Return the prepared image [crop, crop, C] of a file or an item, and its width and height before.

        Raises as `picture`.
        """
        prepared: tuple[Pixels, int, int]
        (prepared,) = await self._queued(_prepare_one, [source], preprocessing)
        return prepared

    async def start(self) -> None:
        """Start the processes, so that the first image does not wait for them."""
        await asyncio.wrap_future((await self._running_pool()).schedule(_nothing))

    async def close(self) -> None:
        """End the processes, also while they decode."""
        pool, self._pool = self._pool, None
        if pool is not None:
            await asyncio.to_thread(_stop, pool)

    async def picture(self, source: bytes | Item, rendering: Rendering, max_side: int) -> Picture:
        """Return a picture, with sides of at most `max_side` pixels, of an encoded image file or of an item.

        Raises `ImageError` for an image that is refused, `InputError` for an object store that does not answer, and
        `Overloaded`.
        """
        picture: Picture
        (picture,) = await self._queued(_picture, [source], rendering, max_side)
        return picture

    async def _decode(
        self, images: Sequence[bytes | Item], preprocessing: Preprocessing, with_thumbnail: bool
    ) -> list[tuple[Pixels, bytes]]:
        return await self._queued(_decode, images, preprocessing, with_thumbnail)

    async def _queued(self, task: Callable[..., Any], sources: Sequence[bytes | Item], *args: Any) -> list[Any]:
        """Return the results of `task(source, *args)` in a decoding process for each source."""
        num_bytes = sum(len(source) for source in sources if isinstance(source, bytes))
        if (
            self._num_waiting + len(sources) > self.max_waiting
            or self._num_waiting_bytes + num_bytes > self.max_waiting_bytes
        ):
            raise Overloaded(
                f"{self._num_waiting:,} images of {self._num_waiting_bytes:,} bytes wait to be decoded; try again "
                "later",
                retry_after_s=1.0,
            )
        results: list[Any] = []
        self._num_waiting += len(sources)
        self._num_waiting_bytes += num_bytes
        try:
            # A few at a time, so that a single image does not wait for all images of a long list.
            for start in range(0, len(sources), self.num_workers):
                part = sources[start : start + self.num_workers]
                outcomes = await asyncio.gather(
                    *(self._run_one(task, source, *args) for source in part), return_exceptions=True
                )
                for outcome in outcomes:
                    if isinstance(outcome, BaseException):
                        raise outcome
                    results.append(outcome)
        finally:
            self._num_waiting -= len(sources)
            self._num_waiting_bytes -= num_bytes
        return results

    async def _run_one(self, task: Callable[..., Any], *args: Any) -> Any:
        async with self._turns:
            try:
                return await self._run(task, args)
            except BrokenProcessPool:
                # If an idle process dies, pebble stops the whole pool; the image is not the cause.
                return await self._run(task, args)

    async def _run(self, task: Callable[..., Any], args: Sequence[Any]) -> Any:
        future = (await self._running_pool()).schedule(task, args, timeout=self.timeout_s)
        try:
            # pebble's time limit begins when a process takes the image, and is lost if the process dies just then.
            async with asyncio.timeout(self.timeout_s + _MAX_START_S):
                result = await asyncio.wrap_future(future)
        except BrokenProcessPool:
            raise
        except TimeoutError as error:
            raise ImageError(f"decoding took more than {self.timeout_s:g} s; send a smaller image") from error
        except pebble.ProcessExpired as error:
            if error.exitcode == _OUT_OF_MEMORY:
                raise ImageError(
                    f"decoding took more memory than {self.max_memory_bytes:,} bytes; send a smaller image"
                ) from error
            logger.warning("a decoding process died (exit code %s)", error.exitcode)
            raise ImageError(
                f"the decoder, which may use {self.max_memory_bytes:,} bytes of memory, crashed on this image; send a "
                "smaller image, or one written by another program"
            ) from error
        if isinstance(result, InputError):
            raise result
        return result

    async def _running_pool(self) -> pebble.ProcessPool:
        pool = self._pool
        if pool is not None and pool.active:
            return pool
        if pool is not None:
            logger.warning("the decoding processes died and are restarted")
        started = self._pool = self._new_pool()
        # Reading `active` starts the pool, which blocks for a moment.
        await asyncio.to_thread(_is_active, started)
        if pool is not None:
            await asyncio.to_thread(_stop, pool)
        return started

    def _new_pool(self) -> pebble.ProcessPool:
        # This process has threads and must not be forked. The fork server imports the modules once for all processes.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["__main__", __name__, *_READERS])
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
    return np.stack(pixels) if pixels else np.empty((0, side, side, preprocessing.channels), preprocessing.dtype)


def _limit(max_memory_bytes: int) -> None:
    """Set the limits of a decoding process, at its start."""
    # pebble's own handler needs the interpreter, which native decoding code holds.
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    # Before the limit counts. A fork server that something else has started did not import them.
    for name in _READERS:
        importlib.import_module(name)
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = num_pages * resource.getpagesize() + max_memory_bytes
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    # A core dump would contain users' images.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def _nothing() -> None:
    """Do nothing, in a decoding process; its return shows that the process has started."""


def _decode(source: bytes | Item, preprocessing: Preprocessing, with_thumbnail: bool) -> Any:
    """Return the network's input of an image and its thumbnail (b"" unless requested), in a decoding process."""
    from orbithash.encoders.sources.records import make_thumbnail

    rendering = preprocessing.rendering

    def prepare(pixels: Image) -> tuple[Pixels, bytes]:
        thumbnail = make_thumbnail(rendering.picture(pixels)) if with_thumbnail else b""
        return preprocessing.prepare(pixels), thumbnail

    return _read(source, rendering, prepare)


def _prepare_one(source: bytes | Item, preprocessing: Preprocessing) -> Any:
    """Return the network's input of an image, its width and its height, in a decoding process."""
    rendering = preprocessing.rendering
    return _read(source, rendering, lambda pixels: (preprocessing.prepare(pixels), pixels.shape[1], pixels.shape[0]))


def _picture(source: bytes | Item, rendering: Rendering, max_side: int) -> Any:
    """Return a `Picture` of an image, in a decoding process."""
    from orbithash.encoders.sources.records import encode_picture

    # An encoded file is a thumbnail, which is a picture already.
    shown = rendering if isinstance(source, Item) else Rendering()
    return _read(source, shown, lambda pixels: Picture(*encode_picture(shown.picture(pixels), max_side, _QUALITY)))


def _read(source: bytes | Item, rendering: Rendering, use: Callable[[Image], Any]) -> Any:
    """Return what `use` returns for the pixels of an image.

    An error is returned, not raised: a traceback would keep the decoded pixels in memory until the next image.
    """
    from orbithash.encoders.imagery.images import read_image
    from orbithash.encoders.sources.records import read_item

    try:
        if isinstance(source, Item):
            return use(read_item(source, rendering))
        return use(read_image(source, rendering, formats=_FORMATS))
    except InputError as error:
        return type(error)(str(error))
    except MemoryError:
        # The process may have too little memory left for the next image.
        os._exit(_OUT_OF_MEMORY)
