"""Verbs around data and models."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import DataOption, JsonOption, SetOption, WeightsOption
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(epilog="Example: orbithash demo --data UCMerced_LandUse --weights IMAGENET1K_V2 --out runs/ucmd")
def demo(
    data: Annotated[Path | None, typer.Option("--data", help="Labelled images; without: generated scenes.")] = None,
    weights: WeightsOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of everything the demo makes.")] = Path("runs/demo"),
    captions: Annotated[Path | None, typer.Option("--captions", help="Sentences about --data, as JSON.")] = None,
    settings: SetOption = None,
) -> None:
    """Runs the whole chain on this machine: train, evaluate, encode, serve, query; writes a report."""
    from orbithash.cluster.experiments.demo import run_demo

    run_demo(out, data, weights, settings or [], captions)


@verbs.command(epilog="Example: orbithash scenes data/scenes --count 600")
def scenes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new folder.")],
    count: Annotated[int, typer.Option("--count", help="Scenes to draw.")] = 600,
    seed: Annotated[int, typer.Option("--seed", help="The same seed gives the same bytes.")] = 0,
    size: Annotated[int, typer.Option("--size", help="Pixels a side.")] = 128,
) -> None:
    """Draws georeferenced land-use scenes with a second source, labels and captions."""
    from orbithash.cluster.output import track
    from orbithash.trainers.scenes import write_scenes

    with track("drawing", count, "scenes") as advance_to:
        write_scenes(directory, count, seed, size, on_progress=lambda done: advance_to(done, ""))


@verbs.command(epilog="Example: orbithash wald UCMerced_LandUse data/ucmd_pairs --factor 4")
def wald(
    source: Annotated[
        Path, typer.Argument(metavar="SOURCE", help="Folder of RGB images, with a folder for each class or none.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new folder.")],
    factor: Annotated[int, typer.Option("--factor", help="How much coarser the first source is.")] = 4,
) -> None:
    """Makes pairs of sources of RGB images: coarse colour and fine grey of the same ground (Wald's protocol)."""
    from orbithash.cluster.output import say, track
    from orbithash.trainers.datasets.layouts import cut
    from orbithash.trainers.datasets.wald import count_images, write_wald_pairs

    with track("degrading", count_images(source), "images") as advance_to:
        pairs = write_wald_pairs(source, out, factor, on_progress=lambda done: advance_to(done, ""))
    for problem in cut(pairs.refused):
        say(f"left out: {problem}")
    say(f"{pairs.count} pairs are in {out}; {len(pairs.refused)} images were left out")


@verbs.command(epilog="Example: orbithash train dhcl --data UCMerced_LandUse --bits 64 --workers 2 --out runs/ucmd")
def train(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method, such as dhcl.")],
    data: DataOption,
    out: Annotated[Path, typer.Option("--out", help="Run folder; an interrupted run in it goes on.")],
    dataset: Annotated[str | None, typer.Option("--dataset", help="Its name, such as ucmd; else recognised.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="How to split; else the dataset's own.")] = None,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Chooses the split.")] = 0,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the training images held back to choose the epoch; 0: none.")
    ] = 0.1,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="JSON file of sentences about the images, Karpathy style.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a code.")] = None,
    workers: Annotated[
        str, typer.Option("--workers", help="Ray Train workers; MIN:MAX: as many as there is room for at the time.")
    ] = "1",
    gpus_per_worker: Annotated[float, typer.Option("--gpus-per-worker", help="GPUs for each worker.")] = 0,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="mlflow or wandb, beside TensorBoard; may be repeated.")
    ] = None,
    storage: Annotated[
        str | None, typer.Option("--storage", help="Path or URI (s3://, gs://) for the checkpoints; else RUN.")
    ] = None,
    loading: Annotated[
        str, typer.Option("--loading", help="Images: memory, stream (decoded as needed) or auto, whichever fits.")
    ] = "auto",
    validate_beside: Annotated[
        bool,
        typer.Option("--validate-beside", help="Validate while the next epochs train; takes one more worker's room."),
    ] = False,
    keep: Annotated[int, typer.Option("--keep", help="Best checkpoints to keep, beside the last one.")] = 1,
    weights: WeightsOption = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    settings: SetOption = None,
) -> None:
    """Trains a method and leaves a run folder with the model of its best validation epoch."""
    from orbithash.cluster.output import say
    from orbithash.cluster.runtime import parse_workers
    from orbithash.cluster.training.train import prepare_run, train_on_ray

    num_workers = parse_workers(workers)
    run = prepare_run(
        method,
        data,
        dataset,
        protocol,
        config,
        settings or [],
        split_seed=split_seed,
        validation=validation,
        captions=captions,
        bits=bits,
        weights=weights,
    )
    if run.config.weights is None and config is None:
        say(
            "no --weights: the network starts from random ones, for which the default settings are not meant; "
            "trainers/recipes/from_scratch.yaml (--config) has some that are"
        )
    train_on_ray(
        run,
        out,
        num_workers,
        gpus_per_worker,
        track=track or [],
        storage=storage,
        keep=keep,
        loading=loading,
        validate_beside=validate_beside,
    )


