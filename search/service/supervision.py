"""Work that is repeated until the service ends, whatever errors it meets."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

__all__ = ["repeat"]

logger = logging.getLogger(__name__)

# Minimum seconds between an error and the next attempt.
_MIN_DELAY_S = 0.1


async def repeat(
    what: str,
    work: Callable[[], Awaitable[None]],
    every_s: float,
    max_every_s: float,
    fatal: tuple[type[Exception], ...] = (),
) -> None:
    """Await `work()` every `every_s` seconds until the current task is cancelled, or an error is one of `fatal`.

    Another error is logged; then the delay doubles, from at least 0.1 s, up to `max_every_s`.
    """
    delay_s = every_s
    while True:
        await asyncio.sleep(delay_s)
        try:
            await work()
            delay_s = every_s
        except fatal:
            raise
        except (KeyboardInterrupt, SystemExit, GeneratorExit):
            raise
        except BaseException as error:
            # A panic of native code is not an `Exception`. A CancelledError may come from a shut down executor.
            task = asyncio.current_task()
            if isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling():
                raise
            delay_s = min(max(2 * delay_s, _MIN_DELAY_S), max_every_s)
            logger.warning("%s failed (next attempt in %g s): %r", what, delay_s, error)
