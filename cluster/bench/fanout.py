"""`bench fanout`: a simulated search of very many shards; latency and coverage with stragglers and failures.

The engine, the replicas and the merge are the real ones; the shards' behaviour is drawn before the first query. The
event loop does not sleep: its clock jumps to the next timer. Results of the delays alone are therefore the same on
every machine. A second run of each scenario also advances the clock by the event loop's own work on this machine.
"""

import asyncio
import gc
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.bench.fanout_world import (
    NUM_CODES,
    WARM_UP,
    FanoutBench,
    Scenario,
    World,
    scenarios,
)
from orbithash.cluster.bench.report import environment, print_table, show, write_results
from orbithash.cluster.encoding.skipping_loop import SkippingLoop
from orbithash.cluster.output import say
from orbithash.search import observer as observing
from orbithash.search.engine.engine import SHARD_TIMEOUT_S, Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.answers import ShardAnswer
from orbithash.search.index.merge import Merged, merge
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.queries import Answer, Query

__all__ = ["bench_fanout", "show_fanout"]

_QUERY_TIMEOUT_S = 10.0
_NUM_MERGES = 20

# Queries by code need no model.
_NO_ENCODER: Any = None


class _Counting(Observer):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: observing.Count, number: int = 1) -> None:
        self.counts[name] += number


@dataclass
class _Outcome:
    """The counted queries of one scenario: seconds and coverage of each (0 if it failed), and totals."""

    seconds: list[float] = field(default_factory=list)
    coverages: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_failed: int = 0
    num_wrong: int = 0
    work_s: float = 0.0


def bench_fanout(settings: FanoutBench, out: Path | None = None) -> dict[str, Any]:
    """Simulate and return the result; with `out`, write results.json and a plot there."""
    settings.check()
    say(f"{settings.shards} shards of random codes")
    world = World(settings)
    # Each scenario runs twice: with the delays alone, and with the event loop's own work.
    outcomes: dict[str, tuple[_Outcome, _Outcome]] = {}
    with _quiet():
        for scenario in scenarios(settings):
            say(scenario.name)
            outcomes[scenario.name] = _run(world, settings, scenario, False), _run(world, settings, scenario, True)
    result = {
        **environment("fanout", "orbithash", "numpy"),
        "shards": settings.shards,
        "rows": world.archive.num_rows,
        "bits": settings.bits,
        "k": settings.k,
        "queries": f"{settings.queries} of each scenario, one after the other",
        "delay": f"median {settings.delay_ms:g} ms, {settings.stragglers:g} of calls {settings.slow:g} times as slow",
        "down": f"{settings.down:g} of the replicas, alternately hanging and refusing",
        "shard_timeout_s": SHARD_TIMEOUT_S,
        "seed": settings.seed,
        "wrong_answers": sum(each.num_wrong for pair in outcomes.values() for each in pair),
        **_merge_times(world, settings.k),
        "scenarios": {name: _metrics(*pair) for name, pair in outcomes.items()},
    }
    if settings.actors:
        from orbithash.cluster.bench.fanout_actors import actor_calls

        say(f"1 and {settings.actors} Ray actors")
        result["actors"] = actor_calls(settings.actors, settings.bits, settings.k)
    if out is not None:
        from orbithash.cluster.bench.plots import latency_curves

        write_results(result, out)
        curves = {name: [1e3 * second for second in pair[0].seconds] for name, pair in outcomes.items()}
        latency_curves(curves, settings.queries, out / "fanout.png")
    return result


