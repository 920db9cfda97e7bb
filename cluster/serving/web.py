"""The web service in a process: `orbithash web`."""

import asyncio
import signal

from orbithash.cluster.output import say
from orbithash.search.logs import Format, is_json, log_to_stderr
from orbithash.search.web.settings import WebSettings

__all__ = ["run"]


def run(settings: WebSettings, log_format: Format) -> None:
    """Serve until SIGTERM or SIGINT. Raises `InputError` for invalid settings and a port that is in use."""
    from orbithash.search.web.server import listening, run_web, url_of

    settings.check()
    with log_to_stderr(log_format), listening(settings.listen) as listener:

        def ready() -> None:
            if not is_json():
                say(f"page at {url_of(settings, listener)}; stop with Ctrl-C")

        async def until_signal() -> None:
            stop = asyncio.Event()
            for number in (signal.SIGTERM, signal.SIGINT):
                asyncio.get_running_loop().add_signal_handler(number, stop.set)
            await run_web(settings, listener, ready, stop)

        asyncio.run(until_signal())
