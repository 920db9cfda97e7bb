"""Verbs about whole archives: encode, export, refused, duplicates."""

import sys
from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import (
    ARCHIVE,
    AssetOption,
    CaOption,
    CertKeyOption,
    CertOption,
    CodesOption,
    Connection,
    FilterOption,
    JsonOption,
    ReportOption,
    TableOption,
    TimeoutOption,
    TokenFileOption,
    local_model,
)
from orbithash.cluster.output import print_json
from orbithash.encoders.errors import InputError

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=ARCHIVE, epilog="Example: orbithash encode tiles/ --model runs/ucmd/model --archive archive"
)
def encode(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, text list of paths, Parquet table, STAC items or catalog, GeoTIFF or JPEG 2000 scenes, "
            "mosaic (.vrt, or .mosaic: a text list of GeoTIFFs). For a model of embeddings: a Parquet file of "
            "vectors, or a folder of them. Without a model: the same of codes.",
        ),
    ],
    archive: Annotated[str, typer.Option("--archive", help="Archive to create or to extend: a folder or a URI.")],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            callback=local_model,
            help="Model folder, such as RUN/model, or hf:ORG/NAME of the hub. Codes made elsewhere need none.",
        ),
    ] = None,
    codes: CodesOption = None,
    workers: Annotated[
        str | None,
        typer.Option("--workers", help="Number of encoding actors, or MIN:MAX. Default: limited by resources only."),
    ] = None,
    tile: Annotated[
        int | None,
        typer.Option(
            "--tile", help="Cut GeoTIFF or JPEG 2000 scenes and mosaics into square tiles of this side, pixels."
        ),
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
        bool, typer.Option("--watch", help="Keep running and encode new and changed images, until Ctrl-C or SIGTERM.")
    ] = False,
    prefix: Annotated[
        str,
        typer.Option(
            "--prefix", help="Put PREFIX/ before all keys, for a source with the same file names as an earlier one."
        ),
    ] = "",
    captions: Annotated[
        Path | None,
        typer.Option("--captions", help="Karpathy-style JSON file of sentences. Default: captions.json in SOURCE."),
    ] = None,
    table: TableOption = None,
    retry_refused: Annotated[
        bool, typer.Option("--retry-refused", help="Read refused images again, also those that have not changed.")
    ] = False,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Encode images into an archive; running it again encodes only new and changed images.

    The key of a row is the path of its image within SOURCE, or the id of its vector. An image is encoded again when its
    size, times and content have changed, vectors when their file has changed. What cannot be read is recorded in the
    archive's side table with the reason; `orbithash refused` lists it. Rows that were deleted through a gateway come
    back if they are still in SOURCE.

    Without --model, SOURCE is a Parquet file of codes, such as one of `orbithash export`: its rows are taken unchanged.
    """
    from orbithash.cluster.encoding.codes import import_codes
    from orbithash.cluster.encoding.encode import Workers
    from orbithash.cluster.encoding.encode import encode as run_encode
    from orbithash.cluster.encoding.vectors import encode_vectors, takes_vectors
    from orbithash.cluster.encoding.watch import watch
    from orbithash.encoders.errors import InputError

    actors = Workers.parse(workers, gpus)
    if model is None or codes:
        for name, value in (
            *(("--tile", tile), ("--asset", asset), ("--captions", captions), ("--watch", watching)),
            *(("--workers", workers), ("--gpus-per-worker", gpus), ("--retry-refused", retry_refused)),
        ):
            if value:
                why = "no --model is given, so that SOURCE is a table of codes" if model is None else "--codes is given"
                raise InputError(f"{name} is for what a model encodes, and {why}: omit one of them")
        summary = import_codes(source, archive, codes or (), table or (), model=model, prefix=prefix)
    elif takes_vectors(model):
        for name, value in (("--tile", tile), ("--asset", asset), ("--captions", captions), ("--watch", watching)):
            if value:
                raise InputError(f"{name} is for images; the model in {model} takes vectors: omit it")
        summary = encode_vectors(
            source, model, archive, actors, table or (), prefix=prefix, retry_refused=retry_refused
        )
    else:
        if table:
            raise InputError(f"--table is for vectors; the model in {model} takes images: omit it")
        run = watch if watching else run_encode
        summary = run(
            source,
            model,
            archive,
            actors,
            tile,
            asset,
            prefix=prefix,
            captions=captions,
            retry_refused=retry_refused,
        )
    if as_json:
        print_json(summary.to_json())
    else:
        print(summary)
    if report is not None:
        from orbithash.cluster.encoding.page import write_encode_page

        write_encode_page(report, source, summary, archive)


@verbs.command(rich_help_panel=ARCHIVE, epilog="Example: orbithash export archive places.parquet")
def export(
    archive: Annotated[
        str, typer.Argument(metavar="ARCHIVE", help="Archive of codes: a folder or a URI; with --address, omit it.")
    ],
    out: Annotated[
        Path | None,
        typer.Argument(
            metavar="OUT",
            help="File to write, by its ending .parquet (GeoParquet), .geojson, .csv or .json (STAC items), replaced "
            "if it exists; or a new folder (STAC collection with GeoParquet files).",
        ),
    ] = None,
    format_: Annotated[
        str | None,
        typer.Option("--format", help="parquet, stac, items, geojson or csv. Default: by the ending of OUT."),
    ] = None,
    filter_: FilterOption = "",
    version: Annotated[
        int | None, typer.Option("--version", min=1, help="Version of the archive. Default: the newest.")
    ] = None,
    columns: Annotated[
        str | None,
        typer.Option(
            "--columns",
            help="Columns to write beside id, geometry and bbox, separated by commas, such as label,datetime,code. "
            "Default: all; for geojson, csv and items without vector, thumbnail and stamp.",
        ),
    ] = None,
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Model folder of the codes; its name, method and thresholds are described."),
    ] = None,
    licence: Annotated[
        str, typer.Option("--licence", help="Licence of the codes for STAC: an SPDX identifier. Default: not stated.")
    ] = "other",
    source: Annotated[
        str, typer.Option("--source", help="URL of the source images for STAC. Default: not stated.")
    ] = "",
    workers: Annotated[
        str | None,
        typer.Option(
            "--workers",
            metavar="MIN:MAX",
            help="Export on Ray Data with this number of tasks, into a folder of GeoParquet files. Default: one "
            "process.",
        ),
    ] = None,
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            help="Export the archive of the gateway at HOST:PORT, to GeoParquet, GeoJSON or CSV, ordered by row id.",
        ),
    ] = None,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Write the rows of an archive to files that other programs read, in the order of a Hilbert curve.

    Codes are packed bytes; the footer of GeoParquet and the STAC collection describe their bits. Rows that wait for
    their place in the order need free disk space beside OUT. With --address, the only argument is OUT.
    """
    if address is not None:
        unusable: dict[str, object] = {"--format": format_, "--version": version, "--columns": columns}
        unusable |= {"--model": model, "--source": source, "--workers": workers, "--licence": licence != "other"}
        if out is not None or any(unusable.values()):
            extra = f"ARCHIVE {archive}" if out is not None else next(name for name, value in unusable.items() if value)
            raise InputError(
                f"{extra} cannot be given with --address; give OUT, --filter and options of the connection"
            )
        with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
            rows = client.export(archive, filter_)
        if as_json:
            print_json({"out": archive, "rows": rows})
        else:
            print(f"{archive}: wrote {rows:,} rows")
        return
    if out is None:
        raise InputError("OUT is missing: give the archive and the file or folder to write, or --address and the file")
    from orbithash.cluster.exporting.export import ExportOptions
    from orbithash.cluster.exporting.export import export as run_export
    from orbithash.cluster.runtime import parse_workers

    exported = run_export(
        archive,
        out,
        ExportOptions(
            format_,
            version,
            filter_,
            None if columns is None else columns.split(","),
            model,
            licence,
            source,
            None if workers is None else parse_workers(workers),
        ),
    )
    if as_json:
        print_json(exported.to_json())
    else:
        print(exported)


