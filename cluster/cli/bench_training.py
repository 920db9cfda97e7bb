"""Verbs of the group bench about training, and about networks on a GPU."""

from typing import Annotated

import typer

from orbithash.cluster.cli.bench import bench, write_page
from orbithash.cluster.cli.options import JsonOption, ReportOption

__all__ = ["bench"]


@bench.command("manifest", epilog="Example: orbithash bench manifest --count 1000000 --files 20000")
def bench_manifest(
    count: Annotated[int, typer.Option("--count", help="Number of images of the generated manifest.")] = 1_000_000,
    files: Annotated[int, typer.Option("--files", help="Number of files to hash.")] = 20_000,
    file_bytes: Annotated[int, typer.Option("--file-bytes", help="Size of a file to hash, bytes.")] = 65_536,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure the start of a rank next to a bare read of its manifest, and hashing next to one thread."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.training.manifest import bench_manifest as run_bench

    result = run_bench(count, files, file_bytes)
    show(result, as_json)
    write_page(report, result)


@bench.command("features", epilog="Example: orbithash bench features --count 8000 --workers 2")
def bench_features(
    count: Annotated[int, typer.Option("--count", help="Number of generated scenes.")] = 8000,
    workers: Annotated[int, typer.Option("--workers", help="Number of workers, which share the cores.")] = 2,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure images per second of the workers of `features` next to as many bare loops that keep nothing."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.training.features import bench_features as run_bench

    result = run_bench(count, workers)
    show(result, as_json)
    write_page(report, result)


@bench.command(
    "gpu",
    epilog="Example: orbithash bench gpu --device cpu --count 16 --batch-size 4 --compared 4 --network resnet8",
)
def bench_gpu(
    device: Annotated[str, typer.Option("--device", help="cuda, cuda:N, or cpu to try the command.")] = "cuda",
    network: Annotated[
        list[str] | None,
        typer.Option("--network", help="Backbone with random weights; may be repeated. Default: three of them."),
    ] = None,
    count: Annotated[int, typer.Option("--count", help="Number of generated images.")] = 4096,
    batch_size: Annotated[int, typer.Option("--batch-size", help="Number of images in a step of training.")] = 128,
    precision: Annotated[
        str, typer.Option("--precision", help="Precision of training: float32, tf32 or bfloat16.")
    ] = "bfloat16",
    compared: Annotated[int, typer.Option("--compared", help="Number of images to encode on the CPU, too.")] = 256,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure training and encoding on a GPU next to loops of torch alone, to decoding, and to codes of a CPU."""
    from orbithash.cluster.bench.networks.gpu import NETWORKS, GpuBench, show_gpu
    from orbithash.cluster.bench.networks.gpu import bench_gpu as run_bench

    result = run_bench(GpuBench(device, tuple(network or NETWORKS), count, batch_size, precision, compared))
    show_gpu(result, as_json)
    write_page(report, result)


@bench.command("loading", epilog="Example: orbithash bench loading --count 4096")
def bench_loading(
    count: Annotated[int, typer.Option("--count", help="Number of generated scenes.")] = 4096,
    rounds: Annotated[int, typer.Option("--rounds", help="Number of epochs of each contestant.")] = 5,
    report: ReportOption = None,
    as_json: JsonOption = False,
) -> None:
    """Measure views per second from a folder and from the same images packed, next to a bare loop over the files."""
    from orbithash.cluster.bench.report import show
    from orbithash.cluster.bench.training.loading import bench_loading as run_bench

    result = run_bench(count, rounds)
    show(result, as_json)
    write_page(report, result)
