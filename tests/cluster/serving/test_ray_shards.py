"""Shards as Ray actors: placed, called directly, joined, stopped and killed."""

import asyncio
import contextlib
import os
import signal
import time

import numpy as np
import psutil
import pytest

from orbithash.cluster.serving import shards as shards_module
from orbithash.cluster.serving.shards import RayBackend
from orbithash.encoders.archive.archive import Archive
from orbithash.encoders.errors import InputError
from orbithash.search.engine.engine import Engine
from orbithash.search.observer import Observer
from orbithash.search.protocol.queries import Query

pytestmark = pytest.mark.ray

NUM_ROWS, BITS = 300, 16
CODES = np.random.default_rng(3).integers(0, 256, (NUM_ROWS, BITS // 8), dtype=np.uint8)


def table_of(codes, first=0):
    keys = [f"row {first + number}" for number in range(len(codes))]
    return Archive.table(codes, BITS, key=keys, uri=keys)


@pytest.fixture
def rows(tmp_path):
    """An archive of `NUM_ROWS` rows."""
    archive = Archive.create(tmp_path / "rows", BITS, "model")
    archive.commit(Archive.write_fragments(archive.path, table_of(CODES)))
    archive.refresh()
    return archive


def started(archive, num_shards=2, num_replicas=1, folder=None):
    return RayBackend.start(archive, None, lambda: None, num_shards, num_replicas, "exact", Observer(), folder)


def nearest(codes, query, k):
    distances = np.bitwise_count(codes ^ query).sum(axis=1)
    order = np.lexsort((np.arange(len(codes)), distances))[:k]
    return [(int(distances[row]), f"row {row}") for row in order]


async def answer(engine, k=10, **options):
    return await engine.search(Query(code=bytes(2), k=k, **options), 30)


def pairs_of(found):
    return [(hit.distance, hit.key) for hit in found.hits]


def processes_of_shards():
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "".join(process.cmdline()).startswith("ray::_ShardActor"):
                found.append(process.pid)
    return found


async def until(condition):
    async with asyncio.timeout(60):
        while not await condition():
            await asyncio.sleep(0.05)


@pytest.mark.slow
def test_a_stopped_actor_is_out_and_back_and_a_killed_one_follows(ray_cluster, rows, tmp_path):
    async def scenario():
        backend = await started(rows, folder=tmp_path / "segments")
        try:
            engine = Engine(await backend.at(rows.version))
            expected = nearest(CODES, CODES[:1] * 0, 10)
            found = await answer(engine)
            assert (pairs_of(found), found.coverage.fraction) == (expected, 1)
            victim = processes_of_shards()[0]

            os.kill(victim, signal.SIGSTOP)
            while (await answer(engine)).coverage.answered_shards == 2:
                pass
            found = await answer(engine)
            assert 0 < found.coverage.fraction < 1
            # Changes are shown meanwhile.
            more = np.full((50, 2), 255, np.uint8)
            rows.write(table_of(more, NUM_ROWS))
            rows.refresh()
            engine.swap(await backend.at(rows.version))
            found = await answer(engine)
            assert found.coverage.total_rows == NUM_ROWS + 50
            os.kill(victim, signal.SIGCONT)

            async def is_whole():
                return (await answer(engine)).coverage.fraction == 1

            await until(is_whole)
            assert pairs_of(await answer(engine)) == expected

            os.kill(victim, signal.SIGKILL)

            async def has_successor():
                return await is_whole() and len(set(processes_of_shards()) - {victim}) == 2

            await until(has_successor)
            assert pairs_of(await answer(engine)) == expected
        finally:
            await backend.close()

        async def have_ended():
            return not processes_of_shards()

        await until(have_ended)

    asyncio.run(scenario())


def test_an_error_of_the_start_is_shown_as_it_is(ray_cluster, rows, monkeypatch):
    with pytest.raises(InputError, match="multi-hash"):
        asyncio.run(RayBackend.start(rows, None, lambda: None, 1, 1, "multi-hash", Observer()))
    # The same name found out by the actor.
    monkeypatch.setattr(shards_module, "is_exact_index", lambda name: True)
    begun = time.monotonic()
    with pytest.raises(InputError, match="multi-hash"):
        asyncio.run(RayBackend.start(rows, None, lambda: None, 1, 1, "multi-hash", Observer()))
    assert time.monotonic() - begun < 120


@pytest.mark.slow
def test_another_driver_joins_and_the_blocked_port_is_bypassed(ray_cluster, rows):
    async def scenario():
        backend = await started(rows)
        try:
            first = Engine(await backend.at(rows.version))
            joined = await RayBackend.join(rows, None, lambda: None, backend.joinable, Observer())
            second = Engine(await joined.at(rows.version))
            assert pairs_of(await answer(second)) == pairs_of(await answer(first))
            # Nothing listens at this port, as if a firewall refused the connection.
            for of_shard in joined._fleet.links:
                for link in of_shard:
                    await link.connection.connect("127.0.0.1:1")
                    link.locate = lambda: asyncio.sleep(0, None)
            found = await answer(second, filter="key LIKE 'row 1%'")
            assert (found.coverage.fraction, found.matching_rows) == (1, 111)
            assert not any(link.connection.is_direct for of_shard in joined._fleet.links for link in of_shard)
            await asyncio.sleep(3)
            assert [shard.num_healthy for shard in second.snapshot.shards] == [1, 1]
            await joined.close()
            # A shard that does not answer is no reason to wait.
            victim = processes_of_shards()[0]
            os.kill(victim, signal.SIGSTOP)
            joined = await asyncio.wait_for(RayBackend.join(rows, None, lambda: None, backend.joinable, Observer()), 30)
            found = await answer(Engine(await asyncio.wait_for(joined.at(rows.version), 30)))
            assert found.coverage.answered_shards == 1
            os.kill(victim, signal.SIGCONT)
            await joined.close()

            # The shards belong to the one that started them.
            async def is_whole():
                return (await answer(first)).coverage.fraction == 1

            await until(is_whole)
        finally:
            await backend.close()

    asyncio.run(scenario())
