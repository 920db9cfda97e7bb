"""The settings, scenarios and simulated shards of `bench fanout`.

Each shard answers from real codes after a random delay. The delay of a query, shard and replica is the same in all
scenarios, so that scenarios differ only in what they name.
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
from orbithash.search.engine.engine import SHARD_TIMEOUT_S
from orbithash.search.index.answers import Counts, Ids, Scope, ShardAnswer
from orbithash.search.index.rankings import GroupName, Ranked
from orbithash.search.observer import Observer
from orbithash.search.segments.dealing import Deal
from orbithash.search.segments.segment import Segment
from orbithash.search.shards.interface import ShardClient
from orbithash.search.shards.replicas import Hedging, Replica, ReplicatedShard
from orbithash.v1 import search_pb2

__all__ = ["NUM_CODES", "WARM_UP", "FanoutBench", "Scenario", "World", "scenarios"]

# Rows of a shard: enough for a full answer, few enough for a thousand shards on a small machine.
_MIN_ROWS = 100
_MAX_SHARDS = 10_000
# Number of different queries, which are repeated; each shard's answer to each is computed once.
NUM_CODES = 16
# Queries before anything is counted: hedging needs the latencies of earlier calls.
WARM_UP = 30
# Sigma of the log-normal distribution of the delays, without stragglers.
_SIGMA = 0.25

ANSWERS, REFUSES, HANGS = range(3)
# Seconds until a replica that went down is taken out: until the next ping fails, or has no answer for 2 s.
_OUT_AFTER_S = {REFUSES: 0.5, HANGS: 2.5}

Seconds = npt.NDArray[np.float64]


@dataclass(frozen=True)
class FanoutBench:
    """Settings of `bench fanout`.

    Attributes:
        shards, bits, k: number of shards, length of a code, number of hits per query.
        queries: number of queries of each scenario, one after the other.
        delay_ms: median delay of a shard's answer.
        stragglers: share of calls that take `slow` times as long.
        slow: factor of the delay of those calls.
        down: share of the replicas that fail before the first counted query; alternately they hang and refuse calls.
        timeout_ms: timeout of a shard in the scenarios with a short one.
        seed: seed of all random numbers.
        actors: number of real Ray actors whose calls are also measured; 0: none.
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
        """Raise `InputError` for an invalid setting."""
        check_bits(self.bits)
        for name, value, minimum, maximum in (
            ("--shards", self.shards, 2, _MAX_SHARDS),
            ("-k", self.k, 1, 1000),
            ("--queries", self.queries, 1, 100_000),
            ("--actors", self.actors, 0, 100),
            ("--seed", self.seed, 0, 2**32 - 1),
        ):
            if not minimum <= value <= maximum:
                raise InputError(f"{name} is {value}; from {minimum} to {maximum:,} are allowed")
        for name, size, smallest, largest in (
            ("--delay-ms", self.delay_ms, 0.001, 1000.0),
            ("--timeout-ms", self.timeout_ms, 0.001, 5000.0),
            ("--slow", self.slow, 1.0, 1000.0),
            ("--stragglers", self.stragglers, 0.0, 1.0),
            ("--down", self.down, 0.0, 1.0),
        ):
            # The comparison is also false for NaN.
            if not smallest <= size <= largest:
                raise InputError(f"{name} is {size:g}; from {smallest:g} to {largest:g} are allowed")


@dataclass(frozen=True)
class Scenario:
    """One row of the table. `timeout_s` is the timeout of a shard."""

    name: str
    replicas: int = 1
    is_one_shard: bool = False
    straggles: bool = True
    goes_down: bool = False
    hedges: bool = True
    timeout_s: float = SHARD_TIMEOUT_S


def scenarios(settings: FanoutBench) -> list[Scenario]:
    """Return the scenarios in the order of the table."""
    short_s = settings.timeout_ms / 1e3
    short = f"{settings.timeout_ms:g} ms timeout"
    return [
        Scenario("one shard with all rows", is_one_shard=True),
        Scenario("no stragglers", straggles=False),
        Scenario("stragglers"),
        Scenario(f"stragglers, {short}", timeout_s=short_s),
        Scenario("stragglers, 2 replicas, no hedging", replicas=2, hedges=False),
        Scenario("stragglers, 2 replicas", replicas=2),
        Scenario("stragglers, down", goes_down=True),
        Scenario(f"stragglers, down, {short}", goes_down=True, timeout_s=short_s),
        Scenario("stragglers, down, 2 replicas, no hedging", replicas=2, goes_down=True, hedges=False),
        Scenario("stragglers, down, 2 replicas", replicas=2, goes_down=True),
    ]


