"""The cost of calling shards that are Ray actors, which the simulated fan-out does not include."""

import asyncio
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from orbithash.cluster.bench.serving.processes import process_seconds, shard_pids
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.codes import Codes, pack

__all__ = ["actor_calls"]

_ROWS_PER_SHARD = 100
_NUM_WARM_UP, _NUM_LONE, _NUM_BATCHED, _IN_FLIGHT = 50, 300, 3200, 64
_TIMEOUT_S = 60.0


class _NoModel:
    """An encoder that is never called, because queries by code need none."""

    has_text = False
    num_features = 0
    embedding = None
    has_views = False


def actor_calls(num_actors: int, bits: int, k: int) -> dict[str, float]:
    """Measure the CPU time (ms) of this process and of its actors per query, with 1 and with `num_actors` shards.

    Measured for lone queries, and for `_IN_FLIGHT` queries at a time, whose batches share calls. `call_ms_…` is the
    cost of one more shard in this process, `shard_call_ms_…` that in the actor.
    """
    from orbithash.cluster.bench.inputs import write_archive
    from orbithash.cluster.runtime import connected
    from orbithash.cluster.serving.shards import SHARD_CPUS

    rng = np.random.default_rng(0)
    queries = pack(rng.random((_NUM_LONE, bits)) < 0.5)
    metrics: dict[str, float] = {}
    with TemporaryDirectory() as folder, connected(math.ceil(num_actors * SHARD_CPUS) + 1):
        path = Path(folder) / "archive"
        write_archive(path, pack(rng.random((num_actors * _ROWS_PER_SHARD, bits)) < 0.5), bits, "random")
        for num_shards in (1, num_actors):
            measured = asyncio.run(_measure(Archive.open(path), num_shards, queries, k))
            metrics |= {f"actors_{num_shards}_{name}": value for name, value in measured.items()}
    for how in ("lone", "batched"):
        one, all_ = (metrics[f"actors_{count}_{how}_cpu_ms"] for count in (1, num_actors))
        metrics[f"call_ms_{how}"] = (all_ - one) / max(1, num_actors - 1)
        metrics[f"shard_call_ms_{how}"] = metrics[f"actors_{num_actors}_{how}_shards_cpu_ms"] / num_actors
    return metrics


async def _measure(archive: Archive, num_shards: int, queries: Codes, k: int) -> dict[str, float]:
    from orbithash.cluster.serving.shards import RayBackend
    from orbithash.search.engine.engine import Engine
    from orbithash.search.observer import Observer
    from orbithash.search.protocol.queries import Query

    encoder: Any = _NoModel()
    backend = await RayBackend.start(archive, encoder, lambda: None, num_shards, 1, "exact", Observer())
    try:
        snapshot = await backend.at(archive.version)
        engine = Engine(snapshot)

        async def search(numbers: Sequence[int]) -> list[float]:
            seconds = []
            for number in numbers:
                begun = time.perf_counter()
                await engine.search(Query(code=queries[number % len(queries)].tobytes(), k=k), _TIMEOUT_S)
                seconds.append(time.perf_counter() - begun)
            return seconds

        await search(range(_NUM_WARM_UP))
        cpu_begun, shards_begun = time.process_time(), _shard_seconds()
        seconds = await search(range(_NUM_LONE))
        lone_s = (time.process_time() - cpu_begun) / _NUM_LONE
        lone_shards_s = (_shard_seconds() - shards_begun) / _NUM_LONE
        begun, cpu_begun, shards_begun = time.perf_counter(), time.process_time(), _shard_seconds()
        await asyncio.gather(*(search(range(first, _NUM_BATCHED, _IN_FLIGHT)) for first in range(_IN_FLIGHT)))
        batched_s = (time.process_time() - cpu_begun) / _NUM_BATCHED
        batched_shards_s = (_shard_seconds() - shards_begun) / _NUM_BATCHED
        rate = _NUM_BATCHED / (time.perf_counter() - begun)
    finally:
        await backend.close()
    return {
        "p50_ms": 1e3 * float(np.median(seconds)),
        "lone_cpu_ms": 1e3 * lone_s,
        "lone_shards_cpu_ms": 1e3 * lone_shards_s,
        "batched_queries_per_s": rate,
        "batched_cpu_ms": 1e3 * batched_s,
        "batched_shards_cpu_ms": 1e3 * batched_shards_s,
    }


def _shard_seconds() -> float:
    """Return the seconds of a core that the shard actors of this process have used."""
    return sum(map(process_seconds, shard_pids(os.getpid())))
