"""The memory of a shard: what the plan of a cluster computes with, and what a shard's actor asks Ray for."""

import math

import numpy as np

from orbithash.cluster.runtime import Shortage
from orbithash.search.index.exact import MIN_WORDS, code_parts
from orbithash.search.segments.host import MAX_VERSIONS
from orbithash.search.segments.selections import MAX_KEPT_BYTES
from orbithash.search.segments.versions.merging import MAX_ROWS

__all__ = [
    "CACHED_BYTES",
    "PROCESS_BYTES",
    "asked_bytes",
    "node_shortage",
    "num_segments",
    "replica_parts",
    "segment_bytes",
    "segment_parts",
    "version_bytes",
]

# Measured (docs/operate/scaling.md): memory of a replica's process without rows, and the part of a row's columns that
# has to stay in the page cache, because hits show it and filters read it.
PROCESS_BYTES = 340e6
CACHED_BYTES = 62

_GB = 1e9


def num_segments(rows: float) -> int:
    """Return the number of large segments of a shard; the small ones of recent changes are not counted."""
    return math.ceil(rows / MAX_ROWS)


def segment_bytes(rows: float, distinct: float, bits: int, is_part: bool) -> dict[str, float]:
    """Return the memory of a segment (`search.segments.segment.Segment`) with the index exact, by part.

    `is_part`: the archive has other shards, so that the ids of this one have gaps and are stored.
    """
    return {
        "codes": distinct * 8 * math.ceil(bits / 64),
        "rows of codes": 4 * rows + (4 * (distinct + 1) if distinct < rows else 0),
        "tables": _table_bytes(distinct, bits),
        "ids": 4 * rows if is_part else 0.0,
    }


def _table_bytes(distinct: float, bits: int) -> float:
    """Return the memory of the tables of `search.index.exact`: offsets for each value of a part, and code numbers."""
    if distinct * math.ceil(bits / 64) < MIN_WORDS:
        return 0.0
    widths = np.diff(code_parts(int(distinct), bits))
    # The codes are in the order of the first part, which needs no numbers.
    return float(4 * ((1 << widths) + 1).sum() + 4 * (len(widths) - 1) * distinct)


def version_bytes(rows: float) -> float:
    """Return the memory of one more version: the set of rows that are left, if the version removes any."""
    return rows / 8


def segment_parts(rows: float, distinct: float, bits: int, is_part: bool) -> dict[str, float]:
    """Return the memory of the segments of a shard, by part; the arguments as in `segment_bytes`, of the shard."""
    segments = num_segments(rows)
    of_segment = segment_bytes(rows / segments, distinct / segments, bits, is_part)
    return {name: segments * value for name, value in of_segment.items()}


def replica_parts(
    rows: float,
    distinct: float,
    bits: int,
    is_part: bool,
    *,
    has_changes: bool = True,
    cached_bytes: float = CACHED_BYTES,
    process_bytes: float = PROCESS_BYTES,
) -> dict[str, float]:
    """Return the memory of one replica of a shard in bytes, by content.

    Args:
        rows: rows of the shard.
        distinct: distinct codes among them.
        bits: length of a code.
        is_part: the archive has other shards.
        has_changes: rows are written while it serves, so that several versions are in memory.
        cached_bytes: bytes of a row in the page cache.
        process_bytes: memory of the process, without rows.
    """
    return {
        **segment_parts(rows, distinct, bits, is_part),
        "versions": MAX_VERSIONS * version_bytes(rows) if has_changes else 0.0,
        # Half of the kept filters may belong to segments that were merged since.
        "filters": min(MAX_KEPT_BYTES, 64 * rows / 8),
        "columns in the page cache": rows * cached_bytes,
        "processes of shards": process_bytes,
    }


def asked_bytes(num_rows: int, bits: int, num_shards: int) -> int:
    """Return the memory that each replica asks Ray for, bytes: that of a plan in which no two codes are equal.

    Nothing knows how many are before the rows were read.
    """
    # A new archive has no rows yet.
    rows = max(1.0, num_rows / num_shards)
    return math.ceil(sum(replica_parts(rows, min(rows, 2.0**bits), bits, num_shards > 1).values()))


def node_shortage(num_replicas: int, each_bytes: int) -> Shortage | None:
    """Return what the nodes of the cluster lack to hold the replicas of all shards; None: nothing.

    Memory that others have reserved is not considered: it can become free.

    Args:
        num_replicas: number of the replicas of all shards.
        each_bytes: memory of each.
    """
    import ray

    # Shards are not placed on nodes without CPUs, such as those of gateways.
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    sizes = [node.get("memory", 0.0) for node in nodes if node.get("CPU", 0)]
    largest = max(sizes, default=0.0)
    if each_bytes > largest:
        return Shortage(
            f"a shard needs {each_bytes / _GB:,.2f} GB of memory, the largest node of the cluster has "
            f"{largest / _GB:,.2f} GB for it",
            "give more --shards, add larger nodes",
        )
    fitting = sum(int(size // each_bytes) for size in sizes)
    if num_replicas > fitting:
        return Shortage(
            f"{num_replicas} replicas of shards need {each_bytes / _GB:,.2f} GB of memory each, the nodes of the "
            f"cluster have room for {fitting}",
            "give fewer --replicas, more --shards, add nodes",
        )
    return None
