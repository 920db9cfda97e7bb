"""`bench soak`: a gateway under load for many minutes while rows change and replicas are killed.

It counts errors by kind and fits the growth of memory.
"""

import asyncio
import os
import re
import signal
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.codes import CodeSource
from orbithash.cluster.bench.report import environment
from orbithash.cluster.bench.serving.processes import resident_mb, shard_pids
from orbithash.cluster.bench.serving.services import ServedArchive, start_gateway
from orbithash.cluster.output import say, track
from orbithash.encoders.codes import Codes, check_bits
from orbithash.encoders.errors import InputError
from orbithash.search.client.async_client import AsyncClient
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row

__all__ = ["SoakBench", "bench_soak"]

_K = 10
_SAMPLE_S = 1.0
_ROWS_PER_CHANGE = 20
# Above this number of added rows the oldest are deleted, so that the archive keeps its size.
_MAX_ADDED_ROWS = 2000
_NUM_QUERIES = 4096
# Number of errors of the gateway's log that are printed.
_NUM_SHOWN = 5
_MAX_SLOPE_MB = 10

_FILTERS = ("", "", "", "label = 'harbor'", "lon > 0 AND label IN ('beach', 'river')", "key LIKE 'soak/%'")


@dataclass(frozen=True)
class SoakBench:
    """Settings of `bench soak`.

    Attributes:
        rows, bits: number and length of generated codes.
        source: where the codes come from.
        shards, replicas: number of shards, and of replicas of each.
        in_flight: maximum number of concurrent searches.
        minutes: duration.
        local: all shards in the gateway's process instead of Ray actors.
        kill_every_s: seconds between two kills of a replica; 0: none is killed.
    """

    rows: int = 100_000
    bits: int = 64
    source: CodeSource = field(default_factory=CodeSource)
    shards: int = 2
    replicas: int = 1
    in_flight: int = 16
    minutes: float = 15.0
    local: bool = False
    kill_every_s: float = 0.0

    def check(self) -> None:
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        self.source.check()
        # The comparison is also false for NaN.
        if not 0.05 <= self.minutes <= 24 * 60:
            raise InputError(f"--minutes is {self.minutes:g}; from 0.05 to {24 * 60} are allowed")
        if not (self.kill_every_s == 0 or 1 <= self.kill_every_s <= 3600):
            raise InputError(f"--kill-every is {self.kill_every_s:g}; 0 or from 1 to 3600 seconds are allowed")
        if self.kill_every_s and self.local:
            raise InputError("got --kill-every and --local; only replicas in processes of their own can be killed")


def bench_soak(settings: SoakBench) -> dict[str, Any]:
    """Measure errors by kind, rates, and the slope of the resident memory of all processes of the gateway.

    The load is the maximum that the gateway answers: `in_flight` searches at a time, half of them filtered, and one
    change after the other. The slope is that of a line fitted to the samples of the second half, in MiB per hour; a
    replica that is killed starts anew, which is part of it.
    """
    settings.check()
    rng = np.random.default_rng(0)
    drawn = settings.source.draw(settings.rows, settings.bits, _NUM_QUERIES, rng)
    with TemporaryDirectory() as temporary:
        archive = ServedArchive.write(Path(temporary), drawn.codes, drawn.bits)
        with start_gateway(archive, settings.shards, settings.local, settings.replicas) as gateway:
            load = _Load(gateway.address, drawn.queries, gateway.pid)
            asyncio.run(load.run(settings.in_flight, 60 * settings.minutes, settings.kill_every_s))
            errors = _logged_errors(gateway.log)
    for error in errors[:_NUM_SHOWN]:
        say(error)
    memory = [sum(by_process.values()) for _, by_process in load.samples]
    slopes = _slopes(load.samples[len(load.samples) // 2 :])
    return {
        **environment("soak", "orbithash", "grpcio", "ray"),
        "rows": len(archive.codes),
        "codes": drawn.kind,
        "shards": f"{settings.shards} {'in one process' if settings.local else 'Ray actors'}",
        "replicas": settings.replicas,
        "minutes": settings.minutes,
        "searches": load.num_searches,
        "searches_per_s": load.num_searches / (60 * settings.minutes),
        "rows_written_or_removed": load.num_changed,
        "kills": load.num_kills,
        "partial_answers": load.num_partial,
        "shed": sum(load.errors.pop(f"{what}: Overloaded", 0) for what in ("search", "change")),
        "errors": dict(load.errors) or "none",
        "errors_in_log": len(errors),
        "memory_mb_begin": memory[0],
        "memory_mb_half": memory[len(memory) // 2],
        "memory_mb_end": memory[-1],
        "memory_slope_mb_per_hour": sum(slopes.values()),
        "memory_slope_target": f"at most {_MAX_SLOPE_MB}",
        **{f"memory_slope_mb_per_hour_{name}": slope for name, slope in slopes.items()},
    }


class _Load:
    """The load on one gateway, and its counts: answers, changed rows, kills, errors by kind, samples of memory.

    An answer with a coverage below 1 counts as partial, not as an error.
    """

    def __init__(self, address: str, queries: Codes, pid: int) -> None:
        self.num_searches = self.num_partial = self.num_changed = self.num_kills = 0
        self.errors: Counter[str] = Counter()
        # Seconds since the beginning, and MiB by kind of process.
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._address = address
        self._queries = queries
        self._pid = pid
        self._end = 0.0

    async def run(self, in_flight: int, seconds: float, kill_every_s: float) -> None:
        """Search and change rows for a number of seconds; kill a replica each `kill_every_s` seconds unless it is 0."""
        begun = time.monotonic()
        self._end = begun + seconds
        async with AsyncClient(self._address, 60.0) as client:
            searches = [asyncio.create_task(self._search(client, number)) for number in range(in_flight)]
            others = [asyncio.create_task(self._change(client))]
            if kill_every_s:
                others.append(asyncio.create_task(self._kill(kill_every_s)))
            with track("load", int(seconds), "s") as advance_to:
                while (now := time.monotonic()) < self._end:
                    self.samples.append((now - begun, resident_mb(self._pid)))
                    total = sum(self.samples[-1][1].values())
                    advance_to(int(now - begun), f"{self.num_searches} searches, {total:.0f} MiB")
                    await asyncio.sleep(_SAMPLE_S)
            await asyncio.gather(*searches, *others)

    async def _search(self, client: AsyncClient, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while time.monotonic() < self._end:
            code = self._queries[rng.integers(len(self._queries))].tobytes()
            query = Query(code=code, k=_K, filter=_FILTERS[rng.integers(len(_FILTERS))])
            try:
                answer = await client.search(query)
                self.num_searches += 1
                self.num_partial += answer.coverage.fraction < 1
            except Exception as error:
                self.errors[f"search: {type(error).__name__}"] += 1

    async def _change(self, client: AsyncClient) -> None:
        rng = np.random.default_rng(0)
        added: list[str] = []
        number = 0
        while time.monotonic() < self._end:
            codes = rng.choice(self._queries, _ROWS_PER_CHANGE)
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

    async def _kill(self, every_s: float) -> None:
        """Kill the shard actors in turn, one each `every_s` seconds."""
        while (wait_s := min(every_s, self._end - time.monotonic())) > 0:
            await asyncio.sleep(wait_s)
            pids = shard_pids(self._pid)
            if time.monotonic() < self._end and pids:
                with suppress(ProcessLookupError):
                    # An actor that restarts has a new and higher number, so the lowest one is the oldest process.
                    os.kill(pids[0], signal.SIGKILL)
                    self.num_kills += 1


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
