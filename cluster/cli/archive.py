"""Verbs that write or read an archive without a gateway: encode, duplicates."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import ARCHIVE, AssetOption, FilterOption, JsonOption, ModelOption
from orbithash.cluster.output import print_json

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=ARCHIVE, epilog="Example: orbithash encode tiles/ --model runs/ucmd/model --archive archive"
)
def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE", help="Folder, text list of paths, Parquet table, STAC items or GeoTIFF scenes."
        ),
    ],
    model: ModelOption,
    archive: Annotated[str, typer.Option("--archive", help="Archive to create or to extend: a folder or a URI.")],
    workers: Annotated[
        str | None,
        typer.Option("--workers", help="Number of encoding actors, or MIN:MAX. Default: limited by resources only."),
    ] = None,
    tile: Annotated[
        int | None, typer.Option("--tile", help="Cut GeoTIFF scenes into square tiles of this side, pixels.")
    ] = None,
    asset: AssetOption = None,
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-worker",
            help="GPUs of each actor; a fraction such as 0.25 shares one. Default: 1 if the cluster has GPUs, else 0.",
        ),
    ] = None,
    watching: Annotated[
        bool, typer.Option("--watch", help="Keep running and encode new images, until Ctrl-C or SIGTERM.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Encode images into an archive; running it again encodes only new images.

    Images that cannot be read are recorded in the archive's side table with the reason.
    """
    from orbithash.cluster.encoding.encode import Workers
    from orbithash.cluster.encoding.encode import encode as run_encode
    from orbithash.cluster.encoding.watch import watch

    run = watch if watching else run_encode
    summary = run(source, model, archive, Workers.parse(workers, gpus), tile, asset)
    if as_json:
        print_json(summary.to_json())
    else:
        print(summary)


@verbs.command(
    rich_help_panel=ARCHIVE,
    epilog="Example: orbithash duplicates archive --radius 2 --filter \"label = 'harbor'\"",
)
def duplicates(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive of codes.")],
    radius: Annotated[
        int, typer.Option("--radius", help="Maximum Hamming distance of two linked codes, bits; 0: equal codes.")
    ] = 0,
    filter_: FilterOption = "",
    as_json: JsonOption = False,
) -> None:
    """Find groups of rows whose codes are equal or linked by small distances, the largest group first."""
    from orbithash.cluster.cli.query import find_duplicates

    groups = find_duplicates(archive, radius, filter_)
    if as_json:
        print_json({"groups": groups})
        return
    for keys in groups:
        print(*keys, sep="\t")
    print(f"{len(groups)} groups, {sum(map(len, groups))} rows", file=sys.stderr)
