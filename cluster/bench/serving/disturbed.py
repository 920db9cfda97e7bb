"""Queries to a gateway while another program appends rows and while new filters are evaluated."""

import asyncio
import multiprocessing
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.bench.codes import BenchCodes, random_codes
from orbithash.cluster.bench.inputs import bench_rows
from orbithash.cluster.bench.serving.processes import busy_seconds
from orbithash.cluster.bench.serving.services import ServedArchive, Service, start_gateway
from orbithash.cluster.bench.serving.stream import Latencies, QueryStream
from orbithash.cluster.output import say
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes
from orbithash.search.client.async_client import AsyncClient

__all__ = ["FILTER_TARGETS_S", "measure_gateway"]

_K = 10
_NUM_APPENDED = 1000
_POLL_S = 0.02
_TIMEOUT_S = 60.0
_NUM_SHORT_FILTERS, _SHORT_S = 40, 0.05
# After the last short deadline: until the work of cancelled filters has to have ended, and while it is measured.
_PAUSE_S, _IDLE_S = 1.0, 2.0
_MAX_SLOWER = 5.0
# Of 10^7 rows.
FILTER_TARGETS_S = {"label": 0.1, "LIKE": 0.4, "polygon": 0.5}

# Name, value, unit, target.
Measured = tuple[str, float, str, float | None]


def measure_gateway(
    archive: ServedArchive,
    drawn: BenchCodes,
    shards: int,
    local: bool,
    seconds: float,
    filters: Mapping[str, Sequence[str]],
) -> list[Measured]:
    """Return what changes of another program and new filters take, and what they do to other queries."""
    say("starting the gateway")
    with (
        start_gateway(archive, shards, local) as gateway,
        # The rows are written by another process, whose work does not stop the client of this one.
        ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool,
    ):
        return asyncio.run(_measure(gateway, archive, drawn, seconds, filters, pool))


async def _measure(
    gateway: Service,
    archive: ServedArchive,
    drawn: BenchCodes,
    seconds: float,
    filters: Mapping[str, Sequence[str]],
    pool: ProcessPoolExecutor,
) -> list[Measured]:
    async with AsyncClient(gateway.address, _TIMEOUT_S) as client:
        results: list[Measured] = []
        async with QueryStream(client, drawn.queries, _K) as stream:
            say("other queries, undisturbed")
            # The first queries compile and read what later ones find.
            await asyncio.sleep(1 + seconds / 4)
            before = await _during(stream, asyncio.sleep(seconds))
            results += [
                ("other queries, undisturbed: p99", before.p99_ms, "ms", None),
                ("other queries, undisturbed: slowest", before.slowest_ms, "ms", None),
            ]
            say(f"{_NUM_APPENDED} rows appended by another program")
            results += [each async for each in _append(client, stream, before, archive, drawn.bits, pool)]
            for kind, texts in filters.items():
                say(f"new filters: {kind}")
                results += [each async for each in _filter(client, stream, before, kind, texts, drawn.queries)]
        say(f"{_NUM_SHORT_FILTERS} new filters with a deadline of {1e3 * _SHORT_S:.0f} ms")
        results.append(await _short_filters(gateway, drawn.queries))
    return results


async def _during(stream: QueryStream, work: Any) -> Latencies:
    """Wait for the work and return the latencies of the queries meanwhile."""
    begun = time.perf_counter()
    await work
    return stream.latencies(begun, time.perf_counter())


async def _append(
    client: AsyncClient,
    stream: QueryStream,
    before: Latencies,
    archive: ServedArchive,
    bits: int,
    pool: ProcessPoolExecutor,
) -> AsyncIterator[Measured]:
    codes = random_codes(_NUM_APPENDED, bits, np.random.default_rng(7))
    begun = time.perf_counter()
    committed = await asyncio.wrap_future(pool.submit(_append_rows, archive.path, codes, bits))
    code = codes[-1].tobytes()
    while True:
        # A client that asks for a new row as long as it is missing.
        answer = await client.search(code=code, k=1)
        if answer.hits and answer.hits[0].distance == 0 and "appended" in answer.hits[0].key:
            break
        if time.perf_counter() - committed > _TIMEOUT_S:
            raise RuntimeError(f"rows committed by another program were not found within {_TIMEOUT_S:.0f} s")
        await asyncio.sleep(_POLL_S)
    seen = time.perf_counter()
    # Also what follows: segments that are merged, versions that are dropped.
    await asyncio.sleep(1)
    meanwhile = stream.latencies(begun, time.perf_counter())
    yield f"{_NUM_APPENDED} rows appended: until found", seen - committed, "s", 2.0
    yield "rows appended: failed queries meanwhile", float(meanwhile.num_failed), f"of {meanwhile.num_queries}", 0.0
    yield "rows appended: p99 meanwhile", meanwhile.p99_ms, "ms", None
    slower = meanwhile.slowest_ms / before.slowest_ms
    yield "rows appended: slowest query meanwhile", slower, "x the slowest before", _MAX_SLOWER


def _append_rows(path: Path, codes: Codes, bits: int) -> float:
    """Commit rows; return the time of the commit by a clock that all processes of the machine share."""
    rows = bench_rows(codes, bits, 0, "appended", np.random.default_rng(8))
    archive = Archive.open(path)
    with archive.writing():
        archive.commit(Archive.write_fragments(path, rows))
    return time.perf_counter()


async def _filter(
    client: AsyncClient, stream: QueryStream, before: Latencies, kind: str, texts: Sequence[str], queries: Codes
) -> AsyncIterator[Measured]:
    seconds, others = [], []
    for text in texts:
        begun = time.perf_counter()
        await client.search(code=queries[0].tobytes(), k=_K, filter=text)
        ended = time.perf_counter()
        seconds.append(ended - begun)
        others.append(stream.latencies(begun, ended))
        await asyncio.sleep(_POLL_S)
    yield f"new filter, {kind}: first answer", float(np.median(seconds)), "s", FILTER_TARGETS_S.get(kind)
    # Each filter takes a fraction of a second, so this is the p99 of few queries.
    slower = float(np.median([each.p99_ms for each in others])) / before.p99_ms
    yield f"new filter, {kind}: p99 of other queries", slower, "x that before", 2.0
    yield f"new filter, {kind}: failed queries meanwhile", float(sum(each.num_failed for each in others)), "", 0.0


async def _short_filters(gateway: Service, queries: Codes) -> Measured:
    """Return the cores that are busy after many new filters passed their deadline."""

    async def send(client: AsyncClient, number: int) -> None:
        await client.search(code=queries[0].tobytes(), k=_K, filter=f"key LIKE '%short{number}%'")

    async with AsyncClient(gateway.address, _SHORT_S) as client:
        await asyncio.gather(*(send(client, number) for number in range(_NUM_SHORT_FILTERS)), return_exceptions=True)
    await asyncio.sleep(_PAUSE_S)
    begun, used = time.perf_counter(), busy_seconds(gateway.pid)
    await asyncio.sleep(_IDLE_S)
    cores = (busy_seconds(gateway.pid) - used) / (time.perf_counter() - begun)
    return f"busy cores {_PAUSE_S:g} s after {_NUM_SHORT_FILTERS} filters with short deadlines", cores, "", 0.2
