"""Verbs that measure."""

from pathlib import Path
from typing import Annotated

import typer

from orbithash.cluster.cli.options import JsonOption, WeightsOption

__all__ = ["verbs"]

verbs = typer.Typer(help="Measurements, each beside a baseline of the same run.", no_args_is_help=True)


@verbs.command("encode", epilog="Example: orbithash bench encode --count 2000")
def bench_encode(
    model: Annotated[Path | None, typer.Option("--model", help="Model folder; without: a mobilenet_v2.")] = None,
    data: Annotated[Path | None, typer.Option("--data", help="Images; without: generated scenes.")] = None,
    count: Annotated[int, typer.Option("--count", help="Images to encode.")] = 2000,
    as_json: JsonOption = False,
) -> None:
    """Rows per second of the Ray Data pipeline beside a bare loop with as many threads."""
    from orbithash.cluster.bench.throughput import bench_encode as run_bench
    from orbithash.cluster.bench.throughput import show

    show(run_bench(model, data, count), as_json)


@verbs.command("train", epilog="Example: orbithash bench train --epochs 3")
def bench_train(
    data: Annotated[Path | None, typer.Option("--data", help="Labelled images; without: generated scenes.")] = None,
    weights: WeightsOption = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Epochs of each run.")] = 3,
    workers: Annotated[int, typer.Option("--workers", help="Ray Train workers, which share the cores.")] = 2,
    as_json: JsonOption = False,
) -> None:
    """Images per second of each Ray Train worker beside the bare loop with as many threads."""
    from orbithash.cluster.bench.throughput import bench_train as run_bench
    from orbithash.cluster.bench.throughput import show

    show(run_bench(data, weights, epochs, workers), as_json)


@verbs.command("search", epilog="Example: orbithash bench search --rows 1000000 --bits 64 --out runs/bench")
def bench_search(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 1_000_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a random code.")] = 64,
    distinct: Annotated[
        float | None, typer.Option("--distinct", help="Share of the random codes that are distinct, such as 0.1.")
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="Hits of a query.")] = 10,
    queries: Annotated[int, typer.Option("--queries", help="Asked of each engine, alone and in batches of 64.")] = 512,
    radius: Annotated[
        int | None, typer.Option("--radius", help="Hits at most so many bits away: compares flat and multi-hash.")
    ] = None,
    archive: Annotated[Path | None, typer.Option("--archive", help="The codes of an archive, not random ones.")] = None,
    engine: Annotated[
        list[str] | None, typer.Option("--engine", help="Such as flat or hnsw; may be repeated; without: all.")
    ] = None,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of results.json and plots.")] = None,
    as_json: JsonOption = False,
) -> None:
    """Our indexes beside FAISS, numpy and other installed engines over the same codes, on one core."""
    from orbithash.cluster.bench.search import SearchBench, show_search
    from orbithash.cluster.bench.search import bench_search as run_bench

    asked = SearchBench(rows, bits, distinct, k, queries, radius, archive, tuple(engine or ()))
    show_search(run_bench(asked, out), as_json)


@verbs.command("serve", epilog="Example: orbithash bench serve --rows 100000 --local")
def bench_serve(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 100_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a code.")] = 64,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index.")] = 2,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Requests at a time.")] = 16,
    requests: Annotated[int, typer.Option("--requests", help="Requests to each of the two services.")] = 4000,
    local: Annotated[bool, typer.Option("--local", help="All shards in the gateway's process, without Ray.")] = False,
    as_json: JsonOption = False,
) -> None:
    """Requests to a gateway beside requests to an empty gRPC service: rates and latencies."""
    from orbithash.cluster.bench.serve import bench_serve as run_bench
    from orbithash.cluster.bench.throughput import show

    show(run_bench(rows, bits, shards, in_flight, requests, local), as_json)


@verbs.command("soak", epilog="Example: orbithash bench soak --minutes 15")
def bench_soak(
    rows: Annotated[int, typer.Option("--rows", help="Random codes.")] = 100_000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a code.")] = 64,
    shards: Annotated[int, typer.Option("--shards", help="Parts of the index.")] = 2,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Searches at a time.")] = 16,
    minutes: Annotated[float, typer.Option("--minutes", help="How long.")] = 15.0,
    local: Annotated[bool, typer.Option("--local", help="All shards in the gateway's process, without Ray.")] = False,
    as_json: JsonOption = False,
) -> None:
    """A gateway under the highest load while rows come and go: errors, and the slope of its memory."""
    from orbithash.cluster.bench.soak import bench_soak as run_bench
    from orbithash.cluster.bench.throughput import show

    show(run_bench(rows, bits, shards, in_flight, minutes, local), as_json)


@verbs.command("fanout", epilog="Example: orbithash bench fanout --shards 1000 --out runs/fanout")
def bench_fanout(
    shards: Annotated[int, typer.Option("--shards", help="Simulated shards.")] = 1000,
    bits: Annotated[int, typer.Option("--bits", help="Bits of a random code.")] = 64,
    k: Annotated[int, typer.Option("-k", help="Hits of a query.")] = 10,
    queries: Annotated[int, typer.Option("--queries", help="Of each scenario, one after the other.")] = 100,
    delay_ms: Annotated[float, typer.Option("--delay-ms", help="Median delay of a shard's answer.")] = 5.0,
    stragglers: Annotated[float, typer.Option("--stragglers", help="Share of calls that are slow.")] = 0.001,
    slow: Annotated[float, typer.Option("--slow", help="How many times as long they take.")] = 20.0,
    down: Annotated[
        float, typer.Option("--down", help="Share of copies that hang or refuse in some scenarios.")
    ] = 0.002,
    timeout_ms: Annotated[float, typer.Option("--timeout-ms", help="The short timeout of a shard in some.")] = 50.0,
    seed: Annotated[int, typer.Option("--seed", help="Of all that is drawn.")] = 0,
    actors: Annotated[int, typer.Option("--actors", help="Measure calls of so many real Ray actors, too.")] = 0,
    out: Annotated[Path | None, typer.Option("--out", help="Folder of results.json and a plot.")] = None,
    as_json: JsonOption = False,
) -> None:
    """The real fan-out and merge over very many simulated shards: latency and coverage with stragglers and failures."""
    from orbithash.cluster.bench.fanout import bench_fanout as run_bench
    from orbithash.cluster.bench.fanout import show_fanout
    from orbithash.cluster.bench.fanout_world import FanoutBench

    asked = FanoutBench(shards, bits, k, queries, delay_ms, stragglers, slow, down, timeout_ms, seed, actors)
    show_fanout(run_bench(asked, out), as_json)
