"""A plan as a person or a program reads it."""

import sys
from dataclasses import asdict
from typing import Any

from orbithash.cluster.planning.plan import Plan

__all__ = ["as_fields", "as_table"]


def as_fields(plan: Plan) -> dict[str, Any]:
    """The fields of `--json`."""
    return asdict(plan)


def as_table(plan: Plan) -> None:
    """Prints a plan for a person."""
    from rich.console import Console
    from rich.table import Table

    console = Console(markup=False, highlight=False, width=None if sys.stdout.isatty() else 120)
    wanted = plan.wanted
    about = Table(box=None, pad_edge=False, show_header=False)
    about.add_column(style="bold")
    about.add_column(overflow="fold")
    by = ", ".join(f"{name} {count:,}" for name, count in plan.nodes_by.items())
    for name, value in (
        ("rows", f"{wanted.rows:,.0f} of {wanted.bits} bits, {wanted.num_distinct:,.0f} distinct codes"),
        ("queries", f"{wanted.qps:g} a second, {wanted.k} hits each, 99 of 100 within {wanted.p99_ms:g} ms"),
        ("a node", f"{wanted.cores} cores, {wanted.memory_gb:g} GB; {wanted.headroom:.0%} of both stays free"),
        ("constants", plan.costs),
        ("problem", plan.problem),
        (
            "nodes",
            f"{'not possible with these' if plan.problem else f'{plan.nodes:,}'}; {plan.decided_by} decides ({by})",
        ),
        (
            "shards",
            f"{plan.shards:,} of {plan.rows_per_shard:,.0f} rows and {plan.distinct_per_shard:,.0f} distinct codes",
        ),
        ("gateways", f"{plan.gateways:,}"),
        ("copies", f"{plan.copies:,} of {_short(plan.copy_gb)} GB: {wanted.replicas} of each shard for each gateway"),
        ("batches", f"of {plan.batch:.1f} queries"),
    ):
        if value:
            about.add_row(name, value)
    console.print(about)
    parts = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("memory, GB", "", "cores, busy", "", "99th of 100, ms", "", "archive on disk, GB", ""):
        parts.add_column(name, justify="left" if name else "right")
    columns = [
        [(name, _short(value)) for name, value in _with_sum(part)]
        for part in (plan.memory_gb, plan.cores, plan.p99_ms, plan.archive_gb)
    ]
    for number in range(max(map(len, columns))):
        parts.add_row(*(cell for column in columns for cell in (column[number] if number < len(column) else ("", ""))))
    console.print()
    console.print(parts)
    changes = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("what would change it", "nodes", "shards", "gateways", "p99 ms", "what decides"):
        changes.add_column(name, justify="left" if name in ("what would change it", "what decides") else "right")
    for each in plan.what_if:
        nodes = "-" if each.problem else f"{each.nodes:,}"
        decided = f"not possible: {each.decided_by}" if each.problem else each.decided_by
        changes.add_row(each.text, nodes, f"{each.shards:,}", f"{each.gateways:,}", f"{each.p99_ms:,.0f}", decided)
    console.print()
    console.print(changes)
    for limit in plan.limits:
        console.print(f"note: {limit}")


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 1 else f"{value:.3f}"


def _with_sum(part: dict[str, float]) -> list[tuple[str, float]]:
    return list((part if "all" in part else {**part, "all": sum(part.values())}).items())
