"""Verbs about a Ray cluster: submit a job, plan the resources."""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated, cast

import typer

from orbithash.cluster.cli.options import CLUSTER, JsonOption, ReportOption
from orbithash.cluster.output import print_json, say
from orbithash.encoders.errors import InputError

__all__ = ["verbs"]

verbs = typer.Typer()


@verbs.command(
    rich_help_panel=CLUSTER,
    epilog="Example: orbithash submit --id first -- train dhcl --data /data/tiles --out /data/runs/first",
)
def submit(
    context: typer.Context,
    words: Annotated[
        list[str] | None, typer.Argument(metavar="[VERB]...", help="The verb and its options, after two dashes.")
    ] = None,
    address: Annotated[
        str, typer.Option("--address", envvar="RAY_API_SERVER_ADDRESS", help="http://HOST:PORT of Ray's dashboard.")
    ] = "http://127.0.0.1:8265",
    token_file: Annotated[
        Path | None, typer.Option("--token-file", help="File with the cluster's token. Default: RAY_AUTH_TOKEN.")
    ] = None,
    job_id: Annotated[
        str | None,
        typer.Option("--id", help="Name of the job. If a job of this name exists, follow it. Default: a random name."),
    ] = None,
    wheel: Annotated[
        Path | None, typer.Option("--wheel", help="Wheel of orbithash for nodes with another version or without it.")
    ] = None,
    python: Annotated[str, typer.Option("--python", help="Python command on the cluster's nodes.")] = "python",
    variables: Annotated[
        list[str] | None,
        typer.Option(
            "--env",
            metavar="NAME[=VALUE]",
            help="Environment variable of the job; NAME alone takes its value from here. May be repeated. Every user "
            "of the cluster can read it.",
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only check the verb and its options; ask no cluster and start no job.")
    ] = False,
    detach: Annotated[bool, typer.Option("--detach", help="Return after sending; do not follow the output.")] = False,
    stop: Annotated[str | None, typer.Option("--stop", metavar="ID", help="Stop the job of this name.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Run a verb as a job on a Ray cluster and print its output; Ctrl-C leaves the job running."""
    from orbithash.cluster.submit import Cluster, Runtime, check_words, run_job, stop_job

    if check and stop is not None:
        raise InputError(f"got --check and --stop {stop}; give one of them")
    cluster = Cluster(address, token_file)
    if stop is None:
        check_words(context.find_root().command, words or [])
        if check:
            say("the command line is valid")
            return
        # With --json, stdout carries the JSON alone.
        output = sys.stderr if as_json else sys.stdout
        runtime = Runtime.of(python, wheel, variables or [])
        job = run_job(cluster, words or [], job_id, runtime, detach, output)
    else:
        job = stop_job(cluster, stop)
    if as_json:
        print_json(dataclasses.asdict(job))
    if stop is None:
        raise typer.Exit(job.code)


@verbs.command(rich_help_panel=CLUSTER, epilog="Example: orbithash plan --rows 1e9 --bits 64 --qps 500")
def plan(
    rows: Annotated[float, typer.Option("--rows", help="Number of rows of the archive, such as 1e9.")],
    bits: Annotated[int, typer.Option("--bits", help="Length of a code in bits.")] = 64,
    codes: Annotated[
        str, typer.Option("--codes", help="Distribution of the codes: learned (near one another) or random (uniform).")
    ] = "learned",
    qps: Annotated[float, typer.Option("--qps", help="Queries per second.")] = 100.0,
    k: Annotated[int, typer.Option("-k", help="Number of hits per query.")] = 10,
    distinct: Annotated[
        float, typer.Option("--distinct", help="Fraction of the codes that are distinct, above 0 and up to 1.")
    ] = 1.0,
    replicas: Annotated[int, typer.Option("--replicas", help="Number of replicas of each shard.")] = 2,
    cores: Annotated[int, typer.Option("--cores", help="CPU cores of a node.")] = 16,
    memory: Annotated[float, typer.Option("--memory", help="Memory of a node, GB (10^9 bytes).")] = 64.0,
    headroom: Annotated[
        float, typer.Option("--headroom", help="Fraction of cores and memory to keep free, 0 to 0.9.")
    ] = 0.3,
    p99: Annotated[float, typer.Option("--p99", help="99th percentile of the latency to reach, ms.")] = 100.0,
    read_only: Annotated[bool, typer.Option("--read-only", help="No rows are written while serving.")] = False,
    bench: Annotated[
        list[Path] | None,
        typer.Option("--bench", help="results.json of `bench search` to fit the cost model to; may be repeated."),
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Estimate the nodes that serve an archive of this size, what limits them, and what would change the estimate."""
    from orbithash.cluster.planning.costs import MEASURED, fitted
    from orbithash.cluster.planning.plan import make_plan
    from orbithash.cluster.planning.requirements import CodeKind, Requirements
    from orbithash.cluster.planning.table import as_fields, as_table

    requirements = Requirements(
        rows, bits, cast(CodeKind, codes), qps, k, distinct, replicas, cores, memory, headroom, p99, not read_only
    )
    made = make_plan(requirements, fitted(bench) if bench else MEASURED)
    if as_json:
        print_json(as_fields(made))
    else:
        as_table(made)
    if report is not None:
        from orbithash.cluster.planning.page import write_plan_page

        write_plan_page(report, made)
