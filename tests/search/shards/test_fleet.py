"""A fleet that follows versions although replicas are late."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from search_parts import random_codes
from shard_parts import MemoryHost, served

from orbithash.search.index.answers import Scope
from orbithash.search.shards import fleet as fleet_module
from orbithash.search.shards.fleet import Fleet
from orbithash.search.shards.health import Link

RNG = np.random.default_rng(2)
IDS = np.arange(30, dtype=np.uint64)
CODES = random_codes(RNG, 30, 16)
VERSIONS = {version: (IDS[: 10 * version], CODES[: 10 * version]) for version in (1, 2, 3)}


class GatedHost(MemoryHost):
    """Follows versions after the first one when the gate is open."""

    def __init__(self):
        super().__init__(VERSIONS)
        self.gate = threading.Event()

    def follow(self, version):
        if version > 1:
            assert self.gate.wait(60)
        return super().follow(version)


@contextlib.asynccontextmanager
async def fleet_of(hosts):
    """Yield a fleet of one shard with a replica for each host."""
    async with contextlib.AsyncExitStack() as stack:
        links = [Link((await stack.enter_async_context(served(host)))[1]) for host in hosts]
        fleet = Fleet([links])
        try:
            yield fleet
        finally:
            for host in hosts:
                host.gate.set()
            await fleet.close()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


def test_a_version_is_shown_without_a_late_replica_which_is_asked_when_it_has_followed(monkeypatch):
    monkeypatch.setattr(fleet_module, "_GRACE_S", 0.1)

    async def scenario():
        hosts = [GatedHost(), GatedHost()]
        async with fleet_of(hosts) as fleet:
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            hosts[1].gate.set()
            (newer,) = fleet.clients(2, await fleet.follow(2, 60))
            assert newer.num_rows == 20
            # Pings tell that the first replica is late.
            await until(lambda: newer.num_healthy == 1)
            for _ in range(20):
                assert (await newer.search(CODES[:1], 30, Scope(), 30)).ids.shape == (1, 20)
            # Searches that began before go on.
            assert (await client.search(CODES[:1], 30, Scope(), 30)).ids.shape == (1, 10)
            hosts[0].gate.set()
            await until(lambda: newer.num_healthy == 2)
            assert hosts[0].holds(2)

    asyncio.run(scenario())


def test_a_version_is_not_shown_before_each_shard_holds_it():
    async def scenario():
        host = GatedHost()
        async with fleet_of([host]) as fleet:
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            following = asyncio.create_task(fleet.follow(2, 60))
            await asyncio.sleep(1.2)
            assert not following.done()
            # The version that is shown is answered, and its replica stays healthy.
            assert (await client.search(CODES[:1], 30, Scope(), 30)).ids.shape == (1, 10)
            assert client.num_healthy == 1
            host.gate.set()
            assert await following == [20]
            host.gate.clear()
            with pytest.raises(TimeoutError):
                await fleet.follow(3, 0.1)

    asyncio.run(scenario())


def test_of_two_calls_at_the_same_time_the_later_one_decides_which_version_is_late():
    async def scenario():
        host = GatedHost()
        host.gate.set()
        async with fleet_of([host]) as fleet:
            await fleet.follow(1, 60, is_first=True)
            connection = fleet.links[0][0].connection
            follow, may_end = connection.follow, {2: asyncio.Event(), 3: asyncio.Event()}

            async def gated(version, timeout_s):
                num_rows = await follow(version, timeout_s)
                await may_end[version].wait()
                return num_rows

            connection.follow = gated
            earlier = asyncio.create_task(fleet.follow(2, 60))
            await asyncio.sleep(0)
            later = asyncio.create_task(fleet.follow(3, 60))
            may_end[3].set()
            assert await later == [30]
            may_end[2].set()
            assert await earlier == [20]
            assert fleet._watch.version == 3

    asyncio.run(scenario())
