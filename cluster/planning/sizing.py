"""The size of a cluster with a given number of shards and gateways: memory, cores, nodes, and limits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from orbithash.cluster.planning.costs import Costs
from orbithash.cluster.planning.latency import Fan, Latency, num_distinct, search_seconds
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.serving.memory import num_segments, replica_parts, segment_parts
from orbithash.cluster.serving.shards import SHARD_CPUS, START_TIMEOUT_S
from orbithash.encoders.codes import num_bytes

__all__ = ["Alternative", "Plan", "nodes_for_memory", "size"]

_GB, _MS = 1e9, 1e-3
# Above this memory bandwidth of a node, GB per second, the plan warns: about what two cores can read.
_WARN_READ_GB = 30
# Maximum time of a new filter: with more, it ends after the deadline of many clients.
_MAX_FILTER_S = 5.0


@dataclass(frozen=True)
class Alternative:
    """A short plan for changed requirements or costs."""

    text: str
    nodes: int
    shards: int
    gateways: int
    p99_ms: float
    decided_by: str
    problem: str


@dataclass(frozen=True)
class Plan:
    """A cluster for the requirements.

    Attributes:
        requirements: the input.
        costs: the source of the cost model's constants.
        shards, gateways, replicas, nodes: numbers; `replicas` are those of all shards together.
        rows_per_shard, distinct_per_shard, replica_gb: rows and distinct codes of a shard, memory of one replica.
        branches: number of calls of a gateway for one batch: to all shards, or to one shard of each node.
        decided_by: the resource that decides the number of nodes.
        nodes_by: number of nodes that each resource alone would need.
        problem: the reason why the requirements cannot be met; the other fields then hold the nearest plan. "" if
            they can be met.
        cores: busy cores by task.
        memory_gb: memory of all nodes by content.
        archive_gb: size on disk by part.
        p99_ms: 99th percentile of the latency by part, and "all" for the sum.
        batch: mean number of queries that share the calls to the shards.
        start_s: seconds until a replica can search, by source of its rows.
        limits: other limits, one sentence each.
        alternatives: plans for changed requirements or costs.
    """

    requirements: Requirements
    costs: str
    shards: int
    gateways: int
    replicas: int
    nodes: int
    rows_per_shard: float
    distinct_per_shard: float
    replica_gb: float
    branches: int
    decided_by: str
    nodes_by: dict[str, int]
    problem: str
    cores: dict[str, float]
    memory_gb: dict[str, float]
    archive_gb: dict[str, float]
    p99_ms: dict[str, float]
    batch: float
    start_s: dict[str, float]
    limits: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()


def nodes_for_memory(requirements: Requirements, costs: Costs, shards: int) -> int:
    """Return the number of nodes that hold all replicas of the shards."""
    of_replica = sum(_replica_bytes(requirements, costs, shards).values())
    node_bytes = _node_bytes(requirements)
    replicas = shards * requirements.replicas
    # A replica cannot be split over nodes. One that fits on no node counts by its bytes, and is a problem.
    return max(math.ceil(replicas * of_replica / node_bytes), math.ceil(replicas / max(1, node_bytes // of_replica)))


def size(requirements: Requirements, costs: Costs, shards: int, gateways: int, fan: Fan, found: Latency) -> Plan:
    """Return the plan for these shards and gateways with the latency `found`."""
    replicas = shards * requirements.replicas
    rows, distinct = requirements.rows / shards, num_distinct(requirements, costs, shards)
    of_replica = _replica_bytes(requirements, costs, shards)
    replica_bytes = sum(of_replica.values())
    memory = {name: replicas * value for name, value in of_replica.items()}
    memory["processes of gateways"] = gateways * costs.gateway_bytes
    cores = {
        "searches": requirements.qps * shards * search_seconds(requirements, costs, shards, found.batch),
        "calls in shards": requirements.qps / found.batch * shards * costs.shard_call_s,
        "gateways": float(gateways),
    }
    node_bytes = _node_bytes(requirements)
    nodes_by = {
        # First, because it is the simplest explanation if several resources need the same number.
        "replicas": requirements.replicas,
        "memory": max(math.ceil(sum(memory.values()) / node_bytes), nodes_for_memory(requirements, costs, shards)),
        "cores": math.ceil(sum(cores.values()) / (requirements.cores * requirements.used_share)),
        "actor slots": math.ceil(replicas * SHARD_CPUS / requirements.cores),
    }
    nodes = max(nodes_by.values())
    # Replicas of a node start at the same time.
    at_once = max(1.0, replicas / nodes / requirements.cores)
    start_s = {"from the archive": rows * costs.load_s * at_once, "from its files": rows * costs.map_s * at_once}
    problems = []
    if replica_bytes > node_bytes:
        largest = max(of_replica, key=lambda name: of_replica[name])
        problems.append(
            f"a replica of a shard needs {replica_bytes / _GB:,.1f} GB ({largest}: {of_replica[largest] / _GB:,.1f}), "
            f"a node has {node_bytes / _GB:,.1f} to use"
        )
    if start_s["from the archive"] > START_TIMEOUT_S:
        problems.append(
            f"a replica takes {start_s['from the archive']:,.0f} s to read its rows; the timeout is "
            f"{START_TIMEOUT_S:.0f} s"
        )
    if rows * costs.filter_s > _MAX_FILTER_S:
        problems.append(
            f"a new filter takes {rows * costs.filter_s:,.0f} s in a shard of {rows:,.0f} rows; more than "
            f"{_MAX_FILTER_S:.0f} s is beyond the deadline of many clients"
        )
    return Plan(
        requirements=requirements,
        costs=costs.source,
        shards=shards,
        gateways=gateways,
        replicas=replicas,
        nodes=nodes,
        rows_per_shard=rows,
        distinct_per_shard=distinct,
        replica_gb=replica_bytes / _GB,
        branches=fan.branches,
        decided_by=max(nodes_by, key=lambda name: nodes_by[name]),
        nodes_by=nodes_by,
        problem="; ".join(problems),
        cores=cores,
        memory_gb={name: value / _GB for name, value in memory.items()},
        archive_gb={
            "codes": requirements.rows * num_bytes(requirements.bits) / _GB,
            "other columns": requirements.rows * costs.column_bytes / _GB,
            "index of keys": requirements.rows * costs.index_bytes / _GB,
            "thumbnails": requirements.rows * costs.thumbnail_bytes / _GB,
            "files of replicas": replicas * (_segment(requirements, costs, shards) + rows * costs.mapped_bytes) / _GB,
        },
        p99_ms={**{name: value / _MS for name, value in found.seconds.items()}, "all": found.total_s / _MS},
        batch=found.batch,
        start_s=start_s,
        limits=tuple(_limits(requirements, costs, gateways, shards, fan, nodes)),
    )


def _node_bytes(requirements: Requirements) -> float:
    return requirements.memory_gb * _GB * requirements.used_share


def _segment(requirements: Requirements, costs: Costs, shards: int) -> float:
    distinct = num_distinct(requirements, costs, shards)
    return sum(segment_parts(requirements.rows / shards, distinct, requirements.bits, shards > 1).values())


def _replica_bytes(requirements: Requirements, costs: Costs, shards: int) -> dict[str, float]:
    """Return the memory of one replica of a shard by content."""
    return replica_parts(
        requirements.rows / shards,
        num_distinct(requirements, costs, shards),
        requirements.bits,
        shards > 1,
        has_changes=requirements.has_changes,
        cached_bytes=costs.cached_bytes,
        process_bytes=costs.replica_bytes,
    )


def _limits(
    requirements: Requirements, costs: Costs, gateways: int, shards: int, fan: Fan, nodes: int
) -> Iterator[str]:
    """Yield limits that the number of nodes does not show."""
    if gateways > 1:
        yield f"{gateways} gateways share the shards (`orbithash serve --gateways` and `--join`); they write in turn"
    if fan.leaves:
        yield f"a gateway calls {fan.branches:,} shards, each of which calls {fan.leaves:,} others of its node"
    distinct = num_distinct(requirements, costs, shards)
    codes_of_segment = distinct / num_segments(requirements.rows / shards)
    measured = max(probe.codes for probe in costs.probes)
    if requirements.codes == "random":
        read_gb = requirements.qps * shards * distinct * num_bytes(requirements.bits) / nodes / _GB
        if read_gb > _WARN_READ_GB:
            yield f"searches read {read_gb:,.0f} GB of memory per second on each node; the model assumes this bandwidth"
    elif codes_of_segment > measured:
        yield (
            f"a segment has {codes_of_segment:,.0f} distinct codes; probing was measured with at most {measured:,.0f} "
            "and is assumed to take the same time"
        )
    if shards > 1:
        yield f"a query waits for the slowest of {shards:,} shards (`orbithash bench fanout --shards {shards}`)"
