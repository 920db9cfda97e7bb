"""Health of replicas: real processes that are stopped, continued and killed."""

import asyncio
import contextlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from shard_parts import TOKEN

from orbithash.search.index.answers import Scope
from orbithash.search.protocol.errors import Unavailable
from orbithash.search.shards import health as health_module
from orbithash.search.shards.client import Connection
from orbithash.search.shards.fleet import Fleet
from orbithash.search.shards.health import Link

# Serves shard `number` of two; the second version has one more row.
PROCESS = """
import asyncio, sys
import numpy as np
sys.path[:0] = sys.argv[2:]
from shard_parts import TOKEN, MemoryHost
from orbithash.search.shards.server import ShardServer

number = int(sys.argv[1])
ids = np.arange(number, 40, 2, dtype=np.uint64)
codes = np.arange(len(ids), dtype=np.uint8)[:, None]

async def serve():
    server = ShardServer(MemoryHost({1: (ids[:-1], codes[:-1]), 2: (ids, codes)}), number, TOKEN)
    print(await server.start("127.0.0.1"), flush=True)
    await asyncio.Event().wait()

asyncio.run(serve())
"""
QUERY = np.zeros((1, 1), np.uint8)


class Shard:
    """A process that serves a shard, and the link to it."""

    def __init__(self, number):
        self.number = number
        self.link = Link(Connection(number, TOKEN), self.locate)
        self.start()

    def start(self):
        command = [sys.executable, "-c", PROCESS, str(self.number), *sys.path]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.address = None

    async def locate(self):
        if self.address is None:
            self.address = (await asyncio.to_thread(self.process.stdout.readline)).strip()
        return self.address

    def kill(self):
        # A stopped process, too.
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


@contextlib.asynccontextmanager
async def fleet_of(*numbers):
    """Yield the processes and a fleet of a replica of a shard each; equal numbers are replicas of one shard."""
    shards = [Shard(number) for number in numbers]
    try:
        for shard in shards:
            await shard.link.connection.connect(await shard.locate())
        links = [[shard.link for shard in shards if shard.number == number] for number in sorted(set(numbers))]
        fleet = Fleet(links)
        try:
            yield shards, fleet
        finally:
            await fleet.close()
    finally:
        for shard in shards:
            shard.kill()


async def until(condition):
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.01)


# From the last answer of a replica to its loss.
LOST_AFTER_S = health_module._PING_EVERY_S + health_module._PING_TIMEOUT_S


def search(client, timeout_s=30):
    return client.search(QUERY, 3, Scope(), timeout_s)


def test_a_stopped_process_is_out_and_back():
    # From the last answer to the end of the ping that has none; measured in a test of its own.
    assert LOST_AFTER_S <= 3

    async def scenario():
        async with fleet_of(0, 1) as (shards, fleet):
            first, second = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            await search(first)
            shards[0].process.send_signal(signal.SIGSTOP)
            async with asyncio.timeout(60):
                # A call that waits ends with the health of its replica, long before its own time-out.
                with pytest.raises(Unavailable):
                    await search(first, 600)
                assert (first.num_healthy, second.num_healthy) == (0, 1)
                with pytest.raises(Unavailable):
                    await search(first, 600)
            assert (await search(second)).ids.tolist() == [[1, 3, 5]]
            # A change is shown without the shard that is out.
            assert await fleet.follow(2, 60) == [None, 20]
            shards[0].process.send_signal(signal.SIGCONT)
            # It follows the version that it has missed, too.
            await until(lambda: first.num_healthy == 1)
            newer = fleet.clients(2, [20, 20])[0]
            assert (await search(newer)).ids.tolist() == [[0, 2, 4]]

    asyncio.run(scenario())


@pytest.mark.slow
def test_a_stopped_process_is_out_in_the_time_of_a_ping():
    async def scenario():
        async with fleet_of(0) as (shards, fleet):
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            await search(client)
            shards[0].process.send_signal(signal.SIGSTOP)
            begun = time.monotonic()
            with pytest.raises(Unavailable):
                await search(client, 600)
            # A busy machine takes longer; without pings the call ends after 600 s.
            assert time.monotonic() - begun <= 4 * LOST_AFTER_S

    asyncio.run(scenario())


