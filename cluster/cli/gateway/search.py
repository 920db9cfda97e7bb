"""Verbs that run a gateway or talk to one: serve, query, upsert, delete, refresh, status."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orbithash.cluster.cli.options import (
    DEFAULT_ADDRESS,
    SEARCH,
    AssetOption,
    BaseMapOption,
    CaOption,
    CertKeyOption,
    CertOption,
    CodesOption,
    Connection,
    FilterOption,
    GatewayOption,
    JsonOption,
    TimeoutOption,
    TokenFileOption,
    WebHostOption,
    local_model,
)
from orbithash.cluster.output import print_json
from orbithash.search.logs import Format

if TYPE_CHECKING:
    from orbithash.search.client.client import Client

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash serve archive --model runs/ucmd/model --shards 2")
def serve(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="Archive of codes: a folder or a URI.")],
    model: Annotated[
        Path | None,
        typer.Option(
            "--model",
            callback=local_model,
            help="Model folder of the archive, or hf:ORG/NAME of the hub. Default with --join: the other gateway's.",
        ),
    ] = None,
    shards: Annotated[
        int | None,
        typer.Option("--shards", help="Number of shards of the index, one actor each. Default: 2; 1 with --local."),
    ] = None,
    replicas: Annotated[
        int, typer.Option("--replicas", help="Number of replicas of each shard; 2 or more survive a lost node.")
    ] = 1,
    encoders: Annotated[
        str, typer.Option("--encoders", help="Number of actors that encode queries, or MIN:MAX.")
    ] = "1",
    gpus_per_encoder: Annotated[
        float,
        typer.Option(
            "--gpus-per-encoder", help="GPUs of each encoder; a fraction such as 0.25 shares one; 0: CPUs only."
        ),
    ] = 0,
    index: Annotated[
        str,
        typer.Option(
            "--index",
            help="exact, the default, finds the nearest rows without comparing all codes; flat and gpu-flat compare "
            "all; ivf and hnsw are approximate.",
        ),
    ] = "exact",
    segments: Annotated[
        Path | None,
        typer.Option("--segments", help="Folder of the shards' files on each node. Default: in the cache folder."),
    ] = None,
    images: Annotated[
        list[str] | None,
        typer.Option(
            "--images",
            help="Folder, or URI of a folder, from which images of rows may be read for larger pictures and heat maps; "
            "may be repeated. Default: thumbnails only.",
        ),
    ] = None,
    gateways: Annotated[
        int, typer.Option("--gateways", help="Number of processes that answer at --address and share the shards.")
    ] = 1,
    join: Annotated[
        bool,
        typer.Option(
            "--join",
            help="Use the shards and encoders of a gateway of this archive that runs on the same Ray cluster.",
        ),
    ] = False,
    address: Annotated[str, typer.Option("--address", help="HOST:PORT to listen on.")] = DEFAULT_ADDRESS,
    local: Annotated[bool, typer.Option("--local", help="Run everything in this process, without Ray.")] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate of the gateway, PEM.")] = None,
    tls_key: Annotated[
        Path | None, typer.Option("--tls-key", help="Private key of --tls-cert, PEM without a password.")
    ] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="Require client certificates signed by one of these CAs, PEM.")
    ] = None,
    tokens: Annotated[
        Path | None,
        typer.Option("--tokens", help="Require tokens: file with lines ROLE TOKEN NAME; roles are read and write."),
    ] = None,
    insecure_listen: Annotated[
        bool,
        typer.Option("--insecure-listen", help="Allow other machines to connect without TLS and tokens."),
    ] = False,
    reflection: Annotated[
        bool, typer.Option("--reflection", help="Enable gRPC server reflection, for tools such as grpcurl.")
    ] = False,
    metrics: Annotated[
        str | None,
        typer.Option(
            "--metrics",
            help="HOST:PORT for Prometheus metrics; with --gateways N, of the first of N ports. Default: no metrics.",
        ),
    ] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Allow other machines to read the metrics, without protection.")
    ] = False,
    web: Annotated[
        str | None,
        typer.Option(
            "--web",
            help="HOST:PORT of a page in the browser and of the JSON door, such as 127.0.0.1:8080. Default: no page.",
        ),
    ] = None,
    web_host: WebHostOption = None,
    base_map: BaseMapOption = None,
    log_format: Annotated[Format, typer.Option("--log-format", help="Format of the log on stderr.")] = Format.TEXT,
) -> None:
    """Serve an archive over gRPC, and with --web as a page in the browser, until SIGTERM or Ctrl-C."""
    from orbithash.cluster.runtime import parse_workers
    from orbithash.cluster.serving.serve import serve as run_serve
    from orbithash.cluster.serving.settings import ServeSettings, default_shards
    from orbithash.search.gateway.protection import Protection

    settings = ServeSettings(
        archive,
        model,
        address,
        num_shards=default_shards(local) if shards is None else shards,
        num_replicas=replicas,
        num_encoders=parse_workers(encoders, "--encoders"),
        gpus_per_encoder=gpus_per_encoder,
        index=index,
        images=tuple(images or ()),
        segments=segments,
        is_local=local,
        num_gateways=gateways,
        joins=join,
        protection=Protection.from_files(tls_cert, tls_key, client_ca, tokens, insecure_listen, reflection),
        metrics_address=metrics,
        open_metrics=open_metrics,
        web_address=web,
        web_hosts=tuple(web_host or ()),
        base_map=base_map,
        log_format=log_format,
    )
    run_serve(settings)


@verbs.command(
    rich_help_panel=SEARCH,
    epilog="Example: orbithash query --image tile.png -k 5 --filter \"label = 'harbor'\"",
)
def query(
    image: Annotated[Path | None, typer.Option("--image", help="Query by this image file.")] = None,
    text: Annotated[
        str | None, typer.Option("--text", help="Query by this sentence; needs a model with a text encoder.")
    ] = None,
    vector: Annotated[
        Path | None,
        typer.Option("--vector", help="Query by the vector in this file of numpy.save: the input of the model's head."),
    ] = None,
    key: Annotated[str | None, typer.Option("--key", help="Query by the row with this key.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="Query by this code, in hexadecimal.")] = None,
    like: Annotated[
        list[str] | None, typer.Option("--like", help="Query by the row with this key, as a positive; may be repeated.")
    ] = None,
    unlike: Annotated[list[str] | None, typer.Option("--unlike", help="Key of a negative; may be repeated.")] = None,
    weight: Annotated[
        list[str] | None,
        typer.Option(
            "--weight", help="OPTION=NUMBER: weight of the examples of an option, such as text=0.5. Default: 1."
        ),
    ] = None,
    k: Annotated[int, typer.Option("-k", help="Maximum number of hits, 1 to 10,000.")] = 10,
    radius: Annotated[
        int | None, typer.Option("--radius", help="Maximum Hamming distance of a hit, bits. Default: no limit.")
    ] = None,
    filter_: FilterOption = "",
    after: Annotated[
        str | None, typer.Option("--after", help="DISTANCE:ID of the last hit of the page before this one.")
    ] = None,
    include: Annotated[
        list[str] | None,
        typer.Option(
            "--include",
            help="Column to add to --json: uri, caption, thumbnail, footprint, code or vector; may be repeated.",
        ),
    ] = None,
    min_coverage: Annotated[
        float,
        typer.Option("--min-coverage", help="Fail if a smaller fraction of the archive was searched, 0 to 1."),
    ] = 0.0,
    rescore: Annotated[
        str,
        typer.Option(
            "--rescore",
            help="Rank a shortlist of the nearest rows again: vector (cosine of stored vectors) or asymmetric "
            "(real-valued outputs of the query against codes). Default: order by distance.",
        ),
    ] = "",
    oversampling: Annotated[
        float,
        typer.Option("--oversampling", help="Rows of the shortlist for each hit, with --rescore."),
    ] = 4.0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Search a gateway for the nearest images.

    Several of --image, --text, --vector, --key, --code and --like together make one query near all of them.
    """
    from orbithash.cluster.cli.gateway.query import as_fields, as_table, make_query

    asked = make_query(
        image,
        text,
        vector,
        key,
        code,
        like or (),
        unlike or (),
        weight or (),
        after,
        k=k,
        radius=radius,
        filter=filter_,
        include=tuple(include or ()),
        min_coverage=min_coverage,
        rescore=rescore,
        oversampling=oversampling,
    )
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        answer = client.search(asked)
    if as_json:
        print_json(as_fields(answer))
    else:
        as_table(answer)


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash upsert new_tiles/")
def upsert(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="Folder, image, text list of paths, Parquet table of images or codes, or STAC items.",
        ),
    ],
    asset: AssetOption = None,
    codes: CodesOption = None,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Send images to a gateway, which encodes them into its archive; searches find them at once.

    Codes of the gateway's model, such as those of `orbithash export`, are sent as they are.
    """
    from orbithash.cluster.cli.gateway.changes import upsert_source

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        done = upsert_source(client, source, asset, codes or ())
    if as_json:
        print_json({"written": done.num_written, "refused": done.refused})
        return
    for refused_key, reason in done.refused.items():
        print(f"refused {refused_key}: {reason}", file=sys.stderr)
    print(f"wrote {done.num_written} rows" + (f", refused {len(done.refused)}" if done.refused else ""))


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash delete harbor/harbor_0001.tif")
def delete(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of rows to delete.")] = None,
    file: Annotated[
        Path | None, typer.Option("--keys", help="File with one key per line; - reads standard input.")
    ] = None,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Delete rows from the archive of a gateway.

    A later `orbithash encode` of the same source adds them again.
    """
    from orbithash.cluster.cli.gateway.changes import delete_keys

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        removed = delete_keys(client, keys or [], file)
    if as_json:
        print_json({"removed": removed})
    else:
        print(f"removed {removed} rows")


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash refresh --shards 8")
def refresh(
    archive: Annotated[
        str, typer.Argument(metavar="[ARCHIVE]", help="Archive to serve. Default: the newest version of the current.")
    ] = "",
    model: Annotated[
        str, typer.Option("--model", help="Model folder of the archive. Default: the current model.")
    ] = "",
    shards: Annotated[int, typer.Option("--shards", help="Number of shards; 0: the current number.")] = 0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 600.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Switch a running gateway to the newest version of its archive, another archive, or another number of shards.

    Paths are read on the gateway's machine. No query fails during the switch.
    """
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        client.refresh(archive, model, shards, timeout_s=timeout)
        _print_status(client, as_json)


@verbs.command(rich_help_panel=SEARCH, epilog="Example: orbithash status --json")
def status(
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Show what a gateway serves; exit code 1 if a part of the archive cannot be searched."""
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        if not _print_status(client, as_json):
            raise typer.Exit(1)


def _print_status(client: "Client", as_json: bool) -> bool:
    """Print the gateway's status; return whether the whole archive can be searched."""
    from orbithash.cluster.cli.gateway.status import as_fields, as_table, read_status

    found = read_status(client)
    if as_json:
        print_json(as_fields(found))
    else:
        as_table(found)
    return found.is_whole
