"""`bench soak`: a gateway under load for many minutes while rows are added and deleted; errors and growth of memory."""

import asyncio
import os
import re
import time
from collections import Counter, defaultdict
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.report import environment
from orbithash.cluster.bench.services import RandomArchive, start_gateway
from orbithash.cluster.output import say, track
from orbithash.encoders.codes import check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search.client.async_client import AsyncClient
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row

__all__ = ["bench_soak"]

_K = 10
_SAMPLE_S = 1.0
_ROWS_PER_CHANGE = 20
# Above this number of added rows the oldest are deleted, so that the archive keeps its size.
_MAX_ADDED_ROWS = 2000
# Number of errors of the gateway's log that are printed.
_NUM_SHOWN = 5

_FILTERS = ("", "", "", "label = 'harbor'", "lon > 0 AND label IN ('beach', 'river')", "key LIKE 'soak/%'")


def bench_soak(rows: int, bits: int, shards: int, in_flight: int, minutes: float, local: bool) -> dict[str, Any]:
    """Measure errors by kind, rates, and the slope of the resident memory of all processes of the gateway.

    The load is the maximum that the gateway answers: `in_flight` searches at a time, some of them filtered, and one
    change after the other. The slope is that of a line fitted to the samples of the second half, in MiB per hour.
    """
    check_bits(bits)
    if not 0.05 <= minutes <= 24 * 60:
        raise InputError(f"--minutes is {minutes:g}; from 0.05 to {24 * 60} are allowed")
    with TemporaryDirectory() as temporary:
        archive = RandomArchive.write(Path(temporary), rows, bits, np.random.default_rng(0))
        with start_gateway(archive, shards, local) as gateway:
            load = _Load(gateway.address, bits, gateway.pid)
            asyncio.run(load.run(in_flight, 60 * minutes))
            errors = _logged_errors(gateway.log)
    for error in errors[:_NUM_SHOWN]:
        say(error)
    memory = [sum(by_process.values()) for _, by_process in load.samples]
    slopes = _slopes(load.samples[len(load.samples) // 2 :])
    return {
        **environment("soak", "orbithash", "grpcio", "ray"),
        "rows": rows,
        "shards": f"{shards} {'in one process' if local else 'Ray actors'}",
        "minutes": minutes,
        "searches": load.num_searches,
        "searches_per_s": load.num_searches / (60 * minutes),
        "rows_written_or_removed": load.num_changed,
        "shed": sum(load.errors.pop(f"{what}: Overloaded", 0) for what in ("search", "change")),
        "errors": dict(load.errors) or "none",
        "errors_in_log": len(errors),
        "memory_mb_begin": memory[0],
        "memory_mb_half": memory[len(memory) // 2],
        "memory_mb_end": memory[-1],
        "memory_slope_mb_per_hour": sum(slopes.values()),
        **{f"memory_slope_mb_per_hour_{name}": slope for name, slope in slopes.items()},
    }


class _Load:
    """The load on one gateway, and its counts: searches, changed rows, errors by kind, samples of memory."""

    def __init__(self, address: str, bits: int, pid: int) -> None:
        self.num_searches = self.num_changed = 0
        self.errors: Counter[str] = Counter()
        # Seconds since the beginning, and MiB by kind of process.
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._address = address
        self._bits = bits
        self._pid = pid
        self._end = 0.0

    async def run(self, in_flight: int, seconds: float) -> None:
        """Search and change rows for a number of seconds."""
        begun = time.monotonic()
        self._end = begun + seconds
        async with AsyncClient(self._address, 60.0) as client:
            searches = [asyncio.create_task(self._search(client, number)) for number in range(in_flight)]
            changes = asyncio.create_task(self._change(client))
            with track("load", int(seconds), "s") as advance_to:
                while (now := time.monotonic()) < self._end:
                    self.samples.append((now - begun, _resident_mb(self._pid)))
                    total = sum(self.samples[-1][1].values())
                    advance_to(int(now - begun), f"{self.num_searches} searches, {total:.0f} MiB")
                    await asyncio.sleep(_SAMPLE_S)
            await asyncio.gather(*searches, changes)

    async def _search(self, client: AsyncClient, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while time.monotonic() < self._end:
            code = pack(rng.random((1, self._bits)) < 0.5)[0].tobytes()
            query = Query(code=code, k=_K, filter=_FILTERS[rng.integers(len(_FILTERS))])
            try:
                await client.search(query)
                self.num_searches += 1
            except Exception as error:
                self.errors[f"search: {type(error).__name__}"] += 1

    async def _change(self, client: AsyncClient) -> None:
        rng = np.random.default_rng(0)
        added: list[str] = []
        number = 0
        while time.monotonic() < self._end:
            codes = pack(rng.random((_ROWS_PER_CHANGE, self._bits)) < 0.5)
            keys = [f"soak/{number}/{row}" for row in range(_ROWS_PER_CHANGE)]
            number += 1
            try:
                await client.upsert([Row(key=key, code=code.tobytes()) for key, code in zip(keys, codes, strict=True)])
                added += keys
                if len(added) > _MAX_ADDED_ROWS:
                    await client.delete(added[:_ROWS_PER_CHANGE])
                    added = added[_ROWS_PER_CHANGE:]
                    self.num_changed += _ROWS_PER_CHANGE
                self.num_changed += _ROWS_PER_CHANGE
            except Exception as error:
                self.errors[f"change: {type(error).__name__}"] += 1


def _logged_errors(log: Path) -> list[str]:
    """Return the errors in the gateway's log, panics of native code included."""
    records = re.split(r"\n(?=\d{4}-\d\d-\d\dT)", log.read_text(errors="replace"))
    return [record.strip() for record in records if re.search(r"^\S+ ERROR |panicked at", record, re.MULTILINE)]


def _slopes(samples: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """Return MiB per hour by kind of process; empty with fewer than two samples."""
    if len(samples) < 2:
        return {}
    seconds = [second for second, _ in samples]
    names = sorted({name for _, by_process in samples for name in by_process})
    return {
        name: 3600 * float(np.polyfit(seconds, [by_process.get(name, 0.0) for _, by_process in samples], 1)[0])
        for name in names
    }


def _resident_mb(pid: int) -> dict[str, float]:
    """Return MiB of a process and its descendants by kind of process; shared pages count for each process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found = re.search(r"\nPPid:\t(\d+)", (entry / "status").read_text())
            children.setdefault(int(found[1]) if found else 0, []).append(int(entry.name))
    sizes: defaultdict[str, float] = defaultdict(float)
    for each in _family(pid, children):
        sizes["gateway" if each == pid else _kind(each)] += _size_mb(each)
    return dict(sizes)


def _family(pid: int, children: dict[int, list[int]]) -> Sequence[int]:
    return [pid, *(each for child in children.get(pid, []) for each in _family(child, children))]


def _kind(pid: int) -> str:
    """Return the class of a Ray actor, or "ray" for any other process."""
    with suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        if actor := re.match(r"ray::_?(\w+)", title):
            return actor[1].lower()
    return "ray"


def _size_mb(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0
