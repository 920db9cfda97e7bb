"""Verbs that make datasets and train: demo, scenes, wald, convert, methods, train, tune."""

import os
from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.methods import MethodCommand
from orbithash.cluster.cli.options import (
    LEARN,
    DataOption,
    GpusPerWorkerOption,
    JsonOption,
    MethodArgument,
    RunOptions,
    SetOption,
    TableOption,
    WeightsOption,
    local_data,
    with_run_options,
)
from orbithash.cluster.output import print_json
from orbithash.encoders.errors import InputError

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=LEARN,
    epilog="Example: orbithash demo --data UCMerced_LandUse --weights IMAGENET1K_V2 --out runs/ucmd",
)
def demo(
    data: Annotated[str | None, typer.Option("--data", help="Folder of images. Default: generated scenes.")] = None,
    weights: WeightsOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for all files of the demo.")] = Path("runs/demo"),
    captions: Annotated[
        Path | None,
        typer.Option("--captions", help="JSON file of captions of --data: trains DUCH in place of DHCL."),
    ] = None,
    unlabelled: Annotated[
        bool,
        typer.Option(
            "--unlabelled",
            help="--data has no labels, subfolders are not classes: fit ITQ codes in seconds, encode, show the page. "
            "Default of --weights: IMAGENET1K_V2.",
        ),
    ] = False,
    settings: SetOption = None,
    no_web: Annotated[
        bool, typer.Option("--no-web", help="End after the report, without a page in the browser.")
    ] = False,
) -> None:
    """Run every step on this machine: train, evaluate, encode, serve, query; write a report, and show the page."""
    folder = None if data is None else local_data(data)
    if unlabelled:
        from orbithash.cluster.experiments.unlabelled import run_unlabelled

        if folder is None or captions is not None:
            raise InputError("--unlabelled needs a folder of images as --data, and no --captions")
        return run_unlabelled(out, folder, weights, settings or [], with_page=not no_web)
    from orbithash.cluster.experiments.demo import run_demo

    run_demo(out, folder, weights, settings or [], captions, with_page=not no_web)
    return None


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash scenes data/scenes --count 600")
def scenes(
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    count: Annotated[int, typer.Option("--count", help="Number of scenes.")] = 600,
    seed: Annotated[int, typer.Option("--seed", help="Random seed; the same seed gives the same files.")] = 0,
    size: Annotated[int, typer.Option("--size", help="Side of a scene, pixels.")] = 128,
) -> None:
    """Draw georeferenced land-use scenes with labels, captions and a second source."""
    from orbithash.cluster.output import track
    from orbithash.trainers.scenes import write_scenes

    with track("drawing", count, "scenes") as advance_to:
        processes = min(len(os.sched_getaffinity(0)), 1 + count // 200)
        write_scenes(directory, count, seed, size, on_progress=lambda done: advance_to(done, ""), processes=processes)


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash wald UCMerced_LandUse data/ucmd_pairs --factor 4")
def wald(
    source: Annotated[
        str, typer.Argument(metavar="SOURCE", help="Folder of RGB images, with or without one subfolder per class.")
    ],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="A new or empty folder.")],
    factor: Annotated[
        int, typer.Option("--factor", help="Ratio of the ground sampling distances of the two sources.")
    ] = 4,
) -> None:
    """Derive image pairs from RGB images: coarse colour and fine grey of the same ground (Wald's protocol)."""
    from orbithash.cluster.output import say, track
    from orbithash.trainers.datasets.layouts import first_problems
    from orbithash.trainers.datasets.wald import count_images, write_wald_pairs

    folder = local_data(source)
    with track("degrading", count_images(folder), "images") as advance_to:
        pairs = write_wald_pairs(folder, out, factor, on_progress=lambda done: advance_to(done, ""))
    for problem in first_problems(pairs.refused):
        say(f"skipped: {problem}")
    say(f"wrote {pairs.count} pairs to {out}; skipped {len(pairs.refused)} images")


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash convert RemoteCLIP-ViT-B-32.pt remoteclip.safetensors")
def convert(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Pickled weights: .pt, .pth, .bin or .ckpt.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="The new file, NAME.safetensors.")],
) -> None:
    """Convert pickled weights to safetensors, for --weights; only tensors are read, and no code is run."""
    from orbithash.cluster.output import say
    from orbithash.encoders.networks.backbones.pickles import convert_pickle

    done = convert_pickle(file, out)
    if done.nested:
        say(f"took the weights under the key {done.nested}")
    if done.prefix:
        say(f"removed the prefix {done.prefix} from their names")
    if done.left_out:
        say(f"left out {len(done.left_out)} tensors beside the backbone (first: {done.left_out[0]})")
    say(f"wrote {done.num_tensors} tensors to {out}")


