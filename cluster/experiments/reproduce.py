"""Training and evaluation of methods by their papers' protocols, with a table beside the published results.

OUT/PROTOCOL/NAME/BITS-SEED/     a run folder with its evaluation; NAME is that of the method or the recipe
OUT/reproduce.json               all values of all runs
OUT/results.md                   the table
OUT/report.html                  the table as a page
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.experiments.evaluate import evaluate_run
from orbithash.cluster.experiments.reproduction_page import write_table
from orbithash.cluster.experiments.reproduction_table import Row, rows_of, with_learned_baselines
from orbithash.cluster.experiments.side_by_side import Outcome, attempt, num_that_fit, run_side_by_side
from orbithash.cluster.output import say
from orbithash.cluster.runtime import connected
from orbithash.cluster.training.train import train_on_ray
from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import write_file
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import PROTOCOLS, Manifest
from orbithash.trainers.evaluation.evaluation import HEADLINE
from orbithash.trainers.evaluation.published import LEARNED_BASELINES, REPRODUCTIONS, Reproduction
from orbithash.trainers.loop.run import Run, make_run
from orbithash.trainers.loop.run_folder import check_training
from orbithash.trainers.methods import METHODS, get_method, method_names
from orbithash.trainers.recipe import Recipe, find_recipe, shipped_recipes

__all__ = ["reproduce"]

# Settings that have an option of their own, which would override them.
OPTIONS = {"bits": "--bits", "seed": "--seeds"}


# Metrics of a run that is trained and evaluated, in its folder.
MEASURED = "reproduction.json"


@dataclasses.dataclass(frozen=True)
class Way:
    """A method or a recipe, and the evaluation of a paper.

    `name` is that of the method or of the recipe; `recipe` is None for a method with its default settings.
    """

    name: str
    method: str
    rule: Reproduction
    recipe: Recipe | None = None

    @property
    def config(self) -> Path | None:
        """The recipe's file."""
        return None if self.recipe is None else self.recipe.file

    @property
    def num_seeds(self) -> int:
        """Number of seeds if none is given."""
        return 1 if self.recipe is None else self.recipe.seeds or 1


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run: a method with the evaluation of a paper, and its folder."""

    rule: Reproduction
    run: Run
    folder: Path


def reproduce(
    names: Sequence[str],
    data: Path | str,
    out: Path,
    *,
    bits: Sequence[int] = (),
    num_seeds: int | None = None,
    weights: str | None = None,
    captions: Path | None = None,
    settings: Sequence[str] = (),
    workers: int = 1,
    gpus_per_worker: float = 0,
    concurrent: int | None = None,
) -> list[Row]:
    """Train and evaluate each method for each length and seed; finished runs are not repeated. Return the table's rows.

    Args:
        names: methods to reproduce, or shipped recipes, whose settings, split and number of seeds are used; empty: all
            methods that the data allow (DUCH needs captions, MrHash a second source). The learned baselines
            (classifier, csq, triplet) are trained by the protocols of all supervised methods given; as a recipe, by
            its own.
        data: the folder of images, or a packed data set.
        out: the folder for runs and tables.
        bits: lengths of the codes; empty: the recipe's, else the method's default.
        num_seeds: number of seeds; a seed decides both split and training; None: the recipe's, else 1.
        weights: initial weights of the backbone; None: random.
        captions: file with captions, for cross-modal methods.
        settings: `key=value`, or `method.key=value` for one method.
        workers: number of training workers.
        gpus_per_worker: GPUs of each worker.
        concurrent: number of runs at a time; None: as many as the cluster has room for, at most 4. The runs and the
            table are the same, but for the rounding of other numbers of threads.

    Raises:
        InputError: all problems of methods, recipes, settings and data, before any training; or the runs that failed,
            after the others.
    """
    if num_seeds is not None and num_seeds < 1:
        raise InputError(f"seeds is {num_seeds}; at least 1 is needed")
    if concurrent is not None and concurrent < 1:
        raise InputError(f"--concurrent is {concurrent}; at least 1 is needed")
    planned = _prepare(names, data, out, bits, num_seeds, weights, captions, settings, workers)
    done = _measured(planned, workers, gpus_per_worker, concurrent)
    rows: list[Row] = []
    # The seeds of a method and length are consecutive.
    for _, group in groupby(done, key=lambda pair: (pair[0].folder.parent, pair[0].run.config.bits)):
        seeds = list(group)
        first = seeds[0][0]
        runs = [str(plan.folder.relative_to(out)) for plan, _ in seeds]
        found = rows_of(first.rule, first.run, [metrics for _, metrics in seeds])
        rows += [dataclasses.replace(row, runs=runs) for row in found]
    rows = with_learned_baselines(rows)
    write_table(out, rows, data)
    return rows


def _measured(
    planned: Sequence[Planned], workers: int, gpus_per_worker: float, concurrent: int | None
) -> list[tuple[Planned, dict[str, Any]]]:
    """Train and evaluate all runs; return each with its metrics, in the order given."""
    configs = [plan.run.config for plan in planned]
    names = [
        f"run {number} of {len(planned)}: {plan.run.method}, {config.bits} bits, seed {config.seed}"
        for number, (plan, config) in enumerate(zip(planned, configs, strict=True), 1)
    ]
    outcomes: dict[int, Outcome] = {}
    remaining = []
    for number, plan in enumerate(planned):
        if (plan.folder / MEASURED).exists():
            say(names[number])
            outcomes[number] = Outcome(_measure(plan, workers, gpus_per_worker))
        else:
            remaining.append(number)
    with connected() if remaining else nullcontext():
        concurrent = min(len(remaining), concurrent or (num_that_fit(workers, gpus_per_worker) if remaining else 1))
        runs = [partial(_measure, planned[number], workers, gpus_per_worker, concurrent) for number in remaining]
        if concurrent > 1:
            found = run_side_by_side(
                runs, [names[number] for number in remaining], concurrent, workers, gpus_per_worker
            )
            outcomes |= zip(remaining, found, strict=True)
        else:
            for number, run in zip(remaining, runs, strict=True):
                say(names[number])
                outcomes[number] = attempt(run)
    problems = [f"{names[number]}: {outcome.problem}" for number, outcome in outcomes.items() if outcome.problem]
    if problems:
        num_others = len(planned) - len(problems)
        raise listed(problems, f"{num_others} of {len(planned)} runs are complete; the same command repeats the others")
    return [(plan, outcomes[number].result) for number, plan in enumerate(planned)]


def _measure(plan: Planned, workers: int, gpus_per_worker: float, side_by_side: int = 1) -> dict[str, Any]:
    """Train and evaluate one run; return its metrics."""
    train_on_ray(plan.run, plan.folder, workers, gpus_per_worker, side_by_side=side_by_side)
    return _evaluate(plan.folder, plan.run, plan.rule)


def _prepare(
    names: Sequence[str],
    data: Path | str,
    out: Path,
    bits: Sequence[int],
    num_seeds: int | None,
    weights: str | None,
    captions: Path | None,
    settings: Sequence[str],
    workers: int,
) -> list[Planned]:
    """Return all runs, checked before the first is trained; `InputError` lists all problems."""
    ways = _ways(list(dict.fromkeys(names)) or [name for name in METHODS if name in REPRODUCTIONS])
    lengths: list[int | None] = list(dict.fromkeys(bits)) or [None]
    _check_settings(settings, ways, lengths, weights)
    planned, problems = [], []
    for way in ways:
        rule, runs = way.rule, []
        seeds = way.num_seeds if num_seeds is None else num_seeds
        try:
            for length, seed in product(lengths, range(seeds)):
                run = make_run(
                    way.method,
                    data,
                    way.config,
                    _settings_of(way.method, settings),
                    protocol=rule.protocol,
                    split_seed=seed,
                    validation=rule.validation,
                    # Other methods use the images without captions, which is another dataset.
                    captions=captions if rule.directions != ("",) else None,
                    bits=length,
                    seed=seed,
                    weights=weights,
                )
                if not run.manifest.part("test").is_labelled.any():
                    raise InputError(f"no image of the test part of {data} has a class, which all metrics need")
                folder = out / rule.protocol / way.name / f"{run.config.bits}-{seed}"
                check_training(run, folder, workers)
                runs.append(Planned(rule, run, folder))
        except InputError as err:
            problems.append(f"{way.name}: {_indented(err)}")
        else:
            planned += runs
    problems = list(dict.fromkeys(problems))
    if problems and (names or not planned):
        raise listed(problems, "nothing was trained")
    for problem in problems:
        say(f"skipped: {problem}")
    if weights is None:
        say("no --weights: the networks start from random weights, unlike those of the papers")
    return planned


def _ways(names: Sequence[str]) -> list[Way]:
    """Return each method or recipe with its paper's evaluation; a recipe may change the split.

    A recipe of a method without a paper's evaluation is evaluated by the headline. A learned baseline has those of all
    supervised methods given, or its own without one or as a recipe.
    """
    methods = [name for name in names if name not in shipped_recipes()]
    if unknown := [name for name in methods if name not in (known := method_names())]:
        raise InputError(
            f"unknown method or recipe {unknown[0]!r}; there are {', '.join(known)} and the recipes "
            f"{', '.join(shipped_recipes())}"
        )
    if others := [name for name in methods if name not in REPRODUCTIONS]:
        raise InputError(
            f"{', '.join(others)}: no published evaluation to reproduce; there are {', '.join(REPRODUCTIONS)}; use "
            "train and evaluate"
        )
    ways = [Way(name, name, REPRODUCTIONS[name]) for name in methods if name not in LEARNED_BASELINES]
    supervised = {way.rule.protocol: way.rule for way in ways if get_method(way.method).supervision != "none"}
    for name in methods:
        if name in LEARNED_BASELINES:
            own = REPRODUCTIONS[name]
            rules = [dataclasses.replace(rule, note=own.note) for rule in supervised.values()]
            ways += [Way(name, name, rule) for rule in rules or [own]]
    for name in names:
        if name in shipped_recipes():
            recipe = find_recipe(name)
            assert recipe.method is not None, "a shipped recipe names its method"
            rule = REPRODUCTIONS.get(recipe.method, Reproduction(recipe.protocol or "", HEADLINE, policy="expected"))
            split = {key: value for key, value in recipe.split().items() if key in ("protocol", "validation")}
            ways.append(Way(name, recipe.method, dataclasses.replace(rule, **split), recipe))
    return ways


def _indented(err: InputError) -> str:
    """Return the message of an error, indented if it is a list, for use in a list."""
    return str(err).replace("\n", "\n  ")


def _check_settings(
    settings: Sequence[str], ways: Sequence[Way], lengths: Sequence[int | None], weights: str | None
) -> None:
    """Raise `InputError` with all problems of the settings, including settings that no method has."""
    methods = list(dict.fromkeys(way.method for way in ways))
    known = sorted({key for name in methods for key in get_method(name).Config.model_fields})
    problems = []
    for setting in settings:
        key = setting.partition("=")[0]
        name, dot, own = key.rpartition(".")
        if dot and name not in METHODS:
            problems.append(f"{setting!r}: unknown method {name!r}; there are {', '.join(METHODS)}")
        elif own in OPTIONS:
            problems.append(f"{setting!r}: use the option {OPTIONS[own]} instead")
        elif not dot and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{setting!r}: no setting of {' or '.join(methods)}{hint}")
    for way, length in product(ways, lengths):
        kind = get_method(way.method)
        try:
            load_config(kind.Config, way.config, _settings_of(way.method, settings), bits=length, weights=weights)
        except InputError as err:
            problems.append(f"{way.name}: {_indented(err)}")
    if problems:
        raise listed(list(dict.fromkeys(problems)), "nothing was trained")


def _settings_of(method: str, settings: Sequence[str]) -> list[str]:
    """Return the settings that apply to one method: those prefixed with its name, and the common ones that it has."""
    known = get_method(method).Config.model_fields
    chosen = []
    for setting in settings:
        key = setting.partition("=")[0]
        name, dot, _ = key.partition(".")
        if dot and name == method:
            chosen.append(setting.removeprefix(f"{method}."))
        elif not dot and key in known:
            chosen.append(setting)
    return chosen


def _evaluate(folder: Path, run: Run, rule: Reproduction) -> dict[str, Any]:
    """Return the metrics of one run, with those of the search by the paper's protocol under "searched".

    The metrics are computed once and kept in the run folder.
    """
    path = folder / MEASURED
    if path.exists():
        stored: dict[str, Any] = json.loads(path.read_text())
        return stored
    cutoffs = (20, 100, smallest_class(run.manifest))
    metrics, _ = evaluate_run(folder, run.root, cutoffs=cutoffs)
    if rule.searched_by:
        searched, _ = evaluate_run(folder, run.root, rule.searched_by, baselines=False, cutoffs=cutoffs)
        metrics = {**metrics, "searched": searched}
    metrics["smallest_class"] = cutoffs[-1]
    write_file(path, json.dumps(metrics))
    return metrics


def smallest_class(manifest: Manifest) -> int:
    """Return the number of images of the smallest class in the database."""
    database = manifest.part(*PROTOCOLS[manifest.protocol].database)
    _, numbers = np.unique(database.labels.values, return_counts=True)
    return int(numbers.min())
