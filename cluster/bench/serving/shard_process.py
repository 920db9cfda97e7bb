"""One shard in a process of its own, so that its memory can be measured."""

import ctypes
import gc
import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from orbithash.cluster.bench.serving.processes import ResidentBytes, resident_bytes
from orbithash.encoders.codes import Codes
from orbithash.search.index.answers import Ids, Scope
from orbithash.search.index.row_index import warm_up
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.host import HostStatus, ShardHost
from orbithash.search.segments.stop import Stop

__all__ = ["ShardProcess", "ShardSize"]

_TIMEOUT_S = 600.0

# The shard of this process; `_open` sets it.
_host: ShardHost


class ShardSize(NamedTuple):
    """What a shard reports, and the resident memory of its process."""

    status: HostStatus
    memory: ResidentBytes


class ShardProcess:
    """A process with one shard that has all rows of an archive."""

    def __init__(self, location: str, bits: int, num_rows: int, folder: Path) -> None:
        """Start the process and compile; nothing is read before `follow`. Segments are kept in `folder`."""
        self._pool = ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))
        self.compile_s, self.before = self._pool.submit(_open, location, bits, num_rows, folder).result()

    def follow(self, version: int) -> float:
        """Hold a version; return the seconds that this took."""
        return self._pool.submit(_follow, version).result(_TIMEOUT_S)

    def search(self, version: int, queries: Codes, k: int) -> tuple[Ids, float]:
        """Return ids uint64 [Q, k] of the nearest rows, and the seconds."""
        return self._pool.submit(_search, version, queries, k).result(_TIMEOUT_S)

    def count(self, version: int, filter_text: str) -> tuple[int, float]:
        """Return the number of rows that pass a filter, and the seconds."""
        return self._pool.submit(_count, version, filter_text).result(_TIMEOUT_S)

    def size(self) -> ShardSize:
        """Return what the shard and its process take."""
        return self._pool.submit(_size).result(_TIMEOUT_S)

    def close(self) -> None:
        """Close the shard, which writes its files, and end the process."""
        try:
            self._pool.submit(_close).result(_TIMEOUT_S)
        finally:
            self._pool.shutdown()


def _open(location: str, bits: int, num_rows: int, folder: Path) -> tuple[float, ResidentBytes]:
    """Make the shard; return the seconds of compiling, and the resident memory before it reads anything."""
    global _host
    # Imported by the first use otherwise, which would count as memory and time of the rows.
    import lance  # noqa: F401

    seconds = warm_up(bits)
    _host = ShardHost(location, bits, Deal.of(num_rows, 1), 0, folder=folder)
    return seconds, _resident()


def _follow(version: int) -> float:
    begun = time.perf_counter()
    _host.follow(version)
    return time.perf_counter() - begun


def _search(version: int, queries: Codes, k: int) -> tuple[Ids, float]:
    begun = time.perf_counter()
    answer = _host.search(version, queries, k, Scope(), Stop(_TIMEOUT_S))
    return np.asarray(answer.ids), time.perf_counter() - begun


def _count(version: int, filter_text: str) -> tuple[int, float]:
    begun = time.perf_counter()
    return _host.count(version, filter_text, Stop(_TIMEOUT_S)), time.perf_counter() - begun


def _size() -> ShardSize:
    return ShardSize(_host.status(), _resident())


def _resident() -> ResidentBytes:
    """Return the resident memory of this process without memory that is free but not returned to the system."""
    gc.collect()
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    return resident_bytes()


def _close() -> Any:
    _host.close()
