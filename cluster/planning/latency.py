"""The latency of a query: the time of its scans, calls and merge, and of waiting for other queries.

A gateway calls each shard once per batch of queries, and runs as many batches at a time as a shard has replicas. More
shards make scans shorter and calls more.
"""

import math

from orbithash.cluster.planning.costs import Costs
from orbithash.cluster.planning.requirements import Requirements
from orbithash.search.engine.batching import MAX_BATCH

# Maximum number of rows whose columns a gateway keeps.
MAX_TABLE = 2**24

__all__ = ["distinct_of_shard", "latency", "num_distinct", "scan_seconds"]


def latency(requirements: Requirements, costs: Costs, shards: int, qps: float) -> tuple[float, dict[str, float]] | None:
    """Return the mean batch size of one gateway and the 99th percentile of the latency in seconds, by part.

    `qps` is the load of this gateway. Returns None if the gateway does not keep up. A query waits for the batch in
    progress and then takes the time of its own. The gateway's event loop does one thing at a time; while shards scan
    for one batch, it can work on another.
    """
    max_batches = requirements.replicas
    scan_s = scan_seconds(requirements, costs, shards)
    calls_s = shards * costs.call_s
    loop_s = costs.query_s + shards * (costs.merge_s + requirements.k * costs.merge_hit_s)
    is_read = requirements.rows > MAX_TABLE
    take_s, take_query_s = is_read * costs.take_s, is_read * requirements.k * costs.take_hit_s
    # Capacity that is left for the cost per batch, after the cost per query: of the event loop, of concurrent batches.
    of_loop = 1 - qps * loop_s
    of_batches = max_batches - qps * (loop_s + scan_s + take_query_s)
    if min(of_loop, of_batches) <= 0 or qps * scan_s > requirements.used_share * max_batches:
        return None
    batch = max(1.0, qps * calls_s / of_loop, qps * (calls_s + costs.hop_s + take_s) / of_batches)
    if batch > MAX_BATCH * requirements.used_share:
        return None
    parts = {
        "shard calls": calls_s + costs.hop_s,
        "gateway and merge": batch * loop_s,
        "scans": batch * scan_s * costs.scan_tail,
        "rows of hits": take_s + batch * take_query_s,
    }
    period = sum(parts.values())
    busy = min(1.0, qps * period / (max_batches * batch))
    return batch, {"waiting": busy * period / max_batches, **parts}


def scan_seconds(requirements: Requirements, costs: Costs, shards: int) -> float:
    """Return the seconds of one query in one shard."""
    return costs.scan_s + num_distinct(requirements, costs, shards) * costs.compare_s(requirements.bits)


def num_distinct(requirements: Requirements, costs: Costs, shards: int) -> float:
    """Return the number of distinct codes of a shard."""
    if costs.is_by_code:
        return requirements.num_distinct / shards
    return distinct_of_shard(requirements.rows, requirements.num_distinct, shards)


def distinct_of_shard(rows: float, distinct: float, shards: int) -> float:
    """Return the number of distinct codes of a shard, for rows dealt by id and as many rows of each code.

    If some codes have more rows than others, the number is smaller.
    """
    return distinct * -math.expm1(rows / distinct * math.log1p(-1 / shards)) if shards > 1 else distinct
