"""Orders and counts of shards in this process and behind gRPC, with replicas: equal to those of one shard."""

import asyncio
import contextlib
import threading

import numpy as np
import pytest
from ranked_rows import FILTERS, RankedRows, same_ranked
from shard_cases import Shards
from shard_parts import served

from orbithash.search.engine.backend import LocalShardClient
from orbithash.search.index.rankings import ByTime, LinearOrder, PlaceOrder, RandomOrder, merge_ranked
from orbithash.search.protocol.errors import DeadlineExceeded, InvalidQuery, Unavailable
from orbithash.search.segments.stop import Stop
from orbithash.search.shards.client import RemoteShardClient
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard
from orbithash.v1 import shards_pb2 as pb

ORDERS = [
    LinearOrder((1, -2, 3, 300, -32768)),
    LinearOrder((1, -2, 3, 300, 0), -7),
    PlaceOrder(-181.25, 1 / 3),
    RandomOrder(2**64 - 1),
    ByTime(),
    ByTime(newest_first=True),
]
CODE = np.array([0xF0, 0x0F, 0xA0], np.uint8)
GROUPS = ("label", "month", "year")


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = RankedRows.create(tmp_path_factory.mktemp("ranked") / "archive", 5)
    case.write(300)
    case.write(100, 50)
    case.delete(60)
    return case


@contextlib.contextmanager
def shards_of(case, num_shards):
    shards = Shards.of(case, num_shards, 0)
    shards.follow(case.version)
    yield shards
    shards.close()


@contextlib.asynccontextmanager
async def clients_of(kind, hosts, version):
    """Yield a client of each shard: in this process, behind gRPC, or one with two replicas behind gRPC."""
    if kind == "local":
        yield [LocalShardClient(host, version) for host in hosts]
        return
    async with contextlib.AsyncExitStack() as stack:
        clients = []
        for number, host in enumerate(hosts):
            of_shard = []
            for _ in range(1 + (kind == "replicas")):
                _, connection = await stack.enter_async_context(served(host, number))
                of_shard.append(RemoteShardClient(connection, version, host.num_rows(version)))
            replicas = [Replica() for _ in of_shard]
            clients.append(of_shard[0] if len(of_shard) == 1 else ReplicatedShard(of_shard, replicas, Hedging()))
        yield clients


@pytest.mark.parametrize(
    ("kind", "num_shards"), [("local", 1), ("local", 4), ("grpc", 1), ("grpc", 3), ("replicas", 2)]
)
def test_all_kinds_of_shards_answer_alike(case, kind, num_shards):
    async def scenario(hosts):
        async with clients_of(kind, hosts, case.version) as clients:
            for text in FILTERS:
                for order in ORDERS:
                    every = case.ranked(order, 500, text=text)
                    middle = len(every.keys) // 2
                    after = (int(every.keys[middle]), int(every.ids[middle])) if middle else None
                    for k, max_key, start in ((5, None, None), (500, after and after[0], None), (7, None, after)):
                        parts = await asyncio.gather(
                            *(client.rank(order, k, max_key, start, text, 30.0) for client in clients)
                        )
                        assert same_ranked(merge_ranked(parts, k), case.ranked(order, k, max_key, start, text))
                counted = await asyncio.gather(*(client.distances(CODE, text, 30.0) for client in clients))
                assert sum(rows for rows, _ in counted).tolist() == case.distances(CODE, text)
                assert {each is None for _, each in counted} == {not text}
                for by in GROUPS:
                    grouped = await asyncio.gather(*(client.count_by(by, text, 30.0) for client in clients))
                    groups, without = case.groups(by, text)
                    assert sum(number for _, number in grouped) == without
                    names = {name for of_shard, _ in grouped for name in of_shard}
                    assert {name: sum(each.get(name, 0) for each, _ in grouped) for name in names} == groups

    with shards_of(case, num_shards) as shards:
        asyncio.run(scenario(shards.hosts))


