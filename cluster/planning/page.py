"""The page of a plan: the nodes, what decides them, and what would change the plan."""

from pathlib import Path

from orbithash.cluster.planning.sizing import Plan
from orbithash.encoders.codes import num_bytes
from orbithash.trainers.reports.page import Fact, Facts, Figure, Figures, Section, Table, Text, write_report
from orbithash.trainers.reports.plots import bars
from orbithash.trainers.reports.provenance import Provenance

__all__ = ["write_plan_page"]


def write_plan_page(path: Path, plan: Plan) -> None:
    """Write the page of a plan."""
    given = plan.requirements
    title = (
        "No plan meets these requirements"
        if plan.problem
        else f"{plan.nodes:,} {'node' if plan.nodes == 1 else 'nodes'} for {given.rows:,.0f} rows"
    )
    subtitle = (
        f"{given.rows:,.0f} rows of {given.bits} bits, {given.qps:g} queries per second of {given.k} hits each, 99 % "
        f"within {given.p99_ms:g} ms."
    )
    sections: list[Section] = []
    if plan.problem:
        sections.append(Text("Problem", [f"{plan.problem}. The numbers below are those of the nearest plan."]))
    sections += [_facts(plan), _figures(plan), _alternatives(plan), _numbers(plan)]
    notes = [
        f"The plan is arithmetic on measured costs ({plan.costs}); plans of many nodes were never tested.",
        *(f"{limit[0].upper()}{limit[1:]}." for limit in plan.limits),
    ]
    sections.append(Text("Limits of the plan", notes))
    data = f"{given.rows:,.0f} rows, {given.num_distinct:,.0f} distinct codes ({given.codes})"
    node = f"{given.cores} cores, {given.memory_gb:g} GB; {given.headroom:.0%} of both stays free"
    write_report(path, title, subtitle, sections, Provenance("Plan", data, {"Node": node, "Costs": plan.costs}))


def _facts(plan: Plan) -> Facts:
    given = plan.requirements
    memory, cores = sum(plan.memory_gb.values()), sum(plan.cores.values())
    nodes_by = ", ".join(f"{name} {count:,}" for name, count in plan.nodes_by.items())
    code_gb = given.rows * num_bytes(given.bits) / 1e9
    return Facts(
        "In short",
        [
            Fact(
                "Nodes",
                f"{plan.nodes:,}",
                f"{plan.decided_by.capitalize()} decides. The baseline is what each resource alone would need.",
                f"by resource: {nodes_by}",
            ),
            Fact(
                "99th percentile of the latency",
                f"{_short(plan.p99_ms['all'])} ms",
                f"On average {plan.batch:.1f} queries share their calls. Shards called: {plan.branches:,}.",
                f"required: {given.p99_ms:g} ms",
            ),
            Fact(
                "Memory of all nodes",
                f"{_short(memory)} GB",
                f"Replicas: {plan.replicas:,} of {_short(plan.replica_gb)} GB.",
                f"the packed codes alone: {_short(code_gb)} GB",
            ),
            Fact(
                "Busy cores",
                _short(cores),
                f"At {given.qps:g} queries per second. Gateways: {plan.gateways:,}.",
                f"cores of the nodes: {plan.nodes * given.cores:,}",
            ),
        ],
    )


def _figures(plan: Plan) -> Figures:
    parts = (
        ("Memory", plan.memory_gb, "GB", "Memory of all nodes by content."),
        ("Busy cores", plan.cores, "cores", "Busy cores by task."),
        (
            "Latency",
            {name: value for name, value in plan.p99_ms.items() if name != "all"},
            "ms",
            "99th percentile of the latency by part.",
        ),
        ("Archive on disk", plan.archive_gb, "GB", "Size by part."),
    )
    return Figures(
        "Where it goes",
        [Figure(title, bars(values, unit), caption) for title, values, unit, caption in parts if values],
    )


def _alternatives(plan: Plan) -> Table:
    rows = [
        ["this plan", *_row(plan.nodes, plan.shards, plan.gateways, plan.p99_ms["all"], plan.decided_by, plan.problem)]
    ]
    rows += [
        [each.text, *_row(each.nodes, each.shards, each.gateways, each.p99_ms, each.decided_by, each.problem)]
        for each in plan.alternatives
    ]
    return Table(
        "What would change the plan",
        ["change", "nodes", "shards", "gateways", "p99, ms", "decided by"],
        rows,
        "Each row changes one requirement or cost of this plan.",
    )


def _row(nodes: int, shards: int, gateways: int, p99_ms: float, decided_by: str, problem: str) -> list[str]:
    if problem:
        return ["-", "-", "-", "-", f"not possible: {problem}"]
    return [f"{nodes:,}", f"{shards:,}", f"{gateways:,}", f"{p99_ms:,.0f}", decided_by]


def _numbers(plan: Plan) -> Table:
    given = plan.requirements
    rows = [
        ["shards", f"{plan.shards:,}"],
        ["rows of a shard", f"{plan.rows_per_shard:,.0f}"],
        ["distinct codes of a shard", f"{plan.distinct_per_shard:,.0f}"],
        ["replicas of each shard", f"{given.replicas}"],
        ["replicas of all shards", f"{plan.replicas:,}"],
        ["memory of a replica", f"{_short(plan.replica_gb)} GB"],
        ["gateways", f"{plan.gateways:,}"],
        *([f"start of a replica {source}", f"{_short(seconds)} s"] for source, seconds in plan.start_s.items()),
    ]
    return Table("The plan", ["name", "value"], rows)


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"
