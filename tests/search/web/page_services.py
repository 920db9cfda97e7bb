"""The processes behind a page: a gateway that may be stopped, the web service, the browser's options."""

import asyncio
import os
import re
import signal
import subprocess
import sys
import threading

from orbithash.cluster.serving.serve import serving
from orbithash.cluster.serving.settings import ServeSettings

CHROMIUM_FLAGS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


class GatewayThread:
    """A gateway in a thread, at one address; it may be stopped and started again."""

    def __init__(self, world, **settings):
        self.address = "127.0.0.1:0"
        self._settings = lambda: ServeSettings(
            str(world.archive), world.model, self.address, num_shards=2, is_local=True, **settings
        )
        self._thread = None

    def start(self):
        """Start it and return when it answers."""
        ready = threading.Event()

        async def serve():
            self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
            async with serving(self._settings()) as running:
                self.address = running.gateway.address
                ready.set()
                await self._stop.wait()

        self._thread = threading.Thread(target=asyncio.run, args=(serve(),))
        self._thread.start()
        assert ready.wait(120), "the gateway did not start"

    def stop(self):
        """Stop it and return when the address is free."""
        if self._thread is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join()
            self._thread = None


class WebProcess:
    """`orbithash web` in a process of its own, with the `url` of its first page."""

    def __init__(self, gateway_address, *options):
        program = "from orbithash.cluster.cli.main import main; main()"
        self.process = subprocess.Popen(
            [sys.executable, "-c", program, "web", "--gateway", gateway_address, "--listen", "127.0.0.1:0", *options],
            stderr=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            env=os.environ,
            text=True,
        )
        lines = []
        for line in self.process.stderr:
            lines.append(line)
            if found := re.search(r"https?://\S+:\d+", line):
                self.url = found[0]
                return
        raise AssertionError(f"the web service did not start: {lines}")

    def stop(self):
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.communicate(timeout=30)
        finally:
            self.process.kill()
