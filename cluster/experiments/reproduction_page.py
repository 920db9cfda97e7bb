"""The files of `orbithash reproduce`: the table as JSON and Markdown, and the page with baselines and failures."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.experiments.reproduction_table import COLUMNS, Row, cells_of, spread
from orbithash.encoders.files import write_file
from orbithash.trainers.evaluation.comparison import HEADLINE
from orbithash.trainers.evaluation.published import REPRODUCTIONS
from orbithash.trainers.reports.page import Fact, Facts, Figure, Figures, Link, Section, Table, Text, write_report
from orbithash.trainers.reports.plots import bars
from orbithash.trainers.reports.provenance import Provenance

__all__ = ["write_table"]

# A published value counts as reached from this much below it.
_TOLERANCE = 0.01
# Number of confused pairs of classes named for each run.
_NUM_CONFUSED = 3


def write_table(out: Path, rows: Sequence[Row], data: Path | str) -> None:
    """Write `reproduce.json`, `results.md` and `report.html` into the folder `out`; `data` is the folder of images."""
    notes = [
        f"{name}: {rule.note}" for name, rule in REPRODUCTIONS.items() if rule.note and name in {r.method for r in rows}
    ]
    write_file(out / "reproduce.json", json.dumps([dataclasses.asdict(row) for row in rows], indent=1))
    lines = [COLUMNS, ["---"] * len(COLUMNS), *map(cells_of, rows)]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write_file(out / "results.md", (table + "".join(f"\n{note}\n" for note in notes)))
    _write_page(out / "report.html", rows, data, notes)


def _write_page(path: Path, rows: Sequence[Row], data: Path | str, notes: Sequence[str]) -> None:
    """Write the page.

    Args:
        path: the HTML file; the run folders of the rows are relative to its folder.
        rows: the rows of the table.
        data: the folder of images.
        notes: remarks on the methods.
    """
    sections: list[Section] = [_facts(rows), _figures(rows), Table("Results", COLUMNS, [cells_of(row) for row in rows])]
    if (failures := _failures(path.parent, rows)) is not None:
        sections.append(failures)
    explanation = [
        "Ours: mean and standard deviation over the seeds, by the paper's own protocol, metric and order of ties. A "
        "published value has its source: the paper, the authors in an issue or README, or a third party's table; it "
        "was measured with the paper's network and imagery.",
        f"{HEADLINE}, expected: the headline on the queries and the database of the split. Rows of the same split can "
        "be compared by it, and so can the baselines of the row: simple methods on the backbone's features before "
        "training, and the codes of the classifier, of CSQ and of the triplet network if they were trained. Float "
        "cosine uses these features in float32, many times the bytes.",
        *notes,
    ]
    sections.append(Text("How to read the table", explanation))
    datasets = ", ".join(dict.fromkeys(row.dataset for row in rows))
    provenance = Provenance("Reproduction", f"{datasets} in {data}")
    write_report(path, "Reproduction", "Each method by its paper's own protocol.", sections, provenance)


def _facts(rows: Sequence[Row]) -> Facts:
    published = [row for row in rows if row.published is not None]
    reached = [row for row in published if np.mean(row.ours) >= float(row.published or 0) - _TOLERANCE]
    compared = [row for row in rows if row.baselines]
    beaten = [row for row in compared if _best(row)[1] > np.mean(row.clean)]
    best = max(rows, key=lambda row: float(np.mean(row.clean)))
    name, value = _best(best) if best.baselines else ("", 0.0)
    facts = [
        Fact(
            f"Best {HEADLINE}",
            spread(best.clean),
            f"{_name(best)}, on the queries and the database of its split.",
            f"{name}: {value:.3f}" if name else "",
        ),
    ]
    if compared:
        facts.append(
            Fact(
                "Better than all baselines",
                f"{len(compared) - len(beaten)} of {len(compared)}",
                f"Worse than a baseline of no more bytes: {', '.join(map(_name, beaten))}."
                if beaten
                else "By the headline.",
            )
        )
    if published:
        missed = [_name(row) for row in published if row not in reached]
        facts.append(
            Fact(
                "Published value reached",
                f"{len(reached)} of {len(published)}",
                f"Within {_TOLERANCE:g}, by the paper's metric."
                + (f" Below it: {', '.join(missed)}." if missed else ""),
            )
        )
    return Facts("In short", facts)


def _figures(rows: Sequence[Row]) -> Figures:
    ours = {_name(row): float(np.mean(row.ours)) for row in rows}
    clean = {_name(row): float(np.mean(row.clean)) for row in rows}
    published = {_name(row): row.published for row in rows if row.published is not None}
    baselines = {_name(row): _best(row)[1] for row in rows if row.baselines}
    return Figures(
        "Beside the baselines",
        [
            Figure(
                f"{HEADLINE} of the split",
                bars(clean, HEADLINE, limit=1, baseline=("best baseline", baselines) if baselines else None),
                "Expected over ties. The mark is the best baseline of no more bytes.",
            ),
            Figure(
                "The papers' metrics",
                bars(ours, "metric of each paper", limit=1, baseline=("published", published) if published else None),
                "Each paper has its own metric, so only bar and mark of one row can be compared.",
            ),
        ],
    )


def _failures(out: Path, rows: Sequence[Row]) -> Table | None:
    """Return the table of the failures of the first seed of each row; None if no evaluation has written them."""
    cells: list[list[str | Link]] = []
    for row in rows:
        for run in row.runs[:1]:
            folder = Path(run) / "evaluation"
            if (failures := _read(out / folder / "failures.json", row.direction)) is None:
                continue
            worst, bits = failures["worst"][0], failures["bits"]
            confused = "; ".join(
                f"{pair['label']} → {pair['nearest']} ({pair['queries']:.3g} of {pair['of']:,})"
                for pair in failures["confused"][:_NUM_CONFUSED]
            )
            cells.append(
                [
                    Link(_name(row), str(folder / "report.html")),
                    f"{worst['label']}: {worst['ap']:.2f}" + _baseline_of(worst),
                    confused or "none",
                    str(len(bits["dead"])),
                    f"{bits['num_correlated']:,}",
                ]
            )
    if not cells:
        return None
    return Table(
        "Failures",
        ["method", f"worst query, {HEADLINE}", "most confused classes", "dead bits", "correlated pairs of bits"],
        cells,
        "Of the first seed. The evaluation of each run has the pictures.",
    )


def _read(path: Path, direction: str) -> dict[str, Any] | None:
    """Return the failures of a direction from a `failures.json`; None if an older evaluation wrote none."""
    if not path.exists():
        return None
    directions: Mapping[str, dict[str, Any]] = json.loads(path.read_text())["directions"]
    # The headline of a model with a text side is image to image.
    return next((directions[name] for name in (direction, "image->image", "") if name in directions), None)


def _baseline_of(worst: Mapping[str, Any]) -> str:
    return f" ({worst['baseline']['name']}: {worst['baseline']['ap']:.2f})" if worst["baseline"] else ""


def _best(row: Row) -> tuple[str, float]:
    """Return name and mean headline of the best baseline of a row that has one."""
    name, values = max(row.baselines.items(), key=lambda item: float(np.mean(item[1])))
    return name, float(np.mean(values))


def _name(row: Row) -> str:
    variant = f" ({row.variant})" if row.variant else ""
    return f"{row.method}{variant} {row.direction.replace('->', ' → ')}".strip() + f", {row.protocol}, {row.bits} bits"
