"""A search of very many shards, simulated: what stragglers and failures do to its latency and to its coverage.

The engine, the copies of shards and the merge are the real ones. Each shard answers from real codes, after a delay that
is drawn: it is the same in all scenarios for one query, shard and copy, so that scenarios differ by nothing else.
Nobody waits: the clock of the event loop jumps to whatever is due next. So delays alone give the same figures on every
machine; with the event loop's own work counted in, the clock goes on by what the work takes on this one.
"""

import asyncio
import gc
import json
import logging
import math
import selectors
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar, TypeVarTuple

import numpy as np
import numpy.typing as npt

from orbithash.cluster.progress import say
from orbithash.encoders.codes import Codes, check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search import engine as engine_module
from orbithash.search import observer as observing
from orbithash.search.engine import Engine
from orbithash.search.errors import SearchError
from orbithash.search.merge import Merged, merge
from orbithash.search.observer import Observer
from orbithash.search.queries import Answer, Query
from orbithash.search.replicas import Copy, Latencies, Replicas
from orbithash.search.shard import Ids, Shard, ShardAnswer
from orbithash.search.snapshot import Scope, ShardClient, Snapshot

__all__ = ["FanoutBench", "bench_fanout", "show_fanout"]

# Of one shard: enough for a full answer, few enough for a thousand shards on a small machine.
_LEAST_ROWS = 100
_MOST_SHARDS = 10_000
# So many different queries are asked over and over, and what a shard answers to each is computed once.
_NUM_CODES = 16
# Before anything is counted: copies must be known for a while before a search of one is called slow.
_WARM_UP = 30
# What a query has, and what a shard has as `orbithash serve` runs it.
_QUERY_TIMEOUT_S, _SHARD_TIMEOUT_S = 10.0, 5.0
# Delays of calls that do not straggle: the scatter of a log-normal distribution.
_SCATTER = 0.25
_MERGES = 20

_ANSWERS, _REFUSES, _HANGS = range(3)

# Queries by code ask no model.
_NO_ENCODER: Any = None

Seconds = npt.NDArray[np.float64]
Result = TypeVar("Result")
_Args = TypeVarTuple("_Args")


@dataclass(frozen=True)
class FanoutBench:
    """What is simulated.

    Attributes:
        shards, bits, k: of the search.
        queries: of each scenario, one after the other.
        delay_ms: the median delay of a shard's answer.
        stragglers: share of calls that take `slow` times as long.
        down: share of the copies of shards that go down before the first query that counts: in turn one that hangs
            and one that refuses at once.
        timeout_ms: of a shard, in the scenarios that have a short one.
        seed: of all that is drawn.
        actors: so many shards as real Ray actors are asked, too, to say what a call costs this process; 0: none.
    """

    shards: int = 1000
    bits: int = 64
    k: int = 10
    queries: int = 100
    delay_ms: float = 5.0
    stragglers: float = 0.001
    slow: float = 20.0
    down: float = 0.002
    timeout_ms: float = 50.0
    seed: int = 0
    actors: int = 0

    def check(self) -> None:
        """`InputError` for what cannot be simulated."""
        check_bits(self.bits)
        for name, value, least, most in (
            ("--shards", self.shards, 2, _MOST_SHARDS),
            ("-k", self.k, 1, 1000),
            ("--queries", self.queries, 1, 100_000),
            ("--actors", self.actors, 0, 100),
            ("--seed", self.seed, 0, 2**32 - 1),
        ):
            if not least <= value <= most:
                raise InputError(f"{name} is {value}; from {least} to {most:,} are allowed")
        for name, size, smallest, largest in (
            ("--delay-ms", self.delay_ms, 0.001, 1000.0),
            ("--timeout-ms", self.timeout_ms, 0.001, 5000.0),
            ("--slow", self.slow, 1.0, 1000.0),
            ("--stragglers", self.stragglers, 0.0, 1.0),
            ("--down", self.down, 0.0, 1.0),
        ):
            # Also false for what is no number.
            if not smallest <= size <= largest:
                raise InputError(f"{name} is {size:g}; from {smallest:g} to {largest:g} are allowed")


@dataclass(frozen=True)
class _Scenario:
    """One row of the table; `timeout_s` is that of a shard."""

    name: str
    copies: int = 1
    is_one_shard: bool = False
    straggles: bool = True
    goes_down: bool = False
    hedges: bool = True
    timeout_s: float = _SHARD_TIMEOUT_S