class World:
    """The simulated shards; delays and failures of their replicas are drawn before the first query."""

    def __init__(self, settings: FanoutBench) -> None:
        rng = np.random.default_rng(settings.seed)
        num_turns = WARM_UP + settings.queries
        rows = max(_MIN_ROWS, settings.k)
        num_rows = settings.shards * rows
        codes, self.queries = (pack(rng.random((count, settings.bits)) < 0.5) for count in (num_rows, NUM_CODES))
        ids = np.arange(num_rows, dtype=np.uint64)
        parts = [slice(number, None, settings.shards) for number in range(settings.shards)]
        shards = [Segment.build(ids[part], codes[part], settings.bits) for part in parts]
        self.answers = [shard.search(self.queries, settings.k) for shard in shards]
        self.whole_answer = Segment.build(ids, codes, settings.bits).search(self.queries, settings.k)
        self.num_shards, self.rows_per_shard = settings.shards, rows
        self.archive = _Archive(settings.bits, num_rows)
        shape = (2, num_turns, settings.shards)
        self.delays_s: Seconds = settings.delay_ms / 1e3 * rng.lognormal(0, _SIGMA, shape)
        self.is_slow = rng.random(shape) < settings.stragglers
        self.slow = settings.slow
        # For each replica another set of shards, so that sometimes both replicas of a shard are down.
        self.fates = np.full((2, settings.shards), ANSWERS)
        num_down = math.ceil(round(settings.down * settings.shards, 6))
        for fates in self.fates:
            fates[rng.permutation(settings.shards)[:num_down]] = np.resize([HANGS, REFUSES], num_down)
        # Number of the current query.
        self.turn = 0

    def clients(self, scenario: Scenario, observer: Observer) -> list[ShardClient]:
        """Return the shards of a scenario as clients for the engine."""
        self._replicas = [
            [Replica() for _ in range(scenario.replicas)]
            for _ in range(1 if scenario.is_one_shard else self.num_shards)
        ]
        return [
            ReplicatedShard(
                [_SimulatedReplica(self, scenario, shard, replica) for replica in range(scenario.replicas)],
                replicas,
                Hedging() if scenario.hedges else _NeverSlow(),
                observer,
            )
            for shard, replicas in enumerate(self._replicas)
        ]

    def go_down(self) -> None:
        """Let the replicas of the last `clients` fail from now on; pings take them out as `HealthWatch` does."""
        loop = asyncio.get_running_loop()
        for shard, replicas in enumerate(self._replicas):
            for replica, fates in zip(replicas, self.fates, strict=False):
                if fates[shard] != ANSWERS:
                    loop.call_later(_OUT_AFTER_S[fates[shard]], replica.lost)

    def deal(self, scenario: Scenario) -> Deal:
        """Return which shard of a scenario has which rows."""
        return Deal(1 if scenario.is_one_shard else self.num_shards)


class _Archive:
    """The part of an archive that the engine asks for."""

    model_id, version, vector = "simulated", 1, None

    def __init__(self, bits: int, num_rows: int) -> None:
        self.bits, self.num_rows = bits, num_rows

    def find(self, keys: Sequence[str]) -> dict[str, int]:
        return {}

    def exist(self, ids: Ids) -> npt.NDArray[np.bool_]:
        raise NotImplementedError("queries by code name no rows")

    def take(self, ids: Ids, columns: list[str]) -> Any:
        raise NotImplementedError("queries by code read no rows of the archive")


class _SimulatedReplica:
    """One replica of a shard, whose rows have a key and nothing else."""

    num_replicas = num_healthy = 1
    num_segments = num_bytes = num_merges = num_evaluations = 0

    def __init__(self, world: World, scenario: Scenario, shard: int, replica: int) -> None:
        self._world, self._scenario = world, scenario
        self._shard, self._replica = shard, replica
        self._answer = world.whole_answer if scenario.is_one_shard else world.answers[shard]
        self.num_rows = world.archive.num_rows if scenario.is_one_shard else world.rows_per_shard

    async def search(self, queries: Codes, k: int, scope: Scope, timeout_s: float) -> ShardAnswer:
        """See `ShardClient`."""
        world, turn = self._world, self._world.turn
        call = self._replica, turn, self._shard
        if self._scenario.goes_down and turn >= WARM_UP:
            fate = world.fates[self._replica, self._shard]
            if fate == HANGS:
                await asyncio.get_running_loop().create_future()
            if fate == REFUSES:
                raise ConnectionError("simulated: the replica is down")
        is_slow = self._scenario.straggles and world.is_slow[call]
        await asyncio.sleep(float(world.delays_s[call]) * (world.slow if is_slow else 1))
        one = slice(turn % NUM_CODES, turn % NUM_CODES + 1)
        ids = self._answer.ids[one]
        rows = tuple(await self.hits(ids[0], scope.include, timeout_s)) if scope.with_rows else ()
        return ShardAnswer(self._answer.distances[one], ids, self._answer.ties[one], rows, num_rows=self.num_rows)

    async def hits(self, ids: Ids, include: Sequence[str], timeout_s: float) -> list[bytes]:
        """See `ShardClient`."""
        return [search_pb2.Hit(id=row, key=str(row)).SerializeToString() for row in ids.tolist()]

    async def read(self, ids: Ids, columns: Sequence[str], timeout_s: float) -> Any:
        """See `ShardClient`."""
        raise NotImplementedError("queries by code read no columns")

    async def count(self, filter_text: str, timeout_s: float) -> int:
        """See `ShardClient`."""
        raise NotImplementedError("nothing is counted")

    async def scroll(self, filter_text: str, after: int | None, limit: int, timeout_s: float) -> Ids:
        """See `ShardClient`."""
        raise NotImplementedError("nothing is listed")

    async def rank(self, *_: Any, **__: Any) -> Ranked:
        """See `ShardClient`."""
        raise NotImplementedError("rows have no order but by distance")

    async def distances(self, code: Codes, filter_text: str, timeout_s: float) -> tuple[Counts, int | None]:
        """See `ShardClient`."""
        raise NotImplementedError("nothing is counted")

    async def count_by(self, by: GroupName, filter_text: str, timeout_s: float) -> tuple[dict[str, int], int]:
        """See `ShardClient`."""
        raise NotImplementedError("nothing is counted")


class _NeverSlow(Hedging):
    """Never hedge: a second replica is called only after the first one failed."""

    def delay_s(self, kind: str = "search") -> float:
        return 1e6