def test_a_killed_process_is_out_at_once_and_its_successor_follows():
    async def scenario():
        async with fleet_of(0) as (shards, fleet):
            (client,) = fleet.clients(2, await fleet.follow(2, 60, is_first=True))
            shards[0].kill()
            with pytest.raises(Unavailable):
                await search(client, 600)
            await until(lambda: not client.num_healthy)
            # Listens at another port, holds no version, and is found by `locate`.
            shards[0].start()
            await until(lambda: client.num_healthy == 1)
            assert (await search(client)).ids.tolist() == [[0, 2, 4]]

    asyncio.run(scenario())


def test_no_search_fails_while_one_of_two_replicas_is_stopped():
    async def scenario():
        async with fleet_of(0, 0) as (shards, fleet):
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            assert client.num_healthy == 2
            shards[0].process.send_signal(signal.SIGSTOP)
            while client.num_healthy == 2:
                assert (await search(client)).ids.tolist() == [[0, 2, 4]]
                await asyncio.sleep(0.01)
            # The replica that answers is enough for the next version.
            assert await fleet.follow(2, 60) == [20]
            shards[0].process.send_signal(signal.SIGCONT)
            await until(lambda: client.num_healthy == 2)

    asyncio.run(scenario())


def test_a_stall_of_this_process_takes_no_replica_out(monkeypatch):
    monkeypatch.setattr(health_module, "_PING_TIMEOUT_S", 0.3)

    async def scenario():
        async with fleet_of(0) as (shards, fleet):
            await fleet.follow(1, 60, is_first=True)
            connection, replica = shards[0].link.connection, shards[0].link.replica
            call, num_stalls = connection.call_directly, 0

            async def stalls(*args):
                nonlocal num_stalls
                task = asyncio.create_task(call(*args))
                await asyncio.sleep(0)
                # The answer arrives meanwhile, and the time-out of the ping passes.
                time.sleep(0.7)
                num_stalls += 1
                return await task

            lost = []
            replica.lost = lambda: lost.append(True)
            connection.call_directly = stalls
            await until(lambda: num_stalls == 3)
            connection.call_directly = call
            assert not lost

    asyncio.run(scenario())


def test_the_port_is_used_again_when_a_ping_reaches_it():
    async def scenario():
        async with fleet_of(0) as (shards, _):
            way = Connection(0, TOKEN, shards[0].link.connection.call)
            await way.connect(shards[0].address)
            other = Fleet([[Link(way)]])
            way.is_direct = False
            await until(lambda: way.is_direct)
            await other.close()

    asyncio.run(scenario())


def test_the_other_way_is_taken_when_packets_to_the_port_are_lost():
    """A port that accepts and never answers, as behind a firewall."""

    async def scenario():
        silent = await asyncio.start_server(lambda reader, writer: asyncio.sleep(3600), "127.0.0.1", 0)
        shard = Shard(0)
        direct = Connection(0, TOKEN)
        await direct.connect(await shard.locate())
        link = Link(Connection(0, TOKEN, direct.call))
        await link.connection.connect(f"127.0.0.1:{silent.sockets[0].getsockname()[1]}")
        fleet = Fleet([[link]])
        try:
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            assert (await search(client)).ids.tolist() == [[0, 2, 4]]
            assert not link.connection.is_direct
            await asyncio.sleep(3)
            assert client.num_healthy == 1
            # The port can be reached again.
            await link.connection.connect(shard.address)
            await until(lambda: link.connection.is_direct)
        finally:
            await fleet.close()
            await direct.close()
            silent.close()
            shard.kill()

    asyncio.run(scenario())


def test_a_version_that_cannot_be_loaded_is_an_error_and_the_older_one_stays():
    async def scenario():
        async with fleet_of(0) as (_, fleet):
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            with pytest.raises(Unavailable, match="its log has the cause"):
                await fleet.follow(3, 60)
            assert (await search(client)).ids.tolist() == [[0, 2, 4]]
            await asyncio.sleep(0.6)
            assert client.num_healthy == 1

    asyncio.run(scenario())


def test_health_is_watched_after_any_error():
    class Panic(BaseException):
        pass

    async def scenario():
        async with fleet_of(0) as (shards, fleet):
            (client,) = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
            errors = iter([RuntimeError("no address"), Panic("native code")])

            async def fails():
                for error in errors:
                    raise error
                return await shards[0].locate()

            shards[0].link.locate = fails
            shards[0].kill()
            await until(lambda: not client.num_healthy)
            shards[0].start()
            await until(lambda: client.num_healthy == 1)
            assert next(errors, None) is None

    asyncio.run(scenario())
