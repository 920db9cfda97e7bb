"""What the benchmarks share: the environment in every result, output for a person or a machine, results.json."""

import datetime as dt
import json
import os
import platform
from collections.abc import Iterable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

__all__ = ["environment", "print_table", "show", "write_results"]


def environment(name: str, *packages: str) -> dict[str, Any]:
    """Return the environment that is reported with every measurement: date, machine and versions of `packages`."""
    return {
        "bench": name,
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "machine": f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}",
        "versions": ", ".join(f"{package} {version(package)}" for package in packages),
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
    """Write results.json into the folder `out`, which is created if it does not exist."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "results.json").write_text(json.dumps(result, indent=2) + "\n")
