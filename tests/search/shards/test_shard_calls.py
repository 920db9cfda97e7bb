"""Calls of a shard over a real channel."""

import asyncio
import threading
import time

import grpc
import numpy as np
import pytest
from search_parts import random_codes
from shard_parts import TOKEN, MemoryHost, client_at, served

from orbithash.search.index.answers import Scope
from orbithash.search.protocol.errors import InvalidQuery, Overloaded, Unavailable
from orbithash.search.segments.stop import Stop
from orbithash.search.shards.client import Connection, RemoteShardClient
from orbithash.search.shards.messages import parsed, search_request
from orbithash.search.shards.server import ServerLimits
from orbithash.v1 import shards_pb2 as pb

RNG = np.random.default_rng(0)
IDS = RNG.permutation(200).astype(np.uint64) + np.uint64(2**63)
CODES = random_codes(RNG, 200, 16)
VERSIONS = {1: (IDS[:150], CODES[:150]), 2: (IDS, CODES)}
QUERIES = random_codes(RNG, 3, 16)

SCOPES = [
    Scope(),
    Scope(radius=0),
    Scope(radius=5),
    Scope(after=(5, 2**63 + 7)),
    Scope(filter=f"id < {2**63 + 50}", with_rows=True, include=("caption",)),
    Scope(with_rows=True),
    Scope(filter="id < 0"),
]


def same(answer, expected):
    arrays = ("distances", "ids", "ties")
    return all(
        (getattr(answer, name) == getattr(expected, name)).all()
        and getattr(answer, name).shape == getattr(expected, name).shape
        and getattr(answer, name).dtype == getattr(expected, name).dtype
        for name in arrays
    ) and (answer.rows, answer.num_matching, answer.num_rows, answer.num_shards) == (
        expected.rows,
        expected.num_matching,
        expected.num_rows,
        expected.num_shards,
    )


@pytest.mark.parametrize("scope", SCOPES)
@pytest.mark.parametrize("k", [1, 7, 500])
def test_an_answer_is_that_of_the_host(scope, k):
    async def scenario():
        host = MemoryHost(VERSIONS)
        async with served(host) as (_, connection):
            for version in (1, 2):
                client = await client_at(connection, version)
                assert client.num_rows == len(VERSIONS[version][0])
                answer = await client.search(QUERIES, k, scope, 30)
                assert same(answer, host.search(version, QUERIES, k, scope, Stop()))

    asyncio.run(scenario())


def test_rows_columns_counts_and_ids():
    async def scenario():
        host = MemoryHost(VERSIONS)
        async with served(host) as (_, connection):
            client = await client_at(connection, 2)
            some = IDS[[5, 3, 9]]
            assert await client.hits(some, ["caption"], 30) == host.hits(2, some, [], None)
            assert (await client.read(some, ["key", "label"], 30)).equals(host.read(2, some, ["key", "label"], None))
            text = f"id < {2**63 + 50}"
            assert await client.count(text, 30) == 50
            assert await client.count("", 30) == 200
            page = await client.scroll(text, 2**63 + 9, 4, 30)
            assert page.tolist() == [2**63 + 10, 2**63 + 11, 2**63 + 12, 2**63 + 13]
            assert (await client.scroll("", None, 2, 30)).tolist() == [2**63, 2**63 + 1]

    asyncio.run(scenario())


def test_errors_have_their_type_and_no_traceback():
    def fails(stop):
        raise RuntimeError("a secret of the process")

    async def scenario():
        host = MemoryHost(VERSIONS)
        async with served(host) as (_, connection):
            client = await client_at(connection, 2)
            with pytest.raises(InvalidQuery, match="got 'nonsense'") as caught:
                await client.search(QUERIES, 3, Scope(filter="nonsense"), 30)
            assert caught.value.violations == (("filter", "got 'nonsense'"),)
            with pytest.raises(Unavailable, match="version 9 is not held"):
                await RemoteShardClient(connection, 9, 0).search(QUERIES, 3, Scope(), 30)
            host.before = fails
            with pytest.raises(Unavailable, match="its log has the cause") as caught:
                await client.search(QUERIES, 3, Scope(), 30)
            assert "secret" not in str(caught.value)

    asyncio.run(scenario())


def test_only_the_token_opens_the_shard_that_is_meant():
    async def scenario():
        host = MemoryHost(VERSIONS)
        async with served(host, number=3) as (_, connection):
            for number, token, problem in ((3, "wrong", "token"), (3, "", "token"), (4, TOKEN, "this is shard 3")):
                other = Connection(number, token)
                await other.connect(connection.address)
                with pytest.raises(Unavailable, match=problem):
                    await other.follow(1, 30)
                await other.close()
            async with grpc.aio.insecure_channel(connection.address) as channel:
                with pytest.raises(grpc.aio.AioRpcError) as caught:
                    await channel.unary_unary("/orbithash.v1.ShardService/Ping")(b"")
                assert caught.value.code() is grpc.StatusCode.UNAUTHENTICATED
            assert host.follows == []

    asyncio.run(scenario())


