"""Work that is repeated until the service ends, whatever errors it meets."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

__all__ = ["repeat"]

logger = logging.getLogger(__name__)


async def repeat(
    what: str, work: Callable[[], Awaitable[None]], every_s: float, max_every_s: float, first_s: float | None = None
) -> None:
    """Await `work()` every `every_s` seconds until the current task is cancelled.

    An error is logged; then the delay doubles, up to `max_every_s`. The first call comes after `first_s` seconds, by
    default `every_s`.
    """
    delay_s = every_s
    await asyncio.sleep(every_s if first_s is None else first_s)
    while True:
        try:
            await work()
            delay_s = every_s
        except BaseException as error:
            # A panic of native code is not an `Exception`. A CancelledError may come from a shut down executor.
            task = asyncio.current_task()
            is_cancelled = isinstance(error, asyncio.CancelledError) and task is not None and task.cancelling() > 0
            if is_cancelled or isinstance(error, KeyboardInterrupt | SystemExit):
                raise
            delay_s = min(2 * delay_s, max_every_s)
            logger.warning("%s failed (next attempt in %g s): %r", what, delay_s, error)
        await asyncio.sleep(delay_s)
