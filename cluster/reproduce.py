"""Every method by its paper's own protocol and definition, beside what was published.

OUT/METHOD/BITS-SEED/   a run folder with its evaluation
OUT/reproduce.json      every figure of every run
OUT/results.md          the table
OUT/report.html         the table as a page
"""

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.evaluate import evaluate_run
from orbithash.cluster.progress import say
from orbithash.cluster.train import prepare_run, train_on_ray
from orbithash.encoders.errors import InputError, listed
from orbithash.trainers.datasets import PROTOCOLS, Manifest
from orbithash.trainers.evaluation import HEADLINE
from orbithash.trainers.loop import Run
from orbithash.trainers.methods import METHODS, get_method
from orbithash.trainers.published import PUBLISHED, REPRODUCTIONS, Reproduction
from orbithash.trainers.report import Section, Table, Text, write_atomically, write_report

__all__ = ["Row", "reproduce", "show"]

COLUMNS = [
    "method",
    "bits",
    "the paper's metric",
    "ours",
    "published",
    f"{HEADLINE}, expected",
    "best baseline of no more bytes",
    "runs",
]


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the table: means and standard deviations over the seeds.

    `ours` is by the paper's metric and order of ties, `clean` our headline on the split's own queries and database, the
    queries never trained on. `published` is None where nothing is known; `baseline` is the best simple method of at
    most as many bytes, for the first seed, on the features that the run began with.
    """

    method: str
    dataset: str
    direction: str
    bits: int
    metric: str
    ours: list[float]
    clean: list[float]
    published: float | None
    tag: str
    baseline: tuple[str, float] | None


def reproduce(
    methods: Sequence[str],
    data: Path,
    out: Path,
    *,
    bits: Sequence[int] = (64,),
    num_seeds: int = 1,
    weights: str | None = None,
    captions: Path | None = None,
    settings: Sequence[str] = (),
    workers: int = 1,
    gpus_per_worker: float = 0,
) -> list[Row]:
    """Trains and evaluates each method for each length and seed; what is there already is not done again.

    The seed is that of the split and of the training. `settings` are `key=value`, or `method.key=value` for one method.
    Without `methods`, all that the data allow: DUCH needs captions and MrHash a second source.
    """
    if num_seeds < 1:
        raise InputError(f"{num_seeds} seeds; at least 1 is needed")
    runs = _prepare(methods, data, bits, num_seeds, weights, captions, settings)
    found: dict[tuple[str, int], list[dict[str, Any]]] = {}
    for number, (name, length, seed, run) in enumerate(runs, 1):
        folder = out / name / f"{length}-{seed}"
        say(f"run {number} of {len(runs)}: {name}, {length} bits, seed {seed}")
        train_on_ray(run, folder, workers, gpus_per_worker)
        found.setdefault((name, length), []).append(_evaluated(folder, run, REPRODUCTIONS[name]))
    rows = [row for (name, length), metrics in found.items() for row in _rows(name, length, metrics)]
    _write(out, rows)
    return rows


def _prepare(
    methods: Sequence[str],
    data: Path,
    bits: Sequence[int],
    num_seeds: int,
    weights: str | None,
    captions: Path | None,
    settings: Sequence[str],
) -> list[tuple[str, int, int, Run]]:
    """All runs, before the first is trained: what is wrong with any of them is told at once."""
    _check_prefixes(settings)
    runs, problems = [], []
    for name in methods or list(METHODS):
        kind, rule = get_method(name), REPRODUCTIONS[name]
        for length in bits:
            for seed in range(num_seeds):
                try:
                    run = prepare_run(
                        name,
                        data,
                        protocol=rule.protocol,
                        settings=_settings_of(name, settings, list(kind.Config.model_fields)),
                        split_seed=seed,
                        validation=rule.validation,
                        # With captions the images are another dataset.
                        captions=captions if rule.directions != ("",) else None,
                        bits=length,
                        seed=seed,
                        weights=weights,
                    )
                    _check_tables(run)
                except InputError as err:
                    if methods:
                        problems.append(f"{name}: {err}")
                    else:
                        say(f"{name} is left out: {err}")
                    break
                runs.append((name, length, seed, run))
            else:
                continue
            break
    if problems:
        raise listed(problems, "nothing was trained")
    if not runs:
        raise InputError(f"{data} allows none of the methods; the lines above say why")
    return runs


def _check_prefixes(settings: Sequence[str]) -> None:
    for setting in settings:
        name, dot, _ = setting.partition("=")[0].partition(".")
        if dot and name not in METHODS:
            raise InputError(f"{setting!r}: there is no method {name!r}; there are {', '.join(METHODS)}")


def _settings_of(method: str, settings: Sequence[str], known: Sequence[str]) -> list[str]:
    """The settings of one method: its own, and the common ones that it has."""
    chosen = []
    for setting in settings:
        key = setting.partition("=")[0]
        name, dot, _ = key.partition(".")
        if dot and name == method:
            chosen.append(setting.removeprefix(f"{method}."))
        elif not dot and key in known:
            chosen.append(setting)
    return chosen


def _check_tables(run: Run) -> None:
    """`InputError` when the data lack what the method trains on."""
    from orbithash.trainers.tables import check_sources

    unweighted = run.config.model_copy(update={"weights": None})
    check_sources(list(run.manifest.images), dataclasses.replace(run, config=unweighted).build())


def _evaluated(folder: Path, run: Run, rule: Reproduction) -> dict[str, Any]:
    """The metrics of one run: its own evaluation, and the search by the paper's protocol under "searched"."""
    path = folder / "reproduction.json"
    if path.exists():
        kept: dict[str, Any] = json.loads(path.read_text())
        return kept
    cutoffs = (20, 100, smallest_class(run.manifest))
    metrics, _ = evaluate_run(folder, run.root, cutoffs=cutoffs)
    if rule.searched_by:
        searched, _ = evaluate_run(folder, run.root, rule.searched_by, baselines=False, cutoffs=cutoffs)
        metrics = {**metrics, "searched": searched}
    metrics["smallest_class"] = cutoffs[-1]
    write_atomically(path, json.dumps(metrics).encode())
    return metrics