def _scenarios(asked: FanoutBench) -> list[_Scenario]:
    short_s = asked.timeout_ms / 1e3
    short = f"{asked.timeout_ms:g} ms timeout"
    return [
        _Scenario("one shard with all rows", is_one_shard=True),
        _Scenario("no stragglers", straggles=False),
        _Scenario("stragglers"),
        _Scenario(f"stragglers, {short}", timeout_s=short_s),
        _Scenario("stragglers, 2 copies, no hedging", copies=2, hedges=False),
        _Scenario("stragglers, 2 copies", copies=2),
        _Scenario("stragglers, down", goes_down=True),
        _Scenario(f"stragglers, down, {short}", goes_down=True, timeout_s=short_s),
        _Scenario("stragglers, down, 2 copies, no hedging", copies=2, goes_down=True, hedges=False),
        _Scenario("stragglers, down, 2 copies", copies=2, goes_down=True),
    ]


class _World:
    """The shards, and all that will happen to their copies: decided before the first query."""

    def __init__(self, asked: FanoutBench) -> None:
        rng = np.random.default_rng(asked.seed)
        num_turns = _WARM_UP + asked.queries
        rows = max(_LEAST_ROWS, asked.k)
        num_rows = asked.shards * rows
        codes, self.queries = (pack(rng.random((count, asked.bits)) < 0.5) for count in (num_rows, _NUM_CODES))
        ids = np.arange(num_rows, dtype=np.uint64)
        parts = [slice(start, start + rows) for start in range(0, num_rows, rows)]
        self.shards = [Shard(ids[part], codes[part], asked.bits) for part in parts]
        self.whole = Shard(ids, codes, asked.bits)
        self.answers = [shard.search(self.queries, asked.k) for shard in self.shards]
        self.whole_answer = self.whole.search(self.queries, asked.k)
        self.archive = _Archive(asked.bits, num_rows)
        shape = (2, num_turns, asked.shards)
        self.delays_s: Seconds = asked.delay_ms / 1e3 * rng.lognormal(0, _SCATTER, shape)
        self.is_slow = rng.random(shape) < asked.stragglers
        self.slow = asked.slow
        # Of each copy another set of shards, so that now and then both copies of one are down.
        self.fates = np.full((2, asked.shards), _ANSWERS)
        num_down = math.ceil(round(asked.down * asked.shards, 6))
        for of_copy in self.fates:
            of_copy[rng.permutation(asked.shards)[:num_down]] = np.resize([_HANGS, _REFUSES], num_down)
        # The query that is being asked.
        self.turn = 0


class _Archive:
    """What the engine reads of an archive. Hits need their keys only, and those are in memory."""

    model_id, version = "simulated", 1

    def __init__(self, bits: int, num_rows: int) -> None:
        self.bits, self.num_rows = bits, num_rows

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        return {}

    def take(self, ids: Ids, columns: list[str]) -> Any:
        return self.scan(columns)[1].take(ids)

    def scan(self, columns: list[str], among: Ids | None = None) -> tuple[Ids, Any]:
        import pyarrow as pa

        ids = np.arange(self.num_rows, dtype=np.uint64)
        types = {"lon": pa.float64(), "lat": pa.float64(), "datetime": pa.timestamp("us", "UTC")}
        known = {"key": pa.array(ids).cast(pa.string())}
        return ids, pa.table(
            {name: known.get(name, pa.nulls(len(ids), types.get(name, pa.string()))) for name in columns}
        )


class _SimulatedCopy:
    """One copy of a shard."""

    num_replicas = num_healthy = 1

    def __init__(self, world: _World, scenario: _Scenario, shard: int, copy: int) -> None:
        self._world, self._scenario = world, scenario
        self._shard, self._copy = shard, copy
        self._answer = world.whole_answer if scenario.is_one_shard else world.answers[shard]
        self.num_rows = (world.whole if scenario.is_one_shard else world.shards[shard]).num_rows

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        world, turn = self._world, self._world.turn
        place = self._copy, turn, self._shard
        if self._scenario.goes_down and turn >= _WARM_UP:
            fate = world.fates[self._copy, self._shard]
            if fate == _HANGS:
                await asyncio.get_running_loop().create_future()
            if fate == _REFUSES:
                raise ConnectionError("simulated: it is down")
        is_slow = self._scenario.straggles and world.is_slow[place]
        await asyncio.sleep(float(world.delays_s[place]) * (world.slow if is_slow else 1))
        one = slice(turn % _NUM_CODES, turn % _NUM_CODES + 1)
        return ShardAnswer(self._answer.distances[one], self._answer.ids[one], self._answer.ties[one])


class _Impatient(selectors.SelectSelector):
    """Does not wait, but notes for how long it would have."""

    def __init__(self) -> None:
        super().__init__()
        self.skipped_s = 0.0

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        assert timeout is not None, "nothing will ever happen"
        self.skipped_s += max(0.0, timeout)
        # No file is waited for.
        return []