@verbs.command(rich_help_panel=ARCHIVE, epilog="Example: orbithash refused archive --limit 20")
def refused(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="Archive of codes: a folder or a URI.")],
    limit: Annotated[
        int | None, typer.Option("--limit", min=0, help="Maximum number of images to list. Default: all.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """List the images that could not be read, with the reasons, in the order of their keys."""
    from orbithash.encoders.archive.archive import Archive
    from orbithash.encoders.sources.folders import natural

    reasons = Archive.open(archive).refused()
    keys = sorted(reasons, key=natural)[:limit]
    if as_json:
        print_json({"refused": [{"key": key, "reason": reasons[key]} for key in keys], "total": len(reasons)})
        return
    for key in keys:
        # A name with control characters is one of the reasons.
        print(key if key.isprintable() else ascii(key), reasons[key], sep="\t")
    print(
        f"{len(reasons)} refused images" + (f", {len(keys)} listed" if len(keys) < len(reasons) else ""),
        file=sys.stderr,
    )


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
    from orbithash.cluster.cli.gateway.query import find_duplicates

    groups = find_duplicates(archive, radius, filter_)
    if as_json:
        print_json({"groups": groups})
        return
    for keys in groups:
        print(*keys, sep="\t")
    print(f"{len(groups)} groups, {sum(map(len, groups))} rows", file=sys.stderr)
