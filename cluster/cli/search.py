"""Verbs around archives and gateways."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from orbithash.cluster.cli.connection import (
    CaOption,
    CertKeyOption,
    CertOption,
    Connection,
    GatewayOption,
    TokenFileOption,
)
from orbithash.cluster.cli.options import DEFAULT_ADDRESS, JsonOption, ModelOption, TimeoutOption
from orbithash.cluster.output import print_json
from orbithash.search.logs import Format

if TYPE_CHECKING:
    from orbithash.search.client.client import Client

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(epilog="Example: orbithash encode tiles/ --model runs/ucmd/model --archive archive")
def encode(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, list, Parquet, STAC items or GeoTIFFs.")],
    model: ModelOption,
    archive: Annotated[str, typer.Option("--archive", help="Archive to make or to continue.")],
    workers: Annotated[str | None, typer.Option("--workers", help="Encoding actors, MIN:MAX or a number.")] = None,
    tile: Annotated[int | None, typer.Option("--tile", help="Cut GeoTIFF scenes into tiles of so many pixels.")] = None,
    gpus: Annotated[
        float | None, typer.Option("--gpus-per-worker", help="GPUs of an actor, such as 0.25; without: 1 if there are.")
    ] = None,
    watching: Annotated[
        bool, typer.Option("--watch", help="Go on with what arrives in SOURCE, until Ctrl-C or SIGTERM.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Encodes images into an archive; goes on where it stopped. Refused images go to the archive's side table."""
    from orbithash.cluster.encoding.encode import Workers
    from orbithash.cluster.encoding.encode import encode as run_encode
    from orbithash.cluster.encoding.watch import watch

    run = watch if watching else run_encode
    summary = run(source, model, archive, Workers.parse(workers, gpus), tile)
    if as_json:
        print_json(summary.to_json())
    else:
        print(summary)


@verbs.command(epilog="Example: orbithash serve archive --model runs/ucmd/model --shards 2")
def serve(
    archive: Annotated[str, typer.Argument(metavar="ARCHIVE", help="Archive of codes, a folder or a URI.")],
    model: ModelOption,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index, each in an actor.")] = 2,
    replicas: Annotated[int, typer.Option("--replicas", help="Copies of each part, which stand in for another.")] = 1,
    encoders: Annotated[
        str, typer.Option("--encoders", help="Networks that encode queries, MIN:MAX or a number.")
    ] = "1",
    index: Annotated[str, typer.Option("--index", help="flat, multi-hash, ivf, hnsw or gpu-flat.")] = "flat",
    address: Annotated[str, typer.Option("--address", help="HOST:PORT of the gateway.")] = DEFAULT_ADDRESS,
    local: Annotated[bool, typer.Option("--local", help="All in this process, without Ray.")] = False,
    tls_cert: Annotated[Path | None, typer.Option("--tls-cert", help="Certificate of the gateway, PEM.")] = None,
    tls_key: Annotated[Path | None, typer.Option("--tls-key", help="Its key, PEM, without a password.")] = None,
    client_ca: Annotated[
        Path | None, typer.Option("--client-ca", help="Ask clients for certificates that one of these signed, PEM.")
    ] = None,
    tokens: Annotated[
        Path | None, typer.Option("--tokens", help="Ask for tokens: a file of lines ROLE TOKEN NAME, read or write.")
    ] = None,
    insecure_listen: Annotated[
        bool, typer.Option("--insecure-listen", help="Listen beyond this machine also without TLS and tokens.")
    ] = False,
    reflection: Annotated[bool, typer.Option("--reflection", help="Tell tools such as grpcurl the calls.")] = False,
    metrics: Annotated[str | None, typer.Option("--metrics", help="HOST:PORT of figures for Prometheus.")] = None,
    open_metrics: Annotated[
        bool, typer.Option("--open-metrics", help="Show figures beyond this machine: nothing protects them.")
    ] = False,
    log_format: Annotated[Format, typer.Option("--log-format", help="Lines of the log, on stderr.")] = Format.TEXT,
) -> None:
    """Serves an archive over gRPC until it is told to stop (SIGTERM or Ctrl-C)."""
    from orbithash.cluster.runtime import parse_workers
    from orbithash.cluster.serving.serve import serve as run_serve
    from orbithash.search.gateway.protection import Protection

    protection = Protection.from_files(tls_cert, tls_key, client_ca, tokens, insecure_listen, reflection)
    run_serve(
        archive,
        model,
        shards,
        address,
        local,
        num_replicas=replicas,
        num_encoders=parse_workers(encoders, "--encoders"),
        index=index,
        protection=protection,
        metrics_address=metrics,
        open_metrics=open_metrics,
        log_format=log_format,
    )