def smallest_class(manifest: Manifest) -> int:
    """Images of the smallest class in the database."""
    database = manifest.part(*PROTOCOLS[manifest.protocol].database)
    labels = [label for image in database for label in image.labels]
    return int(np.bincount(labels)[np.unique(labels)].min())


def _rows(name: str, bits: int, runs: Sequence[dict[str, Any]]) -> Iterator[Row]:
    rule = REPRODUCTIONS[name]
    for direction in rule.directions:
        ours, clean = [], []
        metric = rule.metric
        for metrics in runs:
            searched = metrics.get("searched", metrics)
            of_paper, of_clean = (m["metrics"][direction] if direction else m["metrics"] for m in (searched, metrics))
            metric = metric.replace("smallest", str(metrics["smallest_class"]))
            ours.append(of_paper[metric][rule.policy])
            clean.append(of_clean[HEADLINE]["expected"])
        dataset = runs[0]["dataset"]
        known = [f for f in PUBLISHED if (f.method, f.dataset, f.bits, f.direction) == (name, dataset, bits, direction)]
        yield Row(
            method=name,
            dataset=dataset,
            direction=direction,
            bits=bits,
            metric=metric,
            ours=ours,
            clean=clean,
            published=known[0].value if known else None,
            tag=known[0].tag if known else "",
            baseline=None if direction else _best_baseline(runs[0]),
        )


def _best_baseline(metrics: dict[str, Any]) -> tuple[str, float] | None:
    """Of at most as many bytes an item as the codes have, by the headline."""
    size = metrics["codes"]["bytes_per_code"]
    figures = {
        name: float(entry["metrics"][HEADLINE])
        for name, entry in metrics["baselines"].items()
        if "metrics" in entry and entry["bytes"] <= size
    }
    return max(figures.items(), key=lambda item: item[1]) if figures else None


def _write(out: Path, rows: Sequence[Row]) -> None:
    cells = [_cells(row) for row in rows]
    notes = [
        f"{name}: {rule.note}" for name, rule in REPRODUCTIONS.items() if rule.note and name in {r.method for r in rows}
    ]
    write_atomically(out / "reproduce.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1).encode())
    lines = [COLUMNS, ["---"] * len(COLUMNS), *cells]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_atomically(out / "results.md", (table + "".join(f"\n{note}\n" for note in notes)).encode())
    explanation = [
        "Ours: mean and standard deviation over the seeds, by the paper's own protocol, metric and order of ties. "
        f"{HEADLINE}, expected: our headline, the same for all methods, on the same queries and database. A published "
        "figure carries how it is known: read in the paper, told by the authors in an issue or README, or a third "
        "party's table.",
        *notes,
    ]
    sections: list[Section] = [Table("Figures", COLUMNS, cells), Text("How to read them", explanation)]
    write_report(out / "report.html", "Reproduction", "Each method by its paper's own protocol.", sections)


def show(rows: Sequence[Row]) -> None:
    """Prints the table."""
    from rich.console import Console
    from rich.table import Table as RichTable

    table = RichTable(*COLUMNS)
    for row in rows:
        table.add_row(*_cells(row))
    Console().print(table)


def _cells(row: Row) -> list[str]:
    name = f"{row.method} {row.direction}".strip()
    baseline = f"{row.baseline[1]:.3f} ({row.baseline[0]})" if row.baseline else "none"
    if row.baseline and row.baseline[1] > np.mean(row.clean):
        baseline += ", better than the method"
    published = f"{row.published:.3f} ({row.tag})" if row.published is not None else "not known"
    ours, clean = _spread(row.ours), _spread(row.clean)
    return [f"{name} on {row.dataset}", str(row.bits), row.metric, ours, published, clean, baseline, str(len(row.ours))]


def _spread(values: Sequence[float]) -> str:
    mean = f"{np.mean(values):.3f}"
    return f"{mean} ± {np.std(values, ddof=1):.3f}" if len(values) > 1 else mean
