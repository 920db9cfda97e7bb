"""The simulated fan-out: its clock, its repeatability, and the effects of delays and failures."""

import asyncio
import json
import time
from dataclasses import replace

import numpy as np
import pytest

from orbithash.cluster.bench import fanout
from orbithash.cluster.bench import fanout_world as simulated
from orbithash.cluster.bench.fanout import bench_fanout
from orbithash.cluster.bench.fanout_world import WARM_UP, FanoutBench, Scenario, World
from orbithash.cluster.encoding.skipping_loop import SkippingLoop
from orbithash.encoders.errors import InputError
from orbithash.search.index.answers import ShardAnswer

SMALL = FanoutBench(shards=20, queries=40, stragglers=0.02, slow=50, down=0.1, timeout_ms=30, seed=4)


@pytest.fixture(scope="module")
def world():
    return World(SMALL)


def outcome(world, counts_work=False, **scenario):
    with fanout._quiet():
        return fanout._run(world, SMALL, Scenario("one", **scenario), counts_work)


@pytest.mark.parametrize("counts_work", [False, True])
def test_the_clock_skips_waits(counts_work):
    async def sleep():
        loop = asyncio.get_running_loop()
        begun = loop.time()
        await asyncio.gather(asyncio.sleep(1000), asyncio.sleep(10))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(500):
                await loop.create_future()
        assert await asyncio.to_thread(lambda: 3) == 3
        time.sleep(0.05)
        return loop.time() - begun

    begun = time.perf_counter()
    with asyncio.Runner(loop_factory=lambda: SkippingLoop(counts_work)) as runner:
        shown = runner.run(sleep())
    worked = time.perf_counter() - begun
    assert 1500 + 0.05 * counts_work <= shown <= 1500 + worked * counts_work + 1e-6


def expected_seconds(world, straggles):
    """Return the seconds of each counted query: those of its slowest shard."""
    is_slow = world.is_slow[0, WARM_UP:] & straggles
    return (world.delays_s[0, WARM_UP:] * np.where(is_slow, SMALL.slow, 1)).max(axis=1)


@pytest.mark.parametrize("straggles", [False, True])
def test_a_query_takes_as_long_as_the_slowest_shard(world, straggles):
    found = outcome(world, straggles=straggles)
    assert found.seconds == pytest.approx(expected_seconds(world, straggles).tolist())
    assert found.coverages == [1.0] * SMALL.queries
    assert (found.num_failed, found.num_wrong, found.counts.total()) == (0, 0, 0)


def test_a_short_timeout_drops_slow_shards(world):
    late = (world.delays_s * np.where(world.is_slow, SMALL.slow, 1))[0, WARM_UP:] > 0.03
    found = outcome(world, timeout_s=0.03)
    assert found.coverages == pytest.approx((1 - late.mean(axis=1)).tolist())
    assert 0 < np.mean(found.coverages) < 1
    assert found.seconds == pytest.approx(np.minimum(expected_seconds(world, True), 0.03).tolist())
    assert found.counts["failed_shard_calls"] == late.sum()


def test_shards_that_are_down(world):
    # Two of twenty shards: one hangs, so that the first query waits until pings find out; one refuses calls.
    found = outcome(world, straggles=False, goes_down=True)
    assert found.coverages == pytest.approx([0.9] * SMALL.queries)
    assert found.seconds[0] == pytest.approx(2.5)
    assert max(found.seconds[1:]) < 0.1, "a replica that is out is not called again before it answers a ping"
    assert found.num_failed == 0


def test_a_second_replica_answers_for_the_first(world):
    assert not ((world.fates != simulated.ANSWERS).all(axis=0)).any(), "with this seed no shard has both replicas down"
    found = outcome(world, replicas=2, straggles=False, goes_down=True)
    assert found.coverages == [1.0] * SMALL.queries
    assert max(found.seconds) < 0.1
    assert found.counts["retried_shard_calls"] + found.counts["hedged_shard_calls"] >= SMALL.queries
    # Without hedging no other replica is called until the one that hangs is out.
    found = outcome(world, replicas=2, straggles=False, goes_down=True, hedges=False)
    assert found.coverages == [1.0] * SMALL.queries
    assert found.seconds[0] == pytest.approx(2.5, abs=0.1)
    assert max(found.seconds[1:]) < 0.1


