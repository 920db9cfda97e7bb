"""What `bench serve` measures: a service that answers orbithash's queries, and Milvus.

A target has its own client. Queries are `queries[first::step]`, at most `count` of them.
"""

import asyncio
import json
import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from orbithash.cluster.output import say
from orbithash.encoders.codes import Codes
from orbithash.encoders.errors import InputError
from orbithash.search.client.async_client import AsyncClient

__all__ = ["MilvusTarget", "ServiceTarget", "Target", "check_peer_python", "started_milvus"]

# Milvus takes 6 s to start and then some seconds for 10^6 codes.
_START_TIMEOUT_S, _CALL_TIMEOUT_S, _STOP_TIMEOUT_S = 600.0, 600.0, 15.0

_INSTALL = 'pip install "milvus==2.3.5" "pymilvus<2.5" "setuptools<80"'


class Target(Protocol):
    """A service and its client."""

    async def rate(self, first: int, step: int, count: int, in_flight: int) -> float:
        """Return queries per second with `in_flight` queries at a time."""

    async def latencies(self, first: int, step: int, count: int) -> list[float]:
        """Return the seconds of each query, sent one at a time."""

    async def rows(self, first: int, step: int, count: int) -> list[list[int]]:
        """Return ids of the nearest rows of each query, nearest first."""


class ServiceTarget:
    """A `SearchService`: the gateway or the empty service."""

    def __init__(self, client: AsyncClient, queries: Codes, k: int) -> None:
        self._client = client
        self._codes = [code.tobytes() for code in queries]
        self._k = k

    async def rate(self, first: int, step: int, count: int, in_flight: int) -> float:
        """See `Target`."""
        part = self._codes[first::step][:count]
        waiting = iter(part)

        async def send() -> None:
            for code in waiting:
                await self._client.search(code=code, k=self._k)

        begun = time.perf_counter()
        await asyncio.gather(*(send() for _ in range(in_flight)))
        return len(part) / (time.perf_counter() - begun)

    async def latencies(self, first: int, step: int, count: int) -> list[float]:
        """See `Target`."""
        seconds = []
        for code in self._codes[first::step][:count]:
            begun = time.perf_counter()
            await self._client.search(code=code, k=self._k)
            seconds.append(time.perf_counter() - begun)
        return seconds

    async def rows(self, first: int, step: int, count: int) -> list[list[int]]:
        """See `Target`."""
        answers = [await self._client.search(code=code, k=self._k) for code in self._codes[first::step][:count]]
        return [[hit.id for hit in answer.hits] for answer in answers]


class MilvusTarget:
    """Milvus, called by pymilvus in the process of `milvus_peer.py`."""

    def __init__(self, process: subprocess.Popen[str], version: str) -> None:
        self.version = version
        self._process = process

    async def rate(self, first: int, step: int, count: int, in_flight: int) -> float:
        """See `Target`."""
        return float(await self._call("rate", first=first, step=step, count=count, in_flight=in_flight))

    async def latencies(self, first: int, step: int, count: int) -> list[float]:
        """See `Target`."""
        return list(await self._call("latencies", first=first, step=step, count=count))

    async def rows(self, first: int, step: int, count: int) -> list[list[int]]:
        """See `Target`; the ids are row numbers. Milvus orders rows at the same distance as it likes."""
        return list(await self._call("rows", first=first, step=step, count=count))

    async def _call(self, name: str, **arguments: int) -> Any:
        assert self._process.stdin is not None, "stdin is a pipe"
        print(json.dumps({"call": name, **arguments}), file=self._process.stdin, flush=True)
        return await asyncio.to_thread(_reply, self._process, _CALL_TIMEOUT_S)


@contextmanager
def started_milvus(python: Path, folder: Path, codes: Codes, queries: Codes, k: int) -> Iterator[MilvusTarget]:
    """Run Milvus over the codes for as long as the block lasts, with its data in the empty folder `folder`.

    Raises:
        InputError: `python` cannot be run or lacks the packages.
    """
    check_peer_python(python)
    say("starting Milvus and inserting the codes")
    np.save(folder / "codes.npy", codes)
    np.save(folder / "queries.npy", queries)
    log = folder / "stderr"
    with log.open("wb") as stderr:
        process = subprocess.Popen(
            [python, "-I", Path(__file__).with_name("milvus_peer.py"), folder, str(k)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
            # Its server is in the same group of processes, which is killed as a whole if it does not stop.
            start_new_session=True,
        )
    try:
        try:
            version = _reply(process, _START_TIMEOUT_S)
        except RuntimeError as error:
            lines = log.read_text(errors="replace").splitlines() or ["no output"]
            raise RuntimeError(f"Milvus did not start: {lines[-1]}") from error
        yield MilvusTarget(process, version)
    finally:
        assert process.stdin is not None, "stdin is a pipe"
        with suppress(BrokenPipeError):
            process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            process.wait(_STOP_TIMEOUT_S)
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def check_peer_python(python: Path) -> None:
    """Raise `InputError` if Milvus cannot be imported by this Python."""
    try:
        found = subprocess.run(
            [python, "-I", "-c", "import milvus, pymilvus"], capture_output=True, text=True, timeout=120, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise InputError(
            f"--peer-python {python} cannot be run ({error}); give the Python of an environment"
        ) from error
    if found.returncode:
        reason = (found.stderr.splitlines() or ["no output"])[-1]
        raise InputError(f"--peer-python {python}: {reason}; in an environment of its own: {_INSTALL}")


def _reply(process: subprocess.Popen[str], timeout_s: float) -> Any:
    """Return the next reply; RuntimeError if the process ended or does not answer in time."""
    import select

    assert process.stdout is not None, "stdout is a pipe"
    ready, _, _ = select.select([process.stdout], [], [], timeout_s)
    # One reply at a time, so nothing of the next one is in the buffer.
    line = process.stdout.readline() if ready else ""
    if not line:
        raise RuntimeError(f"Milvus's client {'ended' if ready else f'did not answer within {timeout_s:.0f} s'}")
    return json.loads(line)
