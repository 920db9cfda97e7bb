"""What an archive of some size needs to be served, by a model whose constants were measured.

Everything here is arithmetic over two records: what is wanted, and what things cost (`plan_costs.py`). It is no
promise: nobody has built what it says of many nodes.

One gateway has copies of all shards for itself, as `orbithash serve` starts them, and asks each shard with one call a
batch of queries, with as many batches under way as there are copies of a shard. One more shard makes scans shorter and
calls more. So for each number of shards the least number of gateways is looked for that keeps up, and of all such pairs
the one with the fewest nodes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from orbithash.cluster.planning.costs import MEASURED, Costs
from orbithash.cluster.serving.shards import APPLY_TIMEOUT_S, SHARD_CPUS, SHARD_THREADS, START_TIMEOUT_S
from orbithash.encoders.codes import check_bits, num_bytes
from orbithash.encoders.errors import InputError
from orbithash.search.index.host import MAX_VERSIONS

__all__ = ["Plan", "Wanted", "distinct_of_shard", "hit_row_bytes", "make_plan", "shard_bytes"]

# Bounds of `search.hits`, `search.selections` and `search.batching`; a test compares them.
ROWS_IN_MEMORY, READY_ROWS, SELECTED_IDS, MAX_BATCH = 2**24, 2**16, 2**25, 64
_READY_ROW_BYTES = 400

_MOST_SHARDS, _MOST_GATEWAYS = 100_000, 4096
# Between a number of shards and the next one that is tried.
_STEP = 1.1
# How much larger than the smallest copy another one may be that fits on no node either.
_NEARLY = 1.1
_GB, _MS = 1e9, 1e-3
# What a node's memory gives a second without being asked about: about what two cores can read.
_MUCH_GB = 30


@dataclass(frozen=True)
class Wanted:
    """What is to be served, and on what.

    Attributes:
        rows, bits: of the archive.
        qps: queries a second.
        k: hits of a query.
        distinct: share of the rows that have a code of their own; there are never more than 2^bits codes.
        replicas: copies of each shard.
        cores, memory_gb: of one node; 10^9 bytes.
        headroom: share of both that stays free.
        p99_ms: within which 99 of 100 queries are to be answered.
        has_changes: whether rows come and go while it serves, so that versions are kept.
    """

    rows: float
    bits: int = 64
    qps: float = 100.0
    k: int = 10
    distinct: float = 1.0
    replicas: int = 2
    cores: int = 16
    memory_gb: float = 64.0
    headroom: float = 0.3
    p99_ms: float = 100.0
    has_changes: bool = True

    def check(self) -> None:
        """`InputError` for what cannot be planned."""
        check_bits(self.bits)
        for name, value, least, most in (
            ("--rows", self.rows, 1, 1e13),
            ("--qps", self.qps, 1e-3, 1e7),
            ("-k", self.k, 1, 10_000),
            ("--replicas", self.replicas, 1, 16),
            ("--cores", self.cores, 1, 1024),
            ("--memory", self.memory_gb, 1, 1e5),
            ("--headroom", self.headroom, 0, 0.9),
            ("--p99", self.p99_ms, 1, 1e6),
        ):
            # Also false for what is no number.
            if not least <= value <= most:
                raise InputError(f"{name} is {value:g}; from {least:g} to {most:g} are allowed")
        if self.rows != int(self.rows):
            raise InputError(f"--rows is {self.rows:g}; a whole number, such as 1e9, is needed")
        if not 0 < self.distinct <= 1:
            raise InputError(f"--distinct is {self.distinct:g}; a share above 0 and up to 1 is needed")

    @property
    def num_distinct(self) -> float:
        """Distinct codes."""
        return max(1.0, min(self.rows * self.distinct, 2.0**self.bits))

    @property
    def used_share(self) -> float:
        """Of a node, what may be used."""
        return 1 - self.headroom


@dataclass(frozen=True)
class Change:
    """Another plan in short."""

    text: str
    nodes: int
    shards: int
    gateways: int
    p99_ms: float
    decided_by: str
    problem: str


@dataclass(frozen=True)
class Plan:
    """What is needed.

    Attributes:
        shards, gateways, copies, nodes: how many; `copies` are those of all shards for all gateways.
        rows_per_shard, distinct_per_shard, copy_gb: rows and distinct codes of one shard, memory of one copy.
        decided_by: what of the nodes is used up first.
        nodes_by: how many nodes each of these would need alone.
        problem: why what is wanted cannot be had; the rest is then what comes nearest. "" where it can.
        cores: cores that are busy, by what they do.
        memory_gb: memory of all nodes by what is in it.
        archive_gb: on disk, by part.
        p99_ms: of the 99th of 100 queries by what it spends it on, and "all" of it.
        batch: queries that share the calls of shards.
        limits: what else stands against it, a sentence each.
        what_if: what changes would make of it.
    """

    wanted: Wanted
    costs: str
    shards: int
    gateways: int
    copies: int
    nodes: int
    rows_per_shard: float
    distinct_per_shard: float
    copy_gb: float
    decided_by: str
    nodes_by: dict[str, int]
    problem: str
    cores: dict[str, float]
    memory_gb: dict[str, float]
    archive_gb: dict[str, float]
    p99_ms: dict[str, float]
    batch: float
    limits: tuple[str, ...]
    what_if: tuple[Change, ...] = ()


def shard_bytes(rows: float, distinct: float, bits: int) -> dict[str, float]:
    """Memory of one version of a shard (`search.shard.Shard`) by part."""
    codes = distinct * num_bytes(bits)
    return {"codes in FAISS": codes, "codes beside it": codes, "ids": 8 * rows, "counts, starts": 16 * distinct}


def hit_row_bytes(rows: float, key_chars: float) -> float:
    """Return the bytes of the cache of these rows (`search.engine.row_cache.RowCache`), if they are few enough."""
    # An id, an offset, a label's number, lon, lat, a time, whether a change touched the row, and the key.
    return rows * (8 + 8 + 4 + 8 + 8 + 8 + 1 + key_chars)


def distinct_of_shard(rows: float, distinct: float, shards: int) -> float:
    """Distinct codes of a shard where rows are dealt by their ids and each code has as many rows.

    Where some codes have more rows than others there are fewer.
    """
    return distinct * -math.expm1(rows / distinct * math.log1p(-1 / shards)) if shards > 1 else distinct


def make_plan(wanted: Wanted, costs: Costs = MEASURED) -> Plan:
    """The plan with the fewest nodes, and what would change it; `InputError` for what cannot be planned."""
    wanted.check()
    plan = _best(wanted, costs)
    if plan is None:
        raise InputError(
            f"--qps is {wanted.qps:g}: {_MOST_GATEWAYS:,} gateways do not keep up with so many queries of "
            f"{wanted.rows:,.0f} rows; ask for fewer, or for more --replicas"
        )
    return replace(plan, what_if=tuple(_short_of(*given) for given in _changes(wanted, costs)))


def _short_of(text: str, wanted: Wanted, costs: Costs) -> Change:
    plan = _best(wanted, costs)
    if plan is None:
        return Change(text, 0, 0, 0, math.inf, "gateways", "gateways do not keep up")
    return Change(text, plan.nodes, plan.shards, plan.gateways, plan.p99_ms["all"], plan.decided_by, plan.problem)


def _changes(wanted: Wanted, costs: Costs) -> Iterator[tuple[str, Wanted, Costs]]:
    if wanted.distinct > 0.1:
        yield "a tenth as many distinct codes", replace(wanted, distinct=wanted.distinct / 10), costs
    if wanted.replicas > 1:
        yield "one copy of each shard", replace(wanted, replicas=1), costs
    if wanted.has_changes:
        yield "no changes while it serves", replace(wanted, has_changes=False), costs
    yield "nodes of twice the memory", replace(wanted, memory_gb=2 * wanted.memory_gb), costs
    yield "nodes of twice the cores", replace(wanted, cores=2 * wanted.cores), costs
    yield "five times as long for an answer", replace(wanted, p99_ms=5 * wanted.p99_ms), costs
    # What follows is not written.
    yield "scans in a quarter of the time", wanted, replace(costs, code_s=costs.code_s / 4, byte_s=costs.byte_s / 4)
    yield "calls of shards at a tenth", wanted, replace(costs, call_s=costs.call_s / 10)
    yield "gateways that share shards", wanted, replace(costs, is_shared=True)
    if wanted.num_distinct < wanted.rows:
        yield "that, and equal codes in one shard", wanted, replace(costs, is_shared=True, is_by_code=True)


def _best(wanted: Wanted, costs: Costs) -> Plan | None:
    """The plan with the fewest nodes. Where there is none, what comes nearest, with the problem; None for nothing."""
    counts = _shard_counts(wanted)
    problem = ""
    for times in (1, 2, 8, 64, 1e6):
        allowed = replace(wanted, p99_ms=times * wanted.p99_ms)
        if plans := [plan for shards in counts if (plan := _plan_of(allowed, costs, shards))]:
            plan = _cheapest(plans)
            return replace(plan, wanted=wanted, problem=f"{problem}{plan.problem}".removesuffix("; "))
        # What a lone query takes, where all gateways are idle.
        lone_s = [(sum(found[1].values()), shards) for shards in counts if (found := _p99(wanted, costs, shards, 0))]
        least_s, shards = min(lone_s)
        problem = f"not within {wanted.p99_ms:g} ms: {least_s / _MS:,.0f} ms are the least, with {shards:,} shards; "
    return None


def _cheapest(plans: Sequence[Plan]) -> Plan:
    """The one with the fewest nodes, of those without a problem; else of those that come nearest to fitting on one."""
    good = [plan for plan in plans if not plan.problem]
    if not good:
        smallest_gb = min(plan.copy_gb for plan in plans)
        good = [plan for plan in plans if plan.copy_gb <= _NEARLY * smallest_gb]
    return min(good, key=lambda plan: (plan.nodes, plan.gateways, plan.shards))


def _shard_counts(wanted: Wanted) -> list[int]:
    most = int(min(_MOST_SHARDS, wanted.rows))
    steps = range(math.ceil(math.log(most, _STEP)) + 1)
    return sorted({min(most, round(_STEP**step)) for step in steps})


def _plan_of(wanted: Wanted, costs: Costs, shards: int) -> Plan | None:
    """The plan with so many shards and the fewest gateways that keep up; None where none do."""
    if (
        costs.is_shared
        and wanted.qps * _scan_s(wanted, costs, shards) > SHARD_THREADS * wanted.used_share * wanted.replicas
    ):
        return None

    def times(gateways: int) -> tuple[float, dict[str, float]] | None:
        found = _p99(wanted, costs, shards, wanted.qps / gateways)
        return found if found and sum(found[1].values()) <= wanted.p99_ms * _MS else None

    gateways = 1
    while times(gateways) is None:
        gateways *= 2
        if gateways > _MOST_GATEWAYS:
            return None
    low = gateways // 2 + 1
    while low < gateways:
        middle = (low + gateways) // 2
        low, gateways = (low, middle) if times(middle) else (middle + 1, gateways)
    found = times(gateways)
    assert found is not None, "it was found just now"
    return _sized(wanted, costs, shards, gateways, *found)


def _p99(wanted: Wanted, costs: Costs, shards: int, qps: float) -> tuple[float, dict[str, float]] | None:
    """Queries of a batch at so many queries a second of one gateway, and the seconds of the 99th of 100 by part.

    None where it does not keep up. A query waits for the batch that is under way and then has its own. The loop of the
    gateway does one thing at a time; while shards scan for one batch it may do the work of another.
    """
    fan_outs = wanted.replicas
    scan_s = _scan_s(wanted, costs, shards)
    calls_s = shards * costs.call_s
    loop_s = costs.query_s + shards * (costs.merge_s + wanted.k * costs.merge_hit_s)
    is_read = wanted.rows > ROWS_IN_MEMORY
    take_s, take_query_s = is_read * costs.take_s, is_read * wanted.k * costs.take_hit_s
    # Of a second of the loop, and of the batches under way: what the work leaves that grows with the queries.
    of_loop = 1 - qps * loop_s
    of_batches = fan_outs - qps * (loop_s + scan_s + take_query_s)
    if min(of_loop, of_batches) <= 0 or qps * scan_s > wanted.used_share * fan_outs:
        return None
    batch = max(1.0, qps * calls_s / of_loop, qps * (calls_s + costs.hop_s + take_s) / of_batches)
    if batch > MAX_BATCH * wanted.used_share:
        return None
    parts = {
        "calls of shards": calls_s + costs.hop_s,
        "gateway and merge": batch * loop_s,
        "scans": batch * scan_s * costs.scan_tail,
        "rows of hits": take_s + batch * take_query_s,
    }
    period = sum(parts.values())
    busy = min(1.0, qps * period / (fan_outs * batch))
    return batch, {"waiting": busy * period / fan_outs, **parts}


def _distinct(wanted: Wanted, costs: Costs, shards: int) -> float:
    """Distinct codes of a shard."""
    if costs.is_by_code:
        return wanted.num_distinct / shards
    return distinct_of_shard(wanted.rows, wanted.num_distinct, shards)


def _scan_s(wanted: Wanted, costs: Costs, shards: int) -> float:
    """Seconds of one query in one shard."""
    return costs.scan_s + _distinct(wanted, costs, shards) * costs.compare_s(wanted.bits)


def _sized(wanted: Wanted, costs: Costs, shards: int, gateways: int, batch: float, seconds: dict[str, float]) -> Plan:
    copies = shards * wanted.replicas * (1 if costs.is_shared else gateways)
    rows, distinct = wanted.rows / shards, _distinct(wanted, costs, shards)
    one_version = shard_bytes(rows, distinct, wanted.bits)
    shard = sum(one_version.values())
    # Beside the version that is searched the earlier ones, and the one in the making.
    num_more = MAX_VERSIONS if wanted.has_changes else 0
    of_copy = {
        **one_version,
        "versions beside it": num_more * shard,
        "filters": shard,
        "processes of shards": costs.copy_bytes,
    }
    of_gateway = {
        "rows of hits": hit_row_bytes(wanted.rows, costs.key_chars) if wanted.rows <= ROWS_IN_MEMORY else 0.0,
        "processes of gateways": costs.gateway_bytes + READY_ROWS * _READY_ROW_BYTES,
        "rows of filters": 8 * min(SELECTED_IDS, wanted.rows),
    }
    memory = {name: copies * value for name, value in of_copy.items()}
    memory |= {name: gateways * value for name, value in of_gateway.items()}
    scan_s = _scan_s(wanted, costs, shards)
    is_read = wanted.rows > ROWS_IN_MEMORY
    cores = {
        "scans": wanted.qps * shards * scan_s,
        "gateways": float(gateways),
        "rows of hits": is_read * wanted.qps * (costs.take_s / batch + wanted.k * costs.take_hit_s),
    }
    room = wanted.memory_gb * _GB * wanted.used_share
    copy_bytes = sum(of_copy.values())
    # A copy is in one piece; one that fits no node counts by its bytes, and is a problem.
    nodes_by = {
        # First: of equals it is the plainest.
        "replicas": wanted.replicas,
        "memory": max(math.ceil(sum(memory.values()) / room), math.ceil(copies / max(1, room // copy_bytes))),
        "cores": math.ceil(sum(cores.values()) / (wanted.cores * wanted.used_share)),
        "actor slots": math.ceil(copies * SHARD_CPUS / wanted.cores),
    }
    nodes = max(nodes_by.values())
    start_s = (wanted.rows * costs.load_s + rows * costs.build_s) * max(1.0, copies / nodes / wanted.cores)
    change_s = wanted.has_changes * rows * costs.change_s
    problems = []
    if copy_bytes > room:
        most = max(of_copy, key=lambda name: of_copy[name])
        problems.append(
            f"a copy of a shard needs {copy_bytes / _GB:,.1f} GB ({most}: {of_copy[most] / _GB:,.1f}), a node has "
            f"{room / _GB:,.1f} to use"
        )
    if start_s > START_TIMEOUT_S:
        problems.append(f"a copy takes {start_s:,.0f} s to read its rows and is given up after {START_TIMEOUT_S:.0f}")
    if change_s > APPLY_TIMEOUT_S:
        problems.append(f"a replica takes {change_s:,.0f} s to apply a commit, and changes wait for it")
    read_gb = wanted.qps * shards * distinct * num_bytes(wanted.bits) / nodes / _GB
    return Plan(
        wanted=wanted,
        costs=costs.source,
        shards=shards,
        gateways=gateways,
        copies=copies,
        nodes=nodes,
        rows_per_shard=rows,
        copy_gb=copy_bytes / _GB,
        distinct_per_shard=distinct,
        decided_by=max(nodes_by, key=lambda name: nodes_by[name]),
        nodes_by=nodes_by,
        problem="; ".join(problems),
        cores=cores,
        memory_gb={name: value / _GB for name, value in memory.items()},
        archive_gb={
            "codes": wanted.rows * num_bytes(wanted.bits) / _GB,
            "other columns": wanted.rows * costs.column_bytes / _GB,
            "index of keys": wanted.rows * costs.index_bytes / _GB,
            "thumbnails": wanted.rows * costs.thumbnail_bytes / _GB,
        },
        p99_ms={**{name: value / _MS for name, value in seconds.items()}, "all": sum(seconds.values()) / _MS},
        batch=batch,
        limits=tuple(_limits(wanted, costs, gateways, shards, change_s, read_gb)),
    )


def _limits(wanted: Wanted, costs: Costs, gateways: int, shards: int, change_s: float, read_gb: float) -> Iterator[str]:
    """What is not in the number of nodes."""
    if gateways > 1 and not costs.is_shared:
        yield f"{gateways} gateways are as many calls of `orbithash serve`, each with its own shards; one writes"
    if wanted.rows > ROWS_IN_MEMORY:
        yield f"above {ROWS_IN_MEMORY:,} rows a gateway keeps none of them: hits are read from the archive"
    if change_s > 1:
        yield f"a commit takes {change_s:,.1f} s, for each shard is copied as a whole"
    if wanted.rows > SELECTED_IDS:
        yield f"a filter that more than {SELECTED_IDS:,} rows pass pushes all others out of the gateway's memory"
    if read_gb > _MUCH_GB:
        yield f"scans read {read_gb:,.0f} GB of memory a second on each node; the model takes it for granted"
    if shards > 1:
        yield f"a query waits for the slowest of {shards:,} shards (`orbithash bench fanout --shards {shards}`)"
