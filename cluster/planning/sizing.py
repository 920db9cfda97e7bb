"""The size of a cluster with a given number of shards and gateways: memory, cores, nodes, and limits."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from orbithash.cluster.planning.costs import Costs
from orbithash.cluster.planning.latency import MAX_TABLE, num_distinct, scan_seconds
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.serving.shards import APPLY_TIMEOUT_S, SHARD_CPUS, START_TIMEOUT_S
from orbithash.encoders.codes import num_bytes
from orbithash.search.engine.selections import MAX_KEPT_IDS
from orbithash.search.index.host import MAX_VERSIONS

__all__ = ["Alternative", "Plan", "hit_row_bytes", "shard_bytes", "size"]

MAX_READY, _READY_ROW_BYTES = 2**16, 400

_GB, _MS = 1e9, 1e-3
# Above this memory bandwidth of a node, GB per second, the plan warns: about what two cores can read.
_WARN_READ_GB = 30


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
        shards, gateways, replicas, nodes: numbers; `replicas` are those of all shards for all gateways.
        rows_per_shard, distinct_per_shard, replica_gb: rows and distinct codes of a shard, memory of one replica.
        decided_by: the resource that decides the number of nodes.
        nodes_by: number of nodes that each resource alone would need.
        problem: the reason why the requirements cannot be met; the other fields then hold the nearest plan. "" if
            they can be met.
        cores: busy cores by task.
        memory_gb: memory of all nodes by content.
        archive_gb: size on disk by part.
        p99_ms: 99th percentile of the latency by part, and "all" for the sum.
        batch: mean number of queries that share the calls to the shards.
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
    decided_by: str
    nodes_by: dict[str, int]
    problem: str
    cores: dict[str, float]
    memory_gb: dict[str, float]
    archive_gb: dict[str, float]
    p99_ms: dict[str, float]
    batch: float
    limits: tuple[str, ...]
    alternatives: tuple[Alternative, ...] = ()


def shard_bytes(rows: float, distinct: float, bits: int) -> dict[str, float]:
    """Return the memory of one version of a shard (`search.index.shard.Shard`) by part."""
    codes = distinct * num_bytes(bits)
    return {"codes in FAISS": codes, "codes beside it": codes, "ids": 8 * rows, "counts, starts": 16 * distinct}


def hit_row_bytes(rows: float, key_chars: float) -> float:
    """Return the memory of the columns that hits show, if all rows are kept in memory."""
    # Id, offset, number of the label, lon, lat, time, whether a change touched the row, and the key.
    return rows * (8 + 8 + 4 + 8 + 8 + 8 + 1 + key_chars)


def size(
    requirements: Requirements, costs: Costs, shards: int, gateways: int, batch: float, seconds: dict[str, float]
) -> Plan:
    """Return the plan for these shards and gateways; `batch` and `seconds` are the result of `latency`."""
    replicas = shards * requirements.replicas * (1 if costs.is_shared else gateways)
    rows, distinct = requirements.rows / shards, num_distinct(requirements, costs, shards)
    of_replica = _replica_bytes(requirements, costs, rows, distinct)
    replica_bytes = sum(of_replica.values())
    memory = {name: replicas * value for name, value in of_replica.items()}
    memory |= {name: gateways * value for name, value in _gateway_bytes(requirements, costs).items()}
    is_read = requirements.rows > MAX_TABLE
    cores = {
        "scans": requirements.qps * shards * scan_seconds(requirements, costs, shards),
        "gateways": float(gateways),
        "rows of hits": is_read * requirements.qps * (costs.take_s / batch + requirements.k * costs.take_hit_s),
    }
    node_bytes = requirements.memory_gb * _GB * requirements.used_share
    # A replica cannot be split over nodes. One that fits on no node counts by its bytes, and is a problem.
    nodes_by = {
        # First, because it is the simplest explanation if several resources need the same number.
        "replicas": requirements.replicas,
        "memory": max(
            math.ceil(sum(memory.values()) / node_bytes), math.ceil(replicas / max(1, node_bytes // replica_bytes))
        ),
        "cores": math.ceil(sum(cores.values()) / (requirements.cores * requirements.used_share)),
        "actor slots": math.ceil(replicas * SHARD_CPUS / requirements.cores),
    }
    nodes = max(nodes_by.values())
    start_s = (requirements.rows * costs.load_s + rows * costs.build_s) * max(
        1.0, replicas / nodes / requirements.cores
    )
    change_s = requirements.has_changes * rows * costs.change_s
    problems = []
    if replica_bytes > node_bytes:
        largest = max(of_replica, key=lambda name: of_replica[name])
        problems.append(
            f"a replica of a shard needs {replica_bytes / _GB:,.1f} GB ({largest}: {of_replica[largest] / _GB:,.1f}), "
            f"a node has {node_bytes / _GB:,.1f} to use"
        )
    if start_s > START_TIMEOUT_S:
        problems.append(f"a replica takes {start_s:,.0f} s to read its rows; the timeout is {START_TIMEOUT_S:.0f} s")
    if change_s > APPLY_TIMEOUT_S:
        problems.append(f"a replica takes {change_s:,.0f} s to apply a commit, and changes wait for it")
    read_gb = requirements.qps * shards * distinct * num_bytes(requirements.bits) / nodes / _GB
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
        },
        p99_ms={**{name: value / _MS for name, value in seconds.items()}, "all": sum(seconds.values()) / _MS},
        batch=batch,
        limits=tuple(_limits(requirements, costs, gateways, shards, change_s, read_gb)),
    )


def _replica_bytes(requirements: Requirements, costs: Costs, rows: float, distinct: float) -> dict[str, float]:
    """Return the memory of one replica of a shard by content."""
    one_version = shard_bytes(rows, distinct, requirements.bits)
    shard = sum(one_version.values())
    # The earlier versions, and the next one while it is built.
    num_others = MAX_VERSIONS if requirements.has_changes else 0
    return {
        **one_version,
        "other versions": num_others * shard,
        "filters": shard,
        "processes of shards": costs.replica_bytes,
    }


def _gateway_bytes(requirements: Requirements, costs: Costs) -> dict[str, float]:
    """Return the memory of one gateway by content."""
    is_kept = requirements.rows <= MAX_TABLE
    return {
        "rows of hits": hit_row_bytes(requirements.rows, costs.key_chars) if is_kept else 0.0,
        "processes of gateways": costs.gateway_bytes + MAX_READY * _READY_ROW_BYTES,
        "rows of filters": 8 * min(MAX_KEPT_IDS, requirements.rows),
    }


def _limits(
    requirements: Requirements, costs: Costs, gateways: int, shards: int, change_s: float, read_gb: float
) -> Iterator[str]:
    """Yield limits that the number of nodes does not show."""
    if gateways > 1 and not costs.is_shared:
        yield f"{gateways} gateways are {gateways} runs of `orbithash serve`, each with its own shards; only one writes"
    if requirements.rows > MAX_TABLE:
        yield f"above {MAX_TABLE:,} rows a gateway keeps no rows in memory: hits are read from the archive"
    if change_s > 1:
        yield f"a commit takes {change_s:,.1f} s, because each shard is copied as a whole"
    if requirements.rows > MAX_KEPT_IDS:
        yield f"a filter that selects more than {MAX_KEPT_IDS:,} rows evicts all others from the gateway's memory"
    if read_gb > _WARN_READ_GB:
        yield f"scans read {read_gb:,.0f} GB of memory per second on each node; the model assumes this bandwidth"
    if shards > 1:
        yield f"a query waits for the slowest of {shards:,} shards (`orbithash bench fanout --shards {shards}`)"
