"""A gateway over a new archive, for tests of clients that block."""

import asyncio
import threading
from contextlib import contextmanager

import numpy as np
from search_parts import StubEncoder

from orbithash.encoders.archive.archive import Archive
from orbithash.search.engine.backend import LocalBackend
from orbithash.search.gateway.gateway import start_gateway
from orbithash.search.service.service import Target, open_service


async def encode(images):
    """Codes of two bytes: the length of the image file."""
    return np.array([[len(image) // 256 % 256, len(image) % 256] for image in images], np.uint8)


@contextmanager
def serving_archive(folder, limits=None, encode=encode, encoder=None, vector=None):
    """A gateway over a new archive of 16 bits, in an event loop in a thread; yields its address and its service.

    `encode` returns the codes of images; `encoder` is a whole `QueryEncoder` in its place.
    """

    async def start():
        Archive.open_or_create(folder, 16, "m" * 32, vector)

        async def open_backend(target):
            return LocalBackend(Archive.open(target.archive), encoder or StubEncoder(encode), target.num_shards)

        service = await open_service(open_backend, Target(str(folder), "", 2))
        return service, await start_gateway(service, "127.0.0.1:0", limits=limits)

    async def stop(service, gateway):
        await gateway.stop(0)
        await service.close()

    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        service, gateway = asyncio.run_coroutine_threadsafe(start(), loop).result(120)
        try:
            yield gateway.address, service, loop
        finally:
            asyncio.run_coroutine_threadsafe(stop(service, gateway), loop).result(120)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
