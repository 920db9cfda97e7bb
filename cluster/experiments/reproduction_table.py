"""The table of `orbithash reproduce`: our figures, the published ones, the baselines."""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.encoders.files import write_file
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.published import LEARNED_BASELINES, PUBLISHED, REPRODUCTIONS, Reproduction
from orbithash.trainers.loop.run import Run
from orbithash.trainers.reports.page import Section, Table, Text, write_report

__all__ = ["COLUMNS", "Row", "cells_of", "rows_of", "show", "with_learned_baselines", "write_table"]

COLUMNS = [
    "method",
    "network",
    "split",
    "bits",
    "the paper's metric",
    "ours",
    "published",
    f"{HEADLINE}, expected",
    "best baseline of no more bytes",
    "float cosine",
    "runs",
]


# Only in the files.
NOT_SHOWN = {"network", "split", "float cosine", "runs"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table; lists have a figure for each seed.

    `ours` is by the paper's metric and order of ties, `clean` our headline on the split's own queries and database, the
    queries never trained on. `published` is None where nothing is known. `baselines` have the headline of what needs at
    most as many bytes: simple methods on the features that the run began with, and the learned baselines of the same
    split and length. `cosine` is the headline of these features as they are, in float32. Baselines search images by
    image: a row with a direction has none.
    """

    method: str
    variant: str
    network: str
    dataset: str
    protocol: str
    direction: str
    bits: int
    metric: str
    ours: list[float]
    clean: list[float]
    published: float | None
    tag: str
    baselines: dict[str, list[float]]
    cosine: list[float]


def rows_of(rule: Reproduction, run: Run, told: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """The lines of one method, split and length: one for each direction of the search.

    `run` is that of the first seed; `told` are the metrics of each, with those of a search of its own under "searched"
    and the images of the database's smallest class under "smallest_class".
    """
    config = run.config
    start = "" if config.weights else ", random weights"
    for direction in rule.directions:
        ours, clean, names = [], [], []
        for metrics in told:
            searched = metrics.get("searched", metrics)
            of_paper, of_clean = (m["metrics"][direction] if direction else m["metrics"] for m in (searched, metrics))
            # Of another split, the smallest class may be another.
            metric = rule.metric.replace("smallest", str(metrics["smallest_class"]))
            names.append(metric)
            ours.append(of_paper[metric][rule.policy])
            clean.append(of_clean[HEADLINE]["expected"])
        key = (run.method, told[0]["dataset"], config.bits, direction, getattr(config, "variant", ""))
        known = [f for f in PUBLISHED if (f.method, f.dataset, f.bits, f.direction, f.variant) == key]
        baselines, cosine = ({}, []) if direction else _simple_baselines(told)
        yield Row(
            method=run.method,
            variant=key[-1],
            network=f"{config.backbone}{start}, {config.image_size} px, {config.epochs} epochs",
            dataset=told[0]["dataset"],
            protocol=rule.protocol,
            direction=direction,
            bits=config.bits,
            metric=", ".join(dict.fromkeys(names)),
            ours=ours,
            clean=clean,
            published=known[0].value if known else None,
            tag=known[0].tag if known else "",
            baselines=baselines,
            cosine=cosine,
        )


def _simple_baselines(told: Sequence[dict[str, Any]]) -> tuple[dict[str, list[float]], list[float]]:
    """The headline for each seed of those of at most as many bytes an item as the codes have, and of float cosine."""
    size = told[0]["codes"]["bytes_per_code"]
    figures: dict[str, list[float]] = {}
    cosine = []
    for metrics in told:
        for name, entry in metrics["baselines"].items():
            if "metrics" in entry and entry["bytes"] <= size:
                figures.setdefault(name, []).append(float(entry["metrics"][HEADLINE]))
            elif "metrics" in entry and name == "cosine":
                cosine.append(float(entry["metrics"][HEADLINE]))
    return {name: values for name, values in figures.items() if len(values) == len(told)}, cosine


def with_learned_baselines(rows: Sequence[Row]) -> list[Row]:
    """Each supervised method's row with the figures of the learned baselines of its split and length."""

    def beside(row: Row) -> dict[str, list[float]]:
        if row.method in LEARNED_BASELINES:
            return {}
        same = [one for one in rows if (one.protocol, one.bits) == (row.protocol, row.bits)]
        return {one.method: one.clean for one in same if one.method in LEARNED_BASELINES}

    return [dataclasses.replace(row, baselines=row.baselines | beside(row)) for row in rows]


def write_table(out: Path, rows: Sequence[Row]) -> None:
    """Writes `reproduce.json`, `results.md` and `report.html` into the folder `out`."""
    cells = [cells_of(row) for row in rows]
    notes = [
        f"{name}: {rule.note}" for name, rule in REPRODUCTIONS.items() if rule.note and name in {r.method for r in rows}
    ]
    write_file(out / "reproduce.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_file(out / "results.md", (table + "".join(f"\n{note}\n" for note in notes)))
    explanation = [
        "Ours: mean and standard deviation over the seeds, by the paper's own protocol, metric and order of ties. A "
        "published figure carries how it is known: read in the paper, told by the authors in an issue or README, or a "
        "third party's table; it is of the paper's network and imagery.",
        f"{HEADLINE}, expected: our headline, on the queries and the database of the split. Rows of the same split can "
        "be compared by it, and so can the baselines of the row: simple methods on the features that the run began "
        "with, and the classifier's and triplet network's codes where they were trained, too. Float cosine is on these "
        "features as they are and takes many times the bytes.",
        *notes,
    ]
    sections: list[Section] = [Table("Figures", COLUMNS, cells), Text("How to read them", explanation)]
    write_report(out / "report.html", "Reproduction", "Each method by its paper's own protocol.", sections)


def show(rows: Sequence[Row]) -> None:
    """Prints what fits a terminal of the table."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    shown = [number for number, column in enumerate(COLUMNS) if column not in NOT_SHOWN]
    table = RichTable(box=SIMPLE, padding=(0, 1, 0, 0), show_lines=True)
    for number in shown:
        table.add_column(COLUMNS[number], overflow="fold")
    for row in rows:
        cells = cells_of(row)
        table.add_row(*(cells[number] for number in shown))
    Console().print(table)


def cells_of(row: Row) -> list[str]:
    """What stands in each column."""
    variant = f" ({row.variant})" if row.variant else ""
    name = f"{row.method}{variant} {row.direction}".strip()
    best = max(row.baselines.items(), key=lambda item: float(np.mean(item[1])), default=None)
    baseline = "none"
    if best is not None:
        baseline = f"{_spread(best[1])} ({best[0]})"
        if np.mean(best[1]) > np.mean(row.clean):
            baseline += ", better than the method"
    return [
        f"{name} on {row.dataset}",
        row.network,
        row.protocol,
        str(row.bits),
        row.metric,
        _spread(row.ours),
        f"{row.published:.3f} ({row.tag})" if row.published is not None else "not known",
        _spread(row.clean),
        baseline,
        _spread(row.cosine) if row.cosine else "none",
        str(len(row.ours)),
    ]


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean
