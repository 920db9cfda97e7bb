"""A search of very many shards, simulated: what stragglers and failures do to its latency and to its coverage.

The engine, the copies of shards and the merge are the real ones; what the shards do is decided before the first query.
Nobody waits: the clock of the event loop jumps to whatever is due next. So delays alone give the same figures on every
machine; with the event loop's own work counted in, the clock goes on by what the work takes on this one.
"""

import asyncio
import gc
import json
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
    SHARD_TIMEOUT_S,
    WARM_UP,
    FanoutBench,
    Scenario,
    World,
    scenarios,
)
from orbithash.cluster.encoding.skipping_loop import SkippingLoop
from orbithash.cluster.output import say
from orbithash.search import observer as observing
from orbithash.search.engine import engine as engine_module
from orbithash.search.engine.engine import Engine
from orbithash.search.engine.snapshot import Snapshot
from orbithash.search.index.merge import Merged, merge
from orbithash.search.index.shard import ShardAnswer
from orbithash.search.observer import Observer
from orbithash.search.protocol.errors import SearchError
from orbithash.search.protocol.queries import Answer, Query

__all__ = ["bench_fanout", "show_fanout"]

# What a query has.
_QUERY_TIMEOUT_S = 10.0
_MERGES = 20

# Queries by code ask no model.
_NO_ENCODER: Any = None


class _Counting(Observer):
    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def count(self, name: observing.Count, number: int = 1) -> None:
        self.counts[name] += number


@dataclass
class _Outcome:
    """Of the queries of one scenario that count: the time and the coverage of each, 0 where it failed."""

    seconds: list[float] = field(default_factory=list)
    coverages: list[float] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    num_failed: int = 0
    num_wrong: int = 0
    work_s: float = 0.0


def bench_fanout(asked: FanoutBench, out: Path | None = None) -> dict[str, Any]:
    """Simulates; with `out`, leaves results.json and a plot there."""
    from orbithash.cluster.bench.throughput import circumstances

    asked.check()
    say(f"{asked.shards} shards of random codes")
    world = World(asked)
    # Twice each: by the delays alone, and with the event loop's own work.
    outcomes: dict[str, tuple[_Outcome, _Outcome]] = {}
    with _quiet():
        for scenario in scenarios(asked):
            say(scenario.name)
            outcomes[scenario.name] = _run(world, asked, scenario, False), _run(world, asked, scenario, True)
    result = {
        **circumstances("fanout", "orbithash", "numpy"),
        "shards": asked.shards,
        "rows": world.whole.num_rows,
        "bits": asked.bits,
        "k": asked.k,
        "queries": f"{asked.queries} of each scenario, one after the other",
        "delay": f"median {asked.delay_ms:g} ms, {asked.stragglers:g} of calls {asked.slow:g} times as slow",
        "down": f"{asked.down:g} of the copies, in turn hanging and refusing",
        "shard_timeout_s": SHARD_TIMEOUT_S,
        "seed": asked.seed,
        "wrong_answers": sum(each.num_wrong for pair in outcomes.values() for each in pair),
        **_merge_times(world, asked.k),
        "scenarios": {name: _figures(*pair) for name, pair in outcomes.items()},
    }
    if asked.actors:
        from orbithash.cluster.bench.fanout_actors import actor_calls

        say(f"1 and {asked.actors} Ray actors")
        result["actors"] = actor_calls(asked.actors, asked.bits, asked.k)
    if out is not None:
        from orbithash.cluster.bench.plots import latency_curves

        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        curves = {name: [1e3 * second for second in pair[0].seconds] for name, pair in outcomes.items()}
        latency_curves(curves, asked.queries, out / "fanout.png")
    return result


def show_fanout(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result for a machine or for a person."""
    from orbithash.cluster.bench.throughput import show

    if as_json:
        show(result, True)
        return
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    show({name: value for name, value in result.items() if name not in ("scenarios", "actors")}, False)
    show(result.get("actors", {}), False)
    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for head in (
        *("scenario", "p50 ms", "p95", "p99", "with work: p50", "p99", "work ms", "coverage: mean", "least"),
        *("whole", "failed", "extra"),
    ):
        table.add_column(head, justify="left" if head == "scenario" else "right")
    for name, each in result["scenarios"].items():
        table.add_row(
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
    Console(width=None if Console().is_terminal else 160).print(table)
    print("p50 to p99: by the drawn delays alone; with work: with the event loop's own on this machine, without Ray's")
    print("work: CPU time of a query; whole: share of queries that all shards answered; extra: calls of second copies")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without a line of the log for each shard that does not answer, nor pauses to collect what is not garbage."""
    logger = logging.getLogger(engine_module.__name__)
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    # Of the shards and libraries that are here, which no gateway has.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        logger.setLevel(before)


def _run(world: World, asked: FanoutBench, scenario: Scenario, counts_work: bool) -> _Outcome:
    with asyncio.Runner(loop_factory=lambda: SkippingLoop(counts_work)) as runner:
        return runner.run(_ask(world, asked, scenario))


async def _ask(world: World, asked: FanoutBench, scenario: Scenario) -> _Outcome:
    observer = _Counting()
    snapshot = Snapshot.of(world.archive, world.clients(scenario, observer), _NO_ENCODER)
    snapshot.rows.warm()
    engine = Engine(snapshot, shard_timeout_s=scenario.timeout_s, observer=observer)
    exact = merge([world.whole_answer], [asked.k] * NUM_CODES)
    outcome, loop = _Outcome(), asyncio.get_running_loop()
    for turn in range(WARM_UP + asked.queries):
        if turn == WARM_UP:
            observer.counts.clear()
            worked = time.process_time()
        world.turn = turn
        number = turn % NUM_CODES
        begun, answer = loop.time(), None
        with suppress(SearchError):
            answer = await engine.search(Query(code=world.queries[number].tobytes(), k=asked.k), _QUERY_TIMEOUT_S)
        if turn >= WARM_UP:
            outcome.seconds.append(loop.time() - begun)
            outcome.coverages.append(0.0 if answer is None else answer.coverage.fraction)
            outcome.num_failed += answer is None
            outcome.num_wrong += answer is not None and not _is_right(answer, exact[number])
    outcome.work_s = time.process_time() - worked
    outcome.counts = observer.counts
    return outcome


def _is_right(answer: Answer, exact: Merged) -> bool:
    """Whether an answer that covers all is the exact one. Of others only what they cover is promised."""
    if answer.coverage.fraction < 1:
        return True
    hits = [(hit.distance, hit.id) for hit in answer.hits]
    return answer.ties_at_cutoff == exact.ties and hits == list(
        zip(exact.distances.tolist(), exact.ids.tolist(), strict=True)
    )


def _figures(outcome: _Outcome, with_work: _Outcome) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for prefix, each in (("", outcome), ("with_work_", with_work)):
        for share in (50, 95, 99):
            figures[f"{prefix}p{share}_ms"] = 1e3 * float(np.percentile(each.seconds, share))
    num_queries, covered = len(outcome.seconds), outcome.coverages
    extra = outcome.counts["hedged_shard_calls"] + outcome.counts["retried_shard_calls"]
    return {
        **figures,
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
    """Milliseconds of merging the shards' answers to one query, beside what sorting all their hits takes alone."""
    one = [ShardAnswer(each.distances[:1], each.ids[:1], each.ties[:1]) for each in world.answers]

    def sort() -> None:
        distances, ids = (np.concatenate([getattr(each, name)[0] for each in one]) for name in ("distances", "ids"))
        np.lexsort((ids, distances))

    return {"merge_ms": _median_ms(lambda: merge(one, [k])), "sort_alone_ms": _median_ms(sort)}


def _median_ms(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(_MERGES):
        begun = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - begun)
    return 1e3 * float(np.median(seconds))
