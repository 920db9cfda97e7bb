import asyncio
import gc

import numpy as np
import pytest
from search_parts import (
    MemoryArchive,
    MemoryShard,
    StubShard,
    memory_shards,
    random_codes,
    small_case,
    snapshot_of,
)

from orbithash.search.engine.engine import Engine
from orbithash.search.index.answers import Scope
from orbithash.search.protocol.errors import InvalidQuery, Overloaded
from orbithash.search.protocol.queries import Query
from orbithash.search.shards import replicas as replicas_module
from orbithash.search.shards.interface import Unreachable
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard

SCOPE = Scope()
CODES = random_codes(np.random.default_rng(0), 30, 16)
IDS = np.arange(30, dtype=np.uint64)
SHARD = MemoryShard(MemoryArchive(IDS, CODES, 16), IDS, CODES)
EXPECTED = asyncio.run(SHARD.search(CODES[:1], 3, SCOPE, 30.0))


async def nothing():
    pass


async def fails():
    raise RuntimeError("gone")


async def never():
    await asyncio.Event().wait()


def replicas(*befores, latencies=None):
    stubs = [StubShard(SHARD, before) for before in befores]
    copies = [Replica() for _ in befores]
    return ReplicatedShard(stubs, copies, latencies or Hedging()), stubs, copies


def known_latencies(seconds=0.001):
    latencies = Hedging()
    for _ in range(30):
        latencies.took(seconds)
    return latencies


def search(group, timeout_s=30.0):
    return group.search(CODES[:1], 3, SCOPE, timeout_s)


def num_calls(stubs):
    return [len(stub.calls) for stub in stubs]


def test_the_least_loaded_replica_is_asked():
    async def scenario():
        gates = [asyncio.Event() for _ in range(3)]
        group, stubs, copies = replicas(*(gate.wait for gate in gates))
        tasks = [asyncio.create_task(search(group)) for _ in range(7)]
        while sum(num_calls(stubs)) < 7:
            await asyncio.sleep(0)
        assert num_calls(stubs) == [3, 2, 2]
        assert [copy.num_in_flight for copy in copies] == [3, 2, 2]
        for gate in gates:
            gate.set()
        answers = await asyncio.gather(*tasks)
        assert all((answer.ids == EXPECTED.ids).all() for answer in answers)
        assert [copy.num_in_flight for copy in copies] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_failing_replica_costs_one_more_attempt_and_is_asked_last():
    async def scenario():
        group, stubs, copies = replicas(fails, nothing)
        answer = await search(group)
        assert (answer.ids == EXPECTED.ids).all()
        assert num_calls(stubs) == [1, 1]
        assert (group.num_replicas, group.num_healthy) == (2, 1)
        await search(group)
        assert num_calls(stubs) == [1, 2]
        copies[0].pinged(is_late=False)
        await search(group)
        assert num_calls(stubs) == [2, 3]

    asyncio.run(scenario())


def test_two_failures_are_a_failed_shard():
    async def scenario():
        group, stubs, _ = replicas(fails, fails, nothing)
        with pytest.raises(RuntimeError, match="gone"):
            await search(group)
        assert num_calls(stubs) == [1, 1, 0]
        # Those that failed come last now.
        await search(group)
        assert num_calls(stubs) == [1, 1, 1]

    asyncio.run(scenario())


def test_a_lone_replica_that_fails_is_a_failed_shard():
    async def scenario():
        group, stubs, _ = replicas(fails)
        with pytest.raises(RuntimeError, match="gone"):
            await search(group)
        assert num_calls(stubs) == [1]

    asyncio.run(scenario())


def test_a_slow_replica_is_raced_by_another():
    async def scenario():
        ended = asyncio.Event()

        async def hangs():
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        group, stubs, copies = replicas(hangs, nothing, latencies=known_latencies())
        answer = await search(group)
        assert (answer.ids == EXPECTED.ids).all()
        assert num_calls(stubs) == [1, 1]
        # The loser is given up, and was not at fault.
        await asyncio.wait_for(ended.wait(), 30)
        assert copies[0].is_healthy
        assert copies[0].num_in_flight == 0

    asyncio.run(scenario())


