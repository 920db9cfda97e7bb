"""The latency of a query: the time of its searches, calls and merge, and of waiting for other queries.

A gateway calls each shard once per batch of queries, and runs as many batches at a time as a shard has replicas. Beyond
`MAX_DIRECT` shards it calls one shard of each node, which calls the others of its node and merges their answers. All
gateways share the shards.
"""

import math
from typing import NamedTuple

from orbithash.cluster.planning.costs import Costs
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.serving.memory import num_segments
from orbithash.cluster.serving.shards import SHARD_THREADS
from orbithash.search.engine.batching import MAX_BATCH

__all__ = [
    "MAX_DIRECT",
    "Fan",
    "Latency",
    "distinct_of_shard",
    "latency",
    "num_distinct",
    "search_seconds",
]

# Shards that a gateway calls itself.
MAX_DIRECT = 64

_MAX_ROUNDS = 20


class Fan(NamedTuple):
    """The calls of one batch: from a gateway to `branches`, and from each of these to `leaves` others of its node."""

    branches: int
    leaves: int

    @classmethod
    def of(cls, shards: int, nodes: int) -> "Fan":
        """Return the calls to all shards, which lie on this number of nodes."""
        if shards <= MAX_DIRECT:
            return cls(shards, 0)
        branches = min(shards, max(1, nodes))
        return cls(branches, math.ceil(shards / branches) - 1)


class Latency(NamedTuple):
    """Mean number of queries of a batch, and the 99th percentile of the latency in seconds, by part."""

    batch: float
    seconds: dict[str, float]

    @property
    def total_s(self) -> float:
        """The 99th percentile of the latency, seconds."""
        return sum(self.seconds.values())


def latency(
    requirements: Requirements, costs: Costs, shards: int, fan: Fan, gateways: int, qps: float
) -> Latency | None:
    """Return the latency of `qps` queries per second, spread over gateways and replicas; None if they do not keep up.

    A query waits for the batch in progress and then takes the time of its own. A gateway's event loop does one thing at
    a time; while shards search for one batch, it can work on another. A batch also waits for those of other gateways in
    its shards: as in a queue with random arrivals, by the share of time that their threads are busy.
    """
    of_gateway = qps / gateways
    max_batches = requirements.replicas
    calls_s, leaves_s = fan.branches * costs.call_s, fan.leaves * costs.call_s
    merge_s = costs.merge_s + requirements.k * costs.merge_hit_s
    loop_s = costs.query_s + fan.branches * merge_s
    of_loop = 1 - of_gateway * loop_s
    if of_loop <= 0:
        return None
    batch, hops = 1.0, 1 + (fan.leaves > 0)
    # The larger a batch, the less time each of its queries takes; a few rounds reach the balance.
    for _ in range(_MAX_ROUNDS):
        before = batch
        search_s = search_seconds(requirements, costs, shards, batch) + fan.leaves * merge_s
        of_batches = max_batches - of_gateway * (loop_s + search_s)
        busy = qps * search_s / (requirements.replicas * SHARD_THREADS)
        if of_batches <= 0 or busy > requirements.used_share:
            return None
        per_batch_s = calls_s + leaves_s + hops * costs.hop_s
        batch = max(1.0, of_gateway * calls_s / of_loop, of_gateway * per_batch_s / of_batches)
        if batch > MAX_BATCH * requirements.used_share:
            return None
        if math.isclose(batch, before, rel_tol=1e-6):
            break
    parts = {
        "shard calls": per_batch_s,
        "gateway and merge": batch * loop_s,
        "searches": batch * search_s * costs.tail(requirements.codes),
        "waiting in shards": batch * search_s * busy / (1 - busy),
    }
    period = sum(parts.values())
    busy_gateway = min(1.0, of_gateway * period / (max_batches * batch))
    return Latency(batch, {"waiting in the gateway": busy_gateway * period / max_batches, **parts})


def search_seconds(requirements: Requirements, costs: Costs, shards: int, batch: float = 1.0) -> float:
    """Return the seconds of one query of a batch in one shard, whose segments are searched one after the other."""
    segments = num_segments(requirements.rows / shards)
    codes = num_distinct(requirements, costs, shards) / segments
    return segments * costs.search_s(requirements.codes, codes, requirements.bits, batch)


def num_distinct(requirements: Requirements, costs: Costs, shards: int) -> float:
    """Return the number of distinct codes of a shard."""
    if costs.is_by_code:
        return requirements.num_distinct / shards
    return distinct_of_shard(requirements.rows, requirements.num_distinct, shards)


def distinct_of_shard(rows: float, distinct: float, shards: int) -> float:
    """Return the number of distinct codes of a shard, for rows in random order and as many rows of each code.

    If some codes have more rows than others, or if neighbouring rows have equal codes, the number is smaller.
    """
    return distinct * -math.expm1(rows / distinct * math.log1p(-1 / shards)) if shards > 1 else distinct