@verbs.command(epilog="Example: orbithash tune mhcln --data UCMerced_LandUse --weights IMAGENET1K_V2 --trials 16")
def tune(
    method: Annotated[str, typer.Argument(metavar="METHOD", help="Name of the method, such as dhcl.")],
    data: DataOption,
    trials: Annotated[int, typer.Option("--trials", help="Settings to try, the given ones among them.")] = 16,
    out: Annotated[Path, typer.Option("--out", help="Folder of the search; an interrupted one in it goes on.")] = (
        Path("runs/tune")
    ),
    search: Annotated[
        list[str] | None,
        typer.Option("--search", help="KEY, KEY=LOW:HIGH[:log] or KEY=A,B,C; without: all that the method declares."),
    ] = None,
    metric: Annotated[str | None, typer.Option("--metric", help="Of the validation part; else the method's.")] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-trial", help="CPUs of a trial.")] = 1,
    gpus: Annotated[float, typer.Option("--gpus-per-trial", help="GPUs of a trial, such as 0.25.")] = 0,
    concurrent: Annotated[int, typer.Option("--concurrent", help="Trials at a time; 0: as many as there is room.")] = 0,
    grace: Annotated[int | None, typer.Option("--grace", help="Epochs before trials are compared.")] = None,
    seed: Annotated[int, typer.Option("--seed", help="Chooses what is tried.")] = 0,
    best: Annotated[Path | None, typer.Option("--best", help="File for the best settings, besides OUT/best.yaml.")] = (
        None
    ),
    dataset: Annotated[str | None, typer.Option("--dataset", help="Its name, such as ucmd; else recognised.")] = None,
    protocol: Annotated[str | None, typer.Option("--protocol", help="How to split; else the dataset's own.")] = None,
    split_seed: Annotated[int, typer.Option("--split-seed", help="Chooses the split.")] = 0,
    validation: Annotated[
        float, typer.Option("--validation", help="Share of the training images that trials are compared on.")
    ] = 0.1,
    captions: Annotated[
        Path | None, typer.Option("--captions", help="JSON file of sentences about the images, Karpathy style.")
    ] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="Bits of a code.")] = None,
    weights: WeightsOption = None,
    config: Annotated[Path | None, typer.Option("--config", help="YAML file of settings.")] = None,
    settings: SetOption = None,
    as_json: JsonOption = False,
) -> None:
    """Looks for better settings of a method, by the validation part; settings that are given stay as they are."""
    from orbithash.cluster.training.train import prepare_run
    from orbithash.cluster.tuning.report import finish
    from orbithash.cluster.tuning.tune import Tuning, asked_space
    from orbithash.cluster.tuning.tune import tune as run_tune

    run = prepare_run(
        method,
        data,
        dataset,
        protocol,
        config,
        settings or [],
        split_seed=split_seed,
        validation=validation,
        captions=captions,
        bits=bits,
        weights=weights,
    )
    space = asked_space(run.config, search)
    tuning = Tuning.of(run, space, trials, metric, grace, cpus=cpus, gpus=gpus, max_concurrent=concurrent, seed=seed)
    found = run_tune(run, tuning, out)
    finish(run, tuning, found, out, best, as_json)