def test_no_race_before_it_is_known_what_is_slow():
    async def scenario():
        gate = asyncio.Event()
        group, stubs, _ = replicas(gate.wait, nothing)
        task = asyncio.create_task(search(group))
        await asyncio.sleep(0.05)
        assert num_calls(stubs) == [1, 0]
        gate.set()
        await task

    asyncio.run(scenario())


def test_an_error_beside_an_answer_is_looked_at():
    """Or asyncio complains on stderr that nobody retrieved it."""

    async def once():
        gate = asyncio.Event()

        async def fails_late():
            await gate.wait()
            raise RuntimeError("gone")

        group, stubs, _ = replicas(fails_late, gate.wait, latencies=known_latencies())
        task = asyncio.create_task(search(group))
        while num_calls(stubs) != [1, 1]:
            await asyncio.sleep(0.001)
        gate.set()
        await task

    async def scenario():
        complaints = []
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: complaints.append(context))
        # Which of the two is seen first is a matter of luck.
        for _ in range(20):
            await once()
        gc.collect()
        assert complaints == []

    asyncio.run(scenario())


def test_silence_of_all_replicas_is_a_failure_in_time():
    async def scenario():
        async def gives_up():
            await asyncio.sleep(0.02)
            raise TimeoutError

        group, stubs, _ = replicas(gives_up, gives_up, latencies=known_latencies())
        with pytest.raises(TimeoutError):
            await search(group)
        assert num_calls(stubs) == [1, 1]

    asyncio.run(scenario())


def test_what_is_slow_is_the_95th_percentile():
    latencies = Hedging()
    assert latencies.delay_s() == 0.5, "nothing is known yet"
    for milliseconds in range(1, 101):
        latencies.took(milliseconds / 1000)
    assert latencies.delay_s() == pytest.approx(0.095)


@pytest.mark.parametrize("known", [Hedging, known_latencies])
def test_a_replica_that_falls_silent_is_asked_last_in_the_end(known):
    """Also where it is silent from the start."""

    async def scenario():
        group, stubs, copies = replicas(never, nothing, latencies=known())
        for number in range(1, 6):
            answer = await search(group)
            assert (answer.ids == EXPECTED.ids).all()
            while copies[0].num_in_flight:
                await asyncio.sleep(0)
            assert group.num_healthy == (2 if number < 3 else 1)
        assert num_calls(stubs) == [3, 5]
        copies[0].answered()
        assert group.num_healthy == 2
        await search(group)
        assert group.num_healthy == 2, "once is not three times in a row"

    asyncio.run(scenario())


@pytest.mark.parametrize("num_replicas", [1, 2])
def test_calls_that_wait_for_a_replica_end_when_it_is_lost(num_replicas):
    """Otherwise each would wait for its whole time-out."""

    async def scenario():
        case = small_case()
        shard, other = memory_shards(case)
        stubs = [StubShard(shard, never) for _ in range(num_replicas)]
        replicas = [Replica() for _ in stubs]
        group = ReplicatedShard(stubs, replicas, Hedging())
        engine = Engine(snapshot_of(case, [group, StubShard(other, nothing)]), max_fan_outs=4, shard_timeout_s=600)
        searches = [asyncio.create_task(engine.search(Query(code=b"ab"), 600.0)) for _ in range(3)]
        reads = [asyncio.create_task(group.hits(np.arange(3, dtype=np.uint64), (), 600.0)) for _ in range(3)]
        while not all(num_calls(stubs)):
            await asyncio.sleep(0.001)
        for replica in replicas:
            replica.lost()
        for search in searches:
            assert (await asyncio.wait_for(search, 60)).coverage.answered_shards == 1
        for read in reads:
            with pytest.raises(Unreachable):
                await read
        calls = num_calls(stubs)
        for _ in range(5):
            assert (await engine.search(Query(code=b"ab"), 60.0)).coverage.answered_shards == 1
        assert num_calls(stubs) == calls
        assert group.num_healthy == 0
        for stub, replica in zip(stubs, replicas, strict=True):
            stub.before = nothing
            replica.pinged(is_late=False)
        assert group.num_healthy == num_replicas
        assert (await engine.search(Query(code=b"ab"), 60.0)).coverage.fraction == 1
        assert all(replica.num_in_flight == 0 for replica in replicas)

    asyncio.run(scenario())


