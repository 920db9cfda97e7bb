"""A gateway under load for many minutes while rows come and go: what fails, and whether memory grows."""

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

from orbithash.cluster.bench.serve import K, started, write_archive
from orbithash.cluster.output import say, track
from orbithash.encoders.codes import check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search.client.client import AsyncClient
from orbithash.search.protocol.queries import Query
from orbithash.search.protocol.rows import Row

__all__ = ["bench_soak"]

_SAMPLE_S = 1.0
_ROWS_A_CHANGE = 20
# Rows that were written are removed when there are so many of them, so that the archive stays of one size.
_MAX_EXTRA_ROWS = 2000
# Errors of the gateway's log that are printed.
_SHOWN = 5

_FILTERS = ("", "", "", "label = 'harbor'", "lon > 0 AND label IN ('beach', 'river')", "key LIKE 'soak/%'")


def bench_soak(rows: int, bits: int, shards: int, in_flight: int, minutes: float, local: bool) -> dict[str, Any]:
    """Errors by kind, rates, and the slope of the resident memory of all the gateway's processes.

    The load is as high as the gateway answers: `in_flight` searches at a time, some of them filtered, and one stream of
    changes after the other. The slope is that of a straight line through the samples of the second half, MiB an hour.
    """
    from orbithash.cluster.bench.throughput import circumstances, write_random_model
    from orbithash.encoders.networks.card import read_model_folder

    check_bits(bits)
    if not 0.05 <= minutes <= 24 * 60:
        raise InputError(f"--minutes is {minutes:g}; from 0.05 to {24 * 60} are allowed")
    rng = np.random.default_rng(0)
    with TemporaryDirectory() as temporary:
        root = Path(temporary)
        model = write_random_model(root / "model", bits)
        write_archive(root / "archive", pack(rng.random((rows, bits)) < 0.5), read_model_folder(model)[1])
        where = "local" if local else "ray"
        with started("gateway", root / "archive", model, str(shards), where) as child:
            load = _Load(child.address, bits, child.pid)
            asyncio.run(load.run(in_flight, 60 * minutes))
            failures = _failures(child.log)
    for failure in failures[:_SHOWN]:
        say(failure)
    memory = [sum(by_process.values()) for _, by_process in load.samples]
    slopes = _slopes(load.samples[len(load.samples) // 2 :])
    return {
        **circumstances("soak", "orbithash", "grpcio", "ray"),
        "rows": rows,
        "shards": f"{shards} {'in one process' if local else 'Ray actors'}",
        "minutes": minutes,
        "searches": load.num_searches,
        "searches_per_s": load.num_searches / (60 * minutes),
        "rows_written_or_removed": load.num_changed,
        "shed": sum(load.outcomes.pop(f"{what}: Overloaded", 0) for what in ("search", "change")),
        "errors": dict(load.outcomes) or "none",
        "errors_in_log": len(failures),
        "memory_mb_begin": memory[0],
        "memory_mb_half": memory[len(memory) // 2],
        "memory_mb_end": memory[-1],
        "memory_slope_mb_per_hour": sum(slopes.values()),
        **{f"memory_slope_mb_per_hour_{name}": slope for name, slope in slopes.items()},
    }


class _Load:
    """Everything that is asked of one gateway, and what came of it."""

    def __init__(self, address: str, bits: int, pid: int) -> None:
        self.num_searches = self.num_changed = 0
        self.outcomes: Counter[str] = Counter()
        # Seconds since the begin, MiB by kind of process.
        self.samples: list[tuple[float, dict[str, float]]] = []
        self._address = address
        self._bits = bits
        self._pid = pid
        self._end = 0.0

    async def run(self, in_flight: int, seconds: float) -> None:
        """Asks and changes for so long."""
        begun = time.monotonic()
        self._end = begun + seconds
        async with AsyncClient(self._address, 60.0) as client:
            asking = [asyncio.create_task(self._ask(client, number)) for number in range(in_flight)]
            changing = asyncio.create_task(self._change(client))
            with track("load", int(seconds), "s") as advance_to:
                while (now := time.monotonic()) < self._end:
                    self.samples.append((now - begun, _resident_mb(self._pid)))
                    total = sum(self.samples[-1][1].values())
                    advance_to(int(now - begun), f"{self.num_searches} searches, {total:.0f} MiB")
                    await asyncio.sleep(_SAMPLE_S)
            await asyncio.gather(*asking, changing)

    async def _ask(self, client: AsyncClient, seed: int) -> None:
        rng = np.random.default_rng(seed)
        while time.monotonic() < self._end:
            code = pack(rng.random((1, self._bits)) < 0.5)[0].tobytes()
            query = Query(code=code, k=K, filter=_FILTERS[rng.integers(len(_FILTERS))])
            try:
                await client.search(query)
                self.num_searches += 1
            except Exception as error:
                self.outcomes[f"search: {type(error).__name__}"] += 1

    async def _change(self, client: AsyncClient) -> None:
        rng = np.random.default_rng(0)
        keys: list[str] = []
        number = 0
        while time.monotonic() < self._end:
            codes = pack(rng.random((_ROWS_A_CHANGE, self._bits)) < 0.5)
            new = [f"soak/{number}/{row}" for row in range(_ROWS_A_CHANGE)]
            number += 1
            try:
                await client.upsert([Row(key=key, code=code.tobytes()) for key, code in zip(new, codes, strict=True)])
                keys += new
                if len(keys) > _MAX_EXTRA_ROWS:
                    await client.delete(keys[:_ROWS_A_CHANGE])
                    keys = keys[_ROWS_A_CHANGE:]
                    self.num_changed += _ROWS_A_CHANGE
                self.num_changed += _ROWS_A_CHANGE
            except Exception as error:
                self.outcomes[f"change: {type(error).__name__}"] += 1


def _failures(log: Path) -> list[str]:
    """What the gateway logged as errors, and what native code said on its way down."""
    records = re.split(r"\n(?=\d{4}-\d\d-\d\dT)", log.read_text(errors="replace"))
    return [record.strip() for record in records if re.search(r"^\S+ ERROR |panicked at", record, re.MULTILINE)]


def _slopes(samples: Sequence[tuple[float, dict[str, float]]]) -> dict[str, float]:
    """MiB an hour by kind of process, where there are samples enough for a line."""
    if len(samples) < 2:
        return {}
    seconds = [second for second, _ in samples]
    names = sorted({name for _, by_process in samples for name in by_process})
    return {
        name: 3600 * float(np.polyfit(seconds, [by_process.get(name, 0.0) for _, by_process in samples], 1)[0])
        for name in names
    }


def _resident_mb(pid: int) -> dict[str, float]:
    """MiB of a process and all below it, by their kinds; shared pages count once a process."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            found = re.search(r"\nPPid:\t(\d+)", (entry / "status").read_text())
            children.setdefault(int(found[1]) if found else 0, []).append(int(entry.name))
    sizes: defaultdict[str, float] = defaultdict(float)
    for each in _family(pid, children):
        sizes["gateway" if each == pid else _kind(each)] += _own_mb(each)
    return dict(sizes)


def _family(pid: int, children: dict[int, list[int]]) -> Sequence[int]:
    return [pid, *(each for child in children.get(pid, []) for each in _family(child, children))]


def _kind(pid: int) -> str:
    """Ray's actors by their class, what else Ray starts together."""
    with suppress(OSError):
        title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
        if actor := re.match(r"ray::_?(\w+)", title):
            return actor[1].lower()
    return "ray"


def _own_mb(pid: int) -> float:
    with suppress(OSError, ValueError, IndexError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0