@verbs.command(rich_help_panel=LEARN, epilog="Example: orbithash methods dhcl")
def methods(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="Show the settings of this method. Default: list all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the training methods: what each learns from, its paper, recipes, settings with defaults and ranges."""
    from orbithash.cluster.cli.methods import as_fields, describe, show_methods

    described = describe(name)
    if as_json:
        print_json([as_fields(method) for method in described])
    else:
        show_methods(described, with_settings=name is not None)


@verbs.command(
    cls=MethodCommand,
    rich_help_panel=LEARN,
    epilog="Example: orbithash train dhcl --data UCMerced_LandUse --bits 64 --workers 2 --out runs/ucmd",
)
@with_run_options
def train(
    method: MethodArgument,
    data: DataOption,
    out: Annotated[
        Path, typer.Option("--out", help="Run folder. If it holds an interrupted run of the same command, resume it.")
    ],
    options: RunOptions,
    table: TableOption = None,
    workers: Annotated[
        str,
        typer.Option(
            "--workers",
            help="Number of Ray Train workers, or MIN:MAX for as many as the cluster has resources for. They share "
            "each batch.",
        ),
    ] = "1",
    gpus_per_worker: GpusPerWorkerOption = 0,
    track: Annotated[
        list[str] | None,
        typer.Option("--track", help="Log to mlflow or wandb in addition to TensorBoard; may be repeated."),
    ] = None,
    storage: Annotated[
        str | None,
        typer.Option("--storage", help="Path or URI (s3://, gs://) of the checkpoints. Default: the run folder."),
    ] = None,
    loading: Annotated[
        str,
        typer.Option(
            "--loading", help="memory: decode all images once; stream: decode per batch; auto: memory if they fit."
        ),
    ] = "auto",
    validate_beside: Annotated[
        bool,
        typer.Option(
            "--validate-beside", help="Validate in parallel with training; needs the resources of one more worker."
        ),
    ] = False,
    keep: Annotated[
        int, typer.Option("--keep", help="Number of best checkpoints to keep, in addition to the last one.")
    ] = 1,
) -> None:
    """Train a method and write a run folder; its model is the epoch with the best validation score.

    `orbithash train METHOD --help` also shows the settings of the method.
    """
    from orbithash.cluster.output import say
    from orbithash.cluster.runtime import parse_workers
    from orbithash.cluster.training.train import train_on_ray
    from orbithash.encoders.networks.backbones.names import TORCHVISION
    from orbithash.trainers.methods import get_method

    num_workers = parse_workers(workers)
    run = options.make_run(method, data, table)
    # Other sources of backbones have weights that come with the name.
    is_random = run.config.weights is None and run.config.backbone.partition(":")[0] in (*TORCHVISION, "timm")
    if is_random and get_method(method).supervision == "none":
        say("no --weights: the features are those of random weights, which say little; give --weights IMAGENET1K_V2")
    elif is_random and options.config is None:
        say(
            "no --weights: the network starts from random weights, and the default settings are made for pretrained "
            "ones; --config from-scratch has settings for DHCL without pretrained weights"
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


@verbs.command(
    cls=MethodCommand,
    rich_help_panel=LEARN,
    epilog="Example: orbithash tune mhcln --data UCMerced_LandUse --weights IMAGENET1K_V2 --trials 16",
)
@with_run_options
def tune(
    method: MethodArgument,
    data: DataOption,
    options: RunOptions,
    trials: Annotated[
        int, typer.Option("--trials", help="Number of trials; the first uses the settings as given.")
    ] = 16,
    out: Annotated[
        Path, typer.Option("--out", help="Folder of the search. If it holds an interrupted search, resume it.")
    ] = Path("runs/tune"),
    search: Annotated[
        list[str] | None,
        typer.Option(
            "--search",
            help="Setting to vary: KEY, KEY=LOW:HIGH[:log] or KEY=A,B,C; may be repeated. Default: every setting for "
            "which the method declares a range and no value is given.",
        ),
    ] = None,
    metric: Annotated[
        str | None, typer.Option("--metric", help="Validation metric to maximise. Default: the method's.")
    ] = None,
    cpus: Annotated[float, typer.Option("--cpus-per-trial", help="CPUs of each trial.")] = 1,
    gpus: Annotated[
        float,
        typer.Option("--gpus-per-trial", help="GPUs of each trial; a fraction such as 0.25 shares one; 0: CPUs only."),
    ] = 0,
    concurrent: Annotated[
        int, typer.Option("--concurrent", help="Maximum number of trials at a time; 0: limited by resources only.")
    ] = 0,
    grace: Annotated[
        int | None,
        typer.Option("--grace", help="Epochs before a trial may be stopped early. Default: a quarter of the epochs."),
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the sampled settings.")] = 0,
    finalists: Annotated[
        int | None,
        typer.Option(
            "--finalists",
            help="Number of best settings that are trained again beside the given ones, with --seeds seeds each; "
            "0: none. Default: 3, at most all.",
        ),
    ] = None,
    seeds: Annotated[
        int, typer.Option("--seeds", help="Number of seeds of each finalist; they are the same for all.")
    ] = 3,
    best: Annotated[
        Path | None, typer.Option("--best", help="Additional file for the best settings, beside OUT/best.yaml.")
    ] = None,
    table: TableOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search for better settings of a method by their validation score; given settings are kept.

    The best settings and the given ones are then trained with several seeds, and the difference is compared with the
    noise.

    `orbithash tune METHOD --help` also shows the settings of the method.
    """
    from orbithash.cluster.tuning.options import Tuning, asked_space
    from orbithash.cluster.tuning.report import finish
    from orbithash.cluster.tuning.tune import tune as run_tune

    run = options.make_run(method, data, table)
    space = asked_space(run.config, search)
    trial = {"cpus": cpus, "gpus": gpus, "max_concurrent": concurrent, "seed": seed, "num_seeds": seeds}
    tuning = Tuning.of(run, space, trials, metric, grace, finalists, **trial)
    found = run_tune(run, tuning, out)
    finish(run, tuning, found, out, best, as_json)
