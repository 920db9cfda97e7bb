"""What the benchmarks share: the environment in every result, output for a person or a machine, files of results."""

import datetime as dt
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from orbithash.encoders.files import write_file
from orbithash.trainers.reports.provenance import machine, package_versions

__all__ = ["environment", "print_table", "show", "write_results"]


def environment(name: str, *packages: str) -> dict[str, Any]:
    """Return the environment that is reported with every measurement: date, machine and versions of `packages`."""
    return {
        "bench": name,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": machine(),
        "versions": ", ".join(package_versions(*packages)),
    }


def show(result: dict[str, Any], as_json: bool) -> None:
    """Print a result as JSON or as one line per field."""
    if as_json:
        print(json.dumps(result))
        return
    for name, value in result.items():
        print(f"{name:<26} {value:.3f}" if isinstance(value, float) else f"{name:<26} {value}")


def print_table(columns: Sequence[str], rows: Iterable[Sequence[str]], width: int) -> None:
    """Print rows under the names of their columns; `width` characters where there is no terminal."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table

    table = Table(box=SIMPLE, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        table.add_column(name, justify="right" if number else "left")
    for row in rows:
        table.add_row(*row)
    Console(width=None if Console().is_terminal else width).print(table)


def write_results(result: dict[str, Any], out: Path) -> None:
    """Write results.json and report.html into the folder `out`, which is created if it does not exist."""
    from orbithash.cluster.bench.page import write_bench_page

    write_file(out / "results.json", json.dumps(result, indent=2) + "\n")
    write_bench_page(out / "report.html", result)
