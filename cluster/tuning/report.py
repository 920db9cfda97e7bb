"""What a search for settings found: a table, a page with a plot of parallel coordinates."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbithash.cluster.output import print_json
from orbithash.cluster.tuning.tune import Trial, Tuning, best_config
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.loop.run import Run
from orbithash.trainers.reports.page import Fact, Facts, Figure, Figures, Table, write_report
from orbithash.trainers.reports.plots import Coordinate, parallel_coordinates
from orbithash.trainers.search_space import Log

__all__ = ["finish"]

# Rows that a terminal has room for.
_MAX_SHOWN = 20


def finish(run: Run, tuning: Tuning, trials: Sequence[Trial], folder: Path, best: Path | None, as_json: bool) -> None:
    """Writes best.yaml, to `best`, too, and report.html, and prints the trials, which are given best first."""
    settings = best_config(run, trials)
    for path in filter(None, (folder / "best.yaml", best)):
        try:
            write_file(path, settings)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give --best another file") from error
    write_page(folder / "report.html", run, tuning, trials)
    if as_json:
        print_json({"metric": tuning.metric, "trials": [dataclasses.asdict(trial) for trial in trials]})
        return
    show(tuning, trials)
    as_is = next(trial for trial in trials if trial.number == 0)
    print(f"best: trial {trials[0].number}, {tuning.metric} {_score(trials[0])}; as it was: {_score(as_is)}")
    print(f"report: {folder / 'report.html'}")
    print(f"next: orbithash train {run.method} --config {best or folder / 'best.yaml'} --data {run.root} --out RUN")


def write_page(path: Path, run: Run, tuning: Tuning, trials: Sequence[Trial]) -> None:
    """Writes the page of the trials, which are given best first."""
    best, as_is = trials[0], next(trial for trial in trials if trial.number == 0)
    scored = [trial for trial in trials if trial.score is not None]
    coordinates = [
        Coordinate(name, [trial.settings[name] for trial in scored], isinstance(dimension, Log))
        for name, dimension in tuning.space.items()
    ]
    scores = [float(trial.score or 0) for trial in scored]
    marked = next((place for place, trial in enumerate(scored) if trial is as_is), None)
    facts = Facts(
        "Result",
        [
            Fact(tuning.metric, _score(best), f"of the best trial, number {best.number}, in its epoch {best.epoch}"),
            Fact("as it was", _score(as_is), "of trial 0, which has the settings as they were given"),
            Fact("trials", str(len(trials)), f"of which {len(scored)} came to a first score"),
        ],
        "All figures are of the validation part; the test part was not looked at. The best of many is better than it "
        "will be on other images: train with best.yaml and evaluate the run.",
    )
    plot = Figure(
        "Settings and score",
        parallel_coordinates(coordinates, Coordinate(tuning.metric, scores, False), marked),
        "A line is a trial, the bluer the better its score; the dashed one has the settings as they were. Trials that "
        "were stopped early stand at the best score they had.",
    )
    subtitle = f"{run.method}, {run.config.bits} bits, on {run.manifest.dataset}"
    table = Table("Trials", columns(tuning), [cells(tuning, trial) for trial in trials])
    write_report(path, "Tuning", subtitle, [facts, Figures("Search", [plot]), table])


def show(tuning: Tuning, trials: Sequence[Trial]) -> None:
    """Prints the table, as much of it as a terminal has room for."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    # All settings in one column: in one each they would not fit.
    table = RichTable(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("trial", tuning.metric, "epochs", "settings"):
        table.add_column(column, no_wrap=column != "settings")
    for trial in trials[:_MAX_SHOWN]:
        settings = ", ".join(f"{name}={_value(trial.settings.get(name))}" for name in tuning.space)
        told = f"{settings}: {trial.problem}" if trial.problem else settings
        table.add_row(str(trial.number), _score(trial), str(trial.epochs), told)
    Console().print(table)
    if len(trials) > _MAX_SHOWN:
        print(f"… and {len(trials) - _MAX_SHOWN} more")


def columns(tuning: Tuning) -> list[str]:
    """The heads of the table."""
    return ["trial", tuning.metric, "epochs", *tuning.space, ""]


def cells(tuning: Tuning, trial: Trial) -> list[str]:
    """One row of it."""
    settings = [_value(trial.settings.get(name)) for name in tuning.space]
    return [str(trial.number), _score(trial), str(trial.epochs), *settings, trial.problem]


def _score(trial: Trial) -> str:
    return "-" if trial.score is None else f"{trial.score:.4f}"


def _value(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else str(value)
    )
