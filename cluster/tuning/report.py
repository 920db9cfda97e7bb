"""The result of a search for settings: the table on the terminal, best.yaml, and the page."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from orbithash.cluster.output import print_json
from orbithash.cluster.tuning.finals import CONFIDENCE, Candidate, Finals
from orbithash.cluster.tuning.options import Tuning
from orbithash.cluster.tuning.trials import Trial
from orbithash.cluster.tuning.tune import Result, best_config
from orbithash.encoders.errors import InputError
from orbithash.encoders.files import write_file
from orbithash.trainers.loop.run import Run
from orbithash.trainers.reports.page import Fact, Facts, Figure, Figures, Section, Table, write_report
from orbithash.trainers.reports.plots import MAX_BARS, Coordinate, bars, parallel_coordinates
from orbithash.trainers.reports.provenance import Provenance
from orbithash.trainers.search_space import Log

__all__ = ["finish"]

# Maximum number of rows printed on a terminal.
_MAX_SHOWN = 20


def finish(run: Run, tuning: Tuning, result: Result, folder: Path, best: Path | None, as_json: bool) -> None:
    """Write best.yaml, also to `best`, and report.html; print the trials and the finals."""
    settings = best_config(run, result.chosen)
    for path in filter(None, (folder / "best.yaml", best)):
        try:
            write_file(path, settings)
        except OSError as error:
            raise InputError(f"{path}: cannot be written ({error.strerror}); give --best another file") from error
    write_page(folder / "report.html", run, tuning, result)
    if as_json:
        print_json({**result.to_plain(), "trials": [dataclasses.asdict(trial) for trial in result.trials]})
        return
    show(tuning, result.trials)
    best_trial, given = result.trials[0], result.given
    print(f"best: trial {best_trial.number}, {tuning.metric} {_score(best_trial)}; settings as given: {_score(given)}")
    if result.finals is not None:
        for each in result.finals.candidates:
            print(f"finals: {_title(each.number)}, {tuning.metric} {_mean(each)}")
        print(f"finals: {result.finals.verdict}; chosen: {_title(result.finals.chosen)}")
    print(f"report: {folder / 'report.html'}")
    print(f"next: orbithash train {run.method} --config {best or folder / 'best.yaml'} --data {run.root} --out RUN")


def write_page(path: Path, run: Run, tuning: Tuning, result: Result) -> None:
    """Write the page of a search."""
    trials, chosen, given = result.trials, result.chosen, result.given
    scored = [trial for trial in trials if trial.score is not None]
    failed = [trial for trial in trials if trial.problem]
    sections: list[Section] = [_facts(tuning, result)]
    if result.finals is not None:
        sections.append(_finals(tuning, result.finals))
    if scored:
        sections.append(_figures(tuning, scored, given))
    rows = [[name, _value(given.settings.get(name)), _value(chosen.settings.get(name))] for name in tuning.space]
    sections.append(Table("Chosen beside given settings", ["setting", "given", "chosen"], rows))
    if failed:
        problems = [[str(trial.number), _settings(tuning, trial), trial.problem] for trial in failed]
        caption = "Trials that ended with an error; the search goes on without them."
        sections.append(Table("Failed trials", ["trial", "settings", "problem"], problems, caption))
    sections.append(Table("Trials", columns(tuning), [cells(tuning, trial) for trial in trials]))
    subtitle = f"A search over {', '.join(tuning.space)} by the validation metric {tuning.metric}."
    provenance = Provenance(
        "Tuning", f"{run.manifest.dataset} in {run.root}", {"Method": f"{run.method}, {run.config.bits} bits"}
    )
    write_report(path, f"Settings of {run.method}", subtitle, sections, provenance)


def _facts(tuning: Tuning, result: Result) -> Facts:
    trials, best, given = result.trials, result.trials[0], result.given
    num_scored = sum(trial.score is not None for trial in trials)
    num_failed = sum(bool(trial.problem) for trial in trials)
    longest = max(trial.epochs for trial in trials)
    bias = "The best score of many trials is biased upwards"
    if result.finals is None:
        bias += ": train with best.yaml and evaluate the run."
    else:
        bias += "; the finals have seeds of their own."
    return Facts(
        "Result",
        [
            Fact(
                tuning.metric,
                _score(best),
                f"Best trial, number {best.number}, in epoch {best.epoch}.",
                f"settings as given: {_score(given)}",
            ),
            Fact(
                "Trials",
                str(num_scored),
                f"Trials with a score. Ended with an error: {num_failed}.",
                f"started: {len(trials)}",
            ),
            Fact(
                "Epochs",
                f"{sum(trial.epochs for trial in trials):,}",
                "Of all trials together. Trials with poor scores are stopped early.",
                f"without early stopping: {longest * len(trials):,}",
            ),
        ],
        f"All scores are measured on the validation part; the test part was not used. {bias}",
    )


def _finals(tuning: Tuning, finals: Finals) -> Table:
    rows = [[_title(each.number), _mean(each), *map(_text, each.scores), each.problem] for each in finals.candidates]
    verdict = f"{finals.verdict[0].upper()}{finals.verdict[1:]}."
    caption = (
        f"{verdict} Each was trained to the end with each seed. Mean ± standard deviation of {tuning.metric}; "
        f"differences are paired by seed, their interval is that of Student's t distribution at {CONFIDENCE:.0%} and "
        "does not account for the choice of the best finalist."
    )
    return Table("Finals", ["settings", "mean", *(f"seed {seed}" for seed in finals.seeds), ""], rows, caption)


def _figures(tuning: Tuning, scored: Sequence[Trial], given: Trial) -> Figures:
    coordinates = [
        Coordinate(name, [trial.settings[name] for trial in scored], isinstance(dimension, Log))
        for name, dimension in tuning.space.items()
    ]
    scores = [float(trial.score or 0) for trial in scored]
    marked = next((place for place, trial in enumerate(scored) if trial is given), None)
    name_of = {trial.number: f"trial {trial.number}" + (", as given" if trial is given else "") for trial in scored}
    return Figures(
        "Search",
        [
            Figure(
                "Settings and score",
                parallel_coordinates(coordinates, Coordinate(tuning.metric, scores, False), marked),
                "Each line is a trial; a bluer line has a better score, the dashed line has the settings as given. "
                "Trials that were stopped early are shown with the best score that they reached.",
            ),
            Figure(
                "Scores",
                bars(
                    {name_of[trial.number]: score for trial, score in zip(scored[:MAX_BARS], scores, strict=False)},
                    tuning.metric,
                    limit=1 if max(scores) <= 1 else None,
                    highlighted=name_of.get(given.number),
                ),
                "The best score of each trial; the blue bar has the settings as given.",
            ),
        ],
    )


def show(tuning: Tuning, trials: Sequence[Trial]) -> None:
    """Print the table of the first trials."""
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table as RichTable

    # All settings in one column: one column per setting would be too wide.
    table = RichTable(box=SIMPLE, padding=(0, 1, 0, 0))
    for column in ("trial", tuning.metric, "epochs", "settings"):
        table.add_column(column, no_wrap=column != "settings")
    for trial in trials[:_MAX_SHOWN]:
        settings = _settings(tuning, trial)
        text = f"{settings}: {trial.problem}" if trial.problem else settings
        table.add_row(str(trial.number), _score(trial), str(trial.epochs), text)
    Console().print(table)
    if len(trials) > _MAX_SHOWN:
        print(f"… and {len(trials) - _MAX_SHOWN} more")


def columns(tuning: Tuning) -> list[str]:
    """Return the headings of the table of trials."""
    return ["trial", tuning.metric, "epochs", *tuning.space, ""]


def cells(tuning: Tuning, trial: Trial) -> list[str]:
    """Return the row of a trial."""
    settings = [_value(trial.settings.get(name)) for name in tuning.space]
    return [str(trial.number), _score(trial), str(trial.epochs), *settings, trial.problem]


def _settings(tuning: Tuning, trial: Trial) -> str:
    return ", ".join(f"{name}={_value(trial.settings.get(name))}" for name in tuning.space)


def _title(number: int) -> str:
    return "settings as given" if number == 0 else f"trial {number}"


def _mean(candidate: Candidate) -> str:
    if candidate.mean is None:
        return "-"
    return f"{candidate.mean:.4f}" + ("" if candidate.deviation is None else f" ± {candidate.deviation:.4f}")


def _score(trial: Trial) -> str:
    return _text(trial.score)


def _text(score: float | None) -> str:
    return "-" if score is None else f"{score:.4f}"


def _value(value: Any) -> str:
    return (
        f"{value:.3g}"
        if isinstance(value, float)
        else ", ".join(map(str, value))
        if isinstance(value, list | tuple)
        else str(value)
    )