@verbs.command(epilog="Example: orbithash evaluate runs/ucmd --data UCMerced_LandUse")
def evaluate(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")],
    data: DataOption,
    protocol: Annotated[str | None, typer.Option("--protocol", help="Another split than the run's own.")] = None,
    bits: Annotated[int | None, typer.Option("--bits", help="One of the lengths of a run with nested_bits.")] = None,
    baselines: Annotated[
        bool, typer.Option("--baselines/--no-baselines", help="Simple methods on the pretrained features, too.")
    ] = True,
    as_json: JsonOption = False,
) -> None:
    """Evaluates a run's model on its test part: metrics, plots, a page."""
    from orbithash.cluster.experiments.evaluate import evaluate_run

    metrics, page = evaluate_run(run, data, protocol, baselines, bits=bits)
    if as_json:
        print_json(metrics)
    else:
        for name, value in metrics["metrics"].items():
            if "->" in name:
                print(name)
            for metric, figures in value.items() if "->" in name else [(name, value)]:
                print(f"{metric:<20} {figures['expected']:.4f}")
        print(f"report: {page}")


@verbs.command(
    epilog="Example: orbithash reproduce mhcln dhcl --data UCMerced_LandUse --weights IMAGENET1K_V2 --seeds 5"
)
def reproduce(
    data: DataOption,
    methods: Annotated[
        list[str] | None, typer.Argument(metavar="[METHOD]...", help="Names; without: all that the data allow.")
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder of the runs and the table; goes on where it stopped.")] = (
        Path("runs/reproduce")
    ),
    bits: Annotated[list[int] | None, typer.Option("--bits", help="Bits of a code; may be repeated.")] = None,
    seeds: Annotated[int, typer.Option("--seeds", help="Splits and trainings of each.")] = 1,
    captions: Annotated[Path | None, typer.Option("--captions", help="JSON file of sentences, for DUCH.")] = None,
    workers: Annotated[int, typer.Option("--workers", help="Ray Train workers.")] = 1,
    gpus_per_worker: Annotated[float, typer.Option("--gpus-per-worker", help="GPUs for each worker.")] = 0,
    weights: WeightsOption = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value for all that have it, or method.key=value.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Trains and evaluates methods by their papers' own protocols, beside the published figures."""
    from orbithash.cluster.experiments.reproduce import reproduce as run_reproduce
    from orbithash.cluster.experiments.reproduction_table import show

    rows = run_reproduce(
        methods or [],
        data,
        out,
        bits=bits or [64],
        num_seeds=seeds,
        weights=weights,
        captions=captions,
        settings=settings or [],
        workers=workers,
        gpus_per_worker=gpus_per_worker,
    )
    if as_json:
        print_json([dataclasses.asdict(row) for row in rows])
    else:
        show(rows)
        print(f"table: {out / 'results.md'}, report: {out / 'report.html'}")


@verbs.command(epilog="Example: orbithash submit --id first -- train dhcl --data /data/tiles --out /data/runs/first")
def submit(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[VERB]...", help="The command, after two dashes.")
    ] = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="http://HOST:PORT of Ray's dashboard.")
    ] = "http://127.0.0.1:8265",
    token_file: Annotated[Path | None, typer.Option("--token-file", help="File with the cluster's token.")] = None,
    job_id: Annotated[
        str | None, typer.Option("--id", help="Name of the job; a second command of this name only follows it.")
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="orbithash itself, where the nodes have another version or none.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="The cluster's Python.")] = "python",
    variables: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Environment of the job, as here where no value is given; whoever may see the job can read it.",
        ),
    ] = None,
    detach: Annotated[bool, typer.Option("--detach", help="Send it and leave.")] = False,
    stop: Annotated[str | None, typer.Option("--stop", metavar="ID", help="End this job.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Runs a verb as a job of a Ray cluster and follows what it prints; Ctrl-C leaves the job running."""
    from orbithash.cluster.submit import Cluster, Runtime, check_words, run_job, stop_job

    cluster = Cluster(address, token_file)
    if stop is None:
        check_words(context.find_root().command, words or [])
        # What a program reads is JSON alone.
        output = sys.stderr if as_json else sys.stdout
        runtime = Runtime.of(python, wheel, variables or [])
        job = run_job(cluster, words or [], job_id, runtime, detach, output)
    else:
        job = stop_job(cluster, stop)
    if as_json:
        print_json(dataclasses.asdict(job))
    if stop is None:
        raise typer.Exit(job.code)
