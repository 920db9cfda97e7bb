"""Verbs that measure: evaluate, reproduce; the group bench is in `bench.py`."""

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from orbithash.cluster.cli.bench_training import bench
from orbithash.cluster.cli.options import (
    MEASURE,
    DataOption,
    GpusPerWorkerOption,
    JsonOption,
    SharedGpusOption,
    WeightsOption,
)
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()
verbs.add_typer(bench, name="bench", rich_help_panel=MEASURE)


@verbs.command(rich_help_panel=MEASURE, epilog="Example: orbithash evaluate runs/ucmd --data UCMerced_LandUse")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder of a complete training.")],
    data: DataOption,
    protocol: Annotated[
        str | None, typer.Option("--protocol", help="Split to evaluate on. Default: the split of the run.")
    ] = None,
    bits: Annotated[
        int | None,
        typer.Option("--bits", help="Evaluate this shorter length of a run with nested_bits. Default: the full code."),
    ] = None,
    baselines: Annotated[
        bool,
        typer.Option(
            "--baselines/--no-baselines", help="Also evaluate simple methods on the features of the pretrained network."
        ),
    ] = True,
    workers: Annotated[
        int | None,
        typer.Option("--workers", help="Number of Ray Data workers that encode. Default: this process encodes."),
    ] = None,
    gpus_per_worker: SharedGpusOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Evaluate the model of a run on its test part; write metrics, plots and a page."""
    from orbithash.cluster.experiments.evaluate import evaluate_run

    metrics, page = evaluate_run(
        run, data, protocol, baselines, bits=bits, workers=workers, gpus_per_worker=gpus_per_worker
    )
    if as_json:
        print_json(metrics)
        return
    for name, value in metrics["metrics"].items():
        # Cross-modal methods have one group of metrics per direction, such as image->text.
        has_groups = "->" in name
        if has_groups:
            print(name)
        rescored = metrics.get("rescored", {})
        _print_metrics(value if has_groups else {name: value}, rescored.get(name, {}) if has_groups else rescored)
    print(f"report: {page}")


def _print_metrics(metrics: dict[str, Any], rescored: dict[str, Any]) -> None:
    """Print expected values, those by distance before those of each way of rescoring."""
    for metric, values in metrics.items():
        ways = [way for way in ("vector", "asymmetric") if metric in rescored.get(way, {})]
        more = "".join(f"  rescored by {way} {rescored[way][metric]['expected']:.4f}" for way in ways)
        print(f"{metric:<20} {values['expected']:.4f}{more}")


@verbs.command(
    rich_help_panel=MEASURE,
    epilog="Example: orbithash reproduce mhcln dhcl --data UCMerced_LandUse --weights IMAGENET1K_V2 --seeds 5",
)
def reproduce(
    data: DataOption,
    names: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[NAME]...",
            help="Names of methods or of shipped recipes, such as ucmd-dhcl-64. Default: every method that fits the "
            "data.",
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the runs and the table; finished runs in it are not repeated.")
    ] = Path("runs/reproduce"),
    bits: Annotated[
        list[int] | None,
        typer.Option(
            "--bits", help="Length of a code in bits; may be repeated. Default: the recipe's, else the method's."
        ),
    ] = None,
    seeds: Annotated[
        int | None,
        typer.Option(
            "--seeds", help="Number of seeds, each for a split and a training. Default: the recipe's, else 1."
        ),
    ] = None,
    captions: Annotated[Path | None, typer.Option("--captions", help="JSON file of captions, needed by duch.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Number of Ray Train workers of each run.")] = 1,
    gpus_per_worker: GpusPerWorkerOption = 0,
    concurrent: Annotated[
        int | None,
        typer.Option(
            "--concurrent",
            help="Number of runs at a time. Default: as many as the CPUs and GPUs have room for, at most 4.",
        ),
    ] = None,
    weights: WeightsOption = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Setting of every method that has it, or METHOD.KEY=VALUE for one method; may be repeated.",
        ),
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Train and evaluate methods by the protocols of their papers; compare with the published metrics."""
    from orbithash.cluster.experiments.reproduce import reproduce as run_reproduce
    from orbithash.cluster.experiments.reproduction_table import show

    rows = run_reproduce(
        names or [],
        data,
        out,
        bits=bits or [],
        num_seeds=seeds,
        weights=weights,
        captions=captions,
        settings=settings or [],
        workers=workers,
        gpus_per_worker=gpus_per_worker,
        concurrent=concurrent,
    )
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        show(rows)
        print(f"table: {out / 'results.md'}, report: {out / 'report.html'}")