def test_hedging_shortens_slow_queries(world):
    with_hedges, without = (outcome(world, replicas=2, hedges=hedges) for hedges in (True, False))
    assert without.seconds == pytest.approx(expected_seconds(world, True).tolist())
    assert without.counts["hedged_shard_calls"] == 0
    assert np.percentile(with_hedges.seconds, 90) < 0.5 * np.percentile(without.seconds, 90)
    assert 0 < with_hedges.counts["hedged_shard_calls"] < 0.2 * SMALL.queries * SMALL.shards


def test_no_shard_answers(world, monkeypatch):
    monkeypatch.setattr(world, "fates", np.full_like(world.fates, simulated.REFUSES))
    found = outcome(world, goes_down=True)
    assert found.num_failed == SMALL.queries
    assert found.coverages == [0.0] * SMALL.queries


def test_work_adds_to_the_time_only_if_it_is_counted(world):
    without, with_work = outcome(world), outcome(world, counts_work=True)
    assert all(work > wait for work, wait in zip(with_work.seconds, without.seconds, strict=True))
    assert with_work.work_s > 0


def test_the_seed_decides_delays_and_failures(world):
    other, same = (World(replace(SMALL, seed=seed)) for seed in (SMALL.seed + 1, SMALL.seed))
    for name in ("delays_s", "is_slow", "fates"):
        assert (getattr(world, name) == getattr(same, name)).all()
        assert (getattr(world, name) != getattr(other, name)).any()


def test_wrong_answers_are_found(world, monkeypatch):
    wrong = [ShardAnswer(each.distances, each.ids + np.uint64(1), each.ties) for each in world.answers]
    monkeypatch.setattr(world, "answers", wrong)
    assert outcome(world).num_wrong == SMALL.queries


def test_the_whole_bench(tmp_path, cli, capsys):
    args = ["--shards", "12", "--queries", "5", "--stragglers", "0.05", "--down", "0.1"]
    results = [json.loads(cli("bench", "fanout", *args, "--json", *more).out) for more in (("--out", tmp_path), ())]
    assert json.loads((tmp_path / "results.json").read_text()) == results[0]
    assert (tmp_path / "fanout.png").read_bytes().startswith(b"\x89PNG")
    simulated_metrics = [
        {
            name: [each[f"p{share}_ms"] for share in (50, 95, 99)] + [each["coverage_mean"], each["whole_share"]]
            for name, each in result["scenarios"].items()
        }
        for result in results
    ]
    assert simulated_metrics[0] == simulated_metrics[1]
    result = results[0]
    assert (result["wrong_answers"], result["rows"]) == (0, 1200)
    assert min(result["merge_ms"], result["sort_alone_ms"]) > 0
    one, two = result["scenarios"]["stragglers, down"], result["scenarios"]["stragglers, down, 2 replicas"]
    assert one["coverage_mean"] < two["coverage_mean"] == 1
    capsys.readouterr()
    fanout.show_fanout(result, False)
    shown = capsys.readouterr().out
    assert all(name in shown for name in result["scenarios"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"shards": 1}, "--shards is 1; from 2 to 10,000"),
        ({"bits": 4}, "4"),
        ({"k": 0}, "-k is 0"),
        ({"queries": 0}, "--queries is 0"),
        ({"delay_ms": 0.0}, "--delay-ms is 0"),
        ({"stragglers": 1.5}, "--stragglers is 1.5"),
        ({"stragglers": float("nan")}, "--stragglers is nan"),
        ({"slow": 0.5}, "--slow is 0.5"),
        ({"down": -0.1}, "--down is -0.1"),
        ({"timeout_ms": 6000.0}, "--timeout-ms is 6000"),
        ({"seed": -1}, "--seed is -1"),
        ({"actors": 101}, "--actors is 101"),
    ],
)
def test_invalid_settings(settings, message):
    with pytest.raises(InputError, match=message):
        bench_fanout(replace(SMALL, **settings))


@pytest.mark.slow
def test_calls_of_real_actors(start):
    process = start("bench", "fanout", "--shards", "2", "--queries", "1", "--actors", "3", "-k", "5", "--json")
    assert process.wait(240) == 0, process.err.read_text()
    metrics = json.loads(process.out.read_text())["actors"]
    measured = ("p50_ms", "lone_cpu_ms", "lone_shards_cpu_ms", "batched_queries_per_s", "batched_cpu_ms")
    names = {f"actors_{count}_{name}" for count in (1, 3) for name in (*measured, "batched_shards_cpu_ms")}
    assert metrics.keys() == names | {
        f"{name}_ms_{how}" for name in ("call", "shard_call") for how in ("lone", "batched")
    }
    assert min(metrics[name] for name in names) > 0
