"""Further gateways of `serve --gateways`: processes that listen at the same port and share the shards of the first."""

import asyncio
import logging
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.context import SpawnProcess

from orbithash.encoders.errors import InputError

__all__ = ["FurtherGateways", "ends_with_parent"]

logger = logging.getLogger(__name__)

# Seconds before a gateway that has ended is started again: doubled when it ends again within a minute.
_RESTART_S, _MAX_RESTART_S, _STABLE_S = 1.0, 60.0, 60.0

# Seconds for a gateway to end by itself after SIGTERM.
_STOP_S = 20.0
# Seconds from the end of its files to the end of a process.
_END_S = 5.0


class FurtherGateways:
    """Processes of further gateways; one that ends is started again. Belongs to one event loop."""

    def __init__(self, run: Callable[[int], Callable[[], None]], number: int) -> None:
        """`run(n)` returns the function, which is sent to another process, of gateway n from 1 to `number`."""
        self._processes: dict[int, SpawnProcess] = {}
        self._tasks = [asyncio.create_task(self._keep(n, run(n))) for n in range(1, number + 1)]

    async def stop(self) -> None:
        """End all processes: they finish the calls in flight, at most for some seconds."""
        for task in self._tasks:
            task.cancel()
        processes = list(self._processes.values())
        for process in processes:
            process.terminate()
        await asyncio.gather(*(_ended(process, _STOP_S) for process in processes))
        for process in processes:
            if process.is_alive():
                logger.warning("gateway process %d did not end within %g s and is killed", process.pid, _STOP_S)
                process.kill()

    async def _keep(self, number: int, run: Callable[[], None]) -> None:
        delay_s = _RESTART_S
        # A new interpreter: this one has threads, which a fork would not copy.
        context = multiprocessing.get_context("spawn")
        while True:
            started = time.monotonic()
            process = self._processes[number] = context.Process(target=_run, args=(run, _ray_address()))
            process.start()
            await _ended(process)
            delay_s = _RESTART_S if time.monotonic() - started > _STABLE_S else min(2 * delay_s, _MAX_RESTART_S)
            logger.warning(
                "gateway %d (process %d) ended with exit code %s; it is started again in %g s",
                *(number + 1, process.pid, process.exitcode, delay_s),
            )
            await asyncio.sleep(delay_s)


def _ray_address() -> str:
    """Return the address of the Ray cluster of this process."""
    import ray

    return str(ray.get_runtime_context().gcs_address)


def _run(run: Callable[[], None], ray_address: str) -> None:
    """Run a gateway in this process, on the same Ray cluster as the first one."""
    os.environ["RAY_ADDRESS"] = ray_address
    # The first gateway shows the output of actors, if anyone does.
    os.environ["RAY_LOG_TO_DRIVER"] = "0"
    try:
        run()
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
    """Call `stop` during the block if the process that has started this one by `FurtherGateways` ends."""
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