def test_a_call_goes_on_at_another_replica_when_its_own_is_lost():
    async def scenario():
        group, stubs, copies = replicas(never, nothing)
        task = asyncio.create_task(search(group))
        while num_calls(stubs) != [1, 0]:
            await asyncio.sleep(0)
        copies[0].lost()
        assert ((await task).ids == EXPECTED.ids).all()
        # The time-out of a caller is not taken for the loss of a replica.
        stubs[1].before = never
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(0.01):
                await search(group)
        assert copies[1].is_healthy

    asyncio.run(scenario())


def test_a_late_replica_is_asked_last():
    async def scenario():
        group, stubs, copies = replicas(nothing, nothing)
        copies[0].pinged(is_late=True)
        await search(group)
        copies[0].answered()
        await search(group)
        assert (num_calls(stubs), group.num_healthy) == ([0, 2], 1)
        copies[0].pinged(is_late=False)
        await search(group)
        assert (num_calls(stubs), group.num_healthy) == ([1, 2], 2)

    asyncio.run(scenario())


def test_an_invalid_query_is_an_answer_and_an_overloaded_replica_is_healthy():
    async def scenario():
        async def refuses():
            raise InvalidQuery(("filter", "got nonsense"))

        async def is_full():
            raise Overloaded("full", 1.0)

        group, stubs, _ = replicas(refuses, nothing)
        with pytest.raises(InvalidQuery):
            await search(group)
        assert num_calls(stubs) == [1, 0]
        group, stubs, _ = replicas(is_full, nothing)
        await search(group)
        assert num_calls(stubs) == [1, 1]
        assert group.num_healthy == 2
        group, _, _ = replicas(is_full, is_full)
        with pytest.raises(Overloaded):
            await search(group)
        assert group.num_healthy == 2

    asyncio.run(scenario())


def hedged_share(num_searches, scatter, with_losers=True):
    """The share of searches that are sent to a second replica, by the rules of `ReplicatedShard`, in simulated time."""
    rng = np.random.default_rng(1)
    hedging, num_hedges = Hedging(), 0
    for first, second in rng.lognormal(-4, scatter, (num_searches, 2)):
        hedging.began()
        delay = hedging.delay_s()
        if first <= delay or not hedging.take():
            hedging.took(first)
            continue
        num_hedges += 1
        end = min(first, delay + second)
        hedging.took(first if end == first else delay + second - delay)
        if with_losers:
            hedging.took(end - delay if end == first else end)
    return num_hedges / num_searches


@pytest.mark.parametrize("scatter", [0.5, 1.0, 2.0])
def test_hedges_are_at_most_five_per_cent_of_the_searches(scatter, monkeypatch):
    assert 0.02 < hedged_share(4000, scatter) <= 0.05 + 10 / 4000
    # The budget apart: the percentile needs the times of the calls that were cancelled.
    monkeypatch.setattr(replicas_module, "_HEDGES_PER_CALL", 1.0)
    assert hedged_share(4000, scatter, with_losers=False) > hedged_share(4000, scatter)


def test_the_time_of_a_call_that_lost_counts():
    async def scenario():
        hedging = known_latencies()
        group, _, _ = replicas(never, nothing, latencies=hedging)
        before = len(hedging._seconds["search"])
        await search(group)
        while len(hedging._seconds["search"]) < before + 2:
            await asyncio.sleep(0)
        assert sorted(hedging._seconds["search"])[-1] >= hedging.delay_s()

    asyncio.run(scenario())


def test_a_search_whose_hedge_the_budget_refuses_is_still_retried_after_a_failure():
    async def scenario():
        hedging = known_latencies()
        while hedging.take():
            pass
        gate = asyncio.Event()

        async def fails_late():
            await gate.wait()
            raise RuntimeError("gone")

        group, stubs, _ = replicas(fails_late, nothing, latencies=hedging)
        task = asyncio.create_task(search(group))
        while num_calls(stubs) != [1, 0]:
            await asyncio.sleep(0)
        # The delay of a hedge is 5 ms here: it passes while the gate is closed.
        await asyncio.sleep(0.05)
        assert num_calls(stubs) == [1, 0]
        gate.set()
        assert (await task).ids.shape == (1, 3)
        assert num_calls(stubs) == [1, 1]

    asyncio.run(scenario())
