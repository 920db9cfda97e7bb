"""What a simulated search of very many shards asks, and all that will happen to its shards.

Each shard answers from real codes, after a delay that is drawn: it is the same in all scenarios for one query, shard
and copy, so that scenarios differ by nothing else.
"""

import asyncio
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from orbithash.encoders.codes import Codes, check_bits, pack
from orbithash.encoders.errors import InputError
from orbithash.search.engine.replicas import Copy, Latencies, Replicas
from orbithash.search.engine.snapshot import Scope, ShardClient
from orbithash.search.index.shard import Ids, Shard, ShardAnswer
from orbithash.search.observer import Observer

__all__ = ["NUM_CODES", "SHARD_TIMEOUT_S", "WARM_UP", "FanoutBench", "Scenario", "World", "scenarios"]

# Of one shard: enough for a full answer, few enough for a thousand shards on a small machine.
_LEAST_ROWS = 100
_MOST_SHARDS = 10_000
# So many different queries are asked over and over, and what a shard answers to each is computed once.
NUM_CODES = 16
# Before anything is counted: copies must be known for a while before a search of one is called slow.
WARM_UP = 30
# What a shard has as `orbithash serve` runs it.
SHARD_TIMEOUT_S = 5.0
# Delays of calls that do not straggle: the scatter of a log-normal distribution.
_SCATTER = 0.25

ANSWERS, REFUSES, HANGS = range(3)

Seconds = npt.NDArray[np.float64]


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
class Scenario:
    """One row of the table; `timeout_s` is that of a shard."""

    name: str
    copies: int = 1
    is_one_shard: bool = False
    straggles: bool = True
    goes_down: bool = False
    hedges: bool = True
    timeout_s: float = SHARD_TIMEOUT_S


def scenarios(asked: FanoutBench) -> list[Scenario]:
    """The rows of the table, each of which is compared with those above it."""
    short_s = asked.timeout_ms / 1e3
    short = f"{asked.timeout_ms:g} ms timeout"
    return [
        Scenario("one shard with all rows", is_one_shard=True),
        Scenario("no stragglers", straggles=False),
        Scenario("stragglers"),
        Scenario(f"stragglers, {short}", timeout_s=short_s),
        Scenario("stragglers, 2 copies, no hedging", copies=2, hedges=False),
        Scenario("stragglers, 2 copies", copies=2),
        Scenario("stragglers, down", goes_down=True),
        Scenario(f"stragglers, down, {short}", goes_down=True, timeout_s=short_s),
        Scenario("stragglers, down, 2 copies, no hedging", copies=2, goes_down=True, hedges=False),
        Scenario("stragglers, down, 2 copies", copies=2, goes_down=True),
    ]


class World:
    """The shards, and all that will happen to their copies: decided before the first query."""

    def __init__(self, asked: FanoutBench) -> None:
        rng = np.random.default_rng(asked.seed)
        num_turns = WARM_UP + asked.queries
        rows = max(_LEAST_ROWS, asked.k)
        num_rows = asked.shards * rows
        codes, self.queries = (pack(rng.random((count, asked.bits)) < 0.5) for count in (num_rows, NUM_CODES))
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
        self.fates = np.full((2, asked.shards), ANSWERS)
        num_down = math.ceil(round(asked.down * asked.shards, 6))
        for of_copy in self.fates:
            of_copy[rng.permutation(asked.shards)[:num_down]] = np.resize([HANGS, REFUSES], num_down)
        # The query that is being asked.
        self.turn = 0

    def clients(self, scenario: Scenario, observer: Observer) -> list[ShardClient]:
        """The shards as an engine asks them in a scenario."""
        return [
            Replicas(
                [_SimulatedCopy(self, scenario, shard, copy) for copy in range(scenario.copies)],
                [Copy() for _ in range(scenario.copies)],
                Latencies() if scenario.hedges else _NeverSlow(),
                observer,
            )
            for shard in range(1 if scenario.is_one_shard else len(self.shards))
        ]


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

    def __init__(self, world: World, scenario: Scenario, shard: int, copy: int) -> None:
        self._world, self._scenario = world, scenario
        self._shard, self._copy = shard, copy
        self._answer = world.whole_answer if scenario.is_one_shard else world.answers[shard]
        self.num_rows = (world.whole if scenario.is_one_shard else world.shards[shard]).num_rows

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        world, turn = self._world, self._world.turn
        place = self._copy, turn, self._shard
        if self._scenario.goes_down and turn >= WARM_UP:
            fate = world.fates[self._copy, self._shard]
            if fate == HANGS:
                await asyncio.get_running_loop().create_future()
            if fate == REFUSES:
                raise ConnectionError("simulated: it is down")
        is_slow = self._scenario.straggles and world.is_slow[place]
        await asyncio.sleep(float(world.delays_s[place]) * (world.slow if is_slow else 1))
        one = slice(turn % NUM_CODES, turn % NUM_CODES + 1)
        return ShardAnswer(self._answer.distances[one], self._answer.ids[one], self._answer.ties[one])


class _NeverSlow(Latencies):
    """No search is called slow, so none is sent to a second copy before the first one fails."""

    @property
    def hedge_s(self) -> float:
        return 1e6
