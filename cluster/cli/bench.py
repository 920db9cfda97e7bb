"""Verbs of the group bench, which measure speed next to a baseline of the same run."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from orbithash.cluster.cli.options import JsonOption, ReportOption, WeightsOption, local_data

if TYPE_CHECKING:
    from orbithash.cluster.bench.codes import CodeSource

__all__ = ["bench", "write_page"]

RowsOption = Annotated[int, typer.Option("--rows", help="Number of generated codes.")]
BitsOption = Annotated[int, typer.Option("--bits", help="Length of a generated code in bits.")]
ShardsOption = Annotated[
    int | None, typer.Option("--shards", help="Number of shards of the index. Default: 2; 1 with --local.")
]
LocalOption = Annotated[bool, typer.Option("--local", help="Run all shards in the gateway's process, without Ray.")]
CodesOption = Annotated[
    str,
    typer.Option(
        "--codes",
        help="Source of the codes: random (uniform), mixture (near random centres, as codes of trained models are) or "
        "archive (with --archive).",
    ),
]
CentresOption = Annotated[int, typer.Option("--centres", help="Number of centres of the mixture.")]
FlipOption = Annotated[
    float, typer.Option("--flip", help="Probability that a bit differs from that of its centre in the mixture.")
]
ArchiveOption = Annotated[
    Path | None, typer.Option("--archive", help="Use the codes of this archive, as --codes archive.")
]
OutOption = Annotated[
    Path | None, typer.Option("--out", help="Folder for results.json, report.html and plots. Default: not written.")
]

bench = typer.Typer(help="Measure speed next to a baseline of the same run.", no_args_is_help=True)


def write_page(path: Path | None, result: dict[str, Any]) -> None:
    """Write the page of a result, if a path is given."""
    if path is not None:
        from orbithash.cluster.bench.page import write_bench_page

        write_bench_page(path, result)


def _num_shards(shards: int | None, local: bool) -> int:
    from orbithash.cluster.serving.settings import default_shards

    return default_shards(local) if shards is None else shards


def _source(codes: str, centres: int, flip: float, distinct: float | None, archive: Path | None) -> "CodeSource":
    from orbithash.cluster.bench.codes import CodeKind, CodeSource

    return CodeSource("archive" if archive else cast(CodeKind, codes), centres, flip, distinct, archive)


@bench.command("encode", epilog="Example: orbithash bench encode --count 2000")
def bench_encode(
    model: Annotated[
        Path | None, typer.Option("--model", help="Model folder. Default: a mobilenet_v2 with random weights.")
    ] = None,
    data: Annotated[str | None, typer.Option("--data", help="Folder of images. Default: generated scenes.")] = None,
    count: Annotated[int, typer.Option("--count", help="Number of images to encode.")] = 2000,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure rows per second of `encode` next to a plain loop with the same number of threads."""
    from orbithash.cluster.bench.encode import bench_encode as run_bench
    from orbithash.cluster.bench.report import show

    result = run_bench(model, None if data is None else local_data(data), count)
    show(result, as_json)
    write_page(report, result)


