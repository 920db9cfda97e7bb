"""Processes of `serve` beside the first gateway: further gateways, and the page."""

import asyncio
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing.context import SpawnProcess

from orbithash.encoders.errors import InputError

__all__ = ["Processes", "ends_with_parent", "on_cluster"]

logger = logging.getLogger(__name__)

# Seconds before a process that has ended is started again: doubled when it ends again within a minute.
_RESTART_S, _MAX_RESTART_S, _STABLE_S = 1.0, 60.0, 60.0

# Seconds for a process to end by itself after SIGTERM.
_STOP_S = 20.0
# Seconds from the end of its files to the end of a process.
_END_S = 5.0


class Processes:
    """Processes that are started again when they end. Belongs to one event loop."""

    def __init__(self, works: Mapping[str, Callable[[], None]]) -> None:
        """`works`: by name, the function that each process runs; it is sent to the process."""
        self._processes: dict[str, SpawnProcess] = {}
        self._tasks = [asyncio.create_task(self._keep(name, work)) for name, work in works.items()]

    async def stop(self) -> None:
        """End all processes: they finish the calls in flight, at most for some seconds."""
        for task in self._tasks:
            task.cancel()
        processes = list(self._processes.items())
        for _, process in processes:
            process.terminate()
        await asyncio.gather(*(_ended(process, _STOP_S) for _, process in processes))
        for name, process in processes:
            if process.is_alive():
                logger.warning("%s (process %d) did not end within %g s and is killed", name, process.pid, _STOP_S)
                process.kill()

    async def _keep(self, name: str, work: Callable[[], None]) -> None:
        delay_s = _RESTART_S
        # A new interpreter: this one has threads, which a fork would not copy.
        context = multiprocessing.get_context("spawn")
        while True:
            started = time.monotonic()
            process = self._processes[name] = context.Process(target=_run, args=(work,))
            process.start()
            await _ended(process)
            delay_s = _RESTART_S if time.monotonic() - started > _STABLE_S else min(2 * delay_s, _MAX_RESTART_S)
            logger.warning(
                "%s (process %d) ended with exit code %s; it is started again in %g s",
                *(name, process.pid, process.exitcode, delay_s),
            )
            await asyncio.sleep(delay_s)


def on_cluster(work: Callable[[], None]) -> Callable[[], None]:
    """Return a function that does the work in another process, on the Ray cluster of this one."""
    import ray

    return partial(_on_cluster, str(ray.get_runtime_context().gcs_address), work)


def _on_cluster(ray_address: str, work: Callable[[], None]) -> None:
    os.environ["RAY_ADDRESS"] = ray_address
    # The first gateway shows the output of actors, if anyone does.
    os.environ["RAY_LOG_TO_DRIVER"] = "0"
    work()


def _run(work: Callable[[], None]) -> None:
    """Do the work in this process."""
    try:
        work()
    except InputError as error:
        logger.error("%s", error)
        sys.exit(2)


async def _ended(process: SpawnProcess, timeout_s: float | None = None) -> None:
    """Return when the process has ended, or after `timeout_s`."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    loop.add_reader(process.sentinel, ended.set)
    try:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await ended.wait()
    finally:
        loop.remove_reader(process.sentinel)
    # The sentinel closes a moment before the process has ended.
    await asyncio.to_thread(process.join, _END_S if ended.is_set() else 0)


@contextmanager
def ends_with_parent(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` during the block if the process that has started this one by `Processes` ends."""
    parent = multiprocessing.parent_process()
    if parent is None:
        yield
        return
    loop = asyncio.get_running_loop()

    def gone() -> None:
        loop.remove_reader(parent.sentinel)
        stop()

    loop.add_reader(parent.sentinel, gone)
    try:
        yield
    finally:
        loop.remove_reader(parent.sentinel)
