"""The verb `features`, which computes the features of a data set before it is trained on."""

import dataclasses
from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import LEARN, JsonOption, RunOptions, with_run_options
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=LEARN,
    epilog="Example: orbithash features UCMerced_LandUse --weights IMAGENET1K_V2 --workers 2",
)
@with_run_options
def features(
    data: Annotated[
        Path,
        typer.Argument(metavar="DATA", help="Folder of images, as for the option --data of train."),
    ],
    options: RunOptions,
    method: Annotated[
        str, typer.Option("--method", help="Name of the method to be trained, one with a frozen backbone.")
    ] = "mhcln",
    workers: Annotated[int, typer.Option("--workers", help="Number of Ray Data workers, which share the CPUs.")] = 1,
    gpus_per_worker: Annotated[
        float,
        typer.Option(
            "--gpus-per-worker", help="GPUs of each worker; a fraction such as 0.25 shares one; 0: CPUs only."
        ),
    ] = 0,
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