class _SkippingLoop(asyncio.SelectorEventLoop):
    """An event loop whose clock shows the time that would have been waited; with `counts_work` also that of work."""

    def __init__(self, counts_work: bool) -> None:
        self._impatient, self._counts_work = _Impatient(), counts_work
        super().__init__(self._impatient)

    def time(self) -> float:
        """See `asyncio`."""
        return self._impatient.skipped_s + (time.perf_counter() if self._counts_work else 0.0)

    def run_in_executor(
        self, executor: Executor | None, func: Callable[[*_Args], Result], *args: *_Args
    ) -> asyncio.Future[Result]:
        """At once: the clock would not wait for a thread."""
        future: asyncio.Future[Result] = self.create_future()
        future.set_result(func(*args))
        return future


class _NeverSlow(Latencies):
    """No search is called slow, so none is sent to a second copy before the first one fails."""

    @property
    def hedge_s(self) -> float:
        return 1e6


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
    from orbithash.cluster.bench import circumstances

    asked.check()
    say(f"{asked.shards} shards of random codes")
    world = _World(asked)
    # Twice each: by the delays alone, and with the event loop's own work.
    outcomes: dict[str, tuple[_Outcome, _Outcome]] = {}
    with _quiet():
        for scenario in _scenarios(asked):
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
        "shard_timeout_s": _SHARD_TIMEOUT_S,
        "seed": asked.seed,
        "wrong_answers": sum(each.num_wrong for pair in outcomes.values() for each in pair),
        **_merge_times(world, asked.k),
        "scenarios": {name: _figures(*pair) for name, pair in outcomes.items()},
    }
    if asked.actors:
        from orbithash.cluster.bench_fanout_actors import actor_calls

        say(f"1 and {asked.actors} Ray actors")
        result["actors"] = actor_calls(asked.actors, asked.bits, asked.k)
    if out is not None:
        from orbithash.cluster.bench_plots import latency_curves

        out.mkdir(parents=True, exist_ok=True)
        (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
        curves = {name: [1e3 * second for second in pair[0].seconds] for name, pair in outcomes.items()}
        latency_curves(curves, asked.queries, out / "fanout.png")
    return result


def show_fanout(result: dict[str, Any], as_json: bool) -> None:
    """Prints a result for a machine or for a person."""
    from orbithash.cluster.bench import show

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


def _run(world: _World, asked: FanoutBench, scenario: _Scenario, counts_work: bool) -> _Outcome:
    with asyncio.Runner(loop_factory=lambda: _SkippingLoop(counts_work)) as runner:
        return runner.run(_ask(world, asked, scenario))


async def _ask(world: _World, asked: FanoutBench, scenario: _Scenario) -> _Outcome:
    observer = _Counting()
    snapshot = Snapshot.of(world.archive, _shards(world, asked, scenario, observer), _NO_ENCODER)
    snapshot.rows.warm()
    engine = Engine(snapshot, shard_timeout_s=scenario.timeout_s, observer=observer)
    exact = merge([world.whole_answer], [asked.k] * _NUM_CODES)
    outcome, loop = _Outcome(), asyncio.get_running_loop()
    for turn in range(_WARM_UP + asked.queries):
        if turn == _WARM_UP:
            observer.counts.clear()
            worked = time.process_time()
        world.turn = turn
        number = turn % _NUM_CODES
        begun, answer = loop.time(), None
        with suppress(SearchError):
            answer = await engine.search(Query(code=world.queries[number].tobytes(), k=asked.k), _QUERY_TIMEOUT_S)
        if turn >= _WARM_UP:
            outcome.seconds.append(loop.time() - begun)
            outcome.coverages.append(0.0 if answer is None else answer.coverage.fraction)
            outcome.num_failed += answer is None
            outcome.num_wrong += answer is not None and not _is_right(answer, exact[number])
    outcome.work_s = time.process_time() - worked
    outcome.counts = observer.counts
    return outcome


def _shards(world: _World, asked: FanoutBench, scenario: _Scenario, observer: Observer) -> list[ShardClient]:
    return [
        Replicas(
            [_SimulatedCopy(world, scenario, shard, copy) for copy in range(scenario.copies)],
            [Copy() for _ in range(scenario.copies)],
            Latencies() if scenario.hedges else _NeverSlow(),
            observer,
        )
        for shard in range(1 if scenario.is_one_shard else asked.shards)
    ]


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


def _merge_times(world: _World, k: int) -> dict[str, float]:
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
