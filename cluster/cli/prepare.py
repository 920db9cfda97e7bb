"""Verbs that prepare a data set for training: pack, features."""

import dataclasses
from typing import Annotated

import typer

from orbithash.cluster.cli.options import (
    LEARN,
    CaptionsOption,
    DatasetOption,
    JsonOption,
    RunOptions,
    SharedGpusOption,
    local_data,
    with_run_options,
)
from orbithash.cluster.output import print_json, track_when_known

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=LEARN,
    epilog="Example: orbithash pack UCMerced_LandUse --out s3://bucket/ucmd.lance",
)
def pack(
    data: Annotated[str, typer.Argument(metavar="DATA", help="Local folder of images, as for --data of train.")],
    out: Annotated[
        str,
        typer.Option("--out", help="New data set, a path or s3://BUCKET/NAME.lance; its name ends in .lance."),
    ],
    dataset: DatasetOption = None,
    captions: CaptionsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the files of a data set into one Lance dataset that train, tune, evaluate and features read.

    Splits, codes and losses are those of the folder. What is written appears whole or not at all.
    """
    from orbithash.trainers.packing import pack as pack_images

    folder = local_data(data)
    with track_when_known("packing", "files") as on_progress:
        packed = pack_images(folder, out, dataset, captions, on_progress)
    if as_json:
        print_json(dataclasses.asdict(packed))
        return
    print(
        f"packed {packed.num_images} images of {packed.dataset}: {packed.num_files} files, "
        f"{packed.num_bytes / 2**20:.1f} MiB; train with --data {out}"
    )


@verbs.command(
    rich_help_panel=LEARN,
    epilog="Example: orbithash features UCMerced_LandUse --weights IMAGENET1K_V2 --workers 2",
)
@with_run_options
def features(
    data: Annotated[
        str,
        typer.Argument(metavar="DATA", help="Folder of images or packed data set, as for the option --data of train."),
    ],
    options: RunOptions,
    method: Annotated[
        str, typer.Option("--method", help="Name of the method to be trained, one with a frozen backbone.")
    ] = "mhcln",
    workers: Annotated[int, typer.Option("--workers", help="Number of Ray Data workers, which share the CPUs.")] = 1,
    gpus_per_worker: SharedGpusOption = 0,
    as_json: JsonOption = False,
) -> None:
    """Compute the features of images that training asks for, by any number of workers, and keep them.

    Give the settings of the training. Features that are kept are not computed again, so the command continues where it
    was stopped, and training that follows computes none.
    """
    from orbithash.cluster.features.fill import fill_for_training

    done = fill_for_training(options.make_run(method, data), workers, gpus_per_worker)
    if as_json:
        print_json(dataclasses.asdict(done))
        return
    print(
        f"{done.num_images} features of images: {done.num_computed} computed, {done.num_kept_before} kept before; "
        f"{done.seconds:.1f} s, {done.images_per_s:.1f} images/s; folder: {done.folder}"
    )