@pytest.mark.parametrize(
    "method", ["Search", "Hits", "Read", "Count", "Scroll", "Rank", "Distances", "CountBy", "Follow"]
)
def test_bytes_that_are_no_message_are_refused(method):
    async def scenario():
        async with served(MemoryHost(VERSIONS)) as (_, connection):
            client = await client_at(connection, 1)
            response = await connection.call(method, b"\xff" * 9, 30)
            assert b"malformed" in response
            assert (await client.search(QUERIES, 3, Scope(), 30)).ids.shape == (3, 3)

    asyncio.run(scenario())


def test_the_deadline_of_a_call_on_the_other_way_ends_its_work():
    def waits(stop):
        while not stop.is_set:
            time.sleep(0.001)
        stop.check()

    async def scenario():
        host = MemoryHost(VERSIONS, waits)
        async with served(host) as (server, connection):
            await connection.follow(2, 30)
            request = search_request(2, QUERIES, 3, Scope(filter="id < 5")).SerializeToString()
            with pytest.raises(TimeoutError):
                parsed(pb.ShardSearchResponse, await server.call("Search", request, 0.1))

    asyncio.run(scenario())


@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
def test_a_search_that_nobody_waits_for_stops(ends):
    begun, stopped = threading.Event(), threading.Event()

    def waits(stop):
        begun.set()
        while not stop.is_set:
            threading.Event().wait(0.001)
        stopped.set()
        stop.check()

    async def scenario():
        host = MemoryHost(VERSIONS, waits)
        async with served(host) as (_, connection):
            client = await client_at(connection, 2)
            # A filter that is not ready: in a thread.
            search = asyncio.create_task(
                client.search(QUERIES, 3, Scope(filter="id < 5"), 600 if ends == "cancelled" else 0.2)
            )
            assert await asyncio.to_thread(begun.wait, 60)
            if ends == "cancelled":
                search.cancel()
            with pytest.raises(asyncio.CancelledError if ends == "cancelled" else TimeoutError):
                await search
            assert await asyncio.to_thread(stopped.wait, 60)

    asyncio.run(scenario())


def test_calls_and_bytes_that_wait_are_bounded():
    gate = threading.Event()

    def waits(stop):
        gate.wait(60)

    # With a filter that is not ready: in a thread.
    scope = Scope(filter="id < 5")

    async def scenario(limits, num_accepted):
        gate.clear()
        host = MemoryHost(VERSIONS, waits)
        async with served(host, limits=limits) as (server, connection):
            client = await client_at(connection, 2)
            calls = [asyncio.create_task(client.search(QUERIES, 3, scope, 60)) for _ in range(num_accepted)]
            while server._load.num_calls < num_accepted:
                await asyncio.sleep(0.001)
            with pytest.raises(Overloaded, match="wait in a shard"):
                await client.search(QUERIES, 3, scope, 60)
            # A ping is answered at any load.
            await connection.call("Ping", b"", 30)
            gate.set()
            assert len(await asyncio.gather(*calls)) == num_accepted
            await client.search(QUERIES, 3, scope, 60)

    asyncio.run(scenario(ServerLimits(max_calls=3), 3))
    asyncio.run(scenario(ServerLimits(max_request_bytes=60), 2))


def test_a_search_that_was_slow_once_does_not_block_the_event_loop_again():
    gate, begun = threading.Event(), threading.Event()

    def slow(stop):
        time.sleep(0.05)

    def waits(stop):
        begun.set()
        gate.wait(60)

    async def scenario():
        host = MemoryHost(VERSIONS, slow)
        async with served(host) as (_, connection):
            client = await client_at(connection, 2)
            await client.search(QUERIES, 3, Scope(), 30)
            host.before = waits
            search = asyncio.create_task(client.search(QUERIES, 3, Scope(), 60))
            assert await asyncio.to_thread(begun.wait, 60)
            await connection.call("Ping", b"", 30)
            gate.set()
            await search

    asyncio.run(scenario())


def test_concurrent_calls_share_one_follow_which_outlives_them():
    gate, begun = threading.Event(), threading.Event()

    class SlowHost(MemoryHost):
        def follow(self, version):
            begun.set()
            gate.wait(60)
            return super().follow(version)

    async def scenario():
        host = SlowHost(VERSIONS)
        async with served(host) as (_, connection):
            calls = [asyncio.create_task(connection.follow(2, 60)) for _ in range(3)]
            assert await asyncio.to_thread(begun.wait, 60)
            calls[0].cancel()
            # A ping is answered while a version is loaded.
            await connection.call("Ping", b"", 30)
            gate.set()
            assert await asyncio.gather(*calls[1:]) == [200, 200]
            assert host.follows == [2]

    asyncio.run(scenario())


def test_the_other_way_in_is_taken_when_the_port_cannot_be_reached():
    async def scenario():
        host = MemoryHost(VERSIONS)
        async with served(host) as (server, _):
            methods = []

            async def fallback(method, request, timeout_s):
                methods.append(method)
                return await server.call(method, request, timeout_s)

            # Nothing listens at this port.
            connection = Connection(0, TOKEN, fallback)
            await connection.connect("127.0.0.1:1")
            client = await client_at(connection, 2)
            answer = await client.search(QUERIES, 7, SCOPES[4], 30)
            assert same(answer, host.search(2, QUERIES, 7, SCOPES[4], Stop()))
            with pytest.raises(InvalidQuery):
                await client.count("nonsense", 30)
            assert methods == ["Follow", "Search", "Count"]
            assert not connection.is_direct
            await connection.close()

    asyncio.run(scenario())
