import asyncio
import gc

import numpy as np
import pytest
from search_parts import StubShard, build_shards, random_codes, small_case, snapshot_of

from orbithash.search.engine.engine import Engine
from orbithash.search.index.answers import Scope
from orbithash.search.index.shard import Shard
from orbithash.search.protocol.queries import Query
from orbithash.search.shards import replicas as replicas_module
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard, ReplicaWatch

SCOPE = Scope()
CODES = random_codes(np.random.default_rng(0), 30, 16)
SHARD = Shard(np.arange(30, dtype=np.uint64), CODES, 16)


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


def test_the_least_loaded_copy_is_asked():
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
        expected = SHARD.search(CODES[:1], 3)
        assert all((answer.ids == expected.ids).all() for answer in answers)
        assert [copy.num_in_flight for copy in copies] == [0, 0, 0]

    asyncio.run(scenario())


def test_a_failing_copy_costs_one_more_attempt_and_is_asked_last():
    async def scenario():
        group, stubs, copies = replicas(fails, nothing)
        answer = await search(group)
        assert (answer.ids == SHARD.search(CODES[:1], 3).ids).all()
        assert num_calls(stubs) == [1, 1]
        assert (group.num_replicas, group.num_healthy) == (2, 1)
        await search(group)
        assert num_calls(stubs) == [1, 2]
        copies[0].is_healthy = True
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


def test_a_lone_copy_that_fails_is_a_failed_shard():
    async def scenario():
        group, stubs, _ = replicas(fails)
        with pytest.raises(RuntimeError, match="gone"):
            await search(group)
        assert num_calls(stubs) == [1]

    asyncio.run(scenario())


def test_a_slow_copy_is_raced_by_another():
    async def scenario():
        ended = asyncio.Event()

        async def hangs():
            try:
                await asyncio.Event().wait()
            finally:
                ended.set()

        group, stubs, copies = replicas(hangs, nothing, latencies=known_latencies())
        answer = await search(group)
        assert (answer.ids == SHARD.search(CODES[:1], 3).ids).all()
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


def test_silence_of_all_copies_is_a_failure_in_time():
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
    assert latencies.delay_s == 0.5, "nothing is known yet"
    for milliseconds in range(1, 101):
        latencies.took(milliseconds / 1000)
    assert latencies.delay_s == pytest.approx(0.095)


@pytest.mark.parametrize("known", [Hedging, known_latencies])
def test_a_copy_that_falls_silent_is_asked_last_in_the_end(known):
    """Also where it is silent from the start."""

    async def scenario():
        group, stubs, copies = replicas(never, nothing, latencies=known())
        for number in range(1, 6):
            answer = await search(group)
            assert (answer.ids == SHARD.search(CODES[:1], 3).ids).all()
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
def test_replicas_that_hang_are_not_asked_until_they_answer_a_probe(monkeypatch, num_replicas):
    """Each search would wait for its whole time-out."""
    monkeypatch.setattr(replicas_module, "_SILENT_S", 0.05)
    monkeypatch.setattr(replicas_module, "_PROBE_EVERY_S", 0.001)

    async def scenario():
        case = small_case()
        shard, other = build_shards(case.ids, case.codes, case.bits, 2)
        stubs = [StubShard(shard, never) for _ in range(num_replicas)]
        replicas = [Replica() for _ in stubs]
        snapshot = snapshot_of(case, [ReplicatedShard(stubs, replicas, Hedging()), StubShard(other, nothing)])
        engine = Engine(snapshot, shard_timeout_s=0.1)
        # As long as a search may take is what the first ones wait; those that follow do not wait at all.
        while snapshot.shards[0].num_healthy:
            assert (await engine.search(Query(code=b"ab"), 60.0)).coverage.answered_shards == 1
        calls = num_calls(stubs)
        for _ in range(5):
            assert (await engine.search(Query(code=b"ab"), 60.0)).coverage.answered_shards == 1
        assert num_calls(stubs) == calls
        is_back, probed = asyncio.Event(), asyncio.Event()

        async def probe():
            probed.set()
            await is_back.wait()

        watch = ReplicaWatch([(replica, probe) for replica in replicas])
        await asyncio.wait_for(probed.wait(), 60)
        assert not snapshot.shards[0].num_healthy
        for stub in stubs:
            stub.before = nothing
        is_back.set()
        while snapshot.shards[0].num_healthy < num_replicas:
            await asyncio.sleep(0.001)
        assert (await engine.search(Query(code=b"ab"), 60.0)).coverage.fraction == 1
        watch.close()

    asyncio.run(scenario())


def test_short_deadlines_do_not_make_a_replica_silent():
    """Its answers in between count: nobody can take a shard away from others by impatience."""
    replica = Replica()
    for _ in range(10_000):
        replica.abandoned(0.001)
        replica.abandoned(0.001)
        replica.answered()
    assert replica.is_healthy


def test_a_watch_survives_errors_of_probes_and_probes_replicas_apart(monkeypatch):
    monkeypatch.setattr(replicas_module, "_PROBE_EVERY_S", 0.001)

    class Panic(BaseException):
        pass

    async def scenario():
        replicas = [Replica(), Replica()]
        for replica in replicas:
            replica.failed()
        outcomes = iter([RuntimeError("dead"), Panic("native code"), TimeoutError()])

        async def fails_first():
            for outcome in outcomes:
                raise outcome

        watch = ReplicaWatch([(replicas[0], never), (replicas[1], fails_first)])
        while not replicas[1].is_healthy:
            await asyncio.sleep(0.001)
        assert not replicas[0].is_healthy
        watch.close()

    asyncio.run(scenario())


def hedged_share(num_searches, scatter, with_losers=True):
    """The share of searches that are sent to a second replica, by the rules of `ReplicatedShard`, in simulated time."""
    rng = np.random.default_rng(1)
    hedging, num_hedges = Hedging(), 0
    for first, second in rng.lognormal(-4, scatter, (num_searches, 2)):
        hedging.began()
        delay = hedging.delay_s
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
    monkeypatch.setattr(replicas_module, "_HEDGES_PER_SEARCH", 1.0)
    assert hedged_share(4000, scatter, with_losers=False) > hedged_share(4000, scatter)


def test_the_time_of_a_call_that_lost_counts():
    async def scenario():
        hedging = known_latencies()
        group, _, _ = replicas(never, nothing, latencies=hedging)
        before = len(hedging._seconds)
        await search(group)
        while len(hedging._seconds) < before + 2:
            await asyncio.sleep(0)
        assert sorted(hedging._seconds)[-1] >= hedging.delay_s

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