@verbs.command(epilog="Example: orbithash query --image tile.png -k 5 --filter \"label = 'harbor'\"")
def query(
    image: Annotated[Path | None, typer.Option("--image", help="Image file to search by.")] = None,
    text: Annotated[str | None, typer.Option("--text", help="Sentence to search by.")] = None,
    key: Annotated[str | None, typer.Option("--key", help="Key of a row to search by.")] = None,
    code: Annotated[str | None, typer.Option("--code", help="Code to search by, in hexadecimal.")] = None,
    like: Annotated[list[str] | None, typer.Option("--like", help="Key of a good example; may be repeated.")] = None,
    unlike: Annotated[list[str] | None, typer.Option("--unlike", help="Key of a bad example, beside --like.")] = None,
    k: Annotated[int, typer.Option("-k", help="Number of hits.")] = 10,
    radius: Annotated[int | None, typer.Option("--radius", help="Only rows at most so many bits away.")] = None,
    filter_: Annotated[str, typer.Option("--filter", help="Only rows for which this is true, in CQL2 text.")] = "",
    after: Annotated[str | None, typer.Option("--after", help="DISTANCE:ID after which the page begins.")] = None,
    include: Annotated[
        list[str] | None, typer.Option("--include", help="uri, caption, thumbnail, footprint or code; for --json.")
    ] = None,
    min_coverage: Annotated[float, typer.Option("--min-coverage", help="Least share of the archive.")] = 0.0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Asks a gateway for the nearest images."""
    from orbithash.cluster.cli.query import as_fields, as_table, make_query

    asked = make_query(
        image,
        text,
        key,
        code,
        like or (),
        unlike or (),
        after,
        k=k,
        radius=radius,
        filter=filter_,
        include=tuple(include or ()),
        min_coverage=min_coverage,
    )
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        answer = client.search(asked)
    if as_json:
        print_json(as_fields(answer))
    else:
        as_table(answer)


@verbs.command(epilog="Example: orbithash upsert new_tiles/")
def upsert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="Folder, image, list, Parquet or STAC items.")],
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Writes images into the archive of a running gateway, which encodes them; searches see them at once."""
    from orbithash.cluster.cli.changes import upsert_source

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        done = upsert_source(client, source)
    if as_json:
        print_json({"written": done.num_written, "refused": done.refused})
        return
    for refused_key, reason in done.refused.items():
        print(f"refused {refused_key}: {reason}", file=sys.stderr)
    print(f"wrote {done.num_written} rows" + (f", refused {len(done.refused)}" if done.refused else ""))


@verbs.command(epilog="Example: orbithash delete harbor/harbor_0001.tif")
def delete(
    keys: Annotated[list[str] | None, typer.Argument(metavar="[KEY]...", help="Keys of rows.")] = None,
    file: Annotated[Path | None, typer.Option("--keys", help="File with one key a line; - for standard input.")] = None,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 60.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Removes rows from the archive of a running gateway."""
    from orbithash.cluster.cli.changes import delete_keys

    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        removed = delete_keys(client, keys or [], file)
    if as_json:
        print_json({"removed": removed})
    else:
        print(f"removed {removed} rows")


@verbs.command(epilog="Example: orbithash refresh --shards 8")
def refresh(
    archive: Annotated[str, typer.Argument(metavar="[ARCHIVE]", help="Another archive, beside the one served.")] = "",
    model: Annotated[str, typer.Option("--model", help="The model of its codes, where it is another one.")] = "",
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index; 0: as many as now.")] = 0,
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 600.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Moves a running gateway to the newest version of its archive, to another archive, or to other shards.

    Paths are those of the gateway's machine. No query fails on the way.
    """
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        client.refresh(archive, model, shards)
        _print_status(client, as_json)


@verbs.command(epilog="Example: orbithash status --json")
def status(
    address: GatewayOption = DEFAULT_ADDRESS,
    timeout: TimeoutOption = 10.0,
    token_file: TokenFileOption = None,
    ca: CaOption = None,
    cert: CertOption = None,
    cert_key: CertKeyOption = None,
    as_json: JsonOption = False,
) -> None:
    """Says what a gateway serves; exit code 1 when a part of the archive cannot be searched."""
    with Connection(address, timeout, token_file, ca, cert, cert_key).client() as client:
        if not _print_status(client, as_json):
            raise typer.Exit(1)


def _print_status(client: "Client", as_json: bool) -> bool:
    """Whether all of the archive can be searched."""
    from orbithash.cluster.cli.status import as_fields, as_table, read_status

    found = read_status(client)
    if as_json:
        print_json(as_fields(found))
    else:
        as_table(found)
    return found.is_whole


@verbs.command(epilog="Example: orbithash duplicates archive --radius 2 --filter \"label = 'harbor'\"")
def duplicates(
    archive: Annotated[Path, typer.Argument(metavar="ARCHIVE", help="Archive of codes.")],
    radius: Annotated[int, typer.Option("--radius", help="Bits that neighbours in a group differ in, at most.")] = 0,
    filter_: Annotated[str, typer.Option("--filter", help="Only rows for which this is true, in CQL2 text.")] = "",
    as_json: JsonOption = False,
) -> None:
    """Finds groups of rows whose codes are linked by small distances, the largest group first."""
    from orbithash.cluster.cli.query import find_duplicates

    groups = find_duplicates(archive, radius, filter_)
    if as_json:
        print_json({"groups": groups})
        return
    for keys in groups:
        print(*keys, sep="\t")
    print(f"{len(groups)} groups, {sum(map(len, groups))} rows", file=sys.stderr)


@verbs.command(epilog="Example: orbithash plan --rows 1e9 --bits 64 --qps 500")
def plan(
    rows: Annotated[float, typer.Option("--rows", help="Rows of the archive, such as 1e9.")],
    bits: Annotated[int, typer.Option("--bits", help="Bits of a code.")] = 64,
    qps: Annotated[float, typer.Option("--qps", help="Queries a second.")] = 100.0,
    k: Annotated[int, typer.Option("-k", help="Hits of a query.")] = 10,
    distinct: Annotated[float, typer.Option("--distinct", help="Share of codes that are distinct, such as 0.1.")] = 1.0,
    replicas: Annotated[int, typer.Option("--replicas", help="Copies of each shard.")] = 2,
    cores: Annotated[int, typer.Option("--cores", help="Cores of a node.")] = 16,
    memory: Annotated[float, typer.Option("--memory", help="Memory of a node, GB (10^9 bytes).")] = 64.0,
    headroom: Annotated[float, typer.Option("--headroom", help="Share of cores and memory that stays free.")] = 0.3,
    p99: Annotated[float, typer.Option("--p99", help="Ms within which 99 of 100 queries are answered.")] = 100.0,
    read_only: Annotated[bool, typer.Option("--read-only", help="Nothing is written while it serves.")] = False,
    bench: Annotated[
        list[Path] | None, typer.Option("--bench", help="results.json of `bench search` to fit to; may be repeated.")
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Says what an archive of some size needs to be served, what decides that, and what would change it."""
    from orbithash.cluster.planning.costs import MEASURED, fitted
    from orbithash.cluster.planning.plan import Wanted, make_plan
    from orbithash.cluster.planning.table import as_fields, as_table

    wanted = Wanted(rows, bits, qps, k, distinct, replicas, cores, memory, headroom, p99, not read_only)
    made = make_plan(wanted, fitted(bench) if bench else MEASURED)
    if as_json:
        print_json(as_fields(made))
    else:
        as_table(made)