@bench.command("embeddings", epilog="Example: orbithash bench embeddings --rows 1000000")
def bench_embeddings(
    rows: Annotated[int, typer.Option("--rows", help="Number of random vectors.")] = 1_000_000,
    dims: Annotated[int, typer.Option("--dims", help="Dimensions of a vector.")] = 768,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure rows per second of `encode` on vectors next to a plain loop that reads and encodes them."""
    from orbithash.cluster.bench.encode import bench_embeddings as run_bench
    from orbithash.cluster.bench.report import show

    result = run_bench(rows, dims)
    show(result, as_json)
    write_page(report, result)


@bench.command("train", epilog="Example: orbithash bench train --epochs 3")
def bench_train(
    data: Annotated[str | None, typer.Option("--data", help="Labelled images. Default: generated scenes.")] = None,
    weights: WeightsOption = None,
    epochs: Annotated[int, typer.Option("--epochs", help="Number of epochs of each run.")] = 3,
    workers: Annotated[int, typer.Option("--workers", help="Number of Ray Train workers, which share the cores.")] = 2,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure images per second of each training worker next to a plain loop with the same number of threads."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.train import bench_train as run_bench

    result = run_bench(data, weights, epochs, workers)
    show(result, as_json)
    write_page(report, result)


@bench.command("search", epilog="Example: orbithash bench search --rows 1000000 --bits 64 --out runs/bench")
def bench_search(
    rows: RowsOption = 1_000_000,
    bits: BitsOption = 64,
    codes: CodesOption = "random",
    centres: CentresOption = 10_000,
    flip: FlipOption = 0.06,
    distinct: Annotated[
        float | None,
        typer.Option(
            "--distinct", help="Fraction of the codes that are distinct, such as 0.1. Default: all drawn independently."
        ),
    ] = None,
    k: Annotated[int, typer.Option("--k", "-k", help="Number of hits per query.")] = 10,
    queries: Annotated[
        int, typer.Option("--queries", help="Number of queries to each engine, one by one and in batches of 64.")
    ] = 512,
    radius: Annotated[
        int | None,
        typer.Option(
            "--radius", help="Maximum Hamming distance of a hit, bits; compares exact and flat. Default: no limit."
        ),
    ] = None,
    archive: ArchiveOption = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(
            "--engine",
            help="Engine to measure, such as flat or hnsw; may be repeated. Default: exact, and the exact engines that "
            "search in process: faiss-flat, usearch, sqlite-vec, qdrant-edge.",
        ),
    ] = None,
    out: OutOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the index exact next to FAISS and other engines on the same codes, on one core."""
    from orbithash.cluster.bench.search import SearchBench, show_search
    from orbithash.cluster.bench.search import bench_search as run_bench

    source = _source(codes, centres, flip, distinct, archive)
    asked = SearchBench(rows, bits, source, k, queries, radius, tuple(engine or ()))
    result = run_bench(asked, out)
    show_search(result, as_json)
    write_page(report, result)


@bench.command("rank", epilog="Example: orbithash bench rank --rows 1000000 --dims 64")
def bench_rank(
    rows: Annotated[int, typer.Option("--rows", help="Number of random vectors of int8.")] = 10_000_000,
    dims: Annotated[int, typer.Option("--dims", help="Dimensions of a vector.")] = 64,
    k: Annotated[int, typer.Option("--k", "-k", help="Number of rows in the answer.")] = 100,
    rounds: Annotated[int, typer.Option("--rounds", help="Number of times that each contestant reads all rows.")] = 7,
    out: OutOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure bytes per second of linear rankings next to bare products of int8 and plain reading of memory."""
    from orbithash.cluster.bench.rank import RankBench, show_rank
    from orbithash.cluster.bench.rank import bench_rank as run_bench

    result = run_bench(RankBench(rows, dims, k, rounds), out)
    show_rank(result, as_json)
    write_page(report, result)


@bench.command("export", epilog="Example: orbithash bench export --rows 1000000")
def bench_export(
    rows: Annotated[int, typer.Option("--rows", help="Number of random rows.")] = 1_000_000,
    thumbnail: Annotated[int, typer.Option("--thumbnail", help="Size of the thumbnail of a row, bytes.")] = 500,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure rows per second and memory of `export` to GeoParquet next to a bare pyarrow write of the same table."""
    from orbithash.cluster.bench.export import bench_export as run_bench
    from orbithash.cluster.bench.report import show

    result = run_bench(rows, thumbnail)
    show(result, as_json)
    write_page(report, result)


@bench.command("validation", epilog="Example: orbithash bench validation --queries 200")
def bench_validation(
    queries: Annotated[int, typer.Option("--queries", help="Number of codes that search.")] = 2000,
    database: Annotated[int, typer.Option("--database", help="Number of codes that are searched.")] = 100_000,
    bits: BitsOption = 64,
    rounds: Annotated[int, typer.Option("--rounds", help="Number of times that each contestant computes it.")] = 5,
    out: OutOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure seconds of the metric of validation next to plain NumPy, which gives the same digits."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.training.validation import ValidationBench
    from orbithash.cluster.bench.training.validation import bench_validation as run_bench

    result = run_bench(ValidationBench(queries, database, bits, rounds), out)
    show(result, as_json)
    write_page(report, result)


@bench.command("rescore", epilog="Example: orbithash bench rescore --rows 100000 --out runs/rescore")
def bench_rescore(
    rows: Annotated[int, typer.Option("--rows", help="Number of generated vectors.")] = 1_000_000,
    dims: Annotated[int, typer.Option("--dims", help="Dimensions of a generated vector.")] = 768,
    intrinsic: Annotated[
        int, typer.Option("--intrinsic", help="Intrinsic dimension of the generated vectors, at most --dims.")
    ] = 32,
    bits: Annotated[int, typer.Option("--bits", help="Length of the ITQ codes in bits.")] = 128,
    vector_dims: Annotated[int, typer.Option("--vector-dims", help="Dimensions of the stored vectors.")] = 64,
    queries: Annotated[int, typer.Option("--queries", help="Number of queries.")] = 200,
    embeddings: Annotated[
        Path | None,
        typer.Option("--embeddings", help="Use the vectors of this .npy file [N, D]. Default: generated ones."),
    ] = None,
    out: OutOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the recall of rescored shortlists against the float cosine, next to RaBitQ of FAISS."""
    from orbithash.cluster.bench.rescore import RescoreBench, show_rescore
    from orbithash.cluster.bench.rescore import bench_rescore as run_bench

    asked = RescoreBench(rows, dims, intrinsic, bits, vector_dims, queries, embeddings)
    result = run_bench(asked, out)
    show_rescore(result, as_json)
    write_page(report, result)


@bench.command("serve", epilog="Example: orbithash bench serve --rows 100000 --local")
def bench_serve(
    rows: RowsOption = 100_000,
    bits: BitsOption = 64,
    shards: ShardsOption = None,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Maximum number of concurrent requests.")] = 16,
    requests: Annotated[int, typer.Option("--requests", help="Number of requests to each service.")] = 4000,
    local: LocalOption = False,
    codes: CodesOption = "random",
    centres: CentresOption = 10_000,
    flip: FlipOption = 0.06,
    archive: ArchiveOption = None,
    peer: Annotated[
        str, typer.Option("--peer", help="Another server to measure in the same rounds: none or milvus.")
    ] = "none",
    peer_python: Annotated[
        Path | None,
        typer.Option(
            "--peer-python",
            help="Python of an environment with the packages of --peer: milvus 2.3.5, pymilvus<2.5, setuptools<80.",
        ),
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure rates and latencies of a gateway next to an empty gRPC service and, with --peer, to Milvus."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.serving.serve import Peer, ServeBench
    from orbithash.cluster.bench.serving.serve import bench_serve as run_bench

    source = _source(codes, centres, flip, None, archive)
    asked = ServeBench(
        rows, bits, source, _num_shards(shards, local), in_flight, requests, local, cast(Peer, peer), peer_python
    )
    result = run_bench(asked)
    show(result, as_json)
    write_page(report, result)


@bench.command("soak", epilog="Example: orbithash bench soak --minutes 15")
def bench_soak(
    rows: RowsOption = 100_000,
    bits: BitsOption = 64,
    shards: ShardsOption = None,
    in_flight: Annotated[int, typer.Option("--in-flight", help="Maximum number of concurrent searches.")] = 16,
    minutes: Annotated[float, typer.Option("--minutes", help="Duration, minutes.")] = 15.0,
    local: LocalOption = False,
    replicas: Annotated[int, typer.Option("--replicas", help="Number of replicas of each shard.")] = 1,
    kill_every: Annotated[
        float, typer.Option("--kill-every", help="Kill a replica (SIGKILL) each time this many seconds pass; 0: none.")
    ] = 0.0,
    codes: CodesOption = "random",
    centres: CentresOption = 10_000,
    flip: FlipOption = 0.06,
    archive: ArchiveOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Load a gateway with searches while rows change and replicas are killed; report errors and growth of memory."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.serving.soak import SoakBench
    from orbithash.cluster.bench.serving.soak import bench_soak as run_bench

    source = _source(codes, centres, flip, None, archive)
    asked = SoakBench(rows, bits, source, _num_shards(shards, local), replicas, in_flight, minutes, local, kill_every)
    result = run_bench(asked)
    show(result, as_json)
    write_page(report, result)


@bench.command("changes", epilog="Example: orbithash bench changes --rows 1000000")
def bench_changes(
    rows: RowsOption = 1_000_000,
    bits: BitsOption = 64,
    codes: CodesOption = "mixture",
    centres: CentresOption = 10_000,
    flip: FlipOption = 0.06,
    archive: ArchiveOption = None,
    outlines: Annotated[
        bool, typer.Option("--outlines", help="Give each row an outline. Default: rows are points.")
    ] = False,
    shards: ShardsOption = None,
    local: LocalOption = False,
    seconds: Annotated[
        float, typer.Option("--seconds", help="Duration of the undisturbed queries to compare with, s.")
    ] = 10.0,
    part: Annotated[
        list[str] | None,
        typer.Option(
            "--part",
            help="shard (start, memory, commits, filters of one shard) or gateway (queries while another program "
            "writes and while filters are new); may be repeated. Default: both.",
        ),
    ] = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure commits, starts, memory and new filters of a shard, and what they do to other queries of a gateway."""
    from orbithash.cluster.bench.serving.changes import ChangesBench, show_changes
    from orbithash.cluster.bench.serving.changes import bench_changes as run_bench

    source = _source(codes, centres, flip, None, archive)
    parts = tuple(part) if part else ("shard", "gateway")
    asked = ChangesBench(rows, bits, source, outlines, _num_shards(shards, local), local, seconds, parts)
    result = run_bench(asked)
    show_changes(result, as_json)
    write_page(report, result)


@bench.command("fanout", epilog="Example: orbithash bench fanout --shards 1000 --out runs/fanout")
def bench_fanout(
    shards: Annotated[int, typer.Option("--shards", help="Number of simulated shards.")] = 1000,
    bits: BitsOption = 64,
    k: Annotated[int, typer.Option("-k", help="Number of hits per query.")] = 10,
    queries: Annotated[int, typer.Option("--queries", help="Number of queries of each scenario, one by one.")] = 100,
    delay_ms: Annotated[float, typer.Option("--delay-ms", help="Median latency of a shard, ms.")] = 5.0,
    stragglers: Annotated[
        float, typer.Option("--stragglers", help="Fraction of the calls that are slow, 0 to 1.")
    ] = 0.001,
    slow: Annotated[float, typer.Option("--slow", help="Latency of a slow call as a multiple of a usual one.")] = 20.0,
    down: Annotated[
        float,
        typer.Option(
            "--down", help="Fraction of the replicas that hang or refuse calls, in the scenarios with failures."
        ),
    ] = 0.002,
    timeout_ms: Annotated[
        float, typer.Option("--timeout-ms", help="Timeout of a shard in the scenarios with a short one, ms.")
    ] = 50.0,
    seed: Annotated[int, typer.Option("--seed", help="Random seed.")] = 0,
    actors: Annotated[
        int, typer.Option("--actors", help="Also measure calls to this number of real Ray actors; 0: none.")
    ] = 0,
    out: OutOption = None,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Run the real fan-out and merge over simulated shards: latency and coverage with stragglers and failures."""
    from orbithash.cluster.bench.fanout import bench_fanout as run_bench
    from orbithash.cluster.bench.fanout import show_fanout
    from orbithash.cluster.bench.fanout_world import FanoutBench

    asked = FanoutBench(shards, bits, k, queries, delay_ms, stragglers, slow, down, timeout_ms, seed, actors)
    result = run_bench(asked, out)
    show_fanout(result, as_json)
    write_page(report, result)
