"""The table of `orbithash reproduce`: results of orbithash, published results, baselines."""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.published import LEARNED_BASELINES, PUBLISHED, Reproduction
from orbithash.trainers.loop.run import Run

__all__ = ["COLUMNS", "Row", "cells_of", "rows_of", "show", "spread", "with_learned_baselines"]

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


# Columns of the files that the terminal does not show.
NOT_SHOWN = {"network", "split", "float cosine", "runs"}


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of the table; lists have one value per seed.

    Attributes:
        ours: the paper's metric with its order of ties.
        clean: the headline on the split's own queries and database; the queries are never trained on.
        published: the published value; None if unknown.
        source: source of the published value, see `published`.
        baselines: headline of baselines of at most as many bytes: simple methods on the backbone's features before
            training, and the learned baselines of the same split and length. Baselines search images by image, so a
            row with a direction has none.
        cosine: headline of these features in float32.
        runs: run folder of each seed, relative to the folder of the table.
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
    source: str
    baselines: dict[str, list[float]]
    cosine: list[float]
    runs: list[str] = dataclasses.field(default_factory=list)


def rows_of(rule: Reproduction, run: Run, evaluated: Sequence[dict[str, Any]]) -> Iterator[Row]:
    """Yield the rows of one method, split and length: one for each direction of the search.

    Args:
        rule: the paper's evaluation.
        run: the run of the first seed.
        evaluated: the metrics of each seed; "searched" has those of a separate search, if there is one, and
            "smallest_class" the number of images of the database's smallest class.
    """
    config = run.config
    start = "" if config.weights else ", random weights"
    for direction in rule.directions:
        ours, clean, names = [], [], []
        for metrics in evaluated:
            searched = metrics.get("searched", metrics)
            by_paper, by_split = (m["metrics"][direction] if direction else m["metrics"] for m in (searched, metrics))
            # The seeds have different splits, so the size of the smallest class may differ.
            metric = rule.metric.replace("smallest", str(metrics["smallest_class"]))
            names.append(metric)
            ours.append(by_paper[metric][rule.policy])
            clean.append(by_split[HEADLINE]["expected"])
        key = (run.method, evaluated[0]["dataset"], config.bits, direction, getattr(config, "variant", ""))
        known = [r for r in PUBLISHED if (r.method, r.dataset, r.bits, r.direction, r.variant) == key]
        baselines, cosine = ({}, []) if direction else _simple_baselines(evaluated)
        # A method that is a baseline is not compared with itself.
        baselines.pop(run.method.replace("-", "_"), None)
        yield Row(
            method=run.method,
            variant=key[-1],
            network=f"{config.backbone}{start}, {config.image_size} px, {config.epochs} epochs",
            dataset=evaluated[0]["dataset"],
            protocol=rule.protocol,
            direction=direction,
            bits=config.bits,
            metric=", ".join(dict.fromkeys(names)),
            ours=ours,
            clean=clean,
            published=known[0].value if known else None,
            source=known[0].source if known else "",
            baselines=baselines,
            cosine=cosine,
        )


def _simple_baselines(evaluated: Sequence[dict[str, Any]]) -> tuple[dict[str, list[float]], list[float]]:
    """Return the headline per seed of the baselines of at most the code's bytes, and that of float cosine.

    A baseline that is missing for a seed is omitted.
    """
    size = evaluated[0]["codes"]["bytes_per_code"]
    headlines: dict[str, list[float]] = {}
    cosine = []
    for metrics in evaluated:
        for name, entry in metrics["baselines"].items():
            if "metrics" in entry and entry["bytes"] <= size:
                headlines.setdefault(name, []).append(float(entry["metrics"][HEADLINE]))
            elif "metrics" in entry and name == "cosine":
                cosine.append(float(entry["metrics"][HEADLINE]))
    return {name: values for name, values in headlines.items() if len(values) == len(evaluated)}, cosine


def with_learned_baselines(rows: Sequence[Row]) -> list[Row]:
    """Return the rows, those of supervised methods with the learned baselines of the same split and length."""

    def beside(row: Row) -> dict[str, list[float]]:
        if row.method in LEARNED_BASELINES:
            return {}
        same = [other for other in rows if (other.protocol, other.bits) == (row.protocol, row.bits)]
        return {other.method: other.clean for other in same if other.method in LEARNED_BASELINES}

    return [dataclasses.replace(row, baselines=row.baselines | beside(row)) for row in rows]


def show(rows: Sequence[Row]) -> None:
    """Print the columns of the table that fit a terminal."""
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
    """Return the text of each column."""
    variant = f" ({row.variant})" if row.variant else ""
    name = f"{row.method}{variant} {row.direction}".strip()
    best = max(row.baselines.items(), key=lambda item: float(np.mean(item[1])), default=None)
    baseline = "none"
    if best is not None:
        baseline = f"{spread(best[1])} ({best[0]})"
        if np.mean(best[1]) > np.mean(row.clean):
            baseline += ", better than the method"
    return [
        f"{name} on {row.dataset}",
        row.network,
        row.protocol,
        str(row.bits),
        row.metric,
        spread(row.ours),
        f"{row.published:.3f} ({row.source})" if row.published is not None else "not known",
        spread(row.clean),
        baseline,
        spread(row.cosine) if row.cosine else "none",
        str(len(row.ours)),
    ]


def spread(values: Sequence[float]) -> str:
    """Return the mean of the values, and their standard deviation if there are several."""
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean
