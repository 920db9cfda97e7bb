"""Searches of very many shards, node by node, over real channels."""

import asyncio
import contextlib
import functools
import time

import numpy as np
import pytest
from search_parts import random_codes
from shard_parts import TOKEN, MemoryHost

from orbithash.search.index.answers import Scope
from orbithash.search.index.merge import merge
from orbithash.search.protocol.errors import InvalidQuery, Unavailable
from orbithash.search.shards.client import Connection
from orbithash.search.shards.fleet import Fleet
from orbithash.search.shards.health import Link
from orbithash.search.shards.server import ShardServer

NUM_SHARDS = 70
RNG = np.random.default_rng(1)
IDS = RNG.permutation(700).astype(np.uint64)
# Few bits, so that many rows tie.
CODES = random_codes(RNG, 700, 9)
QUERIES = random_codes(RNG, 3, 9)
NODES = ("127.0.0.1", "127.0.0.2")


class Node:
    """The servers of some shards at one address."""

    def __init__(self, host, numbers):
        self.host = host
        self.hosts = {}
        self.servers = {}
        self.links = {}
        for number in numbers:
            part = number == IDS % NUM_SHARDS
            self.hosts[number] = MemoryHost({1: (IDS[part], CODES[part])})

    async def start(self):
        for number, host in self.hosts.items():
            self.servers[number] = ShardServer(host, number, TOKEN)
            self.links[number] = Link(Connection(number, TOKEN))
            await self.links[number].connection.connect(await self.servers[number].start(self.host))

    async def stop(self):
        await asyncio.gather(*(server.stop() for server in self.servers.values()))


@contextlib.asynccontextmanager
async def fleet_over(*nodes, max_flat=64):
    """Yield a fleet over nodes; those with the same shards have replicas of them."""
    for node in nodes:
        await node.start()
    fleet = Fleet(
        [[node.links[number] for node in nodes if number in node.links] for number in range(NUM_SHARDS)],
        max_flat=max_flat,
    )
    try:
        shards = fleet.clients(1, await fleet.follow(1, 60, is_first=True))
        yield fleet, shards
    finally:
        await fleet.close()
        for node in nodes:
            await node.stop()


def two_nodes():
    return Node(NODES[0], range(0, 40)), Node(NODES[1], range(40, NUM_SHARDS))


def two_whole_nodes():
    return Node(NODES[0], range(NUM_SHARDS)), Node(NODES[1], range(NUM_SHARDS))


def found(answers, k):
    """Return hits with their rows, ties, and the number of matching rows of answers of shards."""
    rows = {}
    for answer in answers:
        rows.update(zip(answer.ids[answer.distances != np.iinfo(np.int32).max].tolist(), answer.rows, strict=True))
    hits = [
        (each.distances.tolist(), each.ids.tolist(), each.ties, [rows[id_] for id_ in each.ids.tolist()])
        for each in merge(answers, [k] * len(QUERIES))
    ]
    return hits, sum(answer.num_matching or 0 for answer in answers)


async def flat(shards, k, scope):
    return found(await asyncio.gather(*(shard.search(QUERIES, k, scope, 60) for shard in shards)), k)


async def stopped(node, number):
    await node.servers[number].stop()


SCOPES = [
    Scope(with_rows=True),
    Scope(radius=2, with_rows=True),
    Scope(after=(3, 350), with_rows=True),
    Scope(filter="id < 300", with_rows=True),
    Scope(filter="id < 0", with_rows=True),
]


def test_answers_are_those_of_asking_each_shard():
    async def scenario():
        async with fleet_over(*two_nodes()) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            assert tree.num_rows == 700
            # Each shard is a head at some time.
            for k in (1, 10, 1000):
                for scope in SCOPES:
                    answer = await tree.search(QUERIES, k, scope, 60)
                    assert found([answer], k) == await flat(shards, k, scope)
                    assert (answer.num_rows, answer.num_shards) == (700, NUM_SHARDS)
            with pytest.raises(InvalidQuery, match="nonsense"):
                await tree.search(QUERIES, 3, Scope(filter="nonsense"), 60)

    asyncio.run(scenario())


def test_few_shards_are_asked_without_a_head():
    async def scenario():
        async with fleet_over(*two_nodes(), max_flat=NUM_SHARDS) as (fleet, shards):
            assert fleet.branches(1, shards) is shards

    asyncio.run(scenario())


def test_coverage_says_which_shards_failed_and_each_head_is_replaced():
    async def scenario():
        nodes = two_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            missing = {3, 17, 44}
            for number in missing:
                await stopped(nodes[number >= 40], number)
            rest = [shard for number, shard in enumerate(shards) if number not in missing]
            expected = await flat(rest, 10, SCOPES[0])
            # More turns than shards on a node, so that each of the stopped ones would be the head.
            for _ in range(45):
                answer = await tree.search(QUERIES, 10, SCOPES[0], 60)
                assert (answer.num_rows, answer.num_shards) == (670, 67)
                assert found([answer], 10) == expected

    asyncio.run(scenario())


def test_a_replica_on_another_node_answers_for_a_shard_that_failed():
    async def scenario():
        nodes = two_whole_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            expected = await flat(shards, 10, SCOPES[0])
            for number in (0, 5, 69):
                await stopped(nodes[0], number)
            await stopped(nodes[1], 6)
            for _ in range(10):
                answer = await tree.search(QUERIES, 10, SCOPES[0], 60)
                assert (answer.num_rows, answer.num_shards) == (700, NUM_SHARDS)
                assert found([answer], 10) == expected

    asyncio.run(scenario())


def test_a_node_that_is_gone_costs_no_shard_that_has_a_replica_elsewhere():
    async def scenario():
        nodes = two_whole_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            await nodes[0].stop()
            # Before pings find it out: each head that is asked fails.
            for _ in range(3):
                for link, _ in fleet.links:
                    link.replica.pinged(is_late=False)
                answer = await tree.search(QUERIES, 10, Scope(), 60)
                assert (answer.num_rows, answer.num_shards) == (700, NUM_SHARDS)

    asyncio.run(scenario())


def test_neighbours_that_are_lost_one_after_the_other_cost_no_shard():
    async def scenario():
        nodes = two_whole_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            loop = asyncio.get_running_loop()
            # One in each attempt, on the node that is asked.
            losses = [10, 11, 12, 13, 14]

            def loses_one(place, stop):
                if losses:
                    loop.call_soon_threadsafe(fleet.links[losses.pop()][place].replica.lost)
                    while not stop.is_set:
                        time.sleep(0.005)

            for place, node in enumerate(nodes):
                # Shard 20 is the slow one, which each attempt but the last waits for.
                node.hosts[20].before = functools.partial(loses_one, place)
                node.hosts[20].is_ready = lambda version, text: False
            answer = await tree.search(QUERIES, 10, Scope(), 600)
            assert not losses
            assert (answer.num_rows, answer.num_shards) == (700, NUM_SHARDS)

    asyncio.run(scenario())


def test_a_neighbour_that_is_lost_is_not_waited_for():
    async def scenario():
        nodes = two_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            begun = asyncio.Event()
            loop = asyncio.get_running_loop()

            def hangs(stop):
                loop.call_soon_threadsafe(begun.set)
                while not stop.is_set:
                    time.sleep(0.005)

            nodes[0].hosts[7].before = hangs
            nodes[0].hosts[7].is_ready = lambda version, text: False
            search = asyncio.create_task(tree.search(QUERIES, 10, Scope(), 600))
            await begun.wait()
            fleet.links[7][0].replica.lost()
            answer = await asyncio.wait_for(search, 60)
            assert (answer.num_rows, answer.num_shards) == (690, 69)

    asyncio.run(scenario())


def test_a_search_without_any_shard_fails():
    async def scenario():
        nodes = two_nodes()
        async with fleet_over(*nodes) as (fleet, shards):
            (tree,) = fleet.branches(1, shards)
            for node in nodes:
                await node.stop()
            with pytest.raises((Unavailable, TimeoutError)):
                await tree.search(QUERIES, 10, Scope(), 2)

    asyncio.run(scenario())
