"""Output of a plan: fields for a program, tables for a person."""

import sys
from dataclasses import asdict
from typing import Any

from orbithash.cluster.planning.sizing import Plan

__all__ = ["as_fields", "as_table"]


def as_fields(plan: Plan) -> dict[str, Any]:
    """Return the fields of `--json`."""
    return asdict(plan)


def as_table(plan: Plan) -> None:
    """Print a plan for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    given = plan.requirements
    summary = Table(box=None, pad_edge=False, show_header=False)
    summary.add_column(style="bold")
    summary.add_column(overflow="fold")
    by = ", ".join(f"{name} {count:,}" for name, count in plan.nodes_by.items())
    nodes = "not possible with these" if plan.problem else f"{plan.nodes:,}"
    for name, value in (
        ("rows", f"{given.rows:,.0f} of {given.bits} bits, {given.num_distinct:,.0f} distinct codes ({given.codes})"),
        ("queries", f"{given.qps:g} per second, {given.k} hits each, 99 % within {given.p99_ms:g} ms"),
        ("node", f"{given.cores} cores, {given.memory_gb:g} GB; {given.headroom:.0%} of both stays free"),
        ("costs", plan.costs),
        ("problem", plan.problem),
        ("nodes", f"{nodes}; {plan.decided_by} decides ({by})"),
        (
            "shards",
            f"{plan.shards:,} of {plan.rows_per_shard:,.0f} rows and {plan.distinct_per_shard:,.0f} distinct codes",
        ),
        ("gateways", f"{plan.gateways:,}"),
        ("replicas", f"{plan.replicas:,} of {_short(plan.replica_gb)} GB: {given.replicas} of each shard"),
        ("batches", f"{plan.batch:.1f} queries on average, sent to {plan.branches:,} shards"),
        ("start", ", ".join(f"{_short(seconds)} s {source}" for source, seconds in plan.start_s.items())),
    ):
        if value:
            summary.add_row(name, value)
    console.print(summary)
    parts = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("memory, GB", "", "busy cores", "", "p99, ms", "", "archive on disk, GB", ""):
        parts.add_column(name, justify="left" if name else "right")
    columns = [
        [(name, _short(value)) for name, value in _with_sum(part)]
        for part in (plan.memory_gb, plan.cores, plan.p99_ms, plan.archive_gb)
    ]
    for number in range(max(map(len, columns))):
        parts.add_row(*(cell for column in columns for cell in (column[number] if number < len(column) else ("", ""))))
    console.print()
    console.print(parts)
    alternatives = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what would change it", "nodes", "shards", "gateways", "p99 ms", "what decides"):
        alternatives.add_column(name, justify="left" if name.startswith("what") else "right")
    for each in plan.alternatives:
        nodes = "-" if each.problem else f"{each.nodes:,}"
        decided = f"not possible: {each.decided_by}" if each.problem else each.decided_by
        alternatives.add_row(each.text, nodes, f"{each.shards:,}", f"{each.gateways:,}", f"{each.p99_ms:,.0f}", decided)
    console.print()
    console.print(alternatives)
    for limit in plan.limits:
        console.print(f"note: {limit}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _with_sum(part: dict[str, float]) -> list[tuple[str, float]]:
    return list((part if "all" in part else {**part, "all": sum(part.values())}).items())
