"""The plan of a cluster for an archive and a load, computed from a cost model.

The result is arithmetic on measured costs (`costs.py`); plans of many nodes were never tested.

Gateways share the replicas of all shards. For each number of shards the smallest number of gateways that keeps up is
found; the plan with the fewest nodes is chosen.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from orbithash.cluster.planning.costs import MEASURED, Costs
from orbithash.cluster.planning.latency import Fan, Latency, latency
from orbithash.cluster.planning.requirements import Requirements
from orbithash.cluster.planning.sizing import Alternative, Plan, nodes_for_memory, size
from orbithash.encoders.errors import InputError

__all__ = ["make_plan"]

_MAX_SHARDS, _MAX_GATEWAYS = 100_000, 4096
# Factor between the numbers of shards that are tried.
_STEP = 1.1
# If no replica fits on a node: plans whose replicas are at most this factor larger than the smallest are compared.
_NEARLY_SMALLEST = 1.1
# Factors of the maximum latency that are tried in turn if the requirements cannot be met.
_RELAXATIONS = (1, 2, 8, 64, 1e6)
_MS = 1e-3


def make_plan(requirements: Requirements, costs: Costs = MEASURED) -> Plan:
    """Return the plan with the fewest nodes and its alternatives; raise `InputError` if no plan is possible."""
    requirements.check()
    plan = _best(requirements, costs)
    if plan is None:
        raise InputError(
            f"--qps is {requirements.qps:g}: {_MAX_GATEWAYS:,} gateways and {requirements.replicas} replicas of each "
            f"shard do not keep up with this load on {requirements.rows:,.0f} rows; reduce --qps or increase --replicas"
        )
    return replace(plan, alternatives=tuple(_alternative(*changed) for changed in _changes(requirements, costs)))


def _alternative(text: str, requirements: Requirements, costs: Costs) -> Alternative:
    plan = _best(requirements, costs)
    if plan is None:
        return Alternative(text, 0, 0, 0, math.inf, "replicas", "gateways and replicas do not keep up")
    return Alternative(text, plan.nodes, plan.shards, plan.gateways, plan.p99_ms["all"], plan.decided_by, plan.problem)


def _changes(requirements: Requirements, costs: Costs) -> Iterator[tuple[str, Requirements, Costs]]:
    """Yield changed requirements and costs with a description."""
    if requirements.codes == "learned":
        yield "uniformly random codes", replace(requirements, codes="random"), costs
    else:
        yield "codes of a trained model", replace(requirements, codes="learned"), costs
    if requirements.distinct > 0.1:
        yield "a tenth of the distinct codes", replace(requirements, distinct=requirements.distinct / 10), costs
    if requirements.replicas > 1:
        yield "one replica of each shard", replace(requirements, replicas=1), costs
    if requirements.has_changes:
        yield "no changes while it serves", replace(requirements, has_changes=False), costs
    yield "nodes of twice the memory", replace(requirements, memory_gb=2 * requirements.memory_gb), costs
    yield "nodes of twice the cores", replace(requirements, cores=2 * requirements.cores), costs
    yield "five times the latency", replace(requirements, p99_ms=5 * requirements.p99_ms), costs
    yield "columns read from disk, not cached", requirements, replace(costs, cached_bytes=0.0)
    # The change of costs below is not implemented.
    if requirements.num_distinct < requirements.rows:
        yield "equal codes in one shard", requirements, replace(costs, is_by_code=True)


def _best(requirements: Requirements, costs: Costs) -> Plan | None:
    """Return the plan with the fewest nodes, or the nearest one with its problem, or None if none keeps up."""
    counts = _shard_counts(requirements)
    problem = ""
    for factor in _RELAXATIONS:
        relaxed = replace(requirements, p99_ms=factor * requirements.p99_ms)
        if plans := [plan for shards in counts if (plan := _plan_of(relaxed, costs, shards))]:
            plan = _cheapest(plans)
            return replace(plan, requirements=requirements, problem=f"{problem}{plan.problem}".removesuffix("; "))
        # The latency of a lone query on idle gateways.
        lone = [
            (found.total_s, shards)
            for shards in counts
            if (found := latency(requirements, costs, shards, _fan(requirements, costs, shards), 1, 0))
        ]
        min_s, shards = min(lone)
        problem = (
            f"not within {requirements.p99_ms:g} ms: the minimum is {min_s / _MS:,.0f} ms, with {shards:,} shards; "
        )
    return None


def _cheapest(plans: Sequence[Plan]) -> Plan:
    """Return the plan with the fewest nodes, of those without a problem or else of those with the smallest replicas."""
    good = [plan for plan in plans if not plan.problem]
    if not good:
        smallest_gb = min(plan.replica_gb for plan in plans)
        good = [plan for plan in plans if plan.replica_gb <= _NEARLY_SMALLEST * smallest_gb]
    return min(good, key=lambda plan: (plan.nodes, plan.gateways, plan.shards))


def _shard_counts(requirements: Requirements) -> list[int]:
    maximum = int(min(_MAX_SHARDS, requirements.rows))
    steps = range(math.ceil(math.log(maximum, _STEP)) + 1)
    return sorted({min(maximum, round(_STEP**step)) for step in steps})


def _fan(requirements: Requirements, costs: Costs, shards: int) -> Fan:
    return Fan.of(shards, nodes_for_memory(requirements, costs, shards))


def _plan_of(requirements: Requirements, costs: Costs, shards: int) -> Plan | None:
    """Return the plan with this number of shards and the fewest gateways that keep up, or None if none do."""
    fan = _fan(requirements, costs, shards)

    def allowed_latency(gateways: int) -> Latency | None:
        found = latency(requirements, costs, shards, fan, gateways, requirements.qps)
        return found if found and found.total_s <= requirements.p99_ms * _MS else None

    gateways = 1
    while allowed_latency(gateways) is None:
        gateways *= 2
        if gateways > _MAX_GATEWAYS:
            return None
    low = gateways // 2 + 1
    while low < gateways:
        middle = (low + gateways) // 2
        low, gateways = (low, middle) if allowed_latency(middle) else (middle + 1, gateways)
    found = allowed_latency(gateways)
    assert found is not None, "the search ends at a number that keeps up"
    return size(requirements, costs, shards, gateways, fan, found)
