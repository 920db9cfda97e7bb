"""Every method by its paper's own protocol and definition, beside what was published.

OUT/PROTOCOL/METHOD/BITS-SEED/   a run folder with its evaluation
OUT/reproduce.json               every figure of every run
OUT/results.md                   the table
OUT/report.html                  the table as a page
"""

import dataclasses
import difflib
import json
from collections.abc import Sequence
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np

from orbithash.cluster.experiments.evaluate import evaluate_run
from orbithash.cluster.experiments.reproduction_table import Row, rows_of, with_learned_baselines, write_table
from orbithash.cluster.output import say
from orbithash.cluster.training.train import prepare_run, train_on_ray
from orbithash.encoders.errors import InputError, listed
from orbithash.encoders.files import write_file
from orbithash.trainers.config import load_config
from orbithash.trainers.datasets import PROTOCOLS, Manifest
from orbithash.trainers.evaluation.published import LEARNED_BASELINES, REPRODUCTIONS, Reproduction
from orbithash.trainers.loop.run import Run
from orbithash.trainers.loop.run_folder import check_training
from orbithash.trainers.methods import METHODS, get_method

__all__ = ["reproduce"]

# Settings that are options of the verb, which would overrule them.
OPTIONS = {"bits": "--bits", "seed": "--seeds"}


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run: a method by a paper's way, in a folder."""

    rule: Reproduction
    run: Run
    folder: Path


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
    Without `methods`, all that the data allow: DUCH needs captions and MrHash a second source. The learned baselines
    (classifier, triplet) are trained by the protocols of all the other supervised methods that are asked for.
    """
    if num_seeds < 1:
        raise InputError(f"{num_seeds} seeds; at least 1 is needed")
    planned = _prepare(methods, data, out, bits, num_seeds, weights, captions, settings, workers)
    done = []
    for number, one in enumerate(planned, 1):
        config = one.run.config
        say(f"run {number} of {len(planned)}: {one.run.method}, {config.bits} bits, seed {config.seed}")
        train_on_ray(one.run, one.folder, workers, gpus_per_worker)
        done.append((one, _evaluated(one.folder, one.run, one.rule)))
    rows: list[Row] = []
    # Planned seed by seed.
    for _, group in groupby(done, key=lambda pair: (pair[0].folder.parent, pair[0].run.config.bits)):
        of_seeds = list(group)
        first = of_seeds[0][0]
        rows += rows_of(first.rule, first.run, [metrics for _, metrics in of_seeds])
    rows = with_learned_baselines(rows)
    write_table(out, rows)
    return rows


def _prepare(
    methods: Sequence[str],
    data: Path,
    out: Path,
    bits: Sequence[int],
    num_seeds: int,
    weights: str | None,
    captions: Path | None,
    settings: Sequence[str],
    workers: int,
) -> list[Planned]:
    """All runs, before the first is trained: what is wrong with any of them is told at once."""
    chosen = list(dict.fromkeys(methods)) or list(METHODS)
    bits = list(dict.fromkeys(bits))
    _check_settings(settings, chosen, bits, weights)
    planned, problems = [], []
    for name, rule in _ways(chosen):
        of_method = []
        try:
            for length, seed in product(bits, range(num_seeds)):
                run = prepare_run(
                    name,
                    data,
                    protocol=rule.protocol,
                    settings=_settings_of(name, settings),
                    split_seed=seed,
                    validation=rule.validation,
                    # With captions the images are another dataset.
                    captions=captions if rule.directions != ("",) else None,
                    bits=length,
                    seed=seed,
                    weights=weights,
                )
                if not any(image.labels for image in run.manifest.part("test")):
                    raise InputError(f"no image of the test part of {data} has a class; every figure needs them")
                folder = out / rule.protocol / name / f"{length}-{seed}"
                check_training(run, folder, workers)
                of_method.append(Planned(rule, run, folder))
        except InputError as err:
            problems.append(f"{name}: {_further_in(err)}")
        else:
            planned += of_method
    problems = list(dict.fromkeys(problems))
    if problems and (methods or not planned):
        raise listed(problems, "nothing was trained")
    for problem in problems:
        say(f"left out: {problem}")
    if weights is None:
        say("no --weights: the networks start from random ones, which no paper's did")
    return planned


def _ways(methods: Sequence[str]) -> list[tuple[str, Reproduction]]:
    """Each method with its way; a learned baseline with those of all supervised methods there are, or its own."""
    ways = [(name, REPRODUCTIONS[name]) for name in methods if name not in LEARNED_BASELINES]
    supervised = {rule.protocol: rule for name, rule in ways if get_method(name).needs_labels}
    for name in methods:
        if name in LEARNED_BASELINES:
            own = REPRODUCTIONS[name]
            ways += [(name, dataclasses.replace(rule, note=own.note)) for rule in supervised.values() or [own]]
    return ways


def _further_in(err: InputError) -> str:
    """A message that may be a list, to stand in a list."""
    return str(err).replace("\n", "\n  ")


def _check_settings(settings: Sequence[str], methods: Sequence[str], bits: Sequence[int], weights: str | None) -> None:
    """`InputError` with all that is wrong with the settings, those that would reach no method included."""
    kinds = {name: get_method(name) for name in methods}
    known = sorted({key for kind in kinds.values() for key in kind.Config.model_fields})
    problems = []
    for setting in settings:
        key = setting.partition("=")[0]
        name, dot, own = key.rpartition(".")
        if dot and name not in METHODS:
            problems.append(f"{setting!r}: there is no method {name!r}; there are {', '.join(METHODS)}")
        elif own in OPTIONS:
            problems.append(f"{setting!r}: give {OPTIONS[own]} instead")
        elif not dot and key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            problems.append(f"{setting!r}: no setting of {' or '.join(methods)}{hint}")
    for (name, kind), length in product(kinds.items(), bits):
        try:
            load_config(kind.Config, None, _settings_of(name, settings), bits=length, weights=weights)
        except InputError as err:
            problems.append(f"{name}: {_further_in(err)}")
    if problems:
        raise listed(list(dict.fromkeys(problems)), "nothing was trained")


def _settings_of(method: str, settings: Sequence[str]) -> list[str]:
    """The settings of one method: its own, and the common ones that it has."""
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
    write_file(path, json.dumps(metrics))
    return metrics


def smallest_class(manifest: Manifest) -> int:
    """Images of the smallest class in the database."""
    database = manifest.part(*PROTOCOLS[manifest.protocol].database)
    labels = [label for image in database for label in image.labels]
    return int(np.bincount(labels)[np.unique(labels)].min())