@pytest.mark.parametrize("kind", ["local", "grpc", "replicas"])
def test_what_a_caller_may_mend_is_said_by_every_kind(case, kind):
    async def scenario(hosts):
        async with clients_of(kind, hosts, case.version) as [client]:
            with pytest.raises(InvalidQuery, match="got 2 weights; stored vectors have 5 dimensions"):
                await client.rank(LinearOrder((1, 2)), 3, None, None, "", 30.0)
            for call in (
                client.rank(ByTime(), 3, None, None, "nonsense", 30.0),
                client.distances(CODE, "nonsense", 30.0),
                client.count_by("label", "nonsense", 30.0),
            ):
                with pytest.raises(InvalidQuery, match="nonsense"):
                    await call
            assert client.num_healthy == client.num_replicas

    with shards_of(case, 1) as shards:
        asyncio.run(scenario(shards.hosts))


def test_a_request_without_an_order_and_one_for_another_version(case):
    async def scenario(hosts):
        async with served(hosts[0]) as (_, connection):
            request = pb.ShardRankRequest(version=case.version, k=3).SerializeToString()
            assert b"malformed" in await connection.call("Rank", request, 30.0)
            client = RemoteShardClient(connection, case.version + 9, 0)
            for call in (
                client.rank(ByTime(), 3, None, None, "", 30.0),
                client.distances(CODE, "", 30.0),
                client.count_by("year", "", 30.0),
            ):
                with pytest.raises(Unavailable, match="not held"):
                    await call

    with shards_of(case, 1) as shards:
        asyncio.run(scenario(shards.hosts))


class WaitingHost:
    """A host whose orders and counts take until they are stopped, and remember in which thread."""

    def __init__(self):
        self.begun, self.stopped = threading.Event(), threading.Event()
        self.thread = None

    def num_rows(self, version):
        return 0

    def is_ready(self, version, filter_text):
        return True

    def rank(self, version, order, k, max_key, after, filter_text, stop):
        return self._wait(stop)

    def distances(self, version, code, filter_text, stop):
        return self._wait(stop)

    def count_by(self, version, by, filter_text, stop):
        return self._wait(stop)

    def _wait(self, stop):
        self.thread = threading.get_ident()
        self.begun.set()
        while not stop.is_set:
            threading.Event().wait(0.001)
        self.stopped.set()
        stop.check()


CALLS = {
    "rank": lambda client, time_s: client.rank(ByTime(), 3, None, None, "", time_s),
    "distances": lambda client, time_s: client.distances(CODE, "", time_s),
    "count_by": lambda client, time_s: client.count_by("label", "", time_s),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("kind", ["local", "grpc"])
@pytest.mark.parametrize("ends", ["cancelled", "deadline"])
def test_work_that_nobody_waits_for_ends_and_the_event_loop_is_free(kind, ends, call):
    async def scenario():
        host = WaitingHost()
        async with clients_of(kind, [host], 1) as [client]:
            work = asyncio.create_task(CALLS[call](client, 600.0 if ends == "cancelled" else 0.2))
            # The loop runs while the host works.
            assert await asyncio.to_thread(host.begun.wait, 60)
            assert host.thread != threading.get_ident()
            if ends == "cancelled":
                work.cancel()
            with pytest.raises(asyncio.CancelledError if ends == "cancelled" else (TimeoutError, DeadlineExceeded)):
                await work
            assert await asyncio.to_thread(host.stopped.wait, 60)

    asyncio.run(scenario())


def test_a_failed_replica_is_replaced(case):
    async def scenario(hosts):
        async with clients_of("replicas", hosts, case.version) as [client]:
            broken, _ = client._replicas[0]
            await broken.connection.close()
            order = ORDERS[0]
            ranked = await client.rank(order, 9, None, None, "", 30.0)
            assert same_ranked(ranked, case.ranked(order, 9))
            assert client.num_healthy == 1
            assert (await client.distances(CODE, "", 30.0))[0].tolist() == case.distances(CODE)
            assert await client.count_by("year", "", 30.0) == hosts[0].count_by(case.version, "year", "", Stop())

    with shards_of(case, 1) as shards:
        asyncio.run(scenario(shards.hosts))