def show_fanout(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as a table."""
    if as_json:
        show(result, True)
        return
    show({name: value for name, value in result.items() if name not in ("scenarios", "actors")}, False)
    show(result.get("actors", {}), False)
    columns = (
        *("scenario", "p50 ms", "p95", "p99", "with work: p50", "p99", "work ms", "coverage: mean", "min"),
        *("complete", "failed", "extra"),
    )
    rows = [
        (
            name,
            *(f"{each[f'p{share}_ms']:.1f}" for share in (50, 95, 99)),
            *(f"{each[f'with_work_p{share}_ms']:.1f}" for share in (50, 99)),
            f"{each['work_ms']:.1f}",
            f"{each['coverage_mean']:.5f}",
            f"{each['coverage_least']:.4f}",
            f"{each['whole_share']:.2f}",
            str(each["failed_queries"]),
            f"{each['extra_calls_per_query']:.2f}",
        )
        for name, each in result["scenarios"].items()
    ]
    print_table(columns, rows, width=160)
    print("p50 to p99: simulated delays only; with work: also the event loop's own work on this machine, without Ray's")
    print(
        "work: CPU time per query; complete: share of queries that all shards answered; extra: calls of other replicas"
    )


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the engine's log of failed shards, and exclude existing objects from garbage collection."""
    logger = logging.getLogger("orbithash.search.engine")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    # A gateway does not hold these simulated shards and libraries, so their collection is not its cost.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(before)


def _run(world: World, settings: FanoutBench, scenario: Scenario, counts_work: bool) -> _Outcome:
    with asyncio.Runner(loop_factory=lambda: SkippingLoop(counts_work)) as runner:
        return runner.run(_search(world, settings, scenario))


async def _search(world: World, settings: FanoutBench, scenario: Scenario) -> _Outcome:
    observer = _Counting()
    shards, deal = world.clients(scenario, observer), world.deal(scenario)
    snapshot = Snapshot.of(world.archive, shards, deal, _NO_ENCODER)
    engine = Engine(snapshot, shard_timeout_s=scenario.timeout_s, observer=observer)
    exact = merge([world.whole_answer], [settings.k] * NUM_CODES)
    outcome, loop = _Outcome(), asyncio.get_running_loop()
    for turn in range(WARM_UP + settings.queries):
        if turn == WARM_UP:
            observer.counts.clear()
            if scenario.goes_down:
                world.go_down()
            cpu_begun = time.process_time()
        world.turn = turn
        number = turn % NUM_CODES
        begun, answer = loop.time(), None
        with suppress(SearchError):
            answer = await engine.search(Query(code=world.queries[number].tobytes(), k=settings.k), _QUERY_TIMEOUT_S)
        if turn >= WARM_UP:
            outcome.seconds.append(loop.time() - begun)
            outcome.coverages.append(0.0 if answer is None else answer.coverage.fraction)
            outcome.num_failed += answer is None
            outcome.num_wrong += answer is not None and not _is_right(answer, exact[number])
    outcome.work_s = time.process_time() - cpu_begun
    outcome.counts = observer.counts
    return outcome


def _is_right(answer: Answer, exact: Merged) -> bool:
    """Return whether an answer that covers all shards is the exact one; partial answers always count as right."""
    if answer.coverage.fraction < 1:
        return True
    hits = [(hit.distance, hit.id) for hit in answer.hits]
    return answer.ties_at_cutoff == exact.ties and hits == list(
        zip(exact.distances.tolist(), exact.ids.tolist(), strict=True)
    )


def _metrics(outcome: _Outcome, with_work: _Outcome) -> dict[str, Any]:
    metrics: dict[str, Any] = {}
    for prefix, each in (("", outcome), ("with_work_", with_work)):
        for share in (50, 95, 99):
            metrics[f"{prefix}p{share}_ms"] = 1e3 * float(np.percentile(each.seconds, share))
    num_queries, covered = len(outcome.seconds), outcome.coverages
    extra = outcome.counts["hedged_shard_calls"] + outcome.counts["retried_shard_calls"]
    return {
        **metrics,
        "work_ms": 1e3 * with_work.work_s / num_queries,
        "coverage_mean": float(np.mean(covered)),
        "coverage_p05": float(np.percentile(covered, 5)),
        "coverage_least": min(covered),
        "whole_share": sum(each == 1 for each in covered) / num_queries,
        "failed_queries": outcome.num_failed,
        "failed_queries_with_work": with_work.num_failed,
        "failed_calls_per_query": outcome.counts["failed_shard_calls"] / num_queries,
        "extra_calls_per_query": extra / num_queries,
    }


def _merge_times(world: World, k: int) -> dict[str, float]:
    """Return the milliseconds of merging the shards' answers to one query, and of only sorting all their hits."""
    one = [ShardAnswer(each.distances[:1], each.ids[:1], each.ties[:1]) for each in world.answers]

    def sort() -> None:
        distances, ids = (np.concatenate([getattr(each, name)[0] for each in one]) for name in ("distances", "ids"))
        np.lexsort((ids, distances))

    return {"merge_ms": _median_ms(lambda: merge(one, [k])), "sort_alone_ms": _median_ms(sort)}


def _median_ms(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_NUM_MERGES):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(seconds))
